"""Recordings: the file of a clip as one waveform, with what is wrong with its samples seen.  S samples."""

import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dataset_loading.audio.decoding import AudioReader
from dataset_loading.audio.parts import open_reader
from dataset_loading.audio.signal import FULL_SCALE, SILENCE_DB, StreamResampler

logger = logging.getLogger(__name__)

WILD_RATIO = 10.0  # Samples beyond full scale by which hardly any other is that near are no sound.
WILD_SHARE = 1e-4  # "Hardly any": share of the samples, or one.
CANCELLED = 0.2  # Power of the mean of n channels, times n and relative to theirs, below which they cancel.


class Recording(NamedTuple):
    """A file as a waveform (S,) float32 in one channel at the rate asked for, and the share of its samples that are
    clipped, in the channel with the largest one."""

    waveform: Tensor
    clipped_share: float


class Levels:
    """Sums over all samples of a file, block by block."""

    def __init__(self, n_channels: int):
        self.n_samples, self.peak = 0, 0.0
        self.power = torch.zeros(n_channels, dtype=torch.float64)
        self.mixed_power = 0.0
        self.n_clipped = torch.zeros(n_channels, dtype=torch.int64)

    def add(self, samples: Tensor, mixed: Tensor) -> None:
        """Add a block (channels, S) and the mean of its channels (S,)."""
        low, high = (value.abs().item() for value in samples.aminmax())
        self.peak = max(self.peak, low, high)
        self.n_samples += samples.shape[1]
        if max(low, high) >= FULL_SCALE:
            self.n_clipped += (samples.abs() >= FULL_SCALE).sum(1)
        if len(samples) > 1:
            self.power += torch.stack([channel.dot(channel) for channel in samples])
            self.mixed_power += mixed.dot(mixed).item()


def read_recording(media: dict[str, Any] | None, sample_rate: int) -> Recording:
    """Decode a file, mix its channels and resample them, in memory that is bounded but for the result.

    - Channels that cancel each other (one is inverted) are not mixed: the loudest one is taken, with a warning.
    - A constant offset that would count as sound (SILENCE_DB) is removed.
    - A recording of floating-point numbers beyond full scale is scaled down to it; there it counts as clipped where
      its own peak is held.

    Args:
        media: `{"path": ..., "bytes": ...}`, see `open_media`.
        sample_rate: of the result, in Hz.
    Raises: OSError, ValueError: as `AudioReader`, or a few samples lie far beyond full scale and all others.
    """
    with open_reader(media) as reader:
        levels = Levels(reader.n_channels)
        waveform = collected(mixed_blocks(reader, levels), reader, sample_rate)
        n_samples = levels.n_samples
        # Channels that cancel: the file is read again for its loudest one.
        if levels.mixed_power * reader.n_channels**2 < CANCELLED * levels.power.sum():
            channel = int(levels.power.argmax())
            name = (media or {}).get("path") or "a recording"
            logger.warning("%s: the channels cancel each other (one is inverted); channel %d is used", name, channel)
            waveform = collected((block[channel] for block in reader.blocks()), reader, sample_rate)
        clipped = int(levels.n_clipped.max())
        if reader.is_float and levels.peak > 1:
            clipped = count_clipped(reader, levels.peak, n_samples)
            waveform = waveform.div_(levels.peak)
    # The offset, which would hide silence and move all levels.
    offset = waveform.mean()
    if 20 * offset.abs().clamp_min(1e-20).log10() > SILENCE_DB:
        waveform = waveform.sub_(offset)
    return Recording(waveform, clipped / n_samples)


def mixed_blocks(reader: AudioReader, levels: Levels) -> Iterator[Tensor]:
    """The mean of the channels, block by block, (S,)."""
    for samples in reader.blocks():
        mixed = samples.mean(0)
        levels.add(samples, mixed)
        yield mixed


def collected(blocks: Iterator[Tensor], reader: AudioReader, sample_rate: int) -> Tensor:
    """Blocks (S,) of one channel, resampled and joined."""
    resampler = StreamResampler(reader.sample_rate, sample_rate)
    if reader.n_samples is None:
        return torch.cat(list(resampler.run(blocks)))
    # Written into place, so that the waveform is never there twice.
    waveform, at = torch.empty(resampler.n_resampled(reader.n_samples)), 0
    for piece in resampler.run(blocks):
        piece = piece[: len(waveform) - at]
        waveform[at : at + len(piece)] = piece
        at += len(piece)
    return waveform[:at]


def count_clipped(reader: AudioReader, peak: float, n_samples: int) -> int:
    """Samples at the peak of a recording beyond full scale, in the channel with most of them.

    Raises: ValueError: hardly any sample is near the peak, so that it is no sound.
    """
    n_clipped, n_near, where = torch.zeros(reader.n_channels, dtype=torch.int64), 0, 0
    n_before = 0
    for samples in reader.blocks():
        size = samples.abs()
        n_clipped += (size >= FULL_SCALE * peak).sum(1)
        n_near += int((size > peak / WILD_RATIO).sum(1).max())
        where = n_before + int(size.amax(0).argmax()) if size.max() == peak else where
        n_before += size.shape[1]
    if n_near <= max(1, WILD_SHARE * n_samples):
        raise ValueError(
            f"damaged: {n_near} samples are up to {peak:.3g} times full scale, the largest at "
            f"{where / reader.sample_rate:.3f} s, and all others below a tenth of that; remove or repair the file"
        )
    return int(n_clipped.max())
