"""What a raw file holds. A cache notes size, times and digest of the file of each sample, and knows by them whether
the file has changed since."""

import functools
import hashlib
import os
from collections.abc import Mapping
from typing import Any

from dataset_loading.audio.signal import AUDIO_SUFFIXES
from dataset_loading.files import digest_file, fingerprint
from dataset_loading.image.pixels import IMAGE_SUFFIXES
from dataset_loading.sources import has_file, read_media
from dataset_loading.walking import regular_state

N_DIGITS = 32  # of the SHA-256 that are kept
DIGEST = "source_sha256"
STATE = ("source_bytes", "source_mtime_ns", "source_ctime_ns")
CONTENT_FIELDS = (*STATE, DIGEST)  # Fields of an entry.


def stem_of(name: str) -> str:
    """A raw file's name without the ending of images and recordings: `a.wav` and `a.mp3` are taken for the same one,
    `a.1` and `a.2` are not."""
    stem, ending = os.path.splitext(name)
    return stem if ending.lower() in AUDIO_SUFFIXES | IMAGE_SUFFIXES else name


def is_local(media: Mapping[str, Any]) -> bool:
    """Whether a raw sample is a file of its own, neither in memory nor in an archive nor on the hub."""
    return media.get("bytes") is None and "digest" not in media and "://" not in str(media["path"])


def file_state(media: Mapping[str, Any]) -> dict[str, int]:
    """Size and times of a raw file: of the last change of its content, and of its name, owner or content.

    The latter cannot be set, so that a file that replaces another one of the same size and time is told apart.
    Raises: OSError: there is no such file, or it is no regular one.
    """
    state = regular_state(media["path"])
    return dict(zip(STATE, (state.st_size, state.st_mtime_ns, state.st_ctime_ns)))


def describe_content(media: Mapping[str, Any] | None) -> dict[str, Any]:
    """The fields of an entry that say what a raw sample was made from; to be taken before it is decoded.

    Args: media: `{"path": ..., "bytes": ...}`, see `dataset_loading.sources`; `digest` is that of a sample which is
        no file, such as one of another cache.
    Raises: OSError: the file cannot be read, or the row has none.
    """
    if not has_file(media):
        raise FileNotFoundError("the row has no file")
    if "digest" in media:
        return {DIGEST: media["digest"]}
    if not is_local(media):
        content = read_media(dict(media)).getbuffer()
        return {STATE[0]: len(content), DIGEST: hashlib.sha256(content).hexdigest()[:N_DIGITS]}
    state = file_state(media)
    return {**state, DIGEST: digest_in_state(str(media["path"]), *state.values())}


@functools.lru_cache(maxsize=1024)
def digest_in_state(path: str, *_: int) -> str:
    """The digest of a file; its state makes it computed again after a change. Many rows may name the same file."""
    return digest_file(path).hex()[:N_DIGITS]


def is_same_content(entry: Mapping[str, Any], media: Mapping[str, Any] | None) -> bool:
    """Whether a raw sample still holds what an entry was made from. A file with the same size and times is not read.

    Entries of earlier versions have no digest, so that it is not known.
    """
    if DIGEST not in entry or not has_file(media):
        return False
    try:
        return not changes_of_state(entry, media) or describe_content(media)[DIGEST] == entry[DIGEST]
    except OSError:
        return False


def changes_of_state(entry: Mapping[str, Any], media: Mapping[str, Any]) -> bool:
    """Whether size or times are others than in an entry; True where there is no file to ask."""
    return not is_local(media) or any(entry.get(name) != value for name, value in file_state(media).items())


def present_state(media: Mapping[str, Any] | None) -> dict[str, int]:
    """Size and times of a raw file for an entry whose content is the same, where it is a file."""
    return file_state(media) if has_file(media) and is_local(media) else {}


def digest_of_sample(entry: Mapping[str, Any]) -> dict[str, str]:
    """`digest` of what a sample of a cache was made from, for one that is made of it: the raw file, and which copy and
    part of it. {} where the cache does
    not know that, so that the sample's own file counts."""
    if DIGEST not in entry:
        return {}
    place = [entry[DIGEST], entry.get("offset"), entry.get("duration"), entry["copy"], entry.get("part", 0)]
    return {"digest": fingerprint(place, n_digits=N_DIGITS)}
