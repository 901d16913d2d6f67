"""Resuming a run: which flags may change, which values the others take, and what a checkpoint must hold.

The same command resumed is the same run. A flag that is not given has the value that the run had before; one that is
given with another value takes effect from the checkpoint on, or is refused, as `ON_RESUME` decides.
"""

import dataclasses
import logging
from pathlib import Path
from typing import Any

from torch import nn

from utils.checkpoints import STAGE, step_of
from utils.options import (
    check_effects,
    check_type,
    declared_fields,
    default_value,
    inherited,
    type_name,
    validate_fields,
)
from utils.resuming.saved_files import check_engine, check_model, check_states, new_run, read_run, read_state
from utils.strict_config import StrictConfig

logger = logging.getLogger(__name__)

# What another value of a flag means on resume.
CALL = "belongs to the command, not to the run"
START = "acts before the first step only: it is neither taken over nor changed"
MODEL = "must give the model of the checkpoint"
SAMPLES = "may change as long as an optimizer step has as many samples"
FIXED = "cannot change"
SWITCH = "may change, but not to zero or from zero"
UNREACHED = "may change until that step is reached"
CHANGES = "takes effect from the checkpoint on"

# What is trained and at which rate: the state of the optimizer belongs to its groups.
OPTIMIZER_GROUPS = ("freeze", "learning_rates", "lora_rank", "lora_alpha", "lora_modules")
# Every flag of every training stage, decided once.
ON_RESUME: dict[str, str] = {
    name: kind
    for kind, names in {
        CALL: ["run_name", "output_dir", "resume_from_checkpoint", "dry_run", "measure"],
        # The texts themselves are compared by the fingerprint of their cache.
        START: [
            *("init_from", "text_dataset", "text_column", "text_config", "text_split", "validation_dataset"),
            *("validation_split", "validation_fraction", "max_broken_fraction", "tokenizer", "tokenizer_vocab_size"),
            *("keep_duplicates", "document_bytes"),
        ],
        MODEL: ["config", "override"],
        SAMPLES: ["batch_size", "batch_frames", "batch_tokens", "gradient_accumulation_steps"],
        # Data order and noise, the shape of the discriminator.
        FIXED: [
            *("seed", "sequence_length", "include_modes", "use_speakers", "max_clip_frames"),
            *("tasks", "caption_tokenizer", "caption_vocab_size"),
            *OPTIMIZER_GROUPS,
            *("discriminator", "discriminator_channels", "discriminator_layers", "use_spectral_norm"),
            *("discriminator_periods", "discriminator_resolutions", "discriminator_widening"),
        ],
        # Zero: no discriminator, no CTC head.
        SWITCH: ["gan_weight", "ctc_weight"],
        UNREACHED: ["gan_start_step"],
        CHANGES: [
            # Length, data and networks, which are compared by their fingerprints; optimizer and average.
            *(
                "remote_cache_gb",
                "num_train_epochs",
                "max_steps",
                "cached_dataset",
                "vae_checkpoint",
                "vae_config",
                "vocoder_checkpoint",
            ),
            *("image_latents", "audio_latents", "image_vae_checkpoint", "audio_vae_checkpoint", "image_vae_config"),
            *("audio_vae_config",),
            *("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "max_grad_norm", "lr_scheduler_type"),
            *("warmup_ratio", "max_skipped_steps", "use_ema", "ema_decay"),
            *("trainer", "grokfast_alpha", "grokfast_lambda", "grokfast_window"),
            # Speed and memory; ZeRO's stage is compared by `check_engine`.
            *("bf16", "tf32", "deterministic", "use_gradient_checkpointing", "compile_model", "use_deepspeed"),
            *("deepspeed_config", "num_workers", "eval_batch_size", "flex_attention"),
            # Logs, evaluation, checkpoints.
            *(
                "logging_steps",
                "report_to",
                "eval_steps",
                "save_steps",
                "save_total_limit",
                "n_logged_samples",
                "n_samples",
            ),
            *("async_save", "wer_samples"),
            *("latent_statistics_samples", "sample_tokens", "eval_thinking_steps", "n_time_buckets", "prompts"),
            *("n_prompts", "eval_images", "grid_scales", "sampler", "n_steps", "guidance_scale", "guidance_interval"),
            *("guidance_rescale", "temperature", "text_encoder"),
            # Losses.
            *("l1_weight", "l2_weight", "gradient_weight", "perceptual_weight", "perceptual"),
            *("perceptual_start_step", "kl_weight"),
            *("latent_noise",),
            *("intermediate_weight", "distillation_weight", "mel_weight", "stft_weight", "stft_resolutions"),
            *(
                "phase_weight",
                "complex_stft_weight",
                "channel_weight_power",
                "latent_weight_power",
                "loss_weighting",
                "min_snr_gamma",
            ),
            # The adversary's training.
            *("gan_loss", "gan_warmup_steps", "gan_ramp_steps", "use_adaptive_gan_weight", "feature_matching_weight"),
            *("discriminator_every", "discriminator_learning_rate", "discriminator_beta1", "r1_weight", "r1_every"),
            *("lecam_weight", "diff_augment"),
            # What a step samples: crops, times, captions, numbers of steps.
            *("segment_frames", "caption_dropout", "time_sampling", "time_mean", "time_std"),
            *("mean_decoder_steps", "decoder_steps_sigma", "min_decoder_steps", "max_decoder_steps"),
            *("n_backprop_steps", "recurrent_steps_per_rank", "recurrent_curriculum"),
            # Speech.
            *("prior_weight", "duration_weight", "duration_samples", "sentences"),
        ],
    }.items()
    for name in names
}


@dataclasses.dataclass
class Resumption:
    """A checkpoint from which a run goes on.

    Attributes:
        folder: the checkpoint.
        record: its `stage.json`.
        old_arguments: flags that the run had so far, under today's names.
        changes: flag -> (old value, new value).
    """

    folder: Path
    record: dict[str, Any]
    old_arguments: dict[str, Any]
    changes: dict[str, tuple[Any, Any]]

    @property
    def step(self) -> int:
        """The optimizer step of the checkpoint."""
        return step_of(self.folder)

    def describe(self) -> list[str]:
        """The checkpoint, and what changes, a line each."""
        changes = [f"--{name} from step {self.step} on: {old} -> {new}" for name, (old, new) in self.changes.items()]
        return [f"resuming from {self.folder}", *changes]

    def run_lengths(self, n_steps: int) -> list[list[int]]:
        """(step, length of the run from this step on), see `utils/resuming/schedules.py`.

        Args: n_steps: length of the resumed run.
        """
        if self.changes.keys() & {"lr_scheduler_type", "warmup_ratio"}:
            return [[0, n_steps]]  # Another schedule, as if it had been given from the first step on.
        lengths = self.record.get("run_lengths") or [[0, read_state(self.folder).max_steps]]
        return lengths if lengths[-1][1] == n_steps or n_steps <= self.step else [*lengths, [self.step, n_steps]]

    def record_of(self, args: Any, run_dir: Path, n_steps: int) -> dict[str, Any]:
        """Entries of the resumed run's `stage.json`: its flags and lengths, and what was changed at which step."""
        # Flags that act before the first step are still those of that time.
        start = {name: value for name, value in self.old_arguments.items() if ON_RESUME.get(name) == START}
        changes = list(self.record.get("changes", []))
        if self.changes or run_dir.resolve() != self.folder.parent.resolve():
            changes.append({"step": self.step, "from": str(self.folder), "flags": self.changes})
        return {
            "arguments": {**dataclasses.asdict(args), **start},
            "run_lengths": self.run_lengths(n_steps),
            "changes": changes,
        }


# ---- Flags.


def resume_arguments(args: Any, folder: Path, stage: str, config_class: type[StrictConfig]) -> Resumption:
    """Give flags that were not given the values that a checkpoint's run had, and check the others.

    Args:
        args: flags of this command, with the names of the given ones in `given`; changed in place.
        folder: the checkpoint to resume.
        stage: name of the stage.
    Raises:
        ValueError: a flag differs that cannot change, or a file of the checkpoint is not what it should be.
    """
    record = read_run(folder, stage)
    check_states(folder, record, config_class)
    old = recorded_arguments(type(args), record["arguments"], folder / STAGE)
    if args.batch_size == "auto":  # The run goes on with what it has found.
        args.given = [name for name in args.given if name != "batch_size"]
    take_over(args, old, folder / STAGE)
    changes = {name: (value, getattr(args, name)) for name, value in old.items() if getattr(args, name) != value}
    resumption = Resumption(folder, record, old, {})
    for name, values in changes.items():
        check_change(name, *values, folder=folder, is_given=name in args.given)
        if ON_RESUME.get(name) not in (CALL, START, MODEL):
            resumption.changes[name] = values
    args.init_from = ""  # The weights come from the checkpoint.
    return resumption


def recorded_arguments(arguments_class: type, recorded: dict[str, Any], file: Path) -> dict[str, Any]:
    """The recorded flags under today's names; those that do not exist any more, or did not exist then, are named in
    the log."""
    known = [field.name for field in declared_fields(arguments_class)]
    current = {alias: name for name in known for alias in inherited(arguments_class, name, "aliases") or ()}
    values = {current.get(name, name): value for name, value in recorded.items()}
    # Before these flags, all weights were trained, at one rate.
    former = {field.name: default_value(field) for field in declared_fields(arguments_class)}
    values = {**{name: former[name] for name in OPTIMIZER_GROUPS if name in former}, **values}
    # Records of other versions.
    if unknown := {name: value for name, value in values.items() if name not in known}:
        logger.warning("%s: this version has no flags %s, which are left out", file, unknown)
    if missing := [name for name in known if name not in values and ON_RESUME.get(name) != CALL]:
        logger.warning("%s has no values of --%s; those of this command are used", file, ", --".join(missing))
    return {name: values[name] for name in known if name in values}


def take_over(args: Any, old: dict[str, Any], file: Path) -> None:
    """Give flags that were not given their recorded values.

    Raises: ValueError: a recorded value is none of the flag, or does not go together with the given flags.
    """
    taken, fields = {}, {field.name: field for field in declared_fields(args)}
    # Overrides are named one by one: those that were not given are taken over too.
    if "override" in args.given and isinstance(old.get("override"), list):
        fields_given = {pair.partition("=")[0] for pair in args.override}
        forgotten = [pair for pair in old["override"] if str(pair).partition("=")[0] not in fields_given]
        args.override, taken = [*forgotten, *args.override], {"override": forgotten} if forgotten else {}
    for name, value in old.items():
        if name in args.given or ON_RESUME.get(name) in (CALL, START):
            continue
        if name == "max_steps" and "num_train_epochs" in args.given:  # It would make the given length ineffective.
            continue
        if not check_type(value, fields[name].type):
            raise ValueError(
                f"{file}: arguments.{name}={value!r} must be {type_name(fields[name].type)}; the file is damaged, or "
                f"of another version. Give --{name}, or {new_run(file.parent)}"
            )
        setattr(args, name, value)
        if value != default_value(fields[name]):
            taken[name] = value
    if not taken:
        return
    logger.info("flags that are not given are those of %s: %s", file, taken)
    try:
        validate_fields(args, "--{}")
        check_effects(args, args.given, "--{name}")
    except ValueError as error:
        raise ValueError(f"{error} (flags that are not given are those of {file}; give them to change them)") from None


def check_change(name: str, old: Any, new: Any, *, folder: Path, is_given: bool) -> None:
    """Raises: ValueError: the flag cannot change from its old to its new value at this checkpoint."""
    kind, step, reason = ON_RESUME.get(name, FIXED), step_of(folder), ""
    if kind == FIXED:
        reason = "it cannot change within a run"
    elif kind == SWITCH and bool(old) != bool(new):
        reason = "it cannot change to zero or from zero within a run"
    elif kind == UNREACHED and step > min(old, new):
        reason = f"it cannot change once that step is reached, and the checkpoint is at step {step}"
    if name == "init_from" and is_given and Path(old).resolve() != Path(new).resolve():
        reason = "the weights of a resumed run come from its checkpoint"
    if reason:
        raise ValueError(
            f"{folder} was trained with --{name} {shown(old)}, this run has {shown(new)}: {reason}. Give the same or "
            f"leave it out, or {new_run(folder)}"
        )


def shown(value: Any) -> str:
    """A flag's value as on the command line."""
    return " ".join(map(str, value)) if isinstance(value, list) else repr(value) if value == "" else str(value)


# ---- What this run has: model, data, engine, length.


def check_resumable(
    resumption: Resumption,
    model: nn.Module,
    *,
    zero_stage: int,
    n_ranks: int,
    fingerprint: str,
    settings_fingerprint: str = "",
    args: Any,
    n_steps: int,
) -> None:
    """Check that this run can go on from a checkpoint.

    Args:
        model: the model of this run, on any device.
        zero_stage: -1 without DeepSpeed.
        n_ranks: number of processes.
        fingerprint: of the training data.
        settings_fingerprint: of the settings that it was made with, where its fingerprint covers its content as well.
        args: flags of this run.
        n_steps: its length.
    Raises:
        ValueError: the checkpoint is of another model, other data, another engine, or beyond the end of the run; the
            message names both values and what to do.
    """
    folder, record = resumption.folder, resumption.record
    # Data: the order of samples belongs to the data set.
    check_data(folder, record["data"], fingerprint, settings_fingerprint)
    check_model(folder, model)
    check_engine(folder, record, zero_stage=zero_stage, n_ranks=n_ranks)
    check_samples(resumption, args, n_ranks)
    check_length(resumption, args, n_steps)


def check_data(folder: Path, recorded: dict[str, Any], fingerprint: str, settings_fingerprint: str) -> None:
    """Raises: ValueError: a checkpoint was trained on other data, or on a former content of the same cache."""
    former, _, conditions = recorded["fingerprint"].partition("+")
    if recorded["fingerprint"] == fingerprint:
        return
    # Earlier versions noted the settings of a cache alone.
    if settings_fingerprint and (former, conditions) == (settings_fingerprint, fingerprint.partition("+")[2]):
        logger.warning(
            "%s does not say on which content of its data set it was trained (%s); it is taken for the present one",
            *(folder, recorded.get("folder")),
        )
        return
    is_changed = settings_fingerprint and recorded.get("settings_fingerprint") == settings_fingerprint
    what = (
        "a former content of its data set: files were changed, added or removed since" if is_changed else "other data"
    )
    raise ValueError(
        f"{folder} was trained on {what} ({recorded.get('folder')}, fingerprint {recorded['fingerprint']}; this cache "
        f"has {fingerprint}). Give the same --cached_dataset, or {new_run(folder)}"
    )


def check_samples(resumption: Resumption, args: Any, n_ranks: int) -> None:
    """Raises: ValueError: an optimizer step would have another number of samples, or of latent frames, which shifts
    the data order."""
    old, written_ranks = resumption.old_arguments, resumption.record["n_ranks"]
    # What a micro-batch is counted by.
    budgets = {"batch_frames": "latent frames", "batch_tokens": "tokens", "batch_size": "samples"}
    size = next(name for name in budgets if old.get(name) or getattr(args, name, 0))
    unit = budgets[size]
    if not {size, "gradient_accumulation_steps"} <= old.keys():
        return  # `recorded_arguments` has warned.
    splits = {
        "checkpoint": (old[size], old["gradient_accumulation_steps"], written_ranks),
        "this run": (getattr(args, size), args.gradient_accumulation_steps, n_ranks),
    }
    before, now = (batch * accumulation * ranks for batch, accumulation, ranks in splits.values())
    if before == now:
        return
    texts = [f"{name} {' x '.join(map(str, split))}" for name, split in splits.items()]
    accumulation, rest = divmod(before, getattr(args, size) * n_ranks or before + 1)
    command = f"--gradient_accumulation_steps {accumulation}" if accumulation and not rest else f"another --{size}"
    raise ValueError(
        f"{resumption.folder} was trained with {before} {unit} per optimizer step, this run has {now} (--{size} "
        f"x --gradient_accumulation_steps x processes: {', '.join(texts)}), which would change the data order. Give "
        f"{command}, or {new_run(resumption.folder)}"
    )


def check_length(resumption: Resumption, args: Any, n_steps: int) -> None:
    """Raises: ValueError: the run ends before the checkpoint, or its schedule has ended there."""
    folder, step = resumption.folder, resumption.step
    if step > n_steps:
        raise ValueError(
            f"{folder} is at step {step:,}, beyond this run's {n_steps:,}; raise --max_steps or --num_train_epochs, "
            "or go on from an earlier checkpoint"
        )
    # A schedule that falls to zero has nothing left to stretch.
    lengths = resumption.run_lengths(n_steps)
    is_over = len(lengths) > 1 and lengths[-2][1] <= lengths[-1][0] == step
    if is_over and not args.lr_scheduler_type.startswith("constant"):
        raise ValueError(
            f"{folder} ends a run of {step:,} steps, at which the {args.lr_scheduler_type} schedule has a learning "
            f"rate of 0: {n_steps - step:,} steps more would change nothing. Give --lr_scheduler_type constant with a "
            f"--learning_rate, or {new_run(folder)}"
        )
