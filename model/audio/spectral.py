"""The one log-mel and the short-time Fourier transform of this repository.  B batch, S samples, N n_fft, K N // 2 + 1
frequency bins, M mel bins, F frames.

Frames are centre-free: the waveform is extended by reflection with (N - hop) / 2 samples on both sides, so that S
samples give S / hop frames and frame f is centred on sample (f + 1/2) * hop. Everything here runs in fp32, also under
autocast.
"""

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchaudio.functional import melscale_fbanks

from utils.flags.choices import MelPreset
from utils.options import suggest


@dataclasses.dataclass(frozen=True)
class MelSettings:
    """What defines a log-mel: saved in every audio cache and in every checkpoint that reads or writes log-mels.

    Mel bins are Slaney's (linear below 1 kHz, area normalised, as librosa's default), of magnitudes; the logarithm is
    natural, of values clamped at `floor`.

    Raises: ValueError: a field is out of bounds.
    """

    sample_rate: int = 16000  # Hz
    n_fft: int = 1024  # samples of a frame, all of them under a periodic Hann window
    hop_length: int = 256  # samples between frames
    n_mels: int = 80
    f_min: float = 0.0  # Hz
    f_max: float = 8000.0  # Hz
    floor: float = 1e-5  # smallest mel magnitude

    def __post_init__(self):
        for name in ("sample_rate", "n_fft", "hop_length", "n_mels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be > 0")
        # Reflection adds (n_fft - hop_length) / 2 whole samples on both sides.
        if self.n_fft % 2 or self.hop_length % 2:
            raise ValueError(f"n_fft={self.n_fft} and hop_length={self.hop_length} must be even")
        # Overlap-add cuts frames into pieces of one hop.
        if self.n_fft % self.hop_length or self.n_fft < 2 * self.hop_length:
            raise ValueError(f"hop_length={self.hop_length} must divide n_fft={self.n_fft} at least twice")
        if not 0 <= self.f_min < self.f_max <= self.sample_rate / 2:
            raise ValueError(
                f"f_min={self.f_min} and f_max={self.f_max} must satisfy 0 <= f_min < f_max <= sample_rate / 2 = "
                f"{self.sample_rate / 2}"
            )
        if self.floor <= 0:
            raise ValueError(f"floor={self.floor} must be > 0")

    @property
    def log_floor(self) -> float:
        """The log-mel of silence, and of padding."""
        return math.log(self.floor)

    @property
    def min_samples(self) -> int:
        """The shortest waveform that has a log-mel: reflection needs more samples than it adds."""
        return max(self.hop_length, (self.n_fft - self.hop_length) // 2 + 1)

    def as_dict(self) -> dict[str, Any]:
        """Field names to values, for JSON."""
        return dataclasses.asdict(self)

    def describe(self) -> str:
        """One line."""
        return " ".join(f"{name}={value}" for name, value in self.as_dict().items())


# fmt: off
# 22k is HiFi-GAN's definition, 24k and 44k are BigVGAN's (24khz_100band, 44khz_128band_512x).
MEL_PRESETS: dict[MelPreset, MelSettings] = {
    "16k":   MelSettings(),
    "22k":   MelSettings(sample_rate=22050, n_fft=1024, hop_length=256, n_mels=80,  f_max=8000.0),
    "24k":   MelSettings(sample_rate=24000, n_fft=1024, hop_length=256, n_mels=100, f_max=12000.0),
    "44k":   MelSettings(sample_rate=44100, n_fft=2048, hop_length=512, n_mels=128, f_max=22050.0),
    "48k":   MelSettings(sample_rate=48000, n_fft=2048, hop_length=512, n_mels=128, f_max=24000.0),
}
# fmt: on


def mel_preset(name: str) -> MelSettings:
    """The settings of a preset. Raises: ValueError: there is none of that name; the message lists those there are."""
    if name not in MEL_PRESETS:
        raise ValueError(f"no mel preset {name!r}{suggest(name, MEL_PRESETS)}")
    return MEL_PRESETS[name]


def check_same_mel(first: MelSettings, second: MelSettings, *, first_name: str, second_name: str, remedy: str) -> None:
    """Raise if two stages that are joined use different log-mels.

    Args:
        remedy: what to do, a command where there is one.
    Raises: ValueError: the settings differ; the message shows both whole and names the fields.
    """
    if first == second:
        return
    fields = [f.name for f in dataclasses.fields(first) if getattr(first, f.name) != getattr(second, f.name)]
    raise ValueError(
        f"{first_name} and {second_name} use different log-mels, they differ in {', '.join(fields)}:\n"
        f"  {first_name}: {first.describe()}\n  {second_name}: {second.describe()}\n{remedy}"
    )


def mel_filters(settings: MelSettings) -> Tensor:
    """Slaney's triangular filters on magnitudes, (M, K) fp32, equal to `librosa.filters.mel`."""
    with torch.device("cpu"):  # Models are built on the meta device to be counted and loaded.
        return melscale_fbanks(
            settings.n_fft // 2 + 1,
            f_min=settings.f_min,
            f_max=settings.f_max,
            n_mels=settings.n_mels,
            sample_rate=settings.sample_rate,
            norm="slaney",
            mel_scale="slaney",
        ).T.contiguous()


def reflect_pad(waveform: Tensor, n_fft: int, hop_length: int) -> Tensor:
    """(B, S) -> (B, S + n_fft - hop_length), extended by reflection on both sides.

    Raises: ValueError: the waveform is too short to be reflected.
    """
    pad = (n_fft - hop_length) // 2
    if waveform.shape[-1] <= pad:
        raise ValueError(
            f"a waveform of {waveform.shape[-1]} samples is too short for frames of {n_fft} samples: it needs at "
            f"least {pad + 1}"
        )
    return mirror_ends(waveform, pad, pad)


def mirror_ends(waveform: Tensor, before: int, after: int) -> Tensor:
    """(B, S) -> (B, before + S + after), extended by reflection without repeating the ends.

    The library's kernel has no deterministic backward pass on a GPU; `mirror_by_slices` has.
    """
    if waveform.is_cuda and torch.are_deterministic_algorithms_enabled():
        return mirror_by_slices(waveform, before, after)
    return F.pad(waveform, (before, after), mode="reflect")


def mirror_by_slices(waveform: Tensor, before: int, after: int) -> Tensor:
    """`mirror_ends` by slicing.

    Raises: ValueError: the waveform is too short to be reflected.
    """
    S = waveform.shape[-1]
    if max(before, after) >= S:
        raise ValueError(f"a waveform of {S} samples is too short to be extended by {max(before, after)}")
    # The samples next to each end, mirrored; the ends themselves do not repeat.
    ends = waveform[..., 1 : before + 1].flip(-1), waveform[..., S - 1 - after : S - 1].flip(-1)
    return torch.cat([ends[0], waveform, ends[1]], dim=-1)


def stft(waveform: Tensor, window: Tensor, hop_length: int) -> Tensor:
    """Short-time Fourier transform with centre-free frames.

    Args:
        waveform: (B, S).
        window: (N,).
    Returns: (B, K, S // hop_length) complex64.
    """
    n_fft = len(window)
    with torch.autocast(waveform.device.type, enabled=False):
        # Frames (B, F, N), windowed; spectra (B, F, K) -> (B, K, F).
        frames = reflect_pad(waveform.float(), n_fft, hop_length).unfold(-1, n_fft, hop_length)
        return torch.fft.rfft(frames * window).transpose(1, 2)


def istft(spectrum: Tensor, window: Tensor, hop_length: int) -> Tensor:
    """The waveform whose `stft` is nearest to a spectrum (Griffin and Lim 1984, eq. 6): the inverse of `stft`.

    Args:
        spectrum: (B, K, F) complex.
        window: (N,), N a multiple of hop_length.
    Returns: (B, F * hop_length) fp32.
    """
    n_fft = len(window)
    with torch.autocast(spectrum.device.type, enabled=False):
        # Frames (B, F, N), windowed again, summed, and divided by the sum of squared windows.
        frames = torch.fft.irfft(spectrum.transpose(1, 2), n=n_fft) * window
        return overlap_add(frames, hop_length) / squared_windows(window, hop_length, frames.shape[1])


def overlap_add(frames: Tensor, hop_length: int) -> Tensor:
    """Sum frames at their places and cut off what reflection had added.

    Args:
        frames: (B, F, N), N a multiple of hop_length.
    Returns: (B, F * hop_length).
    """
    # A frame is n_fft / hop pieces of one hop; piece i of frame f belongs to hop f + i.
    B, n_frames, n_fft = frames.shape
    overlap = n_fft // hop_length
    pieces = frames.view(B, n_frames, overlap, hop_length)
    # Piece i of all frames, moved by i hops: (B, F + overlap - 1, hop).
    total = sum(F.pad(pieces[:, :, i], (0, 0, i, overlap - 1 - i)) for i in range(overlap))
    cut = (n_fft - hop_length) // 2  # samples that `reflect_pad` added on either side
    return total.reshape(B, -1)[:, cut : cut + n_frames * hop_length]


def squared_windows(window: Tensor, hop_length: int, n_frames: int) -> Tensor:
    """What `overlap_add` makes of frames that are all the squared window, (n_frames * hop_length,)."""
    n_fft = len(window)
    overlap = n_fft // hop_length
    # Number of the frame whose piece i covers hop h: h - i, (hops, overlap).
    first = torch.arange(n_frames + overlap - 1, device=window.device)[:, None] - torch.arange(
        overlap, device=window.device
    )
    covers = ((first >= 0) & (first < n_frames)).to(
        window.dtype
    )  # 1 where a window's piece covers a hop, (hops, overlap)
    cut = (n_fft - hop_length) // 2
    total = covers @ window.square().view(overlap, hop_length)
    return total.reshape(-1)[cut : cut + n_frames * hop_length]


class Spectrogram(nn.Module):
    """Complex spectrogram with the frames of the log-mel, and back.

    Args:
        n_fft: samples of a frame N.
        hop_length: samples between frames.
    """

    def __init__(self, n_fft: int, hop_length: int):
        super().__init__()
        self.n_fft, self.hop_length = n_fft, hop_length
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)

    def forward(self, waveform: Tensor) -> Tensor:
        """(B, S) -> (B, K, S // hop_length) complex64."""
        return stft(waveform, self.window, self.hop_length)

    def inverse(self, spectrum: Tensor) -> Tensor:
        """(B, K, F) complex -> (B, F * hop_length)."""
        return istft(spectrum, self.window, self.hop_length)


