"""Files on disk: atomic writes, fingerprints of what shaped them, and the manifests that describe a folder of them."""

import contextlib
import ctypes
import glob
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

SCHEMA = 1
# What later stages read of a manifest's settings, with their types: of all latents, and by stage.
OF_LATENTS: dict[str, Any] = {
    "max_tokens": int,
    "vae_fingerprint": str,
    "vae_checkpoint": str,
    "text_encoder": str,
    "text_encoder_fingerprint": str,
    "text_embedding_width": int,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "image_vae": {"image_size": int},
    "image_diffusion": {
        "image_size": int,
        "latent_shape": list,
        "horizontal_flip": bool,
        **OF_LATENTS,
    },
    "audio_diffusion": {
        "conditioning": str,
        "mel": dict,
        "latent_channels": int,
        "mel_frames_per_latent": int,
        **OF_LATENTS,
    },
}
MANIFEST = "manifest.json"
JOURNAL = "progress.jsonl"


# ---- Atomic writes: a reader sees the old file, the new one, or none, but never half of one.


@contextlib.contextmanager
def replacing(path: Path, *, sync: bool = False) -> Iterator[Path]:
    """Yield a temporary path in the same folder. What the block writes there, a file or a folder, is renamed to `path`
    when the block ends, and deleted if it raises.

    Args:
        sync: flush the file to the disk before the renaming, and the renaming itself, so that both survive a loss of
            power.
    """
    # The process id keeps processes that write the same file apart; the dot hides the file from listings.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if sync:
            sync_to_disk(temporary)
        os.replace(temporary, path)
        if sync:
            sync_to_disk(path.parent)  # The folder holds the name.
    except OSError as error:
        # A full disk gives no name, other failures the temporary one; users know the final one.
        if error.errno is not None and error.filename in (None, str(temporary)):
            error.filename = str(path)
        raise
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def replace_file(path: Path, content: bytes, *, sync: bool = False) -> None:
    """Write a file atomically, see `replacing`."""
    with replacing(path, sync=sync) as temporary:
        temporary.write_bytes(content)


def remove_leftovers(path: Path) -> None:
    """Delete what killed processes left of `replacing(path)`; the caller holds a lock, so that nobody else writes."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        if leftover.name.removeprefix(f".{path.name}.").removesuffix(".tmp").isdigit():
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def sync_to_disk(file: Path) -> None:
    """Flush a file that is already written, or a folder's list of names, from the page cache to the disk."""
    # Windows opens no folders, and flushes what is open for writing only.
    is_windows = not hasattr(os, "O_DIRECTORY")
    if is_windows and file.is_dir():
        return
    descriptor = os.open(file, os.O_RDWR if is_windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file_system(folder: Path) -> None:
    """Flush all files on the file system of a folder to the disk: one call for thousands of small files, each of which
    would take milliseconds alone.

    Raises: OSError: the disk reports an error.
    """
    if not hasattr(os, "sync"):  # Windows
        for path in folder.rglob("*"):
            sync_to_disk(path)
        return
    # Python has os.sync alone, which flushes all file systems; Linux can flush one.
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "syncfs"):
        os.sync()
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if libc.syncfs(descriptor):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(folder))
    finally:
        os.close(descriptor)


# ---- Fingerprints: equal contents, and only those, have equal ones.


def fingerprint(value: Any, *, n_digits: int = 16) -> str:
    """The hash of a JSON value, such as settings; the order of keys does not matter."""
    return fingerprint_of_bytes([json.dumps(value, sort_keys=True).encode()], n_digits=n_digits)


def fingerprint_of_bytes(chunks: Iterable[Any], *, n_digits: int = 16) -> str:
    """The first hexadecimal digits of the SHA-256 of chunks of bytes, one after the other; 64 are all of them."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()[:n_digits]


def digest_file(file: str | Path) -> bytes:
    """The SHA-256 of a file's contents, read in blocks."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def crc_of_file(file: Path) -> str:
    """The CRC-32 of a file's contents, read in blocks; about 0.2 s per gigabyte. It finds damage, not intent."""
    crc = 0
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return f"{crc:08x}"


# A manifest's last field: SHA-256 of all bytes before it. A manifest that another program has written anew has none.
DIGEST = b',\n"sha256": "'


def with_digest(content: bytes) -> bytes:
    """A JSON object with its digest as the last field.

    Args: content: the object without its closing brace.
    """
    return content + DIGEST + fingerprint_of_bytes([content], n_digits=64).encode() + b'"}\n'


