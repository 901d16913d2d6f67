"""Evaluation of a vocoder: waveforms of held-out log-mels, compared with the recordings, next to Griffin-Lim."""

from typing import ClassVar

from dataset_loading.audio.cached import EVALUATED_FRAMES, VocoderDataset
from model.audio.vocoders import Vocoder
from utils.evaluation.audio import DEFINITIONS, GRIFFIN_LIM_ITERATIONS, AudioEvaluator, Clip


class VocoderEvaluator(AudioEvaluator):
    """Vocodes target log-mels; nothing is random."""

    model_class = Vocoder
    title = "Vocoder"
    row_names: dict[str, str] = {
        "ground_truth": "ground truth",
        "griffin_lim": f"Griffin-Lim, {GRIFFIN_LIM_ITERATIONS}",
        "model": "this model",
    }
    definitions: ClassVar[dict[str, str]] = {
        **DEFINITIONS,
        "griffin_lim": f"{GRIFFIN_LIM_ITERATIONS} iterations with momentum 0.99 on the target log-mel.",
    }

    def build_dataset(self):
        dataset = VocoderDataset(*self.cache()).expect_mel(self.settings, str(self.checkpoint))
        if dataset.vae_fingerprint:  # Then even the recordings differ from the log-mels of the data.
            self.title = f"Vocoder on log-mels of the audio VAE {dataset.vae_fingerprint}"
        return dataset.cut(EVALUATED_FRAMES)

    def clip(self, dataset, index):
        sample, entry = dataset[index], dataset.entries[index]
        mel = sample["mel"]  # (M, F)
        seconds = len(sample["waveform"]) / self.settings.sample_rate
        with self.autocast():
            batch = mel[None].to(self.device)
            waveform = self.speed.run("model", seconds, lambda: self.model(batch))[0]  # (S,)
        # The first row is the reference.
        rows = {
            "ground_truth": sample["waveform"],
            "griffin_lim": self.griffin_lim("griffin_lim", mel),
            "model": self.finite(waveform, entry),
        }
        predicted = self.scorer.log_mel(rows["model"][None])[0]
        return Clip(entry=entry, mel=mel, predicted=predicted, rows=rows)
