"""The temporary folder of uploads and results: one of this process alone, limited in size."""

import atexit
import functools
import os
import shutil
import tempfile
from pathlib import Path

VARIABLE = "GRADIO_TEMP_DIR"  # By which Gradio knows its folder.
MAX_FILES = 10_000  # Empty ones take place, too.


@functools.cache
def kept_folder() -> Path:
    """The folder, made once per process and deleted at its end, in which Gradio keeps uploads and results.

    Call it before gradio is imported. A folder that several processes have could not be limited by one of them.
    """
    folder = Path(tempfile.mkdtemp(prefix="megatransformer-page-", dir=os.environ.get(VARIABLE))).resolve()
    os.environ[VARIABLE] = str(folder)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def trim(folder: Path, max_bytes: int, max_files: int = MAX_FILES) -> int:
    """Delete the oldest files, until the others keep the limits.

    Args:
        folder: with all its subfolders, of which empty ones are deleted, too.
        max_bytes: of the files that remain.
        max_files: that remain.
    Returns: how many were deleted.
    """
    dated = []
    for place, _, names in os.walk(folder):
        for name in names:
            file = os.path.join(place, name)
            try:
                status = os.lstat(file)
            except OSError:  # It was deleted meanwhile, as temporary files are.
                continue
            dated.append((status.st_mtime_ns, status.st_size, file))
    dated.sort(reverse=True)
    n_bytes, n_deleted = 0, 0
    for number, (_, size, file) in enumerate(dated):
        n_bytes += size
        if n_bytes <= max_bytes and number < max_files:
            continue
        try:
            os.remove(file)
            n_deleted += 1
            if Path(file).parent != folder:
                os.rmdir(os.path.dirname(file))
        except OSError:  # Another file is in it, or it is gone already.
            continue
    return n_deleted
