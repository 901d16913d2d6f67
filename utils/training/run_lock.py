"""One run per run folder."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from dataset_loading.locks import only_writer
from utils.distributed import from_main, rank


@contextlib.contextmanager
def only_run(run_dir: Path) -> Iterator[None]:
    """Hold the lock of a run folder: rank 0 for all processes. Every process must enter it, once they are connected.

    Raises: OSError: another run holds it, on every process.
    """
    with contextlib.ExitStack() as stack:
        refusal = ""
        if rank() == 0:
            try:
                stack.enter_context(only_writer(run_dir, "wait until it has ended, or choose another --run_name"))
            except OSError as error:
                refusal = str(error)
        # All processes end where rank 0 is refused; one that went on would wait for it.
        if refusal := from_main(refusal):
            raise OSError(refusal)
        yield
