"""Batches of like samples: clips of like length by a budget of frames or tokens, or images of one size."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch.utils.data import DataLoader
from transformers.trainer_utils import seed_worker

from dataset_loading.audio.latents import FrameBudgetSampler
from dataset_loading.epoch_sampler import BucketSampler
from dataset_loading.image.buckets import BucketedDataset, describe_sizes
from utils.training.stage import zero_stage_of
from utils.training_utils import StageTrainer, expected_steps


def budget_sampler(
    lengths: Sequence[int], budget: int, args: Any, n_ranks: int, unit: str = "latent frames"
) -> FrameBudgetSampler:
    """The batches of a run whose micro-batches have a budget each."""
    n_parts = args.gradient_accumulation_steps * n_ranks
    return FrameBudgetSampler(lengths, budget * n_parts, args.seed, n_parts=n_parts, unit=unit)


def budget_dataloader(trainer: StageTrainer, sampler: FrameBudgetSampler | BucketSampler) -> Any:
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


def bucket_sampler(dataset: BucketedDataset, args: Any, n_ranks: int) -> BucketSampler:
    """The micro-batches of a run on images of several sizes."""
    n_parts, names = args.gradient_accumulation_steps * n_ranks, [describe_sizes([size]) for size in dataset.sizes]
    return BucketSampler(dataset.buckets, args.batch_size, args.seed, n_parts=n_parts, names=names)


def bucket_dataloader(trainer: StageTrainer) -> Any:
    """The training batches of images in aspect-ratio buckets; None for squares.

    Raises: ValueError: evaluations would shard the weights, whose forwards every process must make as often.
    """
    dataset, args = trainer.train_dataset, trainer.stage_arguments
    if not getattr(dataset, "buckets", []):
        return None
    assert isinstance(dataset, BucketedDataset)
    if zero_stage_of(trainer.args) == 3 and not args.use_ema:
        raise ValueError(
            "--no_use_ema: images of several sizes cannot be evaluated with weights that ZeRO-3 shards; leave "
            "--no_use_ema out, or use ds_config_zero-2.json"
        )
    return budget_dataloader(trainer, bucket_sampler(dataset, args, trainer.args.world_size))


def count_bucket_steps(dataset: BucketedDataset, args: Any, n_ranks: int) -> tuple[int, str]:
    """`Stage.count_steps` of a run on images in aspect-ratio buckets.

    Raises: ValueError: also where a resumed run had another batch_size, and so other micro-batches of one size.
    """
    resumption = getattr(args, "resumption", None)
    former = args.batch_size if resumption is None else resumption.old_arguments.get("batch_size", args.batch_size)
    if former != args.batch_size:
        raise ValueError(
            f"--batch_size={args.batch_size}: {resumption.folder} has micro-batches of {former} images of one "
            f"size, which would become others; give --batch_size {former}, and another "
            "--gradient_accumulation_steps for another number of processes"
        )
    n_parts = args.gradient_accumulation_steps * n_ranks
    n_batches = len(bucket_sampler(dataset, args, n_ranks))
    steps = expected_steps(n_batches, n_parts, epochs=args.num_train_epochs, max_steps=args.max_steps)
    return steps, f"{args.batch_size * n_parts} samples of {describe_sizes(dataset.sizes)} pixels"
