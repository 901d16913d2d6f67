"""Vocoding and reconstruction of audio files and log-mels, for the inference scripts.

B batch, S samples, M mel bins, F mel frames.
"""

import functools
import logging
import time
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from dataset_loading.audio.cached import AudioDataset
from dataset_loading.audio.recording import read_recording
from dataset_loading.audio.signal import save_waveform
from dataset_loading.files import MANIFEST
from model.audio.spectral import LogMel, MelSettings, analyse, check_same_mel
from model.audio.vae import AudioVAE
from model.audio.vocoders import Vocoder
from utils.checkpoints import chosen_weights, load_model, read_stage, resolve_checkpoint
from utils.devices import compute_device
from utils.flags.choices import WeightsKind
from utils.generation.arguments.audio import SynthesisArguments
from utils.options import suggest

logger = logging.getLogger(__name__)

MEL_SUFFIX = ".pt"
MAX_LOG_MEL = 12.0  # The log-mel of a tone at full scale is below; a frame of 16384 samples sums up to e^9.


def load_stage_model(model_class: type, stage: str, path: str | Path, *, weights: WeightsKind = "ema") -> Any:
    """The model of a run or checkpoint folder of one stage, in fp32 and eval mode, on the CPU.

    Raises:
        FileNotFoundError: no complete checkpoint.
        ValueError: a checkpoint of another stage.
    """
    read_stage(path, stage)
    return load_model(model_class, path, weights).requires_grad_(False)


def load_vocoder(path: str | Path, weights: WeightsKind = "ema") -> Vocoder:
    """The vocoder of a run or checkpoint folder; raises as `load_stage_model`."""
    return load_stage_model(Vocoder, "vocoder", path, weights=weights)


def read_waveform(file: Path, sample_rate: int) -> Tensor:
    """An audio file in one channel at `sample_rate`, (S,) fp32, see `read_recording`.

    Raises: OSError, ValueError: the file cannot be read as audio.
    """
    return read_recording({"path": str(file), "bytes": None}, sample_rate).waveform


