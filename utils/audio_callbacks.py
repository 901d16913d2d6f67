"""What training stages of sound show in TensorBoard: players, log-mels, waveforms, phases, latents, quality over time.

S samples, M mel bins, F frames, Z latent channels. `Stage` sets the attribute `trainer` of each callback.
"""

import importlib.util
import logging
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback

from model.audio.griffin_lim import griffin_lim
from model.audio.spectral import LogMel, MelSettings, check_same_mel
from utils.audio_metrics import PACKAGES, pesq_wb, stoi
from utils.audio_pictures import TRIPLE, latent_picture, mel_triple, phase_picture, strip_sheet, waveform_picture
from utils.audio_synthesis import load_vocoder
from utils.evaluators import Stopwatch
from utils.metrics import LatentHealth
from utils.pictures import Group, spread
from utils.sounds import add_sound

logger = logging.getLogger(__name__)

MAX_FRAMES = 1024  # Longer clips are cut.
N_SCORED = 4  # Clips that PESQ and STOI are measured on.
SCORES: dict[str, Callable[[Tensor, Tensor, int], float | None]] = {"pesq": pesq_wb, "stoi": stoi}


class Listening(TrainerCallback):
    """Before the first step and after each evaluation: what the model makes of the same validation clips.

    Every process runs the model, as sharded weights need; only the one with a writer writes. Clips are taken one at a
    time, so that nothing is padded. Subclasses say what is made: `run` and `write`.

    Args:
        writer: None except on rank 0.
        n_clips: spread evenly over the validation set.
    """

    trainer: Any

    def __init__(self, writer: SummaryWriter | None, n_clips: int):
        self.writer, self.n_clips = writer, n_clips
        self.samples: list[dict[str, Tensor]] = []
        self.names: list[str] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.show(args.device, state.global_step)

    def on_evaluate(self, args, state, control, **kwargs):
        self.show(args.device, state.global_step)

    @property
    def settings(self) -> MelSettings:
        """The model's log-mel."""
        return self.trainer.model.config.mel

    @torch.no_grad()
    def show(self, device: torch.device, step: int) -> None:
        """Run the model on every process, write on one."""
        is_first = not self.samples
        if is_first:
            self.collect()
        model = self.trainer.evaluation_model()
        made = [self.run(model, sample, device) for sample in self.samples]
        if self.writer is None:
            return
        self.write(made, device, step, is_first)
        self.writer.flush()

    def collect(self) -> None:
        """The clips, at most `MAX_FRAMES` frames of each."""
        dataset, hop_length = self.trainer.eval_dataset, self.settings.hop_length
        for index in spread(len(dataset), self.n_clips):
            sample = dict(dataset[index])
            sample["mel"] = sample["mel"][:, :MAX_FRAMES]
            if "waveform" in sample:
                sample["waveform"] = sample["waveform"][: MAX_FRAMES * hop_length]
            self.samples.append(sample)
            self.names.append(dataset.entries[index]["caption"] or dataset.entries[index]["key"])
        if self.writer is not None:
            self.log_mel = LogMel(self.settings)

    def run(self, model, sample: dict[str, Tensor], device: torch.device) -> Any:
        """What the model makes of one clip, on every process."""
        raise NotImplementedError

    def write(self, made: list[Any], device: torch.device, step: int, is_first: bool) -> None:
        """Everything for TensorBoard, on rank 0."""
        raise NotImplementedError

    def add_picture(self, name: str, picture: Image.Image, step: int) -> None:
        """A picture under `pictures/`."""
        self.writer.add_image(f"pictures/{name}", np.asarray(picture), step, dataformats="HWC")

    def add_mels(self, predicted: list[Tensor], step: int) -> None:
        """Target, prediction, difference of every clip's log-mel (M, F), and their mean absolute difference."""
        longest = max(sample["mel"].shape[1] for sample in self.samples)
        groups, distances = [], []
        for sample, mel, name in zip(self.samples, predicted, self.names):
            distances.append((mel - sample["mel"]).abs().mean().item())
            pictures = mel_triple(sample["mel"], mel, self.settings.log_floor, longest)
            groups.append(Group(pictures, f"{distances[-1]:.3f}  {name}"))
        self.add_picture("mel", strip_sheet(groups, TRIPLE), step)
        self.writer.add_scalar("listening/mel_l1", statistics.fmean(distances), step)

    def add_sounds(self, kind: str, waveforms: list[Tensor], step: int) -> None:
        """A player per clip, `sounds/<clip>_<kind>`."""
        for number, waveform in enumerate(waveforms):
            add_sound(self.writer, f"sounds/{number:02d}_{kind}", waveform, self.settings.sample_rate, step)

    def add_scores(self, real: list[Tensor], made: list[Tensor], step: int) -> None:
        """PESQ and STOI of the first clips, where their packages are installed and the waveforms are finite."""
        pairs = [pair for pair in zip(real[:N_SCORED], made[:N_SCORED]) if pair[1].isfinite().all()]
        for name, score in SCORES.items():
            if not all(importlib.util.find_spec(package) for package in PACKAGES[name]):
                continue
            values = [score(*pair, self.settings.sample_rate) for pair in pairs]
            values = [value for value in values if value is not None]
            if values:
                self.writer.add_scalar(f"listening/{name}", statistics.fmean(values), step)


