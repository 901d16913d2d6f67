"""`--batch_size auto`: the largest power of two that fits, found before the run begins.

Each candidate is tried in a process of its own, which makes a few steps with this process's device alone. Weights,
random numbers and data order of the run are therefore those of a run with the number that is found, no engine is built
twice, and processes of one run never wait for one that is out of memory.
"""

import contextlib
import functools
import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch
from accelerate.utils import find_executable_batch_size

from dataset_loading.integrity import is_out_of_memory
from utils.distributed import launched_world_size, maximum_across_ranks
from utils.megatransformer_utils import training_arguments

logger = logging.getLogger(__name__)

# The first candidate. A CPU computes larger batches no faster; accelerate, too, begins there.
LARGEST = {"cuda": 1024, "cpu": 128}
# What launchers set in the environment, by the beginning of its name.
OF_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "CROSS_", "ACCELERATE_")
OF_LAUNCHERS += ("PMI_", "OMPI_", "MV2_")


Trial = Callable[[type, Any, int], object]  # (class of a stage, its flags, batch size); raises where memory is full


def settle_batch_size(stage: Any, n_samples: int, trial: Trial) -> None:
    """Replace `--batch_size auto` by a number, the smallest of all processes, which are connected after that. Does
    nothing where it is a number.

    Args:
        stage: a `Stage`, prepared.
        n_samples: of the training set.
        trial: makes steps with a batch size, in a new process.
    Raises: MemoryError: not even one sample fits.
    """
    args = stage.args
    if args.batch_size != "auto":
        return
    args.batch_size = largest_that_fits(type(stage), args, n_samples, trial=trial)
    if launched_world_size() > 1:
        device = training_arguments(args, stage.run_dir).device  # Connects the processes.
        args.batch_size = -maximum_across_ranks(-args.batch_size, device)
    logger.info("--batch_size auto: %d", args.batch_size)


def largest_that_fits(stage_class: type, args: Any, n_samples: int, *, trial: Trial) -> int:
    """The largest power of two that makes an optimizer step of the training set and fits into memory."""
    most = n_samples // (args.gradient_accumulation_steps * launched_world_size())
    most = min(max(most, 1), LARGEST["cuda" if torch.cuda.is_available() else "cpu"])
    sizes = iter([2**power for power in reversed(range(most.bit_length()))] + [0])

    # accelerate takes 0.9 of a size that does not fit, which would find other sizes on each machine.
    @find_executable_batch_size(starting_batch_size=next(sizes), reduce_batch_size_fn=functools.partial(next, sizes))
    def fits(batch_size: int) -> int:
        logger.info("--batch_size auto: trying %d", batch_size)
        try:
            with alone(), ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                pool.submit(trial, stage_class, args, batch_size).result()
        except (Exception, BrokenProcessPool) as error:
            if isinstance(error, BrokenProcessPool) or is_out_of_memory(error):
                if batch_size == 1:
                    raise MemoryError("--batch_size auto: not even one sample fits") from error
                raise RuntimeError("the process ran out of memory.") from error  # The words that accelerate knows.
            raise
        return batch_size

    return fits()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Processes that start meanwhile belong to no launch, and have the device of this one."""
    former = dict(os.environ)
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    number = int(os.environ.get("LOCAL_RANK", 0))
    try:
        for name in former:
            if name.startswith(OF_LAUNCHERS):
                del os.environ[name]
        os.environ["CUDA_VISIBLE_DEVICES"] = devices.split(",")[number] if "," in devices else devices or str(number)
        yield
    finally:
        os.environ.clear()
        os.environ.update(former)
