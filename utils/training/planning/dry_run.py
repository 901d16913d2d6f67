"""What a run would be: configuration, counts, steps, memory and the adversary's phases, without a step."""

import dataclasses
import json
from typing import Any

import torch
from rich.console import Console

from model.multimodal.parameters import freeze
from utils.distributed import launched_rank, launched_world_size
from utils.training.initial_weights import adapt
from utils.training.planning.memory import Engine, memory_of, n_trained, parameter_counts
from utils.training.planning.phases import adversary_phases, check_perceptual_start, check_phases


def describe(stage: Any) -> None:
    """Print what a run of a `Stage` would be, once for all processes. Nothing is written to disk.

    Raises: ValueError: what a run would raise.
    """
    # The arguments, and what is still to be prepared.
    args, console = stage.args, Console(soft_wrap=True, highlight=False, quiet=launched_rank() > 0)
    console.print(f"[bold]{stage.name}[/bold] -> {stage.run_dir}")
    console.print(json.dumps(dataclasses.asdict(args), indent=2), markup=False)
    for line in stage.resumption.describe() if stage.resumption is not None else []:
        console.print(line, markup=False)
    if unprepared := stage.unprepared():
        console.print(f"to be prepared: {unprepared}", markup=False)
        console.print("parameters, samples and steps can be counted once that is done")
        return
    config = stage.build_config()
    datasets = stage.build_datasets(config)
    # The meta device has shapes and no memory, so that a model of any size is counted quickly.
    with torch.device("meta"):
        model = stage.model_class(config)
        parts = stage.build_trainer_parts(model)  # Losses and discriminators refuse what they cannot work with.
        adapt(model, args, has_weights=stage.has_weights)
    freeze(model, getattr(args, "freeze", []))

    # The report of the counts.
    n_ranks = launched_world_size()
    n_steps, content = stage.count_steps(datasets["train"], n_ranks)
    counts = parameter_counts(model, parts)
    console.print(config.describe(), markup=False)
    console.print("parameters: " + ", ".join(f"{name} {count:,}" for name, count in counts.items()))
    if n_frozen := counts["model"] - n_trained(model):
        console.print(f"of the model: {n_trained(model):,} trained, {n_frozen:,} frozen")
    console.print("samples: " + ", ".join(f"{split} {len(dataset):,}" for split, dataset in datasets.items()))
    console.print(f"optimizer steps: {n_steps:,} of {content} on {n_ranks} process(es)")
    show_memory(console, memory_of(model, parts, args, Engine.of(args, n_ranks)))
    show_phases(console, args, n_steps)


def show_memory(console: Console, rows: dict[str, float]) -> None:
    """Print bytes by name, and their sum."""
    console.print(f"memory of each process: {sum(rows.values()) / 2**30:.3f} GiB, activations come on top (--measure)")
    for name, size in rows.items():
        console.print(f"  {name}: {size / 2**20:,.1f} MiB")


def show_phases(console: Console, args: Any, n_steps: int) -> None:
    """Print when the adversary acts, and a warning where that lies beyond the end of the run.

    Raises: ValueError: `--gan_start_step` was given, or `--perceptual_start_step`, and is not reached.
    """
    check_perceptual_start(args, n_steps)
    if phases := adversary_phases(args, n_steps):
        console.print("adversary:")
    for phase in phases:
        console.print(f"  {phase.describe(n_steps)}", markup=False)
    if warning := check_phases(args, n_steps):
        console.print(f"[yellow]warning:[/yellow] {warning}")