class LogMel(nn.Module):
    """The log-mel of waveforms; not part of any checkpoint's weights, built from the settings wherever it is needed.

    Args:
        settings: the definition.
    """

    filters: Tensor

    def __init__(self, settings: MelSettings):
        super().__init__()
        self.settings = settings
        self.spectrogram = Spectrogram(settings.n_fft, settings.hop_length)
        self.register_buffer("filters", mel_filters(settings), persistent=False)

    def forward(self, waveform: Tensor) -> Tensor:
        """(B, S) in [-1, 1] -> (B, M, S // hop_length) fp32.

        Raises: ValueError: the waveform has fewer than `settings.min_samples` samples.
        """
        return self.from_magnitude(self.spectrogram(waveform).abs())

    def from_magnitude(self, magnitude: Tensor) -> Tensor:
        """(B, K, F) magnitudes -> (B, M, F) log-mel."""
        with torch.autocast(magnitude.device.type, enabled=False):
            # (M, K) x (B, K, F); silence is at `log_floor`.
            return (self.filters @ magnitude.float()).clamp_min(self.settings.floor).log()


def analyse(waveform: Tensor, log_mel: LogMel, chunk_frames: int = 4096) -> Tensor:
    """The log-mel of a waveform of any length in bounded memory. Silence fills the last frame.

    Args:
        waveform: (S,) at the sampling rate of the log-mel.
        chunk_frames: frames per chunk, without their context.
    Returns: (M, F) with F * hop_length >= S.
    """
    hop_length = log_mel.settings.hop_length
    n_frames = -(-max(len(waveform), log_mel.settings.min_samples) // hop_length)  # rounded up
    n_missing = n_frames * hop_length - len(waveform)
    waveform = F.pad(waveform, (0, n_missing)) if n_missing else waveform
    # The ends of a chunk are padded by reflection, as those of the whole are; context frames on both sides, which are
    # dropped afterwards, keep that out of the result.
    context = -(-log_mel.settings.n_fft // hop_length)
    mels = waveform.new_empty(log_mel.settings.n_mels, n_frames)
    for start in range(0, n_frames, chunk_frames):
        first, last = max(0, start - context), min(n_frames, start + chunk_frames + context)
        mel = log_mel(waveform[None, first * hop_length : last * hop_length])[0]
        mels[:, start : start + chunk_frames] = mel[:, start - first : start - first + chunk_frames]
    return mels
