"""Which files a folder holds: regular ones, each once, however links go in circles, and none outside of it."""

import contextlib
import functools
import logging
import os
import stat
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

HIDDEN = (".", "__MACOSX")
KINDS = {stat.S_IFIFO: "named pipe", stat.S_IFSOCK: "socket", stat.S_IFCHR: "device", stat.S_IFBLK: "device"}


def walk(
    folder: Path, suffixes: Collection[str], enters: Callable[[str], bool] = lambda below: True
) -> Iterator[Path]:
    """Regular files with one of the endings under a folder, sorted, without hidden ones.

    Links are followed, except those to a folder that holds this one, and those to one that is listed anyway.

    Args: enters: whether a folder with this path below `folder`, such as `train/cats`, is listed.
    """
    links = LinkedFolders(os.path.realpath(folder))
    waiting = [""]  # Folders to list, the next one last.
    while waiting:
        below = waiting.pop()
        try:
            with os.scandir(Path(folder, below)) as children:
                entries = sorted(children, key=lambda entry: entry.name)
        except OSError as error:
            logger.warning("%s is left out: %s", Path(folder, below), error.strerror)
            continue
        folders = []
        for entry in entries:
            if entry.name.startswith(HIDDEN):
                continue
            if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():  # A link may lead to itself.
                path = f"{below}/{entry.name}" if below else entry.name
                if enters(path) and (not entry.is_symlink() or links.add(entry.path)):
                    folders.append(path)
            elif os.path.splitext(entry.name)[1].lower() in suffixes and os.path.isfile(entry.path):
                yield Path(folder, below, entry.name)
        waiting += reversed(folders)


class LinkedFolders:
    """Folders outside of a root that links in it lead to.

    Args: root: real path.
    """

    def __init__(self, root: str):
        self.root = root
        self.listed = {root}
        self.above = set(parents_of(root))  # Folders that hold one of those listed.

    def add(self, link: str) -> bool:
        """Whether the folder that a link leads to is to be listed: it is not listed yet, as a whole or in part."""
        target = os.path.realpath(link)
        if target in self.listed or target in self.above:
            return False
        holders = self.listed & set(parents_of(target))
        # What is below the root is listed at its own place, unless it is hidden there.
        inner = path_below(target, self.root).split("/")
        if holders - {self.root} or (holders and not any(name.startswith(HIDDEN) for name in inner)):
            return False
        self.listed.add(target)
        self.above |= set(parents_of(target)) - {self.root}
        return True


def path_below(path: str, folder: str | Path) -> str:
    """A path relative to a folder, with slashes on every system; as it is where it lies on another drive."""
    with contextlib.suppress(ValueError):
        path = os.path.relpath(path, folder)
    return Path(path).as_posix()


def parents_of(path: str) -> list[str]:
    """The folders that hold a path, up to the root of the file system."""
    return [str(parent) for parent in Path(path).parents]


@functools.lru_cache(maxsize=4096)
def real_folder(folder: str) -> str:
    """The real path of a folder; many files lie in the same."""
    return os.path.realpath(folder)


def is_outside(path: str, folder: Path) -> bool:
    """Whether a file, or what it is a link to, lies outside of a folder."""
    parent, name = os.path.split(path)
    real = os.path.realpath(path) if os.path.islink(path) else os.path.join(real_folder(parent), name)
    return not f"{real}{os.sep}".startswith(real_folder(str(folder)).rstrip(os.sep) + os.sep)


def regular_state(path: str | Path) -> os.stat_result:
    """The state of a file. Raises: OSError: there is none, or it is a pipe, a socket or a device, which might never
    end."""
    state = os.stat(path)
    if kind := KINDS.get(stat.S_IFMT(state.st_mode)):
        raise OSError(f"{path} is a {kind}, not a file; remove it")
    return state
