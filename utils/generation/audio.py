"""From sounds and log-mels in files to waveforms in files, for the inference scripts.

B batch, S samples, M mel bins, F mel frames.
"""

import dataclasses
import itertools
import logging
import time
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from dataset_loading.audio.cached import AudioDataset
from dataset_loading.audio.signal import decode_audio, resample, save_waveform
from dataset_loading.files import MANIFEST
from dataset_loading.sources import walk
from model.audio.spectral import LogMel, MelSettings, check_same_mel
from model.audio.vae import AudioVAE
from model.audio.vocoders import Vocoder
from utils.checkpoints import chosen_weights, load_model, read_stage, resolve_checkpoint
from utils.devices import compute_device
from utils.options import option, suggest

logger = logging.getLogger(__name__)

MEL_SUFFIX = ".pt"
MAX_CLIPPED_SHARE = 1e-3  # of the samples of a file, without a warning


@dataclasses.dataclass
class SynthesisArguments:
    """Flags of scripts whose last model is a vocoder."""

    input: list[str] = option([], "files, and folders of files")
    weights: Literal["ema", "raw"] = option("ema", "averaged weights, if they were saved, or the trained weights")
    chunk_frames: int = option(2000, "mel frames per pass of the vocoder; 0: all", ge=0)
    bf16: bool = option(False, "bfloat16 autocast over fp32 weights; Fourier transforms stay in fp32")
    output_dir: str = option("", "folder of the results")


def find_inputs(names: Iterable[str], suffixes: Collection[str]) -> dict[str, Path]:
    """Files named one by one or in folders, by a name that no two share.

    Raises: FileNotFoundError: a name does not exist, or nothing was found.
    """
    found: dict[str, Path] = {}
    for name in map(Path, names):
        if not name.exists():
            raise FileNotFoundError(f"{name} does not exist")
        files = walk(name, suffixes) if name.is_dir() else [name]
        for file in files:
            inside = file.relative_to(name) if name.is_dir() else Path(name.name)
            stem = "__".join(inside.with_suffix("").parts)
            numbered = (f"{stem}_{number}" for number in itertools.count(2))
            found[next(key for key in itertools.chain([stem], numbered) if key not in found)] = file
    if not found:
        raise FileNotFoundError(f"no inputs in {', '.join(names)}; known endings: {' '.join(sorted(suffixes))}")
    return found


def refuse_overwriting(inputs: Iterable[Path], outputs: Iterable[Path]) -> None:
    """Raises: ValueError: an input would be written over; names it."""
    taken = {file.resolve() for file in inputs}
    for file in outputs:
        if file.resolve() in taken:
            raise ValueError(f"{file} is an input and would be written over; name another folder by --output_dir")


def load_stage_model(model_class: type, stage: str, path: str | Path, weights: Literal["ema", "raw"] = "ema") -> Any:
    """The model of a run or checkpoint folder of one stage, in fp32 and eval mode, on the CPU.

    Raises:
        FileNotFoundError: no complete checkpoint.
        ValueError: a checkpoint of another stage.
    """
    found = read_stage(path)["stage"]
    if found != stage:
        raise ValueError(f"{resolve_checkpoint(path)} is of stage {found!r}; one of stage {stage!r} is needed")
    return load_model(model_class, path, weights).requires_grad_(False)


def load_vocoder(path: str | Path, weights: Literal["ema", "raw"] = "ema") -> Vocoder:
    """The vocoder of a run or checkpoint folder; raises as `load_stage_model`."""
    return load_stage_model(Vocoder, "vocoder", path, weights)


def read_waveform(file: Path, sample_rate: int) -> Tensor:
    """A sound as the mean of its channels at `sample_rate`, (S,) fp32.

    Raises: OSError, ValueError: the file cannot be read as sound.
    """
    samples, rate = decode_audio({"path": str(file), "bytes": None})
    return resample(samples.mean(0), rate, sample_rate)


