"""What the stages that train on preprocessed sound share: one definition of the log-mel in cache, model and
checkpoints; clips to hear and see in TensorBoard.

S samples, M mel bins, F frames. `Stage` sets the attribute `trainer` of each callback.
"""

import importlib.util
import logging
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback

from dataset_loading.audio.cached import AudioDataset
from dataset_loading.cached import spread
from dataset_loading.collators import collate_audio
from model.audio.configuration import MEL_FIELDS, AudioConfig
from model.audio.spectral import LogMel, MelSettings
from utils.checkpoints import resolve_checkpoint
from utils.command_line import parse_overrides
from utils.drawing.audio import TRIPLE, mel_triple, strip_sheet
from utils.drawing.images import Group
from utils.drawing.playback import add_audio
from utils.metrics.audio import PACKAGES, pesq_wb, stoi
from utils.options import declared_fields, from_preset
from utils.training.stage import Stage

logger = logging.getLogger(__name__)

MAX_FRAMES = 1024  # Longer clips are cut.
N_SCORED = 4  # Clips that PESQ and STOI are measured on.
SCORES: dict[str, Callable[[Tensor, Tensor, int], float | None]] = {"pesq": pesq_wb, "stoi": stoi}


class AudioStage(Stage):
    """A stage whose model reads or writes log-mels; subclasses state name, configuration, model, presets, trainer and
    data set.

    A new model takes the log-mel of the cache. Where `--override` names a field of it, or a checkpoint is gone on
    from, the two must be equal.
    """

    config_class: ClassVar[type[AudioConfig]]
    dataset_class: ClassVar[type[AudioDataset]] = AudioDataset

    def build_config(self):
        dataset = self.dataset_class(self.cache_dir, "train")
        self.check_checkpoint(dataset)
        fields = {field.name for field in declared_fields(self.config_class)}
        overrides = parse_overrides(self.args.override, fields)
        mel = {} if overrides.keys() & set(MEL_FIELDS) else dataset.mel.as_dict()
        config = from_preset(self.config_class, self.presets, self.args.config, **{**mel, **overrides})
        dataset.expect_mel(config.mel, "this run's --override")
        self.collator = partial(collate_audio, log_floor=config.mel.log_floor)
        return config

    def check_checkpoint(self, dataset: AudioDataset) -> None:
        """Raises: ValueError: the checkpoint to start from or go on with has another log-mel than the cache."""
        named = {"--init_from": self.args.init_from, "--resume_from_checkpoint": self.find_checkpoint()}
        for flag, path in named.items():
            if path:
                config = self.config_class.from_pretrained(resolve_checkpoint(path))
                dataset.expect_mel(config.mel, f"{flag} {path}", "or train a new model on the cache as it is")

    def build_dataset(self, split, config):
        return self.dataset_class(self.cache_dir, split).expect_mel(config.mel, "the model")


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

    def add_image(self, name: str, image: Image.Image, step: int) -> None:
        """An image under `images/`."""
        self.writer.add_image(f"images/{name}", np.asarray(image), step, dataformats="HWC")

    def add_mels(self, predicted: list[Tensor], step: int) -> None:
        """Target, prediction, difference of every clip's log-mel (M, F), and their mean absolute difference."""
        longest = max(sample["mel"].shape[1] for sample in self.samples)
        groups, distances = [], []
        for sample, mel, name in zip(self.samples, predicted, self.names):
            distances.append((mel - sample["mel"]).abs().mean().item())
            images = mel_triple(mel, sample["mel"], self.settings.log_floor, max_frames=longest)
            groups.append(Group(images, f"{distances[-1]:.3f}  {name}"))
        self.add_image("mel", strip_sheet(groups, TRIPLE), step)
        self.writer.add_scalar("listening/mel_l1", statistics.fmean(distances), step)

    def add_sounds(self, kind: str, waveforms: list[Tensor], step: int) -> None:
        """A player per clip, `sounds/<clip>_<kind>`."""
        for number, waveform in enumerate(waveforms):
            add_audio(self.writer, f"sounds/{number:02d}_{kind}", waveform, rate=self.settings.sample_rate, step=step)

    def add_scores(self, real: list[Tensor], made: list[Tensor], step: int) -> None:
        """PESQ and STOI of the first clips, where their packages are installed and the waveforms are finite."""
        pairs = [pair for pair in zip(made[:N_SCORED], real[:N_SCORED]) if pair[0].isfinite().all()]
        for name, score in SCORES.items():
            if not all(importlib.util.find_spec(package) for package in PACKAGES[name]):
                continue
            values = [score(*pair, self.settings.sample_rate) for pair in pairs]
            values = [value for value in values if value is not None]
            if values:
                self.writer.add_scalar(f"listening/{name}", statistics.fmean(values), step)
