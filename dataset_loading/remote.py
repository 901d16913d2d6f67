"""Packed caches elsewhere (`s3://`, `gs://`, whatever fsspec reads): a local folder stands for one.

    cached_datasets/remote/<name>-<digest>/   manifest, indices and what else is small: copied once
        remote.json                           where the packs are, and how much of them may lie here
        train/00007.safetensors               packs, fetched when a sample of theirs is read

Packs are fetched whole, so that they serve the other samples in them. Where they would exceed the limit the ones that
were not used for longest are deleted. Processes of one machine share the folder.
"""

import contextlib
import errno
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
from filelock import FileLock

from dataset_loading.files import MANIFEST, fingerprint, read_record, replace_file, replacing

REMOTE = "remote.json"
FOLDER = Path("cached_datasets/remote")
LEFTOVER_SECONDS = 24 * 3600  # No pack takes so long to fetch.
N_TRIES = 3
RETRY_SECONDS = 0.5  # Before the second try; twice as long before the third.
REFUSALS = ("credential", "access denied", "accessdenied", "forbidden", "permission", "signature", "invalidaccesskey")
SPLITS = ("train", "validation", "duplicates")


def is_remote(folder: str | Path) -> bool:
    """Whether a cache is named by a URL."""
    return "://" in str(folder)


IS_REMOTE = ("cached_dataset", is_remote)  # The condition of flags that only such a cache needs.


def local_path(cache: str) -> Path:
    """The folder of a cache: itself, or the one that stands for a packed cache at a URL."""
    if not is_remote(cache):
        return Path(cache)
    url = cache.rstrip("/")
    return FOLDER / f"{url.rpartition('/')[2]}-{fingerprint(url, n_digits=8)}"


def open_remote(cache: str, max_gigabytes: float) -> Path:
    """Copy what is small of a packed cache at a URL, unless it is there; nothing to do for local ones.

    Args: max_gigabytes: of packs in the local folder.
    Returns: `local_path`.
    Raises:
        FileNotFoundError: there is no complete cache at the URL.
        ValueError: the cache is not packed, or fsspec lacks a package for this kind of URL.
        OSError: it cannot be read.
    """
    folder = local_path(cache)
    if not is_remote(cache):
        return folder
    system, root = open_url(cache.rstrip("/"))
    try:
        content = system.cat_file(f"{root}/{MANIFEST}")
    except FileNotFoundError:
        raise FileNotFoundError(f"{cache} holds no {MANIFEST}: it is no complete cache") from None
    except Exception as error:  # Each protocol has its own.
        raise describe_refusal(cache, error) from error
    folder.mkdir(parents=True, exist_ok=True)
    # One process of a machine copies, the others wait.
    with FileLock(folder / ".fetching"):
        known = folder / MANIFEST
        if not known.is_file() or known.read_bytes() != content:
            copy_small_files(system, root, folder)
            replace_file(known, content, sync=True)
        sizes = {split: sizes_of(system, f"{root}/{split}") for split in SPLITS}
        record = {"url": cache.rstrip("/"), "max_bytes": round(max_gigabytes * 1e9), "sizes": sizes}
        replace_file(folder / REMOTE, json.dumps(record).encode())
    return folder


def copy_small_files(system: Any, root: str, folder: Path) -> None:
    """Copy all files but packs and the manifest; packs of a former content are deleted.

    Raises: ValueError: the cache is not packed.
    """
    (folder / MANIFEST).unlink(missing_ok=True)
    for split in SPLITS:
        shutil.rmtree(folder / split, ignore_errors=True)
    for file in system.find(root):
        name = file.lstrip("/").removeprefix(root.lstrip("/")).lstrip("/")
        if name.endswith(".pt"):
            raise ValueError(
                f"{root} has a file per sample; pack it first, with python -m dataset_loading.pack SRC DST, and copy "
                "that folder there"
            )
        if not is_pack(name) and not Path(name).name.startswith(".") and name != MANIFEST:
            fetch(system, file, folder / name)


