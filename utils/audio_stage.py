"""What the stages that train on preprocessed sound share: one definition of the log-mel in cache, model and
checkpoints."""

from functools import partial
from typing import ClassVar

from dataset_loading.audio_dataset import AudioDataset
from dataset_loading.collators import collate_audio
from model.audio.configuration import MEL_FIELDS, AudioConfig
from utils.checkpoints import resolve_checkpoint
from utils.configuration import declared_fields, from_preset
from utils.megatransformer_utils import parse_overrides
from utils.stage import Stage


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
