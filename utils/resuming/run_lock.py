"""One run per run folder: rank 0 holds the lock of the folder for all processes of the run."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from dataset_loading.locks import only_writer
from utils.distributed import from_main, launched_rank


@contextlib.contextmanager
def only_run(run_dir: Path, connect: Callable[[], object]) -> Iterator[None]:
    """Hold the lock of a run folder, before anything is written there. Every process enters it, and calls
    `learn_refusal` once the processes are connected.

    Args: connect: connects the processes.
    Raises: OSError: another run holds it; the message names the owner.
    """
    with contextlib.ExitStack() as stack:
        try:
            if launched_rank() == 0:
                stack.enter_context(only_writer(run_dir, "wait until it has ended, or choose another --run_name"))
        except OSError as error:
            # The others would wait for this process.
            connect()
            learn_refusal(str(error))
        yield


def learn_refusal(refusal: str = "") -> None:
    """Raises: OSError: rank 0, whose argument counts, was refused the lock of the run folder."""
    if refusal := from_main(refusal):
        raise OSError(refusal)
