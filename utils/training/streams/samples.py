"""What a multimodal model generates during training, in TensorBoard.  L tokens, M mel bins, F mel frames."""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor

from dataset_loading.cached import evenly_spaced
from dataset_loading.multimodal import Item, Task
from model.multimodal.generation import Sampling
from model.multimodal.layout import Part, Stream, build_stream, join_streams
from model.multimodal.mask import stream_mask
from utils.drawing.audio import strip_sheet
from utils.drawing.images import Group
from utils.drawing.masks import LEGEND, mask_image
from utils.drawing.playback import add_audio, sound_tag
from utils.evaluation.multimodal.examples import Examples
from utils.evaluation.multimodal.items import MARGIN, HeldOutItems, having
from utils.evaluation.multimodal.losses import TIMES, stream_losses
from utils.flags.choices import SPANS
from utils.generation.audio_diffusion import load_matching_vocoder
from utils.generation.multimodal import MultimodalPipeline
from utils.training.callbacks import EvaluationCallback
from utils.training.multimodal import as_markdown

logger = logging.getLogger(__name__)

MAX_MASK = 384  # Tokens of the longest stream whose mask is drawn.


class TaskSample(NamedTuple):
    """An item in a task: what it has, and what was generated for its first part, modality -> text, image (3, S, S) or
    log-mel (M, F)."""

    item: Item
    generated: dict[str, Any]


