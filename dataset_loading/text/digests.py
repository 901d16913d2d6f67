"""Hashes of source files, stored with the prepared text, so that a later start does not read the files again."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from dataset_loading.files import digest_file, replace_file

logger = logging.getLogger(__name__)

DIGESTS = "digests.json"


class Digests:
    """SHA-256 of files, computed again only where path, size or times of the last change differ from the last time.

    Args:
        folder: prepared text, with `digests.json` or without; None: nothing is stored.
    """

    def __init__(self, folder: Path | None = None):
        self.file = folder and folder / DIGESTS
        # Size, times of change (ns) of content and of name, and hash by path: of the last start, and of this one.
        self.known: dict[str, list] = {}
        self.used: dict[str, list] = {}
        if self.file and self.file.exists():
            self.known = read_digests(self.file)

    def of(self, files: Sequence[Path]) -> list[str]:
        """The hash of each file's contents, hexadecimal."""
        states = [file.stat() for file in files]  # Before reading: what changes now is new the next time.
        stamps = {
            str(file.resolve()): [state.st_size, state.st_mtime_ns, state.st_ctime_ns]
            for file, state in zip(files, states)
        }
        unchanged = {name for name, stamp in stamps.items() if self.known.get(name, [])[:3] == stamp}
        if new := [size for name, (size, *_) in stamps.items() if name not in unchanged]:
            logger.info("hashing %.1f MB of texts in %d files", sum(new) / 1e6, len(new))
        # Only changed files are read.
        for name, stamp in stamps.items():
            self.used[name] = self.known[name] if name in unchanged else [*stamp, digest_file(name).hex()]
        return [self.used[str(file.resolve())][3] for file in files]

    def save(self) -> None:
        """Store the hashes that `of` returned; a folder that cannot be written is left as it is."""
        if not self.file or not self.used or self.used == self.known:
            return
        try:
            replace_file(self.file, (json.dumps(self.used, indent=1) + "\n").encode())
        except OSError as error:
            logger.info("the hashes of the texts are not remembered: %s", error)


def read_digests(file: Path) -> dict[str, list]:
    """Size, times of change (ns) and hash by path; nothing where the file is damaged."""
    try:
        return {
            name: [int(size), int(changed), int(renamed), str(digest)]
            for name, (size, changed, renamed, digest) in json.loads(file.read_bytes()).items()
        }
    except (OSError, ValueError, TypeError, AttributeError) as error:
        logger.info("%s cannot be read, texts are hashed again: %s", file, error)
        return {}
