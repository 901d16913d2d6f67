"""What the stages that train on preprocessed audio share: one definition of the log-mel in cache, model and
checkpoints; validation clips in TensorBoard.  S samples, M mel bins, F frames."""

import importlib.util
import logging
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import Sampler

from dataset_loading.audio.cached import EVALUATED_FRAMES, AudioDataset, Crop
from dataset_loading.cached import evenly_spaced
from dataset_loading.collators import HostFields, collate_audio, collate_by_length
from dataset_loading.epoch_sampler import EpochSampler
from model.audio.configuration import MEL_FIELDS, AudioConfig
from model.audio.spectral import MelSettings
from utils.checkpoints import load_config, read_stage
from utils.command_line import parse_overrides
from utils.distributed import is_sharded
from utils.drawing.audio import TRIPLE, mel_triple, strip_sheet
from utils.drawing.images import Group
from utils.drawing.playback import add_audio, sound_tag
from utils.metrics.audio import PACKAGES, not_measured, pesq_wb, stoi
from utils.options import declared_fields, from_preset
from utils.seeds import sample_uniform
from utils.training.callbacks import EvaluationCallback
from utils.training.stage import Stage
from utils.training.trackers import add_table
from utils.training_utils import StageTrainer

logger = logging.getLogger(__name__)

MAX_FRAMES = 1024  # Longer clips are cut.
BATCH_FRAMES = 8192  # Mel frames of a batch of whole clips with its padding, beyond which it comes in parts.
N_SCORED = 4  # Clips that PESQ and STOI are measured on.
SCORES: dict[str, Callable[[Tensor, Tensor, int], float | None]] = {"pesq": pesq_wb, "stoi": stoi}


class AudioStage(Stage):
    """A stage whose model reads or writes log-mels; subclasses state name, configuration, model, presets, trainer and
    data set.

    A new model takes the log-mel of the cache. Where `--override` names a field of it, or the run starts from a
    checkpoint, the two must be equal.
    """

    config_class: ClassVar[type[AudioConfig]]
    dataset_class: ClassVar[type[AudioDataset]] = AudioDataset

    def build_config(self):
        dataset = self.dataset_class(self.cache_dir, "train")
        self.check_checkpoint(dataset)
        fields = {field.name for field in declared_fields(self.config_class)}
        overrides = parse_overrides(self.args.override, fields)
        # The log-mel of the cache, unless overrides name fields of it: then the two must be equal.
        mel = {} if overrides.keys() & set(MEL_FIELDS) else dataset.mel.as_dict()
        config = from_preset(self.config_class, self.presets, self.args.config, **{**mel, **overrides})
        dataset.expect_mel(config.mel, "this run's --override")
        return config

    def build_collator(self, config):
        return partial(collate_audio, log_floor=config.mel.log_floor)

    def check_checkpoint(self, dataset: AudioDataset) -> None:
        """Raises: ValueError: the checkpoint to start from or to resume has another log-mel than the cache."""
        # Weights belong to one log-mel, however the run starts from them.
        named = {"--init_from": self.args.init_from, "--resume_from_checkpoint": self.find_checkpoint()}
        for flag, path in named.items():
            if path:
                read_stage(path, self.name)  # Raises for checkpoints of another stage.
                config = load_config(self.config_class, path)
                dataset.expect_mel(config.mel, f"{flag} {path}", "or train a new model on the cache as it is")

    def build_dataset(self, split, config):
        dataset = self.dataset_class(self.cache_dir, split).expect_mel(config.mel, "the model")
        return dataset if split == "train" else dataset.cut(EVALUATED_FRAMES)