class StreamSamplesCallback(EvaluationCallback):
    """Logs what the model makes of held-out items, task by task: the first part of a stream is the prompt.

    samples/<task>/<number>                       prompt, true and generated text
    images/<task>, images/<task>_mel              real images, or log-mels | generated ones
    sounds/<task>/<number>_1_real, _3_generated   players; real ones once
    images/mask                                   which token sees which in a stream of each task; once
    thinking_steps/text, image, audio             mean steps per token, where tokens leave the core early

    Args:
        trainer, writer: see `EvaluationCallback`.
        vaes: of the latents, by modality.
        vocoder: of the audio VAE's log-mel; None for Griffin-Lim.
        n_samples: items per task, evenly spaced over the validation set.
    """

    before_training = False  # Noise through the VAEs.

    def __init__(self, trainer, writer, *, vaes: Mapping[str, Any], vocoder: Any, n_samples: int):
        super().__init__(trainer, writer)
        self.vaes, self.vocoder, self.n_samples = vaes, vocoder, n_samples
        self.is_first = True  # What does not change is written once.

    @cached_property
    def items(self) -> HeldOutItems:
        """The validation items, one of each text."""
        return HeldOutItems(self.trainer.eval_dataset.caches, self.trainer.config)

    def chosen(self, task: Task) -> list[Item]:
        """The items of a task."""
        items = having(self.items.items, *task.modalities)
        return [items[number] for number in evenly_spaced(len(items), self.n_samples)] if items else []

    def pipeline(self, model) -> MultimodalPipeline:
        """The pipeline with the present model."""
        trainer = self.trainer
        for network in (*self.vaes.values(), self.vocoder):
            if network is not None:
                network.to(trainer.args.device)
        return MultimodalPipeline(trainer.accelerator.unwrap_model(model), trainer.tokenizer, self.vaes, self.vocoder)

    def compute(self, model):
        pipeline = self.pipeline(model)
        samples = {task.name: self.generate(task, pipeline) for task in self.trainer.eval_dataset.tasks}
        # The model has no predictions to compare within its core.
        exits = self.trainer.exits(model) and self.trainer.config.recurrent_exit_criterion != "kl"
        return samples, self.steps(pipeline) if exits else {}

    def generate(self, task: Task, pipeline: MultimodalPipeline) -> list[TaskSample]:
        """The samples of a task; the same seeds at every step, so that only the model changes."""
        first, *rest = task.modalities if len(task.modalities) > 1 else (None, *task.modalities)
        items = self.chosen(task)
        prompts = [[self.items.part(item, first, pipeline)] if first else [] for item in items]
        longest = max(len(pipeline.text_part(item.text).ids) for item in self.items.items)
        sampling = Sampling(
            rest[0] if rest[0] in SPANS else None,
            list(dict.fromkeys(rest)),
            max_new_tokens=pipeline.room(prompts, longest + MARGIN),
            max_spans=sum(name in SPANS for name in rest),
            temperature=0.0 if first else 1.0,  # Without a prompt the most probable text is always the same.
        )
        answers = pipeline.answer(prompts, range(len(items)), sampling) if items else []
        return [TaskSample(item, self.decode(answer, pipeline)) for item, answer in zip(items, answers)]

    def decode(self, parts: Sequence[Part], pipeline: MultimodalPipeline) -> dict[str, Any]:
        """The first part of each modality, decoded; audio that is not finite is left out."""
        decoded: dict[str, Any] = {}
        readers = {"text": pipeline.text_of, "image": pipeline.image_of, "audio": pipeline.mel_of}
        for part in parts:
            if part.modality in decoded:
                continue
            try:
                decoded[part.modality] = readers[part.modality](part)
            except ValueError as error:  # Those of later steps may be finite.
                logger.warning("nothing is heard at step %d: %s", self.trainer.state.global_step, error)
        return decoded

    def steps(self, pipeline: MultimodalPipeline) -> dict[str, float]:
        """Mean thinking steps of the tokens of each modality, with exits."""
        sums: dict[str, float] = {}
        counts: dict[str, int] = {}
        for task in self.trainer.eval_dataset.tasks:
            items = self.chosen(task)
            if not items:
                continue
            rows = [[self.items.part(item, name, pipeline) for name in task.modalities] for item in items]
            losses = stream_losses(pipeline.model, rows, time=TIMES[0], seeds=range(len(rows)))
            for name, value in (losses.steps or {}).items():
                sums[name] = sums.get(name, 0.0) + value
                counts[name] = counts.get(name, 0) + (losses.counts or {})[name]
        return {name: value / counts[name] for name, value in sums.items() if counts[name]}

    # ---- TensorBoard.

    def write(self, content, step):
        samples, steps = content
        for name, value in steps.items():
            self.writer.add_scalar(f"thinking_steps/{name}", value, step)
        for task, rows in samples.items():
            self.write_texts(task, rows, step)
            modalities = [name for name in dict.fromkeys(task.split("-")[1:] or [task]) if rows]
            for name in set(modalities) & set(SPANS):
                self.write_spans(task, name, rows, step)
        if self.is_first:
            self.write_masks(step)
        self.is_first = False

    def write_texts(self, task: str, rows: Sequence[TaskSample], step: int) -> None:
        """Prompts, true and generated texts."""
        first, *rest = task.split("-")
        for number, row in enumerate(rows):
            texts = {"prompt": row.item.text if first == "text" else f"{first} of {row.item.key}"} if rest else {}
            if "text" in rest:
                texts["true"] = row.item.text
            if "text" in (rest or [first]):
                texts["generated"] = row.generated.get("text", "")
            self.writer.add_text(f"samples/{task}/{number:02}", as_markdown(texts), step)

    def write_spans(self, task: str, name: str, rows: Sequence[TaskSample], step: int) -> None:
        """Images or log-mels beside real ones, and players."""
        rows = [row for row in rows if name in row.generated]
        real = [self.real(row.item, name) for row in rows]
        if not rows:
            return
        generated = [row.generated[name] for row in rows]
        examples = Examples(task, [row.item.text for row in rows], real, [generated])
        title = f"step {step}"
        if name == "image":
            self.add_image(task, examples.image_sheet(title), step)
            return
        self.add_image(f"{task}_mel", examples.mel_sheet(title, self.vaes["audio"].config.mel), step)
        audio: Any = self.present.audio
        rate = self.vaes["audio"].config.sample_rate
        kinds = {"real": real, "generated": generated} if self.is_first else {"generated": generated}
        for kind, mels in kinds.items():
            for number, mel in enumerate(mels):
                tag = sound_tag(f"sounds/{task}", number, kind)
                add_audio(self.writer, tag, audio.vocode(mel), rate=rate, step=step)

    @cached_property
    def present(self) -> MultimodalPipeline:
        """A pipeline whose VAEs and vocoder decode; its model is that of the first evaluation."""
        return self.pipeline(self.trainer.model)

    def real(self, item: Item, name: Any) -> Tensor:
        """The image or the log-mel of an item's latents."""
        part = self.items.part(item, name, self.present)
        part.latents = part.latents.to(self.trainer.args.device)  # type: ignore[union-attr]
        return self.present.image_of(part) if name == "image" else self.present.mel_of(part)

    def write_masks(self, step: int) -> None:
        """The mask of the first stream of each task, as it is trained."""
        images = {}
        for task in self.trainer.eval_dataset.tasks:
            for item in self.chosen(task)[:1]:
                parts = [self.items.part(item, name, self.present) for name in task.modalities]
                stream = build_stream(self.trainer.config, parts)
                if len(stream) <= MAX_MASK:
                    mask = stream_mask(join_streams([stream], 0).placement)[0, 0]
                    images[f"{task.name}, {len(stream)} tokens"] = mask_image(mask, token_kinds(stream))
        if images:
            self.add_image("mask", strip_sheet([Group(list(images.values()), LEGEND)], list(images)), step)


def token_kinds(stream: Stream) -> list[int]:
    """The place of each token's kind in `utils.drawing.masks.KINDS`."""
    return [0 if span < 0 else 2 if copy else 1 for span, copy in zip(stream.span, stream.copy)]


def sample_callbacks(trainer: Any, writer: Any, *, load_vae: Callable[[str], Any]) -> list[StreamSamplesCallback]:
    """What shows samples of a run, unless `--n_logged_samples` is 0.

    Args: load_vae: modality -> its frozen VAE.
    Raises: FileNotFoundError, ValueError: no vocoder at `--vocoder_checkpoint`, or one of another log-mel.
    """
    args = trainer.stage_arguments
    if not args.n_logged_samples:
        return []
    vaes = {name: load_vae(name) for name in trainer.names}
    vocoder = None
    if "audio" in vaes:
        vocoder = load_matching_vocoder(args.vocoder_checkpoint, vaes["audio"].config.mel, "the audio VAE")
    settings = {"vaes": vaes, "vocoder": vocoder, "n_samples": args.n_logged_samples}
    return [StreamSamplesCallback(trainer, writer, **settings)]
