"""Command-line flags that every training stage shares, and their translation into transformers'
`TrainingArguments`."""

import dataclasses
import logging
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from dataset_loading.remote import IS_REMOTE
from utils.options import Section, expect_preset, option

if TYPE_CHECKING:
    from transformers import TrainingArguments

logger = logging.getLogger(__name__)

SchedulerKind = Literal["constant", "constant_with_warmup", "linear", "cosine"]  # of transformers' schedulers
TrackerKind = Literal["tensorboard", "wandb", "trackio", "none"]
BatchSize = int | Literal["auto"]
TrainerKind = Literal["default", "grokfast_ema", "grokfast_ma"]  # see `trainer_class_for`


@dataclasses.dataclass
class StageArguments:
    """Flags of all training stages. A stage declares its further flags in a subclass."""

    stage: ClassVar[str] = ""  # Name of the stage, as its runs record it.
    presets: ClassVar[Mapping[str, Any]] = {}  # Rows of `model/presets.py` that --config names.

    SECTION_MODEL: ClassVar = Section("Model")
    config: str = option("tiny", "preset name of the model")
    override: list[str] = option([], "fields of the model's configuration, key=value", adds_up=True)
    SECTION_RUN: ClassVar = Section("Run")
    run_name: str = option("default", "name of the run; its folder is OUTPUT_DIR/<model type>/RUN_NAME")
    output_dir: str = option("runs", "folder of all runs")
    SECTION_DATA: ClassVar = Section("Data")
    cached_dataset: str = option(
        "", "preprocessed data set, packed ones also at a URL; default: cached_datasets/<stage>"
    )
    remote_cache_gb: float = option(
        50.0, "gigabytes of packs of a data set at a URL that lie on the local disk", gt=0, only_with=IS_REMOTE
    )
    SECTION_START: ClassVar = Section("Run")
    resume_from_checkpoint: str = option(
        "", "checkpoint or run folder to resume from, or 'latest' of this run", bare="latest"
    )
    init_from: str = option("", "run, checkpoint, or folder of diffusers or a Llama, whose weights initialise a run")
    dry_run: bool = option(False, "print configuration, parameter and data counts and a memory estimate, then exit")
    measure: int = option(
        0,
        "real steps of each phase that are made and timed to print peak memory, speed and hours, then exit; 0: train",
        ge=0,
        bare=10,
        only_with=("dry_run", False),
    )

    SECTION_LENGTH: ClassVar = Section("Training")
    num_train_epochs: float = option(
        100.0,
        "passes over the training set; ignored where max_steps is given",
        gt=0,
        aliases=("num_train_epoch",),
    )
    max_steps: int = option(-1, "optimizer steps; -1: given by num_train_epochs", ge=-1)
    batch_size: BatchSize = option(16, "samples per micro-batch and process; auto: as many as fit", gt=0)
    eval_batch_size: int = option(16, "samples per batch and process in evaluation", gt=0)
    gradient_accumulation_steps: int = option(1, "micro-batches per optimizer step", gt=0)
    num_workers: int = option(
        -1, "data loading processes per rank; 0: in the training process; -1: up to 4 with a GPU, else 0", ge=-1
    )
    seed: int = option(42, "seed of weights, data order and noise", ge=0, lt=2**32)

    SECTION_OPTIMIZER: ClassVar = Section("Optimizer")
    learning_rate: float = option(1e-4, "peak learning rate of AdamW", gt=0)
    weight_decay: float = option(0.0, "decoupled weight decay of matrices and kernels", ge=0)
    adam_beta1: float = option(0.9, "decay of AdamW's first moment", ge=0, lt=1)
    adam_beta2: float = option(0.99, "decay of AdamW's second moment", ge=0, lt=1)
    max_grad_norm: float = option(1.0, "maximum gradient norm, to which gradients are clipped; 0: no clipping", ge=0)
    lr_scheduler_type: SchedulerKind = option("cosine", "schedule of the learning rate")
    warmup_ratio: float = option(0.02, "fraction of the steps with linear warm-up", ge=0, lt=1)
    trainer: TrainerKind = option("default", "trainer with or without a GrokFast gradient filter")
    grokfast_alpha: float = option(
        0.98, "decay of the GrokFast EMA filter", ge=0, lt=1, only_with=("trainer", "grokfast_ema")
    )
    grokfast_lambda: float = option(
        2.0,
        "GrokFast's amplification of the slow gradient",
        ge=0,
        only_with=("trainer", ("grokfast_ema", "grokfast_ma")),
    )
    grokfast_window: int = option(100, "steps in the GrokFast MA window", gt=0, only_with=("trainer", "grokfast_ma"))
    max_skipped_steps: int = option(10, "consecutive non-finite optimizer steps after which the run ends", gt=0)

    SECTION_AVERAGE: ClassVar = Section("Averaged weights")
    use_ema: bool = option(True, "keep an exponential moving average of the weights; evaluation and saving use it")
    ema_decay: float = option(
        0.999, "decay of the weight EMA after its warm-up", ge=0, lt=1, only_with=("use_ema", True)
    )

    SECTION_ENGINE: ClassVar = Section("Engine: speed and memory")
    bf16: bool = option(False, "bfloat16 autocast over fp32 weights")
    tf32: bool = option(False, "compute fp32 in TensorFloat-32 on an NVIDIA GPU: faster, less exact")
    deterministic: bool = option(
        False, "on a GPU: only kernels with bitwise reproducible results; slower (CPU kernels always are)"
    )
    use_gradient_checkpointing: bool = option(False, "recompute blocks in the backward pass to save memory")
    compile_model: bool = option(
        False, "torch.compile the blocks of a transformer, or another model as a whole; GPUs only"
    )
    use_deepspeed: bool = option(False, "train with the DeepSpeed engine")
    deepspeed_config: str = option(
        "ds_config_zero-2.json", "DeepSpeed configuration file", only_with=("use_deepspeed", True)
    )

    SECTION_LOGS: ClassVar = Section("Logs, evaluation and checkpoints")
    logging_steps: int = option(10, "steps between log lines", gt=0)
    report_to: list[TrackerKind] = option(
        ["tensorboard"], "where numbers, images and sounds are shown, besides log lines"
    )
    eval_steps: int = option(500, "steps between evaluations", gt=0)
    save_steps: int = option(500, "steps between checkpoints", gt=0)
    save_total_limit: int = option(3, "number of complete checkpoints to keep", gt=0)
    async_save: bool = option(
        False, "copy a checkpoint to host memory, and write it by a thread while training goes on"
    )

    def validate_config(self):
        if Path(self.config).suffix in (".yaml", ".yml", ".json"):
            raise ValueError(f"--config={self.config!r} names a preset of the model; a file is given by --config_file")
        if self.presets:
            expect_preset(self.config, self.presets)

    def validate_length(self):
        if self.max_steps == 0:
            raise ValueError("--max_steps=0 trains nothing; give a positive number, or -1 to use --num_train_epochs")

    def validate_batch_size(self):
        if self.batch_size == "auto" and self.dry_run:
            raise ValueError(
                "--batch_size=auto is found by real steps, which --dry_run does not make; give a number, or --measure "
                "in its place"
            )

    def validate_report_to(self):
        if not self.report_to or ("none" in self.report_to and len(set(self.report_to)) > 1):
            raise ValueError(f"--report_to={self.report_to} must name trackers, or none alone")

    def validate_run_name(self):
        parts = Path(self.run_name).parts
        problem = ""
        if not self.run_name.strip() or not parts:
            problem = "is empty"
        elif self.run_name.startswith(("/", "~")) or ".." in parts:
            problem = f"leaves the folder of runs, {self.output_dir}"
        elif any(re.fullmatch(r"checkpoint-\d+", part) for part in parts):
            problem = "looks like a checkpoint of a run"
        elif not self.run_name.isprintable():
            problem = "has characters that cannot be printed"
        elif sys.platform == "win32" and set(self.run_name) & set('<>:"|?*'):
            problem = 'has one of <>:"|?*, which names of files cannot have on Windows'
        if problem:
            raise ValueError(f"--run_name={self.run_name!r} {problem}; give a name such as 'demo'")

    def validate_device(self):
        if not self.tf32:
            return
        # It takes a second, which --help and a mistyped flag need not wait for.
        import torch

        if not torch.cuda.is_available():
            raise ValueError("--tf32 has no effect: this machine has no NVIDIA GPU; leave it out")

    def validate_files(self):
        if self.use_deepspeed and not Path(self.deepspeed_config).is_file():
            raise ValueError(f"--deepspeed_config={self.deepspeed_config!r} does not exist")

    def validate_async_save(self):
        if not (self.async_save and self.use_deepspeed and Path(self.deepspeed_config).is_file()):
            return
        # It imports torch, see `validate_device`.
        from utils.distributed import load_deepspeed_config

        config = load_deepspeed_config(self.deepspeed_config)
        for section in ("nebula", "datastates_ckpt", "checkpoint"):
            if section in config and (section != "checkpoint" or "writer" in config[section]):
                raise ValueError(
                    f"--async_save: {self.deepspeed_config} chooses a writer of DeepSpeed's own by {section!r}; "
                    "leave one of the two out"
                )