def read_mel(file: Path, settings: MelSettings) -> Tensor:
    """A log-mel (M, F) fp32 from a file of a tensor, or of a dictionary with one under "mel", as caches hold them.

    Raises: OSError, ValueError: no such file, another shape, too few frames, or values that are not finite.
    """
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # What torch.load raises on other files depends on their bytes.
        raise ValueError("no file of tensors, or damaged") from error
    mel = content.get("mel") if isinstance(content, dict) else content
    if not isinstance(mel, Tensor) or mel.ndim != 2 or len(mel) != settings.n_mels or not mel.shape[1]:
        found = f"a tensor of shape {tuple(mel.shape)}" if isinstance(mel, Tensor) else f"a {type(content).__name__}"
        raise ValueError(f"{found} where a log-mel of shape ({settings.n_mels}, frames) is needed")
    if mel.shape[1] * settings.hop_length < settings.min_samples:
        needed = -(-settings.min_samples // settings.hop_length)
        raise ValueError(f"a log-mel of {mel.shape[1]} frames is too short, at least {needed} are needed")
    if not mel.isfinite().all():
        raise ValueError("a log-mel with values that are not finite")
    return mel.float()


def check_caches(files: Iterable[Path], settings: MelSettings, name: str) -> None:
    """Refuse log-mels from preprocessed folders that were made with another definition.

    Raises: ValueError: both definitions, and the command that makes what is needed.
    """
    for folder in sorted({file.parent for file in files if file.suffix == MEL_SUFFIX}):
        if (folder.parent / MANIFEST).is_file():
            AudioDataset(folder.parent, folder.name).expect_mel(settings, name)


def analyse(waveform: Tensor, log_mel: LogMel, chunk_frames: int = 4096) -> Tensor:
    """The log-mel of a whole sound of any length, with silence behind up to whole frames, in bounded memory.

    Args:
        waveform: (S,) at the log-mel's rate.
        chunk_frames: frames that are analysed at once, and their neighbours'.
    Returns: (M, F) with F * hop_length >= S.
    """
    hop_length = log_mel.settings.hop_length
    n_frames = -(-max(len(waveform), log_mel.settings.min_samples) // hop_length)
    waveform = F.pad(waveform, (0, n_frames * hop_length - len(waveform)))
    context = -(-log_mel.settings.n_fft // hop_length)  # The ends of a piece are reflected, as those of the whole are.
    pieces = []
    for start in range(0, n_frames, chunk_frames):
        first, last = max(0, start - context), min(n_frames, start + chunk_frames + context)
        found = log_mel(waveform[None, first * hop_length : last * hop_length])[0]
        pieces.append(found[:, start - first : start - first + chunk_frames])
    return torch.cat(pieces, dim=1)


class Synthesizer:
    """A vocoder, ready to turn files into files.

    Args:
        vocoder: in eval mode, on any device.
        chunk_frames: mel frames taken at once; 0: all.
        bf16: bfloat16 autocast.
    Attributes:
        log_mel: the vocoder's own analysis, on the CPU.
        record: where it was loaded from, for the settings of a run.
    """

    def __init__(self, vocoder: Vocoder, chunk_frames: int = 0, bf16: bool = False):
        self.vocoder, self.chunk_frames, self.bf16 = vocoder, chunk_frames, bf16
        self.log_mel, self.rate = LogMel(vocoder.config.mel), vocoder.config.sample_rate
        self.record: dict[str, Any] = {"mel": vocoder.config.mel.as_dict(), "device": str(vocoder.device)}
        self.name = "the vocoder"  # In messages.

    @classmethod
    def load(cls, path: str, args: SynthesisArguments) -> Self:
        """The vocoder that the flags mean, on the GPU where there is one; raises as `load_vocoder`."""
        checkpoint = resolve_checkpoint(path)
        weights = chosen_weights(checkpoint, args)
        vocoder = load_vocoder(checkpoint, weights).to(compute_device())
        loaded = cls(vocoder, args.chunk_frames, args.bf16)
        loaded.record |= {"vocoder_checkpoint": str(checkpoint), "vocoder_weights": weights}
        loaded.name = f"the vocoder {checkpoint}"
        return loaded

    def read(self, file: Path) -> tuple[Tensor, int]:
        """The log-mel (M, F) of a file, and the samples that the sound of it has.

        Raises: OSError, ValueError: the file cannot be read.
        """
        if file.suffix == MEL_SUFFIX:
            mel = read_mel(file, self.log_mel.settings)
            return mel, mel.shape[1] * self.log_mel.settings.hop_length
        waveform = read_waveform(file, self.rate)
        return analyse(waveform, self.log_mel), len(waveform)

    def read_all(self, files: dict[str, Path]) -> Iterator[tuple[str, tuple[Tensor, int]]]:
        """Name and `read` of every file; damaged ones are named in a warning and left out.

        Raises: ValueError: a preprocessed folder has another log-mel than the vocoder, or no file can be read.
        """
        check_caches(files.values(), self.log_mel.settings, self.name)
        n_read = 0
        for name, file in files.items():
            try:
                found = self.read(file)
            except (OSError, ValueError) as error:
                logger.warning("%s is left out: %s", file, error)
                continue
            n_read += 1
            yield name, found
        if not n_read:
            raise ValueError(f"none of {len(files)} files could be read as a sound or a log-mel")

    @torch.inference_mode()
    def waveform(self, mel: Tensor) -> Tensor:
        """The waveform (F * hop_length,) fp32 on the CPU of a log-mel (M, F).

        Raises: ValueError: it is not finite.
        """
        mel = mel[None].to(self.vocoder.device)
        pieces = 0 < self.chunk_frames < mel.shape[-1]
        with torch.autocast(mel.device.type, torch.bfloat16, enabled=self.bf16):
            waveform = self.vocoder.vocode_chunked(mel, self.chunk_frames) if pieces else self.vocoder(mel)
        if not waveform.isfinite().all():
            raise ValueError("the waveform is not finite: the vocoder's weights are broken")
        return waveform[0].float().cpu()

    def write(self, mel: Tensor, n_samples: int, file: Path) -> dict[str, Any]:
        """Synthesise a log-mel (M, F) into a WAV file of `n_samples`.

        Returns: numbers about it: seconds of sound and of computing, mean distance of its log-mel from the given one,
        share of samples cut off.
        """
        start = time.perf_counter()
        waveform = self.waveform(mel)
        elapsed = time.perf_counter() - start
        distance = (analyse(waveform, self.log_mel)[:, : mel.shape[1]] - mel.cpu()).abs().mean().item()
        clipped = save_waveform(waveform[:n_samples], self.rate, file)
        if clipped > MAX_CLIPPED_SHARE:
            logger.warning("%s: %.2g of the samples exceeded full scale and were cut off", file, clipped)
        found = {"file": file.name, "seconds": n_samples / self.rate, "compute_seconds": elapsed}
        return {**found, "mel_l1": distance, "clipped_share": clipped}


class AudioReconstructor:
    """An audio VAE, ready to reconstruct log-mels.

    Args:
        vae: in eval mode, on any device.
        speaker: the place of the speaker in `vae.config.speakers`; None where there are none.
        bf16: bfloat16 autocast.
    Attributes:
        record: where it was loaded from, for the settings of a run.
    """

    def __init__(self, vae: AudioVAE, speaker: int | None = None, bf16: bool = False):
        self.vae, self.speaker, self.bf16 = vae, speaker, bf16
        self.record: dict[str, Any] = {}

    @classmethod
    def load(cls, path: str, args: SynthesisArguments, synthesizer: Synthesizer, speaker: str = "") -> Self:
        """The audio VAE that the flags mean, on the vocoder's device.

        Args: speaker: name of the speaker, for a VAE that knows speakers.
        Raises:
            FileNotFoundError: no complete checkpoint.
            ValueError: a checkpoint of another stage, another log-mel than the vocoder's, an unknown speaker, none
                where one is needed, or one where the VAE knows none.
        """
        checkpoint = resolve_checkpoint(path)
        weights = chosen_weights(checkpoint, args)
        vae = load_stage_model(AudioVAE, "audio_vae", checkpoint, weights)
        remedy = "Train one of them anew on the cache of the other; a cache for vocoders serves audio VAEs as well."
        name = f"the audio VAE {checkpoint}"
        mel, vocoder_mel = vae.config.mel, synthesizer.vocoder.config.mel
        check_same_mel(mel, vocoder_mel, first_name=name, second_name=synthesizer.name, remedy=remedy)
        speakers = vae.config.speakers
        if speaker and not speakers:
            raise ValueError(f"--speaker {speaker} has no effect: {name} was trained without speakers")
        if speakers and speaker not in speakers:
            given = f"knows no speaker {speaker!r}{suggest(speaker, speakers)}" if speaker else "needs --speaker"
            raise ValueError(f"{name} {given} (speakers: {', '.join(speakers)})")
        place = speakers.index(speaker) if speaker else None
        loaded = cls(vae.to(synthesizer.vocoder.device), place, args.bf16)
        loaded.record = {"vae_checkpoint": str(checkpoint), "vae_weights": weights}
        return loaded

    @torch.inference_mode()
    def reconstruction(self, mel: Tensor) -> Tensor:
        """The log-mel of the posterior's mean, nowhere under the floor: (M, F) -> (M, F) fp32 on the CPU.

        Raises: ValueError: it is not finite.
        """
        device = self.vae.device
        speaker = None if self.speaker is None else torch.tensor([self.speaker], device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            made = self.vae(mel[None].to(device), speaker=speaker).reconstruction[0].float().cpu()
        if not made.isfinite().all():
            raise ValueError("the reconstructed log-mel is not finite: the audio VAE's weights are broken")
        return made.clamp_min(self.vae.config.mel.log_floor)
