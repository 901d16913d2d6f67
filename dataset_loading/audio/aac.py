"""AAC and other formats that libsndfile does not know, decoded by PyAV, which is optional (`requirements-av.txt`)."""

import tempfile
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
import soundfile
import torch
from torch import Tensor

AV_SUFFIXES = frozenset((".m4a", ".m4b", ".aac", ".wma", ".webm"))
# Beginnings of MP4, Windows Media and Matroska files; the first of them after four bytes.
MP4, ASF, MATROSKA = b"ftyp", b"\x30\x26\xb2\x75", b"\x1a\x45\xdf\xa3"
WHOLE = 0.98  # Share of a file's stated duration below which it counts as cut off; containers round durations.


def is_av(head: bytes) -> bool:
    """Whether a file with this beginning, at least 8 bytes, is one for PyAV."""
    # Raw AAC has frames with 12 bits of 1 and layer 0, where MP3 has another layer.
    is_adts = len(head) > 1 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0
    return head[4:8] == MP4 or head[:4] in (ASF, MATROSKA) or is_adts


class AvReader:
    """The first audio stream of a file, decoded in blocks.

    Args: file: opened for reading, at its beginning.
    Attributes:
        sample_rate: in Hz.
        n_channels: number of channels.
    Raises: ValueError: PyAV is not installed, or the file is damaged, cut off or has no sound.
    """

    def __init__(self, file: BinaryIO):
        try:
            import av
        except ImportError as error:
            raise ValueError(
                "AAC (.m4a, .aac) is decoded by PyAV, which is not installed: run pip install -r requirements-av.txt, "
                "or convert the file to FLAC"
            ) from error
        self.av = av
        try:
            self.container = av.open(file)
            stream = next(iter(self.container.streams.audio), None)
        except av.error.FFmpegError as error:
            raise ValueError(f"damaged: {error}") from error
        if stream is None or not stream.rate:
            raise ValueError("the file has no audio stream")
        self.stream, self.sample_rate, self.n_channels = stream, stream.rate, stream.channels

    def blocks(self) -> Iterator[Tensor]:
        """The samples in order, (channels, S) float32 each."""
        n_samples, resampler = 0, self.av.AudioResampler(format="fltp")
        try:
            for frame in self.container.decode(self.stream):
                for plain in resampler.resample(frame):
                    block = torch.from_numpy(np.ascontiguousarray(plain.to_ndarray(), dtype=np.float32))
                    n_samples += block.shape[1]
                    yield block
        except self.av.error.FFmpegError as error:
            raise ValueError(f"damaged: {error}") from error
        # Raw AAC states no duration; what PyAV tells of it is guessed from the size.
        seconds = float(self.stream.duration * (self.stream.time_base or 0)) if self.stream.duration else 0.0
        if self.container.format.name != "aac" and n_samples < WHOLE * seconds * self.sample_rate:
            raise ValueError(f"cut off: {n_samples / self.sample_rate:.2f} of {seconds:.2f} s can be read")
        if not n_samples:
            raise ValueError("the file has no samples")


def without_av(file: BinaryIO) -> BinaryIO:
    """A file as libsndfile can read it: one of those formats as a temporary file of float samples, on disk, since it
    may be long; any other as it is, at its beginning.

    Raises: ValueError: see `AvReader`.
    """
    head = file.read(8)
    file.seek(0)
    if not is_av(head):
        return file
    with file:
        reader = AvReader(file)
        samples = tempfile.TemporaryFile()  # noqa: SIM115
        options: dict[str, Any] = {"format": "W64", "subtype": "FLOAT"}
        with soundfile.SoundFile(samples, "w", reader.sample_rate, reader.n_channels, **options) as output:
            for block in reader.blocks():
                output.write(block.T.numpy())
    samples.seek(0)
    return samples