class CropSampler(Sampler[Crop]):
    """A training crop of each clip in the order of another sampler, at the place that belongs to (seed, step, sample).

    Args:
        order: of the clips.
        samples_per_step: clips of an optimizer step.
        n_frames: of a crop.
        uniforms_of: (step, clips (B,)) -> uniform numbers in [0, 1), (B,).
    """

    def __init__(
        self,
        order: EpochSampler,
        *,
        samples_per_step: int,
        n_frames: int,
        uniforms_of: Callable[[int, Tensor], Tensor],
    ):
        self.order, self.samples_per_step, self.n_frames = order, samples_per_step, n_frames
        self.uniforms_of = uniforms_of

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""
        self.order.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[Crop]:
        # Epochs have whole steps, and as many each. A resumed run skips those of the present epoch that were made.
        clips, step = iter(self.order), self.order.epoch * (len(self.order) // self.samples_per_step)
        while indices := list(islice(clips, self.samples_per_step)):
            uniforms = self.uniforms_of(step, torch.tensor(indices)).tolist()
            yield from (Crop(index, self.n_frames, uniform) for index, uniform in zip(indices, uniforms))
            step += 1


class ClipTrainer(StageTrainer):
    """A trainer on clips: training loads crops of `segment_frames` frames, whole clips are computed in batches of like
    length. The batches of an evaluation are those of `collate_by_length`.

    Attributes: crop_stream: name of the random numbers of the crops' places.
    """

    crop_stream: ClassVar[str]

    def _get_train_sampler(self, train_dataset=None):
        order, args = super()._get_train_sampler(train_dataset), self.args
        if not self.stage_arguments.segment_frames:
            return order
        return CropSampler(
            order,  # type: ignore[arg-type]
            samples_per_step=self._train_batch_size * args.gradient_accumulation_steps * args.world_size,
            n_frames=self.stage_arguments.segment_frames,
            uniforms_of=partial(sample_uniform, args.seed, stream=self.crop_stream, shape=()),
        )

    @property
    def whole_collator(self) -> Callable[[Sequence[dict[str, Tensor]]], dict[str, Any]]:
        """Joins whole clips into batches of like length; into one where ZeRO-3 shards the weights, since processes
        with other numbers of forwards would wait for each other forever."""
        model = self.model if self.ema_model is None else self.ema_model
        max_frames = sys.maxsize if is_sharded(model) else BATCH_FRAMES
        return partial(collate_by_length, log_floor=self.model.config.mel.log_floor, max_frames=max_frames)

    def get_eval_dataloader(self, eval_dataset=None):
        collator, self.data_collator = self.data_collator, HostFields(self.whole_collator, self.host_fields)
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = collator


class AudioCallback(EvaluationCallback):
    """Logs the output of a model for the same validation clips, one at a time, so that nothing is padded.

    Subclasses compute the output for a clip in `run`, and write it in `write`.

    Args:
        n_clips: spread evenly over the validation set.
    """

    def __init__(self, trainer, writer, *, n_clips: int):
        super().__init__(trainer, writer)
        self.n_clips = n_clips
        self.is_first = True  # What does not change is written once.
        # Rank 0 writes the scores, and tells which ones are missing.
        if writer is not None:
            for sentence in not_measured(SCORES).values():
                logger.warning(sentence)

    @property
    def settings(self) -> MelSettings:
        return self.trainer.model.config.mel

    @cached_property
    def samples(self) -> list[dict[str, Tensor]]:
        """The clips, at most `MAX_FRAMES` frames of each."""
        dataset = self.trainer.eval_dataset
        return [dataset[Crop(index, MAX_FRAMES)] for index in evenly_spaced(len(dataset), self.n_clips)]

    @cached_property
    def names(self) -> list[str]:
        """A title of each clip."""
        entries = self.trainer.eval_dataset.entries
        chosen = [entries[index] for index in evenly_spaced(len(self.trainer.eval_dataset), self.n_clips)]
        return [entry["caption"] or entry["key"] for entry in chosen]

    def compute(self, model):
        return [self.run(model, sample, self.trainer.args.device) for sample in self.samples]

    def run(self, model, sample: dict[str, Tensor], device: torch.device) -> Any:
        """The output of the model for one clip, on every process."""
        raise NotImplementedError

    def add_mels(self, generated: list[Tensor], step: int) -> None:
        """True and generated log-mel (M, F) of every clip, their difference, and its mean absolute value."""
        # All clips of the sheet have one time scale.
        longest = max(sample["mel"].shape[1] for sample in self.samples)
        groups, distances = [], []
        for sample, mel, name in zip(self.samples, generated, self.names):
            distances.append((mel - sample["mel"]).abs().mean().item())
            images = mel_triple(mel, sample["mel"], self.settings, max_frames=longest)
            groups.append(Group(images, f"{distances[-1]:.3f}  {name}"))
        self.add_image("mel", strip_sheet(groups, TRIPLE), step)
        self.writer.add_scalar("listening/mel_l1", statistics.fmean(distances), step)

    def add_sounds(self, kind: str, waveforms: list[Tensor], step: int) -> None:
        """A player per clip, see `sound_tag`; what they say beside the real ones, which are written once."""
        if kind == "real":
            add_table(self.writer, "sounds", ("clip", "text"), enumerate(self.names))
        for number, waveform in enumerate(waveforms):
            tag = sound_tag("sounds", number, kind)
            add_audio(self.writer, tag, waveform, rate=self.settings.sample_rate, step=step)

    def add_scores(self, generated: list[Tensor], real: list[Tensor], step: int) -> None:
        """PESQ and STOI of the first clips, where their packages are installed and the waveforms are finite."""
        # Early in training a waveform may not be finite.
        pairs = [pair for pair in zip(generated[:N_SCORED], real[:N_SCORED]) if pair[0].isfinite().all()]
        for name, score in SCORES.items():
            if not all(importlib.util.find_spec(package) for package in PACKAGES[name]):
                continue
            values = [score(*pair, self.settings.sample_rate) for pair in pairs]
            # None: the score is not defined for the clip.
            values = [value for value in values if value is not None]
            if values:
                self.writer.add_scalar(f"listening/{name}", statistics.fmean(values), step)
