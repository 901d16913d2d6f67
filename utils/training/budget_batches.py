"""Batches of samples of like length by a budget of frames or tokens, in place of a number of samples."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch.utils.data import DataLoader
from transformers.trainer_utils import seed_worker

from dataset_loading.audio.latents import FrameBudgetSampler
from utils.training_utils import StageTrainer, expected_steps


def budget_sampler(
    lengths: Sequence[int], budget: int, args: Any, n_ranks: int, unit: str = "latent frames"
) -> FrameBudgetSampler:
    """The batches of a run whose micro-batches have a budget each."""
    n_parts = args.gradient_accumulation_steps * n_ranks
    return FrameBudgetSampler(lengths, budget * n_parts, args.seed, n_parts=n_parts, unit=unit)


def budget_dataloader(trainer: StageTrainer, sampler: FrameBudgetSampler) -> Any:
    """The training batches of a sampler, which becomes the trainer's `epoch_sampler`."""
    args = trainer.args
    trainer.epoch_sampler = sampler  # type: ignore[assignment]
    loader = DataLoader(
        trainer.train_dataset,  # type: ignore[arg-type]
        batch_sampler=sampler,
        collate_fn=trainer.data_collator,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        worker_init_fn=partial(seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index),
    )
    return trainer.accelerator.prepare(loader)


def count_budget_steps(
    lengths: Sequence[int], budget: int, args: Any, n_ranks: int, unit: str = "latent frames"
) -> tuple[int, str]:
    """`Stage.count_steps` of a run with a budget."""
    # The number of batches is a multiple of the micro-batches of a step.
    n_parts = args.gradient_accumulation_steps * n_ranks
    n_batches = len(budget_sampler(lengths, budget, args, n_ranks, unit))
    steps = expected_steps(n_batches, n_parts, epochs=args.num_train_epochs, max_steps=args.max_steps)
    return steps, f"at most {budget * n_parts} {unit}"
