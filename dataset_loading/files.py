"""Files that are either whole or absent."""

import os
from pathlib import Path


def replace_file(path: Path, content: bytes, *, sync: bool = False) -> None:
    """Write a file under a temporary name, optionally flush it to the disk, and rename it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # A full disk gives no name.
        error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)
