"""Evaluation of an audio VAE: held-out log-mels through the latents, and the waveforms that a vocoder makes of them.

M mel bins, F frames, S samples, Z latent channels.
"""

import dataclasses
import logging
import math
from pathlib import Path
from typing import Any, ClassVar

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor

from dataset_loading.audio.cached import AudioVAEDataset, VocoderDataset
from dataset_loading.files import read_manifest
from model.audio.spectral import check_same_mel
from model.audio.vae import AudioVAE
from utils.checkpoints import EMA, resolve_checkpoint
from utils.evaluation.audio import DEFINITIONS, GRIFFIN_LIM_ITERATIONS, AudioEvaluationArguments, AudioEvaluator, Clip
from utils.evaluation.tables import latent_table
from utils.generation.audio import load_vocoder
from utils.metrics.audio import mel_l1
from utils.metrics.latents import LatentHealth
from utils.options import option

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class AudioVAEEvaluationArguments(AudioEvaluationArguments):
    """Flags of the evaluation of audio VAEs."""

    vocoder_checkpoint: str = option(
        "", "run or checkpoint folder of a vocoder of the same log-mel; default: Griffin-Lim"
    )


class AudioVAEEvaluator(AudioEvaluator):
    """Posterior means are decoded: nothing is random."""

    arguments_class = AudioVAEEvaluationArguments
    model_class = AudioVAE
    title = "Audio VAE"
    row_names: dict[str, str] = {
        "ground_truth": "ground truth",
        "griffin_lim": f"Griffin-Lim, {GRIFFIN_LIM_ITERATIONS}",
        "resynthesis": "vocoder alone",
        "model": "this VAE + vocoder",
    }
    definitions: ClassVar[dict[str, str]] = {
        **DEFINITIONS,
        "resynthesis": "the vocoder on the true log-mel: what the VAE's own part is to be seen against. Without "
        "recorded waveforms in the data it is the reference. The vocoder is --vocoder_checkpoint, or Griffin-Lim with "
        f"{GRIFFIN_LIM_ITERATIONS} iterations",
        "griffin_lim": f"with --vocoder_checkpoint, {GRIFFIN_LIM_ITERATIONS} iterations on the true log-mel",
        "reconstruction_l1": "mean |difference| of the VAE's log-mel and the true one, without a vocoder",
        "latents": "per channel over clips and positions: mean and std of the posterior means, posterior_std the root "
        "mean posterior variance, normalized_std the std of samples over the stored one, kl to N(0, 1) in nats per "
        "position; dead: kl < 0.01 or std < 0.05",
        "real_time_factor": f"{DEFINITIONS['real_time_factor']}; of the model's row: decoder and vocoder",
        "compression": "mel values per latent value",
    }

    def build_dataset(self):
        """The log-mels, with waveforms where the folder has them; also loads the vocoder."""
        self.vocoder = self.vocoder_checkpoint = None
        self.vocoder_record = {"vocoder": f"Griffin-Lim, {GRIFFIN_LIM_ITERATIONS} iterations", "vocoder_weights": None}
        if self.args.vocoder_checkpoint:
            self.vocoder_checkpoint = resolve_checkpoint(self.args.vocoder_checkpoint)
            weights = "ema" if (self.vocoder_checkpoint / EMA).is_file() else "raw"
            self.vocoder_record = {"vocoder": str(self.vocoder_checkpoint), "vocoder_weights": weights}
            self.vocoder = load_vocoder(self.vocoder_checkpoint, weights).to(self.device)
            remedy = "use a vocoder that was trained on the same log-mels"
            names = (f"the VAE {self.checkpoint}", f"the vocoder {self.vocoder_checkpoint}")
            mel = self.vocoder.config.mel
            check_same_mel(self.settings, mel, first_name=names[0], second_name=names[1], remedy=remedy)
        else:
            self.row_names = {**self.row_names, "resynthesis": "Griffin-Lim alone", "model": "this VAE + Griffin-Lim"}
        folder, split = self.cache()
        has_waveforms = read_manifest(Path(folder), None)["stage"] == VocoderDataset.stage
        if not has_waveforms:
            logger.warning(
                "%s holds no recorded waveforms: every row is held against the resynthesis. For the recordings give "
                "--cached_dataset a folder of the same clips made by preprocess_audio_vocoder_dataset.py",
                folder,
            )
        dataset = (VocoderDataset if has_waveforms else AudioVAEDataset)(folder, split)
        return dataset.expect_mel(self.settings, str(self.checkpoint))

    def vocode(self, row: str, mel: Tensor, entry: dict[str, Any]) -> Tensor:
        """A log-mel (M, F) on the CPU as a waveform (S,) on the CPU.

        Raises: ValueError: it is not finite; names the vocoder and the sample.
        """
        if self.vocoder is None:
            return self.griffin_lim(row, mel)
        seconds = mel.shape[1] * self.settings.hop_length / self.settings.sample_rate
        vocoder, batch = self.vocoder, mel[None].to(self.device)
        with self.autocast():
            made = self.speed.run(row, seconds, lambda: vocoder(batch))[0]
        return self.finite(made, entry, self.vocoder_checkpoint)

    def speaker(self, entry: dict[str, Any]) -> Tensor | None:
        """The number of a clip's speaker, (1,); None for a VAE that is told none.

        Raises: ValueError: the VAE does not know the speaker.
        """
        known = list(self.model.config.speakers)
        if not known:
            return None
        if entry["speaker"] not in known:
            raise ValueError(f"{entry['key']}: the VAE does not know the speaker {entry['speaker']!r}, only {known}")
        return torch.tensor([known.index(entry["speaker"])], device=self.device)

    def clip(self, dataset, index):
        sample, entry = dataset[index], dataset.entries[index]
        mel, speaker = sample["mel"], self.speaker(entry)
        F = mel.shape[1]
        seconds = F * self.settings.hop_length / self.settings.sample_rate
        batch, n_frames = mel[None].to(self.device), torch.tensor([F], device=self.device)
        with self.autocast():
            mean, logvar = self.speed.run("encode", seconds, lambda: self.model.encode(batch, speaker=speaker))
            made = self.speed.run("decode", seconds, lambda: self.model.decode(mean, n_frames, speaker))
        self.health.update(mean.float(), logvar.float())
        self.n_values = (self.n_values[0] + mel.numel(), self.n_values[1] + mean.numel())
        predicted = self.finite(made, entry)[0].clamp_min(self.settings.log_floor)
        rows = {"ground_truth": sample["waveform"]} if "waveform" in sample else {}
        rows["resynthesis"] = self.vocode("resynthesis", mel, entry)
        if self.vocoder is not None:
            rows["griffin_lim"] = self.griffin_lim("griffin_lim", mel)
        rows["model"] = self.vocode("vocoding", predicted, entry)
        return Clip(entry, mel, predicted, rows, {"model": {"reconstruction_l1": mel_l1(mel, predicted)}})

    def measure(self, dataset, indices):
        self.health, self.n_values = LatentHealth(), (0, 0)
        return super().measure(dataset, indices)

    def report(self, values, transcripts, drawn, n_clips):
        evaluation = super().report(values, transcripts, drawn, n_clips)
        latents = self.health.compute()
        spread_of_samples = map(math.hypot, latents["std"], latents["posterior_std"])
        latents["normalized_std"] = [
            found / std for found, std in zip(spread_of_samples, self.model.latent_std.tolist())
        ]
        speed = {name: self.speed.factor(name) or 0.0 for name in ("encode", "decode", "vocoding")}
        score, model = evaluation.metrics["scores"]["model"], evaluation.metrics["model"]
        score["real_time_factor"] = model["real_time_factor"] = speed["decode"] + speed["vocoding"]
        model |= {f"{name}_real_time_factor": value for name, value in speed.items()}
        model |= {
            "latent_channels": self.model.config.latent_channels,
            "latent_frames_per_second": self.settings.sample_rate
            / self.settings.hop_length
            / self.model.config.compression,
            "compression": self.n_values[0] / self.n_values[1],
            **self.vocoder_record,
        }
        evaluation.metrics["latents"] = latents
        evaluation.scalars["dead_channels"] = float(sum(latents["dead"]))
        evaluation.scalars["real_time_factor"] = score["real_time_factor"]
        scores = evaluation.metrics["scores"]
        table = self.score_table(scores, n_clips, len(transcripts))
        evaluation.tables = [table, latent_table(latents), self.model_table(model, score)]
        return evaluation

    def model_table(self, model: dict[str, Any], score: dict[str, float]) -> Table:
        """Size, distance without a vocoder, and speed."""
        table = Table(title="Model", title_justify="left", show_header=False, box=SIMPLE_HEAD)
        table.add_row("parameters", f"{model['parameters']:,}")
        table.add_row(
            "latents", f"{model['latent_channels']} channels, {model['latent_frames_per_second']:.1f} frames/s"
        )
        table.add_row("compression", f"{model['compression']:.1f} times fewer values")
        table.add_row("mel-L1 of the log-mel itself", f"{score['reconstruction_l1']:.3f}")
        for name in ("encode", "decode", "vocoding"):
            table.add_row(name, f"{model[f'{name}_real_time_factor']:.4f} x real time")
        table.add_row("vocoder", ", ".join(filter(None, (model["vocoder"], model["vocoder_weights"]))))
        return table
