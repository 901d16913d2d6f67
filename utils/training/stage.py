"""The training driver: a stage states what differs (model, data, losses), `Stage.main` does the rest in one order."""

import dataclasses
import logging
import shlex
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from torch import nn
from torch.utils.data import Dataset
from torch.utils.tensorboard import SummaryWriter
from transformers import PrinterCallback, TrainerCallback, set_seed

from dataset_loading.collators import collate_stack
from dataset_loading.epoch_sampler import FORMER_ORDER, ORDER, EpochSampler
from dataset_loading.remote import local_path, open_remote
from utils.checkpoints import (
    check_files,
    checkpoints_in,
    log_folder,
    newest_complete,
    provenance,
    resolve_checkpoint,
    step_of,
)
from utils.command_line import explained_errors, parse_arguments, parse_overrides
from utils.devices import compile_in_place
from utils.distributed import barrier, ending_together, from_main, launched_rank, rank, world_size
from utils.megatransformer_utils import StageArguments, training_arguments
from utils.options import declared_fields, from_preset
from utils.resuming.callback import ResumeCallback
from utils.resuming.flags import Resumption, check_resumable, resume_arguments
from utils.resuming.run_lock import learn_refusal, only_run
from utils.saving import set_aside
from utils.strict_config import StrictConfig
from utils.training.callbacks import EvaluationCallback, ScalarLogsCallback, StopOnSignalCallback
from utils.training.initial_weights import adapt, initial_model
from utils.training.log_lines import LogLinesCallback, say
from utils.training.planning.batch_size import settle_batch_size
from utils.training.planning.dry_run import describe
from utils.training.planning.measure import report, try_batch_size
from utils.training.planning.memory import n_trained
from utils.training.planning.phases import first_steps
from utils.training.trackers import open_writer, tracker_module
from utils.training_utils import StageTrainer, expected_steps, trainer_class_for

logger = logging.getLogger(__name__)


