"""Evaluation of an audio VAE: reconstruction of held-out log-mels, and of the waveforms after a vocoder.

M mel bins, F frames, S samples, Z latent channels.
"""

import logging
from pathlib import Path
from typing import Any, ClassVar

import torch
from rich.table import Table
from torch import Tensor

from dataset_loading.audio.cached import EVALUATED_FRAMES, AudioVAEDataset, VocoderDataset
from dataset_loading.files import read_manifest
from model.audio.spectral import check_same_mel
from model.audio.vae import AudioVAE
from utils.checkpoints import EMA, resolve_checkpoint
from utils.evaluation.arguments.audio import AudioVAEEvaluationArguments
from utils.evaluation.audio import DEFINITIONS, GRIFFIN_LIM_ITERATIONS, AudioEvaluator, Clip, Scores
from utils.evaluation.tables import fact_table, latent_table
from utils.generation.audio import load_vocoder
from utils.metrics.audio import mel_l1
from utils.metrics.latents import LATENT_DEFINITION, LatentHealth, normalized_std

logger = logging.getLogger(__name__)


class AudioVAEEvaluator(AudioEvaluator):
    """Decodes posterior means, so nothing is random."""

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
        "resynthesis": "The vocoder applied to the target log-mel, which isolates the error of the VAE. "
        "It is the reference if the data contain no recorded waveforms. The vocoder is --vocoder_checkpoint, or "
        f"Griffin-Lim with {GRIFFIN_LIM_ITERATIONS} iterations.",
        "griffin_lim": f"With --vocoder_checkpoint: {GRIFFIN_LIM_ITERATIONS} iterations of Griffin-Lim on the target "
        "log-mel.",
        "reconstruction_l1": "Mean absolute difference of the reconstructed and the target log-mel, without vocoder.",
        "latents": LATENT_DEFINITION,
        "real_time_factor": f"{DEFINITIONS['real_time_factor']} For the model: decoder and vocoder.",
        "compression": "Number of mel values per latent value.",
    }

    def build_dataset(self):
        """The log-mels, with waveforms where the folder has them; also loads the vocoder."""
        # The vocoder: a checkpoint with the same log-mel, or Griffin-Lim.
        self.vocoder = self.vocoder_checkpoint = None
        self.vocoder_record = {"vocoder": f"Griffin-Lim, {GRIFFIN_LIM_ITERATIONS} iterations", "vocoder_weights": None}
        if self.args.vocoder_checkpoint:
            self.vocoder_checkpoint = resolve_checkpoint(self.args.vocoder_checkpoint)
            weights = "ema" if (self.vocoder_checkpoint / EMA).is_file() else "raw"  # --weights is about the VAE
            self.vocoder_record = {"vocoder": str(self.vocoder_checkpoint), "vocoder_weights": weights}
            self.vocoder = load_vocoder(self.vocoder_checkpoint, weights).to(self.device)
            remedy = "use a vocoder that was trained on the same log-mels"
            names = (f"the VAE {self.checkpoint}", f"the vocoder {self.vocoder_checkpoint}")
            mel = self.vocoder.config.mel
            check_same_mel(self.settings, mel, first_name=names[0], second_name=names[1], remedy=remedy)
        else:
            self.row_names = {**self.row_names, "resynthesis": "Griffin-Lim alone", "model": "this VAE + Griffin-Lim"}
        # Caches of vocoders hold log-mels and recordings, those of audio VAEs log-mels alone.
        folder, split = self.cache()
        has_waveforms = read_manifest(Path(folder), None)["stage"] == VocoderDataset.stage
        if not has_waveforms:
            logger.warning(
                "%s holds no recorded waveforms, so all rows are compared with the resynthesis. To compare with "
                "recordings, give --cached_dataset a folder of the same clips made by "
                "preprocess_audio_vocoder_dataset.py",
                folder,
            )
        dataset = (VocoderDataset if has_waveforms else AudioVAEDataset)(folder, split)
        dataset = dataset.expect_mel(self.settings, str(self.checkpoint)).expect_recorded("an audio VAE")
        return dataset.cut(EVALUATED_FRAMES)

    def vocode(self, row: str, mel: Tensor, entry: dict[str, Any]) -> Tensor:
        """The waveform (S,) of a log-mel (M, F), both on the CPU.

        Raises: ValueError: it is not finite; names the vocoder and the sample.
        """
        if self.vocoder is None:
            return self.griffin_lim(row, mel)
        seconds = mel.shape[1] * self.settings.hop_length / self.settings.sample_rate
        vocoder, batch = self.vocoder, mel[None].to(self.device)  # (1, M, F)
        with self.autocast():
            waveform = self.speed.run(row, seconds, lambda: vocoder(batch))[0]
        return self.finite(waveform, entry, self.vocoder_checkpoint)

    def speaker(self, entry: dict[str, Any]) -> Tensor | None:
        """The index of a clip's speaker, (1,); None for a VAE without speaker conditioning.

        Raises: ValueError: the VAE does not know the speaker.
        """
        # The position in the list is the index of the embedding.
        known = list(self.model.config.speakers)
        if not known:
            return None
        if entry["speaker"] not in known:
            raise ValueError(f"{entry['key']}: the VAE does not know the speaker {entry['speaker']!r}, only {known}")
        return torch.tensor([known.index(entry["speaker"])], device=self.device)

    def clip(self, dataset, index):
        sample, entry = dataset[index], dataset.entries[index]
        mel, speaker = sample["mel"], self.speaker(entry)
        # The VAE: (M, F) -> posterior mean (1, Z, L) or (1, Z, m, L) -> (M, F).
        F = mel.shape[1]
        seconds = F * self.settings.hop_length / self.settings.sample_rate
        batch, n_frames = mel[None].to(self.device), torch.tensor([F], device=self.device)
        with self.autocast():
            mean, logvar = self.speed.run("encode", seconds, lambda: self.model.encode(batch, speaker=speaker))
            reconstruction = self.speed.run("decode", seconds, lambda: self.model.decode(mean, n_frames, speaker))
        self.health.update(mean.float(), logvar.float())  # of all clips
        # Values of log-mels and of latents, for the compression.
        self.n_values = (self.n_values[0] + mel.numel(), self.n_values[1] + mean.numel())
        predicted = self.finite(reconstruction, entry)[0].clamp_min(self.settings.log_floor)
        # Waveforms, the reference first: the recording if there is one, otherwise the resynthesis.
        rows = {"ground_truth": sample["waveform"]} if "waveform" in sample else {}
        rows["resynthesis"] = self.vocode("resynthesis", mel, entry)
        if self.vocoder is not None:
            rows["griffin_lim"] = self.griffin_lim("griffin_lim", mel)
        rows["model"] = self.vocode("vocoding", predicted, entry)
        scores: dict[str, Scores] = {"model": {"reconstruction_l1": mel_l1(predicted, mel)}}
        return Clip(entry=entry, mel=mel, predicted=predicted, rows=rows, scores=scores)

    def measure(self, dataset, indices):
        self.health, self.n_values = LatentHealth(), (0, 0)  # filled by `clip`
        return super().measure(dataset, indices)

    def report(self, values, transcripts, examples):
        evaluation = super().report(values, transcripts, examples)
        # The latents, and their std after normalization with the statistics stored in the model.
        latents = self.health.compute()
        latents["normalized_std"] = normalized_std(latents, self.model.latent_std)
        # The model's time is that of decoder and vocoder.
        speed = {name: self.speed.factor(name) or 0.0 for name in ("encode", "decode", "vocoding")}
        score, model = evaluation.metrics["scores"]["model"], evaluation.metrics["model"]
        score["real_time_factor"] = model["real_time_factor"] = speed["decode"] + speed["vocoding"]
        model |= {f"{name}_real_time_factor": value for name, value in speed.items()}
        # Size of the latents, and which vocoder was used.
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
        # The first table again, now that the time of the model is known.
        table = self.score_table(evaluation.metrics["scores"], len(values["model"]), len(transcripts))
        evaluation.tables = [table, latent_table(latents), self.model_table(model, score)]
        return evaluation

    def model_table(self, model: dict[str, Any], score: dict[str, float]) -> Table:
        """Size, reconstruction error without vocoder, and speed."""
        # The numbers of the report, as text.
        facts = {
            "parameters": f"{model['parameters']:,}",
            "latents": f"{model['latent_channels']} channels, {model['latent_frames_per_second']:.1f} frames/s",
            "compression": f"{model['compression']:.1f} x fewer values",
            "mel-L1 without vocoder": f"{score['reconstruction_l1']:.3f}",
        }
        for name in ("encode", "decode", "vocoding"):
            facts[name] = f"{model[f'{name}_real_time_factor']:.4f} x real time"
        facts["vocoder"] = ", ".join(filter(None, (model["vocoder"], model["vocoder_weights"])))
        return fact_table("Model", facts)
