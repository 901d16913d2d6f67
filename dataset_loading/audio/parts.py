"""Parts of recordings: rows with `offset` and `duration` in seconds, as in manifests of NeMo.  S samples."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dataset_loading.audio.decoding import BLOCK_SAMPLES, AudioReader
from dataset_loading.layouts import is_missing

COLUMNS = ("offset", "duration")
TOLERANCE = 0.1  # Seconds that a part may reach beyond the end of its recording: durations are rounded.
# Encodings whose samples are the same when what lies before them is passed over.
SEEKABLE = ("PCM", "FLOAT", "DOUBLE", "ULAW", "ALAW", "VORBIS", "MPEG_LAYER_III")


def part_of_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """`offset` and `duration` of a row, in seconds, where they are given; a duration of 0 or below is unknown.

    A cell that is no number stays as it is, for `PartReader` to refuse: one row is broken, not the whole listing.
    """
    part = {}
    for column in COLUMNS:
        value = row.get(column)
        if is_missing(value):
            continue
        with contextlib.suppress(TypeError, ValueError):
            value = value if isinstance(value, bool) else float(value)
        if column == "offset" or not isinstance(value, float) or not value <= 0:
            part[column] = value
    return part


def check_part(part: Mapping[str, Any]) -> None:
    """Raises: ValueError: `offset` or `duration` is no number of seconds."""
    for column in COLUMNS:
        value = part.get(column, 0.0)
        if not isinstance(value, float) or not math.isfinite(value) or value < 0:
            raise ValueError(
                f"{column}={value!r} must be seconds of the recording; correct it, or rename the column if it says "
                "something else"
            )


def open_reader(media: dict[str, Any] | None) -> AudioReader:
    """The reader of a file, or of a part of it where `media` has `offset`, `duration` or both."""
    is_part = media is not None and any(name in media for name in COLUMNS)
    return PartReader(media) if media is not None and is_part else AudioReader(media)


class PartReader(AudioReader):
    """The part of a recording that begins at `offset` and lasts `duration` seconds.

    A duration without an offset counts from the beginning, and one that is too long ends with the recording.
    Args: media: as of `AudioReader`, with `offset`, `duration` or both, in seconds.
    Raises: OSError, ValueError: as `AudioReader`; also if the part is not in seconds, or reaches beyond the end.
    """

    def __init__(self, media: dict[str, Any]):
        check_part(media)
        super().__init__(media)
        offset, duration = media.get("offset", 0.0), media.get("duration", math.inf)
        try:
            if self.n_samples is None:
                self.n_samples = sum(samples.shape[1] for samples in super().blocks())
            self.start, self.stop = bounds(
                self.n_samples, self.sample_rate, offset, duration, has_offset="offset" in media
            )
        except BaseException:
            self.file.close()
            raise
        self.n_samples = self.stop - self.start

    def blocks(self, n_samples: int = BLOCK_SAMPLES) -> Iterator[Tensor]:
        n_read = 0
        for samples in self.sought_blocks(n_samples):
            yield samples
            n_read += samples.shape[1]
        if n_read != self.n_samples:
            raise ValueError(f"damaged: {n_read} of {self.n_samples} samples of the part can be read")

    def sought_blocks(self, n_samples: int) -> Iterator[Tensor]:
        """Blocks of the part, read from its beginning where that gives the samples of the whole."""
        with self.open(self.sections[0]) as file:
            if len(self.sections) == 1 and (file.subtype.startswith(SEEKABLE) or file.format == "FLAC"):
                position = file.seek(self.start)
                while position < self.stop:
                    block = file.read(min(n_samples, self.stop - position), dtype="float32", always_2d=True)
                    if not len(block):
                        return
                    position += len(block)
                    samples = torch.from_numpy(block).T
                    if not samples.isfinite().all():
                        raise ValueError("damaged: samples that are no finite numbers")
                    yield samples
                return
        position = 0
        for samples in super().blocks(n_samples):
            piece = samples[:, max(0, self.start - position) : max(0, self.stop - position)]
            position += samples.shape[1]
            if piece.shape[1]:
                yield piece
            if position >= self.stop:
                return


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