class Stage:
    """One training stage. Subclasses state the class attributes and the `build_*` methods; nothing overrides
    `main`."""

    name: ClassVar[str]
    cache_name: ClassVar[str] = ""  # The data's stage, for the default folder; default: `name`.
    arguments_class: ClassVar[type[StageArguments]] = StageArguments
    config_class: ClassVar[type[StrictConfig]]
    model_class: ClassVar[type]
    presets: ClassVar[Mapping[str, Any]]  # name -> fields of the configuration, or another name
    trainer_class: ClassVar[type[StageTrainer]]

    def __init__(self, args: Any):
        self.args = args
        self.run_dir = Path(args.output_dir) / self.name / args.run_name
        self.cache_dir = local_path(args.cached_dataset or f"cached_datasets/{self.cache_name or self.name}")

    # ---- What a stage states.

    def prepare(self) -> None:
        """Tokenise texts, load frozen networks: whatever must be there before the configuration is known or a model
        can be built. No other method that a stage states has side effects, and a dry run skips this one. All processes
        call it, before they are connected."""

    def unprepared(self) -> str:
        """What `prepare` would write to the disk, in words, "" for nothing; a dry run can count only in the latter
        case."""
        return ""

    def build_dataset(self, split: str, config: StrictConfig) -> Dataset:
        """The `train` or `validation` part of the cache, checked against the model's configuration."""
        raise NotImplementedError

    def build_collator(self, config: StrictConfig) -> Callable[[list[dict]], dict]:
        """The function that joins samples into a batch."""
        return collate_stack

    def build_trainer_parts(self, model: nn.Module) -> dict[str, Any]:
        """Further keywords of the trainer: loss, adversary."""
        return {}

    def build_callbacks(self, trainer: StageTrainer, writer: SummaryWriter | None) -> list[EvaluationCallback]:
        """What the stage shows of its model in TensorBoard; `writer` is None except on rank 0."""
        return []

    def count_steps(self, dataset: Dataset, n_ranks: int) -> tuple[int, str]:
        """Optimizer steps of a run on `n_ranks` processes, and what one of them holds, in words.

        Raises: ValueError: a step has more samples than there are.
        """
        per_step = self.args.batch_size * self.args.gradient_accumulation_steps * n_ranks
        epochs, max_steps = self.args.num_train_epochs, self.args.max_steps
        EpochSampler(len(dataset), per_step, self.args.seed)  # Raises where a step has more samples than there are.
        return expected_steps(len(dataset), per_step, epochs=epochs, max_steps=max_steps), f"{per_step} samples"

    def extra_record(self) -> dict[str, Any]:
        """Content of `stage.json` beyond what all stages have."""
        return {}

    def evaluation_flags(self) -> dict[str, str]:
        """Flags of `evaluate.py`, by name, that measure the run with what it was given: its vocoder, its text
        encoder."""
        names = ("vocoder_checkpoint", "text_encoder")
        return {name: getattr(self.args, name) for name in names if getattr(self.args, name, "")}

    # ---- What all stages do.

    @classmethod
    def main(cls, argv: list[str] | None = None) -> dict[str, float]:
        """Parse, check, build, train or resume, save, evaluate; returns the last evaluation's metrics."""
        set_up_logging()
        with explained_errors(logger):
            doc = sys.modules[cls.__module__].__doc__ or cls.name
            args = parse_arguments(cls.arguments_class, argv, doc, complete=cls.complete_arguments)
            with ending_together():
                return cls(args).run()

    @classmethod
    def complete_arguments(cls, args: Any) -> None:
        """Where a run is resumed: give flags that were not given the values of its checkpoint, and refuse others."""
        # A checkpoint that is named by its path is continued in its run's folder, unless another one is named.
        path = args.resume_from_checkpoint
        if path not in ("", "latest") and not {"run_name", "output_dir"} & set(args.given):
            run_dir = resolve_checkpoint(path).resolve().parent
            if run_dir.parent.name == cls.name:
                args.run_name, args.output_dir = run_dir.name, str(run_dir.parent.parent)
        folder = cls(args).find_checkpoint()
        args.resumption = resume_arguments(args, folder, cls.name, cls.config_class) if folder else None

    def run(self) -> dict[str, float]:
        """A dry run, measured steps, or a run that no other one disturbs."""
        open_remote(self.args.cached_dataset, self.args.remote_cache_gb)
        if self.args.dry_run:
            describe(self)
            return {}
        if self.args.measure:
            report(self)
            return {}
        with only_run(self.run_dir, lambda: training_arguments(self.args, self.run_dir)):
            return self.run_alone()

    def run_alone(self) -> dict[str, float]:
        """The order of every stage."""
        # Errors of folders, configuration and data are raised before the model exists.
        self.check_run()
        self.prepare()
        config = self.build_config()
        datasets = self.build_datasets(config)
        settle_batch_size(self, len(datasets["train"]), try_batch_size)

        # The random numbers of a run begin at `set_seed`: weights come first, then the trainer's parts.
        training = training_arguments(self.args, self.run_dir)
        learn_refusal()
        set_seed(self.args.seed)
        model = self.build_trained_model(config)
        # The checkpoint to go on from, where rank 0 sees one; all processes agree.
        checkpoint = from_main(str(self.find_checkpoint() or "")) or None
        n_steps, _ = self.count_steps(datasets["train"], world_size())
        if self.resumption is not None:
            check_resumable(
                self.resumption,
                model,
                zero_stage=zero_stage_of(training),
                n_ranks=world_size(),
                fingerprint=datasets["train"].fingerprint,
                settings_fingerprint=getattr(datasets["train"], "settings_fingerprint", ""),
                args=self.args,
                n_steps=n_steps,
            )
            for line in self.resumption.describe():
                logger.info("%s", line)
        trainer = self.build_trainer(model, datasets, training, n_steps=n_steps)
        # In place, so that parameters keep their names in checkpoints.
        if self.args.compile_model:
            compile_in_place(model)

        # Train, save the last step, and evaluate it.
        if self.resumption is not None and self.resumption.step < n_steps:
            self.abandon_checkpoints_after(self.resumption.step)
        with trainer.background:
            trainer.train(resume_from_checkpoint=checkpoint)
            if trainer.has_trained:
                trainer._save_checkpoint(trainer.model_wrapped, None)
                trainer.warn_of_skipped_steps()
            else:
                logger.info("%s has made all its steps; nothing is trained or saved", checkpoint)
            metrics = {} if self.stopping.stopped_by else trainer.final_metrics()
        if rank() == 0 and not self.stopping.stopped_by:
            flags = {"checkpoint": str(self.run_dir), **self.evaluation_flags()}
            command = ["python", "evaluate.py", *(word for name in flags for word in (f"--{name}", flags[name]))]
            say(f"weights: {newest_complete(self.run_dir)}\nnext: {shlex.join(command)}")
        if self.writer is not None:
            self.writer.close()  # Its thread must not outlive the run.
        self.stopping.end_as_signalled()
        return metrics

    def build_config(self) -> StrictConfig:
        """The model's configuration from the preset and the overrides; it may read what is on disk, and changes
        nothing."""
        fields = {field.name for field in declared_fields(self.config_class)}
        return from_preset(
            self.config_class, self.presets, self.args.config, **parse_overrides(self.args.override, fields)
        )

    def build_model(self, config: StrictConfig) -> nn.Module:
        """A new model, or one with the weights of another one, see `initial_model`."""
        path = self.args.init_from
        if not path:
            return self.model_class(config)
        return initial_model(self.model_class, path, config, stage=self.name, presets=self.presets)

    def build_trained_model(self, config: StrictConfig) -> nn.Module:
        """That model, frozen and with adapters where `--lora_rank` asks for them."""
        model = self.build_model(config)
        if layers := adapt(model, self.args, has_weights=self.has_weights):
            total, trained = sum(parameter.numel() for parameter in model.parameters()), n_trained(model)
            logger.info(
                "LoRA on %d linear layers: %d parameters are trained, %d are frozen",
                len(layers),
                trained,
                total - trained,
            )
        return model

    @property
    def has_weights(self) -> bool:
        """Whether the run begins with trained weights: of `--init_from`, or of the checkpoint that is resumed."""
        return bool(self.args.init_from) or self.resumption is not None

    def build_datasets(self, config: StrictConfig) -> dict[str, Dataset]:
        """Training and validation set by name."""
        return {split: self.build_dataset(split, config) for split in ("train", "validation")}

    def check_run(self) -> None:
        """Raises: ValueError: the run would be mixed with another one in its folder, be compiled for a CPU, or report
        to a tracker that is not installed."""
        # A checkpoint of another folder is continued in an empty one.
        goes_on_here = self.args.resume_from_checkpoint == "latest" or (
            self.resumption is not None and self.resumption.folder.resolve().parent == self.run_dir.resolve()
        )
        if not goes_on_here and checkpoints_in(self.run_dir):
            raise ValueError(
                f"{self.run_dir} already holds {checkpoints_in(self.run_dir)[-1].name}; pass --resume_from_checkpoint "
                "to go on with that run, or another --run_name"
            )
        for name in {"wandb", "trackio"} & set(self.args.report_to):
            tracker_module(name)  # It is missing now, not after the model is built.
        if self.args.compile_model and not torch.cuda.is_available():
            raise ValueError(
                "--compile_model needs a GPU: the CPU kernels that torch 2.11 compiles here write out of bounds"
            )

    @property
    def resumption(self) -> Resumption | None:
        """What is resumed, None in a new run."""
        return getattr(self.args, "resumption", None)

    def abandon_checkpoints_after(self, step: int) -> None:
        """Set the later checkpoints of the run aside, where it goes on from an earlier one."""
        if rank() == 0:
            set_aside(self.run_dir, [folder for folder in checkpoints_in(self.run_dir) if step_of(folder) > step])
        barrier()

    def find_checkpoint(self) -> Path | None:
        """The checkpoint to resume from, None for a new run: `latest` of a run that has no checkpoint yet is one."""
        path = self.args.resume_from_checkpoint
        if self.resumption is not None or not path:
            return self.resumption and self.resumption.folder
        if path == "latest":
            return newest_complete(self.run_dir, check=True)
        check_files(folder := resolve_checkpoint(path))
        return folder

    def build_trainer(self, model, datasets, training, *, n_steps: int) -> StageTrainer:
        """The trainer with its parts, callbacks and the record that goes into every checkpoint."""
        # Rank 0 alone has a writer; what was logged after the step that a run goes on from is no longer shown.
        # Callbacks that need the trainer are added once it exists.
        # A finished run logs nothing: another file of events would make it look alive.
        is_finished = self.resumption is not None and self.resumption.step >= n_steps
        purge_step = self.resumption.step + 1 if self.resumption is not None else None
        self.writer = self.open_writer(purge_step) if rank() == 0 and not is_finished else None
        self.stopping = StopOnSignalCallback()
        callbacks: list[TrainerCallback] = [self.stopping]
        if self.writer is not None:
            callbacks.append(ScalarLogsCallback(self.writer))
            self.writer.add_text("configuration", f"```\n{model.config.describe()}\n```")
        trainer = trainer_class_for(self.args.trainer, self.trainer_class)(
            model=model,
            args=training,
            train_dataset=datasets["train"],
            eval_dataset=datasets["validation"],
            data_collator=self.build_collator(model.config),
            callbacks=callbacks,
            stage_arguments=self.args,
            stage_record=self.record(datasets["train"], zero_stage_of(training), n_steps),
            **self.build_trainer_parts(model),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(LogLinesCallback(first_steps(vars(self.args)).values()))
        if self.resumption is not None:
            trainer.add_callback(ResumeCallback(trainer))
        # Callbacks that read the trainer's model and validation set.
        for callback in self.build_callbacks(trainer, self.writer):
            trainer.add_callback(callback)
        return trainer

    def open_writer(self, purge_step: int | None) -> Any:
        """What the run reports to, by `--report_to`."""
        flags = dataclasses.asdict(self.args)
        names = {"project": self.name, "run": self.args.run_name, "flags": flags, "purge_step": purge_step}
        return open_writer(self.args.report_to, str(log_folder(self.run_dir)), **names)

    def record(self, dataset: Dataset, zero_stage: int, n_steps: int) -> dict:
        """Content of `stage.json`: what this run is, so that later stages and resumed runs can check it."""
        past = {"arguments": dataclasses.asdict(self.args), "run_lengths": [[0, n_steps]], "changes": []}
        if self.resumption is not None:
            past = self.resumption.record_of(self.args, self.run_dir, n_steps)
        order = ORDER if self.resumption is None else self.resumption.record.get("sample_order", FORMER_ORDER)
        return {
            "stage": self.name,
            "preset": self.args.config,
            **past,
            "sample_order": order,
            "data": {
                "folder": str(self.cache_dir),
                "fingerprint": dataset.fingerprint,
                "settings_fingerprint": getattr(dataset, "settings_fingerprint", ""),
            },
            "zero_stage": zero_stage,
            "n_ranks": world_size(),
            **self.extra_record(),
            **provenance(),
        }


def zero_stage_of(training) -> int:
    """ZeRO stage of the run, -1 without DeepSpeed."""
    return -1 if training.deepspeed is None else training.deepspeed.get("zero_optimization", {}).get("stage", 0)


def set_up_logging() -> None:
    """Log lines of rank 0 at INFO, of other ranks from WARNING on."""
    # The process group does not exist yet: the rank is that of the launcher.
    level = logging.INFO if launched_rank() == 0 else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    # Libraries log from WARNING on.
    transformers.utils.logging.set_verbosity_warning()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # It warns of flags that differ from those of a resumed checkpoint; they take effect here.
    logging.getLogger("transformers.trainer_utils").setLevel(logging.ERROR)
    # Kernels of 1x1 have two layouts that are the same memory; DDP sees a difference and copies them, which is right.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
