"""Judges of generated texts, images and clips: exact texts and words, factors, a probe and distances of image sets,
readers of latents, speech recognition, lengths.

N items, D features, S samples.
"""

import logging
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dataset_loading.cached import evenly_spaced
from dataset_loading.embedded.scenes import caption_factors
from dataset_loading.image.latents import ImageLatentDataset
from utils.console.progress import reported
from utils.evaluation.generated_images import agreement_scores, image_set_scores
from utils.evaluation.multimodal.outputs import Outputs
from utils.evaluation.source_images import SourceImageDataset
from utils.evaluation.speech_scores import recognition_scores
from utils.metrics.audio import missing_packages
from utils.metrics.caption_agreement import N_FEATURES, ImageFeatures, TextProbe, UnusableCaptionsError
from utils.metrics.given_features import GivenFeatures
from utils.metrics.words import Recognizer, normalize_text, text_errors

logger = logging.getLogger(__name__)

FEATURES_AT_ONCE = 32  # Images.
Scores = dict[str, Any]


def text_scores(generated: Sequence[str], texts: Sequence[str]) -> Scores:
    """Agreement of generated texts with the true ones.

    Returns: `exact`, share of equal texts without case and punctuation; `words`, share of the true words that occur;
        `wer` and `cer`, errors over words and characters; where all texts are captions of the embedded scenes the
        shares of right factors, and `all` of them.
    """
    pairs = [(normalize_text(one), normalize_text(other)) for one, other in zip(generated, texts, strict=True)]
    errors = [text_errors(*pair) for pair in zip(generated, texts)]
    n_words = sum(len(other) for _, other in pairs)
    scores: Scores = {"exact": sum(one == other for one, other in pairs) / len(pairs)}
    scores["words"] = sum(word in one for one, other in pairs for word in other) / max(n_words, 1)
    scores["wer"] = sum(error.words for error in errors) / max(sum(error.n_words for error in errors), 1)
    n_characters = max(sum(error.n_characters for error in errors), 1)
    scores["cer"] = sum(error.characters for error in errors) / n_characters
    factors = [caption_factors(text) for text in texts]
    if all(factors):
        given = [caption_factors(" ".join(one)) or {} for one, _ in pairs]
        hits = [{name: value == row.get(name) for name, value in true.items()} for row, true in zip(given, factors)]
        scores |= {name: sum(hit[name] for hit in hits) / len(hits) for name in hits[0]}
        scores["all"] = sum(all(hit.values()) for hit in hits) / len(hits)
    return scores


def length_scores(generated: Sequence[Tensor], target: Sequence[Tensor]) -> Scores:
    """Lengths of clips (L, Z): mean absolute error in latent frames, and the quotient of their sums."""
    pairs = [(len(one), len(other)) for one, other in zip(generated, target, strict=True)]
    error = sum(abs(one - other) for one, other in pairs) / len(pairs)
    return {"length_error": error, "length_ratio": sum(a for a, _ in pairs) / sum(b for _, b in pairs)}


class ImageJudge:
    """Agreement of images with texts by a probe, and their distance from the real images.

    Args:
        training, held_out: latents of the splits; their raw images are used where they can be read.
        decode: latents (N items) -> images (3, S, S) in [-1, 1].
        n_training: maximum number of training images.
        given: the network of --features.
    Attributes: reference: `real` for raw images, `vae` for decoded latents. problem: why there is no probe.
    """

    def __init__(
        self,
        training: ImageLatentDataset,
        held_out: ImageLatentDataset,
        *,
        decode: Callable[[Sequence[Tensor]], list[Tensor]],
        n_training: int,
        device: torch.device,
        given: GivenFeatures | None = None,
    ):
        self.training, self.held_out, self.decode = training, held_out, decode
        self.given, self.device, self.problem = given, device, ""
        self.extractor = ImageFeatures(given).to(device)
        captioned = [index for index, entry in enumerate(training.entries) if entry["caption"].strip()]
        self.chosen = [captioned[i] for i in evenly_spaced(len(captioned), n_training or len(captioned))]
        try:
            self.sources = [SourceImageDataset(dataset) for dataset in (training, held_out)]
        except (OSError, ValueError) as error:
            logger.warning("raw images cannot be read, comparing with decoded latents instead: %s", error)
            self.sources = []
        self.reference = "real" if self.sources else "vae"

    def features(self, images: Sequence[Tensor]) -> Tensor:
        """Features (N, D) of images (3, S, S)."""
        batches = [images[i : i + FEATURES_AT_ONCE] for i in range(0, len(images), FEATURES_AT_ONCE)]
        return torch.cat([self.extractor(torch.stack(list(batch)).to(self.device)) for batch in batches])

    def real(self, index: int, *, is_training: bool = False) -> Tensor:
        """The raw image of a sample, or its decoded latents where there is none."""
        if self.sources:
            return self.sources[0 if is_training else 1][index]
        dataset = self.training if is_training else self.held_out
        return self.decode([dataset[index]["mean"]])[0]

    @cached_property
    def probe(self) -> TextProbe | None:
        """The probe, fitted to training images; None where their texts are unusable."""
        batches = [self.chosen[i : i + FEATURES_AT_ONCE] for i in range(0, len(self.chosen), FEATURES_AT_ONCE)]
        features = [self.features([self.real(index, is_training=True) for index in batch]) for batch in batches]
        try:
            return TextProbe(torch.cat(features), [self.training.entries[index]["caption"] for index in self.chosen])
        except UnusableCaptionsError as error:
            self.problem = f"{self.training.folder}: {error}"
            logger.warning("agreement of images with their texts cannot be measured: %s", self.problem)
            return None

    def agreement(self, features: Tensor, texts: Sequence[str]) -> Scores:
        """`probe_top1` and `probe_words`, see `TextProbe.agreement`; `clip_score` with a CLIP model."""
        scores = agreement_scores(self.probe, features, texts)
        named = {"probe_top1": scores["agreement"], "probe_words": scores["words"]}
        clip_score = self.given.clip_score(features[:, N_FEATURES:], texts) if self.given else None
        return named if clip_score is None else {**named, "clip_score": clip_score}

    def distance(self, features: Tensor, target: Tensor) -> Scores:
        """Distances of sets of the same size, see `image_set_scores`."""
        return image_set_scores(features, target)


class SpeechJudge:
    """Error rates of what Whisper understands.

    Args:
        vocode: log-mel (M, F) -> waveform (S,).
        rate: Hz.
        seed: of the bootstrap.
    Attributes: problem: why nothing is measured; "" otherwise.
    """

    def __init__(self, vocode: Callable[[Tensor], Tensor], rate: int, *, seed: int):
        self.vocode, self.rate, self.seed, self.recognizer = vocode, rate, seed, Recognizer()
        missing = ", ".join(missing_packages("wer"))
        self.problem = f"no WER of speech: needs {missing}: pip install -r requirements-eval.txt" if missing else ""
        if self.problem:
            logger.warning(self.problem)

    def recognize(self, waveform: Tensor) -> str:
        """What is recognised in a waveform (S,)."""
        return self.recognizer.transcribe(waveform, self.rate)

    def transcripts(self, outputs: Outputs) -> list[str]:
        """What is recognised in each clip."""
        numbers = reported(range(len(outputs)), "recognised speech", len(outputs), "clips")
        return [self.recognize(self.vocode(mel)) for number in numbers for mel in outputs.decode([number])]

    def scores(self, transcripts: Sequence[str], texts: Sequence[str]) -> Scores:
        """`wer`, `cer`, `wer_all` and so on, see `recognition_scores`."""
        return recognition_scores(transcripts, texts, self.seed)