def training_arguments(args: StageArguments, run_dir: Path) -> "TrainingArguments":
    """The stage's flags as transformers' TrainingArguments, for CPU or GPU and any launcher.

    `--bf16` is autocast over fp32 weights in every engine: transformers' own flag without DeepSpeed, the
    `torch_autocast` section with it (transformers' flag would make DeepSpeed keep and save bfloat16 weights).
    """
    # They take five seconds, which --help and a mistyped flag need not wait for.
    import torch
    from transformers import TrainingArguments

    from utils.devices import (
        compute_device,
        computes_bf16,
        feeding,
        local_processes,
        set_fp32_precision,
        usable_cpus,
        use_deterministic_kernels,
    )
    from utils.distributed import launch_settings, launched_rank

    assert isinstance(args.batch_size, int), "`settle_batch_size` comes first"
    # Precision and determinism are settings of the process, to be made before the first computation.
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        set_fp32_precision(args.tf32)
        if args.deterministic:
            use_deterministic_kernels()
    elif args.bf16 and launched_rank() == 0 and compute_device().type == "cpu" and not computes_bf16():
        logger.warning("--bf16: this CPU has no instructions for bf16, so fp32 is several times as fast; leave it out")
    launch = launch_settings(args.use_deepspeed, args.deepspeed_config, args.bf16)
    feed = feeding(args.num_workers, has_gpu=has_gpu, n_cores=usable_cpus(), n_processes=local_processes())
    feed["accelerator_config"] |= launch.pop("accelerator_config", {})
    # Newer transformers name gradient checkpointing so, and warn of the old name.
    kind = "activation" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient"
    # The flags under transformers' names.
    arguments = TrainingArguments(
        output_dir=str(run_dir),
        run_name=args.run_name,
        num_train_epochs=args.num_train_epochs,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.eval_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        seed=args.seed,
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        adam_beta1=args.adam_beta1,
        adam_beta2=args.adam_beta2,
        max_grad_norm=args.max_grad_norm,
        lr_scheduler_type=args.lr_scheduler_type,
        warmup_steps=args.warmup_ratio,  # A number below 1 is a fraction of the steps.
        **{
            f"{kind}_checkpointing": args.use_gradient_checkpointing,
            f"{kind}_checkpointing_kwargs": {"use_reentrant": False},  # The other one needs an input with a gradient.
        },
        logging_steps=args.logging_steps,
        logging_nan_inf_filter=False,  # The filter would log the mean loss in place of a non-finite one.
        eval_strategy="steps",
        eval_steps=args.eval_steps,
        save_strategy="steps",
        save_steps=args.save_steps,
        save_total_limit=None,  # Complete checkpoints are counted by our own rotation.
        remove_unused_columns=False,  # Trainers read `index`, which no forward takes.
        ddp_find_unused_parameters=False,
        disable_tqdm=True,  # Instead of a bar: `LogLinesCallback`.
        report_to="none",  # Stages write TensorBoard logs themselves.
        **feed,
        **launch,
    )
    # Without a launcher transformers would spread each batch over all GPUs by nn.DataParallel, unknown to the stages.
    if arguments.n_gpu > 1:
        logger.warning(
            "one of %d GPUs is used; start one process per GPU by `torchrun --nproc_per_node` or `deepspeed`",
            arguments.n_gpu,
        )
        arguments._n_gpu = 1
    return arguments
