"""What the stages that train on preprocessed audio share: one definition of the log-mel in cache, model and
checkpoints; validation clips in TensorBoard.  S samples, M mel bins, F frames."""

import importlib.util
import logging
import statistics
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from dataset_loading.audio.cached import EVALUATED_FRAMES, AudioDataset
from dataset_loading.cached import evenly_spaced
from dataset_loading.collators import collate_audio
from model.audio.configuration import MEL_FIELDS, AudioConfig
from model.audio.spectral import MelSettings
from utils.checkpoints import load_config, read_stage
from utils.command_line import parse_overrides
from utils.drawing.audio import TRIPLE, mel_triple, strip_sheet
from utils.drawing.images import Group
from utils.drawing.playback import add_audio
from utils.metrics.audio import PACKAGES, not_measured, pesq_wb, stoi
from utils.options import declared_fields, from_preset
from utils.training.callbacks import EvaluationCallback
from utils.training.stage import Stage

logger = logging.getLogger(__name__)

MAX_FRAMES = 1024  # Longer clips are cut.
BATCH_FRAMES = 8192  # Mel frames of a validation batch with its padding, beyond which it is computed in parts.
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


def terms_by_length(
    terms_of: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    batch: dict[str, Tensor],
    hop_length: int,
    *,
    at_once: bool = False,
) -> dict[str, Tensor]:
    """Terms per clip of a validation batch, computed for clips of like length together, so that one long clip does not
    pad all others to its length. A batch of up to `BATCH_FRAMES` is computed at once.

    Args:
        terms_of: batch -> terms by name, each (B,), where a clip's depend on no other.
        batch: as `collate_audio` makes it.
        at_once: compute any batch at once, as a model must whose weights ZeRO-3 shards: processes with other numbers
            of parts would wait for each other forever.
    Returns: terms by name, (B,).
    """
    n_frames, groups = batch["n_frames"].tolist(), []
    order = sorted(range(len(n_frames)), key=n_frames.__getitem__)
    if at_once or len(order) * max(n_frames) <= BATCH_FRAMES:
        return terms_of(batch)
    for row in order:
        if not groups or (len(groups[-1]) + 1) * n_frames[row] > BATCH_FRAMES:
            groups.append([])
        groups[-1].append(row)
    results = []
    for rows in groups:
        part, longest = {name: values[rows] for name, values in batch.items()}, n_frames[rows[-1]]
        for name, length in (("mel", longest), ("waveform", longest * hop_length)):
            if name in part:
                part[name] = part[name][..., :length]
        results.append(terms_of(part))
    back = torch.tensor(order).argsort()
    return {name: torch.cat([result[name] for result in results])[back] for name in results[0]}


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
        dataset, hop_length, samples = self.trainer.eval_dataset, self.settings.hop_length, []
        for index in evenly_spaced(len(dataset), self.n_clips):
            sample = dict(dataset[index])
            sample["mel"] = sample["mel"][:, :MAX_FRAMES]
            # The waveform ends with the last frame that is left.
            if "waveform" in sample:
                sample["waveform"] = sample["waveform"][: MAX_FRAMES * hop_length]
            samples.append(sample)
        return samples

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
            images = mel_triple(mel, sample["mel"], self.settings.log_floor, max_frames=longest)
            groups.append(Group(images, f"{distances[-1]:.3f}  {name}"))
        self.add_image("mel", strip_sheet(groups, TRIPLE), step)
        self.writer.add_scalar("listening/mel_l1", statistics.fmean(distances), step)

    def add_sounds(self, kind: str, waveforms: list[Tensor], step: int) -> None:
        """A player per clip, `sounds/<clip>_<kind>`."""
        for number, waveform in enumerate(waveforms):
            add_audio(self.writer, f"sounds/{number:02d}_{kind}", waveform, rate=self.settings.sample_rate, step=step)

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