def read_mel(file: Path, settings: MelSettings) -> Tensor:
    """A log-mel (M, F) fp32 from a file that holds a tensor, or a dictionary with the key "mel" as in caches.

    Raises: OSError, ValueError: no such file, another shape, too few frames, or values that are not finite.
    """
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # What torch.load raises on other files depends on their bytes.
        raise ValueError("not a file of tensors, or damaged") from error
    # Shape, length and values are checked before anything is computed.
    mel = content.get("mel") if isinstance(content, dict) else content
    if not isinstance(mel, Tensor) or mel.ndim != 2 or len(mel) != settings.n_mels or not mel.shape[1]:
        actual = f"a tensor of shape {tuple(mel.shape)}" if isinstance(mel, Tensor) else f"a {type(content).__name__}"
        raise ValueError(f"{actual} where a log-mel of shape ({settings.n_mels}, frames) is needed")
    # The waveform must be long enough for its log-mel to be computed again.
    if mel.shape[1] * settings.hop_length < settings.min_samples:
        needed = -(-settings.min_samples // settings.hop_length)
        raise ValueError(f"a log-mel of {mel.shape[1]} frames is too short, at least {needed} are needed")
    if not mel.isfinite().all():
        raise ValueError("a log-mel with values that are not finite")
    if mel.max() > MAX_LOG_MEL:
        raise ValueError(f"values up to {mel.max():.3g} are no natural-log mel of samples in [-1, 1]")
    return mel.float()


@functools.cache
def cache_problem(folder: Path, settings: MelSettings, name: str) -> str:
    """What is wrong with log-mels in a folder, where a preprocessed folder says what their definition is; `""` for
    nothing. The folder is opened once, also where something is wrong.

    Args:
        folder: of the log-mels; a cache has its manifest one folder above.
        name: of the model that reads them, for the message.
    Returns: both definitions, and the command that makes the right log-mels.
    """
    try:
        if (folder.parent / MANIFEST).is_file():
            AudioDataset(folder.parent, folder.name).expect_mel(settings, name)
    except (OSError, ValueError) as error:
        return str(error)
    return ""


class Synthesizer:
    """Reads audio files or log-mels, and writes vocoded audio files.

    Args:
        vocoder: in eval mode, on any device.
        chunk_frames: mel frames per forward pass; 0: all.
        bf16: bfloat16 autocast.
    Attributes:
        log_mel: the log-mel that the vocoder was trained on, on the CPU.
        record: checkpoint, weights and device, for the settings of a run.
    """

    def __init__(self, vocoder: Vocoder, chunk_frames: int = 0, bf16: bool = False):
        self.vocoder, self.chunk_frames, self.bf16 = vocoder, chunk_frames, bf16
        self.log_mel, self.rate = LogMel(vocoder.config.mel), vocoder.config.sample_rate
        self.record: dict[str, Any] = {"mel": vocoder.config.mel.as_dict(), "device": str(vocoder.device)}
        self.name = "the vocoder"  # in messages

    @classmethod
    def load(cls, path: str, args: SynthesisArguments) -> Self:
        """The vocoder of a run or checkpoint folder, on the GPU if there is one; raises as `load_vocoder`."""
        checkpoint = resolve_checkpoint(path)
        weights = chosen_weights(checkpoint, args)
        vocoder = load_vocoder(checkpoint, weights).to(compute_device())
        loaded = cls(vocoder, args.chunk_frames, args.bf16)
        loaded.record |= {"vocoder_checkpoint": str(checkpoint), "vocoder_weights": weights}
        loaded.name = f"the vocoder {checkpoint}"
        return loaded

    def read(self, file: Path) -> tuple[Tensor, int]:
        """The log-mel (M, F) of a file, and its number of samples as audio.

        Raises: OSError, ValueError: the file cannot be read.
        """
        if file.suffix == MEL_SUFFIX:
            if problem := cache_problem(file.parent, self.log_mel.settings, self.name):
                raise ValueError(problem)
            mel = read_mel(file, self.log_mel.settings)
            return mel, mel.shape[1] * self.log_mel.settings.hop_length
        waveform = read_waveform(file, self.rate)
        return analyse(waveform, self.log_mel), len(waveform)

    @torch.inference_mode()
    def waveform(self, mel: Tensor) -> Tensor:
        """The waveform (F * hop_length,) fp32 on the CPU of a log-mel (M, F).

        Raises: ValueError: it is not finite.
        """
        mel = mel[None].to(self.vocoder.device)  # (1, M, F)
        with torch.autocast(mel.device.type, torch.bfloat16, enabled=self.bf16):
            waveform = self.vocoder.synthesize(mel, self.chunk_frames)
        if not waveform.isfinite().all():
            raise ValueError("the waveform is not finite: the vocoder's weights are broken")
        return waveform[0].float().cpu()

    def write(self, mel: Tensor, n_samples: int, file: Path) -> dict[str, Any]:
        """Vocode a log-mel (M, F), and write a WAV file of `n_samples`.

        Returns: name of the file, seconds of audio and of computation, L1 between the log-mel of the waveform and the
            given one, gain at which it was saved.
        """
        # Vocode, with its time; analyse the waveform again, for the distance from the given log-mel.
        start = time.perf_counter()
        waveform = self.waveform(mel)
        elapsed = time.perf_counter() - start
        distance = (analyse(waveform, self.log_mel)[:, : mel.shape[1]] - mel.cpu()).abs().mean().item()
        gain = save_waveform(waveform[:n_samples], self.rate, file)
        record = {"file": file.name, "seconds": n_samples / self.rate, "compute_seconds": elapsed}
        return {**record, "mel_l1": distance, "gain": gain}


class AudioReconstructor:
    """Reconstructs log-mels with an audio VAE.

    Args:
        vae: in eval mode, on any device.
        speaker: index of the speaker in `vae.config.speakers`; None for a VAE without speakers.
        bf16: bfloat16 autocast.
    Attributes:
        record: checkpoint and weights, for the settings of a run.
    """

    def __init__(self, vae: AudioVAE, speaker: int | None = None, bf16: bool = False):
        self.vae, self.speaker, self.bf16 = vae, speaker, bf16
        self.record: dict[str, Any] = {}

    @classmethod
    def load(cls, path: str, args: SynthesisArguments, synthesizer: Synthesizer, *, speaker: str = "") -> Self:
        """The audio VAE of a run or checkpoint folder, on the vocoder's device.

        Args: speaker: name of the speaker, for a VAE that is conditioned on speakers.
        Raises:
            FileNotFoundError: no complete checkpoint.
            ValueError: a checkpoint of another stage, another log-mel than the vocoder's, an unknown speaker, no
                speaker where one is needed, or a speaker for a VAE without speakers.
        """
        checkpoint = resolve_checkpoint(path)
        weights = chosen_weights(checkpoint, args)
        # Both models must have the same definition of the log-mel.
        vae = load_stage_model(AudioVAE, "audio_vae", checkpoint, weights=weights)
        remedy = "Train one of them anew on the cache of the other; a cache for vocoders serves audio VAEs as well."
        name = f"the audio VAE {checkpoint}"
        mel, vocoder_mel = vae.config.mel, synthesizer.vocoder.config.mel
        check_same_mel(mel, vocoder_mel, first_name=name, second_name=synthesizer.name, remedy=remedy)
        # A VAE with speakers needs one of them, a VAE without takes none.
        speakers = vae.config.speakers
        if speaker and not speakers:
            raise ValueError(f"--speaker {speaker} has no effect: {name} was trained without speakers")
        if speakers and speaker not in speakers:
            given = f"knows no speaker {speaker!r}{suggest(speaker, speakers)}" if speaker else "needs --speaker"
            raise ValueError(f"{name} {given} (speakers: {', '.join(speakers)})")
        index = speakers.index(speaker) if speaker else None
        loaded = cls(vae.to(synthesizer.vocoder.device), index, args.bf16)
        loaded.record = {"vae_checkpoint": str(checkpoint), "vae_weights": weights}
        return loaded

    @torch.inference_mode()
    def reconstruction(self, mel: Tensor) -> Tensor:
        """Reconstruction of a log-mel from the posterior mean, clamped at the floor: (M, F) -> (M, F) fp32 on the CPU.

        Raises: ValueError: it is not finite.
        """
        device = self.vae.device
        speaker = None if self.speaker is None else torch.tensor([self.speaker], device=device)  # (1,)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            reconstruction = self.vae(mel[None].to(device), speaker=speaker).reconstruction[0].float().cpu()
        if not reconstruction.isfinite().all():
            raise ValueError("the reconstructed log-mel is not finite: the audio VAE's weights are broken")
        return reconstruction.clamp_min(self.vae.config.mel.log_floor)