def open_url(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it. Raises: ValueError: a package is missing; names it."""
    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{url} cannot be read ({error}); see https://filesystem-spec.readthedocs.io") from error


def is_pack(name: str) -> bool:
    """Whether a file of a cache, by its path there, is a pack."""
    folder, _, file = name.rpartition("/")
    return folder in SPLITS and file.endswith(".safetensors")


def sizes_of(system: Any, folder: str) -> dict[str, int]:
    """Bytes of the packs in a folder by name, from one listing.

    Raises: ValueError: the server does not tell the size of one.
    """
    entries = []
    with contextlib.suppress(FileNotFoundError):
        entries = [entry for entry in system.ls(folder, detail=True) if entry["name"].endswith(".safetensors")]
    sizes = {entry["name"]: entry["size"] for entry in entries}
    # Listings of a web server have none: each file is asked for.
    unknown = [file for file, size in sizes.items() if size is None]
    sizes.update(zip(unknown, system.sizes(unknown) if unknown else ()))
    if untold := next((file for file, size in sizes.items() if size is None), ""):
        raise ValueError(f"{untold}: the server does not tell its size; copy the cache's folder to this machine")
    return {file.rpartition("/")[2]: size for file, size in sizes.items()}


def describe_refusal(url: str, error: Exception) -> OSError:
    """The error of a file system as one that names the address and what to do."""
    text = f"{type(error).__name__}: {error}"
    cause = error.__cause__
    if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError | PermissionError):
        # HTTP file systems hide a refused connection behind a missing file.
        return ConnectionError(f"{url} cannot be reached ({type(cause).__name__}: {cause}); check server and network")
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"{url} does not exist ({error}); check the names of bucket, folder and file")
    if isinstance(error, PermissionError) or any(word in text.lower() for word in REFUSALS):
        remedy = (
            "give credentials as its program does, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile"
        )
        return PermissionError(f"{url} may not be read ({text}); {remedy}")
    return OSError(f"{url} cannot be read ({text})")


def is_final(error: OSError) -> bool:
    """Whether another try would end the same way."""
    return isinstance(error, FileNotFoundError | PermissionError) or error.errno in (errno.ENOSPC, errno.EDQUOT)


def wait_for_retry(n_left: int) -> None:
    """Wait before one of the last `n_left` tries, each time twice as long."""
    time.sleep(RETRY_SECONDS * 2 ** (N_TRIES - 1 - n_left))


def fetch(system: Any, source: str, target: Path, n_bytes: int | None = None) -> None:
    """Copy a file, with a few tries; several processes may do so at once.

    Args: n_bytes: its size, where it is known.
    Raises: OSError: it cannot be read, or the disk is full.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for n_left in reversed(range(N_TRIES)):
        try:
            with replacing(target) as temporary:
                system.get_file(source, str(temporary))
                size = temporary.stat().st_size
                if n_bytes is not None and size != n_bytes:
                    raise ConnectionError(f"{size} of {n_bytes} bytes came")
            return
        except Exception as error:  # Each protocol has its own.
            refusal = error if isinstance(error, OSError) and error.errno else describe_refusal(source, error)
            if is_final(refusal) or not n_left:
                raise refusal from error
            wait_for_retry(n_left)


class RemotePacks:
    """The packs of one split of a cache elsewhere.

    Args: folder: the local one of the split.
    Attributes: sizes: bytes of each pack by name.
    """

    def __init__(self, folder: Path):
        record = read_record(folder.parent / REMOTE, "give --cached_dataset the URL again")
        self.folder, self.url, self.max_bytes = folder, f"{record['url']}/{folder.name}", record["max_bytes"]
        self.sizes: dict[str, int] = record["sizes"][folder.name]

    @classmethod
    def of(cls, folder: Path) -> "RemotePacks | None":
        """Those of a split's folder; None where the cache is a local one."""
        return cls(folder) if (folder.parent / REMOTE).is_file() else None

    def bring(self, name: str) -> Path:
        """A pack as a local file. Raises: OSError: it cannot be fetched."""
        file = self.folder / name
        with contextlib.suppress(FileNotFoundError):
            if file.stat().st_size == self.sizes[name]:
                os.utime(file)  # Now used.
                return file
        self.make_room(self.sizes[name])
        system, root = open_url(self.url)
        fetch(system, f"{root}/{name}", file, self.sizes[name])
        return file

    def open(self, name: str) -> BinaryIO:
        """An open local file with a pack. Another process may delete it between its coming and its opening.

        Raises: OSError: it cannot be fetched.
        """
        for n_left in reversed(range(N_TRIES)):
            try:
                return open(self.bring(name), "rb")
            except FileNotFoundError:
                if not n_left:
                    raise
        raise AssertionError("the last try returns or raises")

    def make_room(self, n_bytes: int) -> None:
        """Delete the packs that were not used for longest, until there is room for a number of bytes."""
        states = []
        # What a process that was killed had begun to fetch.
        for leftover in self.folder.parent.glob("*/.*.tmp"):
            with contextlib.suppress(FileNotFoundError):
                if leftover.stat().st_mtime < time.time() - LEFTOVER_SECONDS:
                    leftover.unlink()
        for file in self.folder.parent.glob("*/*.safetensors"):
            with contextlib.suppress(FileNotFoundError):  # Another process has deleted it.
                if is_pack(f"{file.parent.name}/{file.name}"):
                    states.append((file.stat(), file))
        total = sum(state.st_size for state, _ in states)
        for state, file in sorted(states, key=lambda pair: pair[0].st_mtime_ns):
            if total + n_bytes <= self.max_bytes:
                break
            file.unlink(missing_ok=True)
            total -= state.st_size