def wrong_digest(content: bytes) -> str:
    """How a JSON object differs from the one that was written with its digest, in words; "" if it does not, or has
    none."""
    head, mark, tail = content.rpartition(DIGEST)
    if not mark:
        return ""
    expected, digest = tail.partition(b'"')[0].decode(errors="replace"), fingerprint_of_bytes([head], n_digits=64)
    if digest == expected:
        return ""
    return f"its SHA-256 is {digest}, {expected} was written; if it was edited, remove its last field 'sha256'"


# ---- Manifests: written last, so that a folder with a manifest is complete.


class Record(dict):
    """An object of a JSON file. Reading a key that it lacks raises an error that names the file and what to do.

    Attributes:
        file: the file.
        remedy: what to do about it.
    """

    __slots__ = ("file", "remedy")

    def __init__(self, values: dict[str, Any], file: Path, remedy: str):
        super().__init__(values)
        self.file, self.remedy = file, remedy

    def __missing__(self, name: str) -> Any:
        raise self.damaged(f"it lacks {name!r}")

    def damaged(self, reason: str) -> ValueError:
        """The error about a wrong content."""
        return ValueError(f"{self.file} is damaged ({reason}); {self.remedy}")

    def expect_types(self, types: dict[str, Any], place: str = "") -> None:
        """Check that keys are there, with values of these types, or of one of a tuple of types.

        Args: place: where the object lies in the file, for the message.
        Raises: ValueError: names file, key, value and type.
        """
        for name, kinds in types.items():
            if name not in self:
                raise self.damaged(f"{place or 'it'} lacks {name!r}")
            if not isinstance(self[name], kinds):
                kind_names = " or ".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
                raise self.damaged(f"{place}{'.' if place else ''}{name}={shorten(self[name])} must be {kind_names}")

    def __reduce__(self) -> tuple:
        return Record, (dict(self), self.file, self.remedy)


def shorten(value: Any) -> str:
    """A value for a message, on one line of at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def read_manifest(
    folder: Path,
    stage: str | None,
    *,
    remedy: str = "",
    read: Callable[[Path, str], "Record"] | None = None,
) -> Record:
    """The manifest of a complete preprocessed folder.

    Args:
        folder: the folder that a preprocessing script or `prepare_text` wrote.
        stage: the only stage whose folders are accepted; None accepts all.
        remedy: how to make the folder, for the message; default: the command of the preprocessing script.
        read: reads the file; default: `read_record`.
    Raises:
        FileNotFoundError: there is no complete folder; the message says what is there and which command to run.
        ValueError: the manifest cannot be read, lacks what all manifests have, or is of another schema or stage.
    """
    script = f"preprocess_{stage or '<stage>'}_dataset.py"
    remedy = remedy or f"make it with: python {script} --dataset_name <hub name or folder> --output_dir {folder}"
    file = folder / MANIFEST
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} {'is a file' if folder.exists() else 'does not exist'}; {remedy}")
    if not file.exists():
        if (folder / JOURNAL).exists():
            raise FileNotFoundError(
                f"{folder} is incomplete, its preprocessing was interrupted; run {script} again to finish"
            )
        state = f"is not a preprocessed folder (it has no {MANIFEST})" if any(folder.iterdir()) else "is empty"
        raise FileNotFoundError(f"{folder} {state}; {remedy}")
    manifest = (read or read_record)(file, f"delete the folder and {remedy}")
    # The layout first: manifests of another version may lack what is checked below.
    manifest.expect_types({"schema": int, "stage": str})
    if manifest["schema"] != SCHEMA:
        raise ValueError(
            f"{folder} has schema version {manifest['schema']}, this code reads {SCHEMA}; delete the folder and "
            f"{remedy}"
        )
    if stage is not None and manifest["stage"] != stage:
        raise ValueError(f"{folder} was made for stage {manifest['stage']!r}, not for {stage!r}; {remedy}")
    manifest.expect_types({"fingerprint": str, "settings": Record})
    manifest["settings"].expect_types(SETTINGS.get(manifest["stage"], {}), "settings")
    return manifest


def read_record(file: Path, remedy: str) -> Record:
    """A JSON file that holds an object, whose inner objects are records, too.

    Raises:
        FileNotFoundError: there is no such file; names it and what to do.
        ValueError: the file cannot be read as such, or differs from its digest; names it and what to do.
    """
    try:
        data = file.read_bytes()
        content = json.loads(data.decode(), object_hook=lambda values: Record(values, file, remedy))
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} is missing; {remedy}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({error!r}); {remedy}") from error
    if not isinstance(content, Record):
        raise ValueError(f"{file} is damaged (it holds {shorten(content)}, not an object); {remedy}")
    if problem := wrong_digest(data):
        raise content.damaged(problem)
    return content