class VocoderListening(Listening):
    """What a vocoder makes of validation clips.

    sounds/<clip>_real, _generated   players; the real ones once
    pictures/mel                     log-mel of the recording | of the generated waveform | difference
    pictures/waveform                both waveforms of the first clip
    pictures/phase                   errors of its phases and of their change
    listening/pesq, stoi, mel_l1, phase_error, frequency_error, real_time_factor (the first clip left out)
    """

    def run(self, model, sample, device):
        watch = Stopwatch(device)
        start = watch.now()
        waveform = model(mel=sample["mel"][None].to(device))[0].float()
        return waveform.cpu(), watch.now() - start

    def write(self, made, device, step, is_first):
        generated, times = [waveform for waveform, _ in made], [time for _, time in made]
        real = [sample["waveform"] for sample in self.samples]
        if is_first:
            self.add_sounds("real", real, step)
        self.add_sounds("generated", generated, step)
        self.add_mels([self.log_mel(waveform[None])[0] for waveform in generated], step)
        rate, n_fft, hop_length = self.settings.sample_rate, self.settings.n_fft, self.settings.hop_length
        self.add_picture("waveform", waveform_picture({"real": real[0], "generated": generated[0]}, rate), step)
        phases = [phase_picture(*pair, n_fft, hop_length) for pair in zip(real, generated)]
        self.add_picture("phase", phases[0][0], step)
        for name in ("phase", "frequency"):
            mean = statistics.fmean(errors[name] for _, errors in phases)
            self.writer.add_scalar(f"listening/{name}_error", mean, step)
        self.add_scores(real, generated, step)
        counted = slice(min(1, len(times) - 1), None)
        factor = sum(times[counted]) / sum(len(waveform) / rate for waveform in generated[counted])
        self.writer.add_scalar("listening/real_time_factor", factor, step)


class AudioVAEListening(Listening):
    """What an audio VAE makes of validation clips; PESQ and STOI hold the resynthesis of its log-mels against that of
    the true ones.

    sounds/<clip>_real, _generated   the vocoder, or Griffin-Lim, on the true and on the VAE's log-mel
    pictures/mel                     true log-mel | the VAE's | difference
    pictures/latents                 posterior means over time
    latents/mean_<channel>, latents/posterior_std (histograms), latents/dead_channels
    listening/pesq, stoi, mel_l1

    Args:
        vocoder_checkpoint: run or checkpoint folder of a vocoder of the same log-mel; "" for Griffin-Lim.
    Raises: ValueError, FileNotFoundError: no checkpoint of a vocoder; when training begins: one of another log-mel.
    """

    def __init__(self, writer: SummaryWriter | None, n_clips: int, vocoder_checkpoint: str = ""):
        super().__init__(writer, n_clips)
        self.vocoder_checkpoint = vocoder_checkpoint
        self.vocoder = load_vocoder(vocoder_checkpoint) if vocoder_checkpoint else None
        self.real: list[Tensor] = []

    def on_train_begin(self, args, state, control, **kwargs):
        if self.vocoder is not None:
            name = f"the vocoder {self.vocoder_checkpoint}"
            remedy = "use a vocoder that was trained on the same log-mels"
            check_same_mel(self.settings, "the model", self.vocoder.config.mel, name, remedy)
        super().on_train_begin(args, state, control, **kwargs)

    def run(self, model, sample, device):
        speaker = sample["speaker"][None].to(device) if "speaker" in sample else None
        mel = sample["mel"][None].to(device)
        output = model(mel=mel, n_frames=torch.tensor([mel.shape[-1]], device=device), speaker=speaker)
        reconstruction = output.reconstruction[0].float().clamp_min(self.settings.log_floor)
        return tuple(each.float().cpu() for each in (reconstruction, output.mean, output.logvar))

    def vocode(self, mel: Tensor, device: torch.device) -> Tensor:
        """(M, F) -> (S,) on the CPU; the log-mel of silence where it is too short, or where it is not finite."""
        log_floor, min_samples = self.settings.log_floor, self.settings.min_samples
        missing = max(0, -(-min_samples // self.settings.hop_length) - mel.shape[1])
        mel = torch.nn.functional.pad(mel.nan_to_num(log_floor, log_floor, log_floor), (0, missing), value=log_floor)
        mel = mel[None].to(device)
        if self.vocoder is None:
            return griffin_lim(mel, self.settings)[0].cpu()
        return self.vocoder.to(device)(mel)[0].float().cpu()

    def write(self, made, device, step, is_first):
        mels, health = [mel for mel, _, _ in made], LatentHealth()
        if is_first:
            self.real = [self.vocode(sample["mel"], device) for sample in self.samples]
            self.add_sounds("real", self.real, step)
        generated = [self.vocode(mel, device) for mel in mels]
        self.add_sounds("generated", generated, step)
        self.add_mels(mels, step)
        self.add_scores(self.real, generated, step)
        longest = max(mean.shape[-1] for _, mean, _ in made)
        groups = [Group([latent_picture(mean[0], longest)], name) for (_, mean, _), name in zip(made, self.names)]
        self.add_picture("latents", strip_sheet(groups), step)
        for _, mean, logvar in made:
            health.update(mean, logvar)
        for channel in range(made[0][1].shape[1]):
            values = torch.cat([mean[0, channel].flatten() for _, mean, _ in made])
            self.writer.add_histogram(f"latents/mean_{channel:02d}", values, step)
        deviations = torch.cat([(0.5 * logvar).exp().flatten() for _, _, logvar in made])
        self.writer.add_histogram("latents/posterior_std", deviations, step)
        self.writer.add_scalar("latents/dead_channels", sum(health.compute()["dead"]), step)
