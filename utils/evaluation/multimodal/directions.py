"""Scores of a multimodal model in each direction, of round trips, and of other depths of its core.

N items, with several copies of each where images and clips are generated.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from torch import Tensor

from dataset_loading.multimodal import Item
from utils.evaluation.multimodal.beside import Beside
from utils.evaluation.multimodal.items import Direction, HeldOutItems, having, others, span_part
from utils.evaluation.multimodal.judges import ImageJudge, Scores, SpeechJudge, length_scores, text_scores
from utils.evaluation.multimodal.outputs import AnswerGenerator, Outputs
from utils.evaluation.recordings import Recordings
from utils.metrics.caption_agreement import chance_of
from utils.metrics.latent_readers import LatentReader

Rows = dict[str, Scores]  # Name of the row -> scores.


@dataclasses.dataclass
class Judges:
    """Who judges what is generated; None and missing entries judge nothing."""

    images: ImageJudge | None = None
    speech: SpeechJudge | None = None
    readers: Mapping[str, LatentReader] = dataclasses.field(default_factory=dict)
    recordings: Recordings | None = None


class DirectionMeter:
    """Generates for items in a direction, and scores it.

    Args:
        items: of the held-out split.
        chosen: those that are evaluated.
        judges: of images and clips.
        has_texts: whether texts are generated.
        n_copies: images and clips per text.
    Attributes:
        texts: direction -> generated texts of the evaluated model.
        spans: direction -> its images or clips.
        transcripts: what is recognised in clips, row -> texts.
    """

    def __init__(self, items: HeldOutItems, chosen: Sequence[Item], *, judges: Judges, has_texts: bool, n_copies: int):
        self.items, self.chosen, self.judges = items, list(chosen), judges
        self.has_texts, self.n_copies = has_texts, n_copies
        self.texts: dict[Direction, list[str]] = {}
        self.spans: dict[Direction, Outputs] = {}
        self.transcripts: dict[str, dict[str, list[str]]] = {}

    def of(self, direction: Direction) -> list[Item]:
        """The items that have both modalities of a direction."""
        return having(self.chosen, *direction)

    def copies(self, chosen: Sequence[Item]) -> tuple[list[Item], list[str]]:
        """Items once per copy, and the keys of their noise."""
        return list(chosen) * self.n_copies, [f"{item.key} {n}" for n in range(self.n_copies) for item in chosen]

    def judges_of(self, target: str) -> bool:
        """Whether anything judges images or clips."""
        judges = self.judges
        return target in judges.readers or (judges.images if target == "image" else judges.speech) is not None

    # ---- Directions.

    def measure(self, direction: Direction, generator: AnswerGenerator, beside: Sequence[Beside]) -> Rows:
        """The rows of a direction: references, the model, shuffled conditions, models beside it. Empty without items,
        without a source, or without a judge."""
        source, target = direction
        chosen = self.of(direction)
        if source is None or not chosen or not (self.has_texts if target == "text" else self.judges_of(target)):
            return {}
        models = [model for model in beside if direction in model.directions]
        prompts = [self.items.part(item, source, generator.pipeline) for item in chosen]
        if target == "text":
            generated = self.texts[direction] = generator.texts(prompts, [item.key for item in chosen])
            rows = self.text_rows(generated, chosen)
            for model in models:
                keys = [item.key for item in chosen]
                answers = model.outputs(direction, self.items, chosen, pipeline=model.load(), keys=keys)
                rows[model.name] = text_scores(answers, [item.text for item in chosen])  # type: ignore[arg-type]
            # Errors per word belong to speech.
            is_speech = source == "audio"
            return {
                name: {key: row[key] for key in row if is_speech or key not in ("wer", "cer")}
                for name, row in rows.items()
            }
        repeated, keys = self.copies(chosen)
        outputs = self.spans[direction] = generator.spans(prompts * self.n_copies, keys, target)
        measure = self.image_rows if target == "image" else self.audio_rows
        named: dict[str, Outputs] = {"model": outputs}
        for model in models:
            answers = model.outputs(direction, self.items, repeated, pipeline=model.load(), keys=keys)
            assert isinstance(answers, Outputs)
            named[model.name] = answers
        return measure(direction, named, repeated, generator)

    def text_rows(self, generated: Sequence[str], chosen: Sequence[Item]) -> Rows:
        """Texts compared with the true ones and with those of other items."""
        texts = [item.text for item in chosen]
        rows = {"model": text_scores(generated, texts)}
        return {**rows, "shuffled": text_scores(generated, others(texts))} if len(texts) > 1 else rows

    def image_rows(
        self, direction: Direction, named: Mapping[str, Outputs], repeated: Sequence[Item], generator: AnswerGenerator
    ) -> Rows:
        """Rows of images."""
        judge, n = self.judges.images, len(repeated) // self.n_copies
        texts = [item.text for item in repeated]
        vae = generator.outputs([self.items.latents(item, "image") for item in repeated[:n]], "image")
        rows: Rows = {"real": {}, "vae": self.read("image", vae, texts[:n])}
        real: Tensor | None = None
        if judge is not None:
            decoded = judge.features(vae.media())
            real = decoded
            if judge.sources:
                real = judge.features([judge.real(item.places["image"]) for item in repeated[:n]])
                rows["real"] = judge.agreement(real, texts[:n])
                rows["vae"] |= judge.distance(decoded, real)
            rows["vae"] |= judge.agreement(decoded, texts[:n])
        for name, outputs in named.items():
            rows[name] = self.read("image", outputs, texts)
            if judge is not None and real is not None:
                features = judge.features(outputs.media())
                # Sets of equal size: the first copy of each.
                rows[name] |= {**judge.agreement(features, texts), **judge.distance(features[:n], real)}
            if name == "model" and len(set(texts)) > 1:
                wrong = others(texts[:n]) * self.n_copies
                rows["shuffled"] = self.read("image", outputs, wrong)
                rows["shuffled"] |= {} if judge is None else judge.agreement(features, wrong)
        rows["chance"] = chance_row(rows, texts[:n])
        return {name: row for name, row in rows.items() if row}

    def audio_rows(
        self, direction: Direction, named: Mapping[str, Outputs], repeated: Sequence[Item], generator: AnswerGenerator
    ) -> Rows:
        """Rows of clips."""
        judges, n = self.judges, len(repeated) // self.n_copies
        texts, real = [item.text for item in repeated], [self.items.latents(item, "audio") for item in repeated]
        vae = generator.outputs(real[:n], "audio")
        rows: Rows = {"vae": self.read("audio", vae, texts[:n])}
        recognised: dict[str, list[str]] = {}
        if judges.speech is not None and not judges.speech.problem:
            if judges.recordings is not None:
                clips = [judges.recordings.find(self.items.entry(item, "audio")) for item in repeated[:n]]
                recognised["recording"] = [judges.speech.recognize(clip["waveform"]) for clip in clips]
            for name, outputs in {"vae": vae, **named}.items():
                recognised[name] = judges.speech.transcripts(outputs)
            self.transcripts[direction.name] = recognised
        for name, outputs in named.items():
            lengths = length_scores(outputs.latents, real)
            rows[name] = {**self.read("audio", outputs, texts), **lengths}
            if name == "model" and n > 1:
                wrong = others(texts[:n]) * self.n_copies
                lengths = length_scores(outputs.latents, others(real[:n]) * self.n_copies)
                rows["shuffled"] = {**self.read("audio", outputs, wrong), "length_error": lengths["length_error"]}
        for name, answers in recognised.items():
            assert judges.speech is not None
            rows.setdefault(name, {}).update(judges.speech.scores(answers, texts[: len(answers)]))
            if name == "model" and n > 1:
                rows["shuffled"] |= judges.speech.scores(answers, others(texts[:n]) * self.n_copies)
        rows["chance"] = chance_row(rows, texts[:n])
        return {name: row for name, row in rows.items() if row}

    def read(self, modality: str, outputs: Outputs, texts: Sequence[str]) -> Scores:
        """Scores of a reader, each with the prefix `read_`; {} without one."""
        reader = self.judges.readers.get(modality)
        if reader is None:
            return {}
        return {f"read_{name}": value for name, value in reader.score(outputs.latents, texts).items()}

    # ---- Round trips.

    def round_trips(self, generator: AnswerGenerator) -> dict[str, Rows]:
        """There and back again, from what the directions have generated: name -> rows `model` and `shuffled`."""
        trips: dict[str, Rows] = {}
        config = generator.pipeline.model.config
        for direction, outputs in self.spans.items():
            back = Direction(direction.target, "text")
            if direction.source != "text" or back not in self.texts:
                continue
            # Text to a span to text, of the first copy.
            name, chosen = direction.target, self.of(direction)
            patch = getattr(config, f"{name}_encoder_patch_size")
            parts = [span_part(name, row, patch) for row in outputs.latents[: len(chosen)]]
            answers = generator.texts(parts, [item.key for item in chosen])
            trips[f"text-{name}-text"] = self.text_rows(answers, chosen)
            # A span to text to a span, judged by the reader.
            if name in self.judges.readers:
                trips[f"{name}-text-{name}"] = self.span_trip(direction, self.texts[back], generator)
        return trips

    def span_trip(self, direction: Direction, texts: Sequence[str], generator: AnswerGenerator) -> Rows:
        """Spans generated for texts that the model said of real ones; a text without words stands for nothing."""
        chosen = self.of(Direction(direction.target, "text"))
        prompts = [generator.pipeline.text_part(text or " ") for text in texts]
        outputs = generator.spans(prompts, [f"{item.key} 0" for item in chosen], direction.target)
        true = [item.text for item in chosen]
        rows = {"model": self.read(direction.target, outputs, true)}
        return {**rows, "shuffled": self.read(direction.target, outputs, others(true))} if len(true) > 1 else rows


def chance_row(rows: Rows, texts: Sequence[str]) -> Scores:
    """What guessing among the distinct texts scores, of the metrics of retrieval and of words that some row has."""
    if len(set(texts)) < 2:
        return {}
    chance = dict.fromkeys(("probe_top1", "read_top1"), chance_of(texts))
    chance |= dict.fromkeys(("probe_words", "read_words"), 0.5)
    return {name: value for name, value in chance.items() if any(row.get(name) is not None for row in rows.values())}
