"""Parts of recordings: rows with `offset` and `duration` in seconds, as in manifests of NeMo.  S samples."""

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import soundfile
import torch
from torch import Tensor

from dataset_loading.audio.decoding import BLOCK_SAMPLES, AudioReader, DecodedAudio, decode_audio
from dataset_loading.content import is_local
from dataset_loading.walking import regular_state

COLUMNS = ("offset", "duration")
TOLERANCE = 0.1  # Seconds that a part may reach beyond the end of its recording: durations are rounded.
# Formats whose samples can be found without decoding what lies before.
SEEKABLE = ("WAV", "WAVEX", "FLAC", "AIFF", "RF64", "W64", "AU", "CAF")


def part_of_row(name: str, row: Mapping[str, Any]) -> dict[str, float]:
    """`offset` and `duration` of a row, in seconds, where they are given.

    Raises: ValueError: one is no number of seconds; names the row's file.
    """
    part = {}
    for column in COLUMNS:
        value = row.get(column)
        if value is None or value != value or (isinstance(value, str) and not value.strip()):
            continue
        try:
            seconds = float(value)
        except (TypeError, ValueError):
            seconds = math.nan
        if not math.isfinite(seconds) or seconds < 0 or (column == "duration" and not seconds):
            raise ValueError(
                f"{name}: {column}={value!r} must be seconds of the recording; correct it, or rename the column if it "
                "says something else"
            )
        part[column] = seconds
    return part


def decode_part(media: dict[str, Any]) -> DecodedAudio:
    """The part of a recording that begins at `offset` and lasts `duration` seconds, (channels, S).

    A duration without an offset counts from the beginning, and one that is too long ends with the recording.
    Args: media: as of `decode_audio`, with `offset`, `duration` or both.
    Raises: OSError, ValueError: as `decode_audio`; also if the part reaches beyond the end.
    """
    offset, duration = media.get("offset", 0.0), media.get("duration", math.inf)
    if is_local(media):
        state = regular_state(media["path"])
        try:
            with soundfile.SoundFile(media["path"]) as file:
                if file.format in SEEKABLE:
                    start, stop = bounds(file.frames, file.samplerate, offset, duration, has_offset="offset" in media)
                    return read_part(file, start, stop)
        except soundfile.LibsndfileError:
            pass  # `decode_audio` says what is wrong.
        whole = decode_whole(str(media["path"]), state.st_size, state.st_mtime_ns)
    else:
        whole = decode_audio(media)
    n_samples, rate = whole.samples.shape[1], whole.sample_rate
    start, stop = bounds(n_samples, rate, offset, duration, has_offset="offset" in media)
    return DecodedAudio(whole.samples[:, start:stop], rate)


def read_part(file: soundfile.SoundFile, start: int, stop: int) -> DecodedAudio:
    """Samples of an open file. Raises: ValueError: it ends before, or holds numbers that are not finite."""
    file.seek(start)
    samples = torch.from_numpy(file.read(stop - start, dtype="float32", always_2d=True)).T
    if samples.shape[1] != stop - start:
        raise ValueError(f"damaged: {samples.shape[1]} of {stop - start} samples can be read")
    if not samples.isfinite().all():
        raise ValueError("damaged: samples that are no finite numbers")
    return DecodedAudio(samples, file.samplerate)


@functools.lru_cache(maxsize=1)
def decode_whole(path: str, *_: int) -> DecodedAudio:
    """`decode_audio` of a file, the last one of which is remembered for its next part; its state tells it apart."""
    return decode_audio({"path": path, "bytes": None})


def bounds(n_samples: int, rate: int, offset: float, duration: float, *, has_offset: bool) -> tuple[int, int]:
    """First sample of a part and the one after its last. Raises: ValueError: it reaches beyond the end."""
    start, seconds = round(offset * rate), n_samples / rate
    if start >= n_samples:
        raise ValueError(f"offset={offset:g} s is beyond the end of the recording, {seconds:.3f} s")
    end = offset + duration
    if has_offset and end != math.inf and end > seconds + TOLERANCE:
        raise ValueError(
            f"offset={offset:g} s and duration={duration:g} s reach beyond the end of the recording, {seconds:.3f} s"
        )
    return start, n_samples if end >= seconds else round(end * rate)


class PartReader(AudioReader):
    """The part of a recording that a row names, as `AudioReader` reads whole files. Raises: as `decode_part`."""

    def __init__(self, media: dict[str, Any]):
        super().__init__(media)
        try:
            self.samples = decode_part(media).samples
        except BaseException:
            self.file.close()
            raise
        self.n_samples = self.samples.shape[1]

    def blocks(self, n_samples: int = BLOCK_SAMPLES) -> Iterator[Tensor]:
        yield from self.samples.split(n_samples, dim=1)


def open_reader(media: dict[str, Any] | None) -> AudioReader:
    """A file, or the part of it that its row names."""
    is_part = media is not None and any(column in media for column in COLUMNS)
    return PartReader(media) if media and is_part else AudioReader(media)
