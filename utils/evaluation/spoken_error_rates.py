"""Error rates of what a model speaks, measured during training."""

import logging
from typing import Any

import torch

from dataset_loading.audio.latents import AudioLatentDataset, collate_audio_latents
from dataset_loading.cached import evenly_spaced
from utils.evaluation.audio import MIN_WORDS
from utils.evaluation.speech_scores import is_english
from utils.generation.speech import SpeechPipeline
from utils.metrics.audio import missing_packages
from utils.metrics.words import Recognizer, normalize_text, text_errors

logger = logging.getLogger(__name__)


class SpokenErrorRates:
    """Word and character error rates of validation texts that a model speaks, for evaluations during training.

    Args:
        pipeline: of the frozen VAE and vocoder; its model is replaced by the present one.
        dataset: the validation clips.
        args: sampling flags, and `wer_samples`, the number of clips of `MIN_WORDS` words or more.
    """

    def __init__(self, pipeline: SpeechPipeline, dataset: AudioLatentDataset, args: Any):
        self.pipeline, self.dataset, self.args, self.recognizer = pipeline, dataset, args, Recognizer()
        # The recogniser knows English alone.
        english = [is_english(pipeline.tokenizer, dataset.language_of(entry)) for entry in dataset.entries]
        # Without recognition training goes on; the reason is said once.
        problem = ", ".join(missing_packages("wer"))
        problem = f"it needs {problem}: pip install -r requirements-eval.txt" if problem else ""
        usable: list[int] = []
        if not problem:
            words = [
                len(normalize_text(entry["caption"])) * is_known for entry, is_known in zip(dataset.entries, english)
            ]
            usable = [index for index, n_words in enumerate(words) if n_words >= MIN_WORDS]
        self.indices = [usable[place] for place in evenly_spaced(len(usable), args.wer_samples)]
        if not problem and not self.indices:
            problem = f"no English validation clip has {MIN_WORDS} words or more"
        if problem:
            logger.warning("--wer_samples measures nothing: %s", problem)
            self.indices = []

    @torch.no_grad()
    def __call__(self, model) -> dict[str, float]:
        """`wer` and `cer`; {} where nothing is measured."""
        pipeline, device = self.pipeline, model.device
        pipeline.model = model
        for network in (pipeline.vae, pipeline.vocoder):
            if network is not None:
                network.to(device)
        errors = []
        for index in self.indices:
            # The clip's number is its seed, so that evaluations are comparable.
            entry, batch = self.dataset.entries[index], collate_audio_latents([self.dataset[index]])
            inputs = {
                name: batch[name].to(device)
                for name in ("tokens", "n_tokens", "speakers", "languages")
                if name in batch
            }
            try:
                latents, durations = pipeline.latents(inputs, [index], self.args)
                (mel,) = pipeline.decode(latents, durations.sum(1), [entry["speaker"]])
            except ValueError as error:  # Log-mels are not finite; those of later steps may be.
                logger.warning("no word error rate: %s", error)
                return {}
            text = self.recognizer.transcribe(pipeline.vocode(mel), pipeline.vae.config.sample_rate)
            errors.append(text_errors(text, entry["caption"]))
        if not errors:
            return {}
        return {
            "wer": sum(clip.words for clip in errors) / sum(clip.n_words for clip in errors),
            "cer": sum(clip.characters for clip in errors) / sum(clip.n_characters for clip in errors),
        }
