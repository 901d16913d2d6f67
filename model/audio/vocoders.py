"""Vocoder: log-mel to waveform.  B batch, M mel bins, F frames, D width, K frequency bins, S samples, N n_fft.

Architecture "istft" starts from what signal processing knows and learns the rest:
- magnitude: bins whose mel is the given one (multiplicative updates of the filters' inverse);
- phase: the fundamental frequency of each frame, read off the magnitudes' autocorrelation and summed up over time,
  gives every bin the phase of its nearest harmonic. A network of convolutions could not: on a steady tone all its
  inputs are equal, so that it could only repeat itself every hop;
- a ConvNeXt backbone at frame rate (as in Vocos, arXiv 2306.00814) reads the log-mel and corrects each bin's
  log-magnitude, the depth of the harmonics' comb, and the phase. Its middle blocks may work at half the frame rate,
  for half their cost. Its last layer starts at zero: by PESQ and STOI the untrained model is already about as good as
  60 iterations of Griffin-Lim (not by the distance of log-mels);
- a few Griffin-Lim projections, through which it is trained, make neighbouring frames agree; the last one keeps the
  waveform's own magnitudes and corrects them by what their mel lacks.
Architecture "hifigan" (`hifigan.py`) is the generator of HiFi-GAN, which upsamples step by step.
"""

import math
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, initialization

from model.audio.configuration import AudioConfig
from model.audio.frame_conv import FrameConv
from model.audio.harmonic_prior import FourierTransform, HarmonicPrior
from model.audio.hifigan import HiFiGANGenerator
from model.checkpointing import GradientCheckpointingLayer
from model.layers import ZeroLinear, init_layer
from model.presets import VOCODER
from utils.options import Section, from_preset, option

DISPERSION_SECONDS = 3e-3  # Of `disperse`: lowers the peaks of speech by a fifth; PESQ falls from 4 ms on.


class VocoderConfig(AudioConfig):
    """Configuration of `Vocoder`."""

    model_type = "vocoder"

    architecture: Literal["istft", "hifigan"] = option("istft", "network")

    SECTION_ISTFT: ClassVar = Section("Architecture istft", only_with=("architecture", "istft"))
    width: int = option(256, "channels D of the backbone", gt=0)
    n_layers: int = option(8, "ConvNeXt blocks", gt=0)
    expansion: int = option(3, "hidden over outer channels of a block", gt=0)
    kernel_size: int = option(7, "positions that a block's depthwise convolution sees, odd", gt=0)
    n_half_rate_layers: int = option(0, "of the blocks, those in the middle that see every two frames as one", ge=0)
    n_magnitude_updates: int = option(2, "multiplicative updates of the magnitude prior", ge=0)
    n_projections: int = option(3, "Griffin-Lim projections after the network", ge=0)
    n_mel_projections: int = option(1, "projections after those, which correct the waveform's own mel", ge=0)
    f0_min: float = option(65.0, "lowest fundamental frequency of the phase prior in Hz", gt=0)
    f0_max: float = option(500.0, "highest fundamental frequency of the phase prior in Hz", gt=0)

    SECTION_HIFIGAN: ClassVar = Section("Architecture hifigan", only_with=("architecture", "hifigan"))
    hifigan_width: int = option(512, "channels at frame rate, halved at each upsampling", gt=0)
    hifigan_factors: list[int] = option([8, 8, 2, 2], "upsampling factors; their product is hop_length", gt=0)
    hifigan_kernel_sizes: list[int] = option([3, 7, 11], "samples that the residual stacks' kernels see, odd", gt=0)
    hifigan_activation: Literal["leaky_relu", "snake"] = option("leaky_relu", "activation")

    def validate_hifigan(self):
        if self.architecture != "hifigan":
            return
        if math.prod(self.hifigan_factors) != self.hop_length:
            raise ValueError(
                f"the product of hifigan_factors={self.hifigan_factors} must be hop_length={self.hop_length}"
            )
        if self.hifigan_width % 2 ** len(self.hifigan_factors):
            raise ValueError(
                f"hifigan_width={self.hifigan_width} must be divisible by 2 for each of "
                f"hifigan_factors={self.hifigan_factors}"
            )
        for size in self.hifigan_kernel_sizes:
            if size % 2 == 0:
                raise ValueError(f"hifigan_kernel_sizes={self.hifigan_kernel_sizes} must be odd")

    def validate_kernel_size(self):
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={self.kernel_size} must be odd")

    def validate_n_half_rate_layers(self):
        if self.n_half_rate_layers > self.n_layers:
            raise ValueError(
                f"n_half_rate_layers={self.n_half_rate_layers} must be at most n_layers={self.n_layers}: they "
                "are a part of them"
            )

    def validate_f0(self):
        if self.architecture != "istft":
            return
        # The autocorrelation needs two periods in a frame.
        lowest = 2 * self.sample_rate / self.n_fft
        if not lowest <= self.f0_min < self.f0_max <= self.sample_rate / 8:
            raise ValueError(
                f"f0_min={self.f0_min} and f0_max={self.f0_max} must satisfy {lowest:g} (two periods in a frame) <= "
                f"f0_min < f0_max <= {self.sample_rate / 8:g} (an eighth of the sample rate)"
            )


def disperse(waveform: Tensor, sample_rate: int) -> Tensor:
    """Delay frequencies by 0 at 0 Hz to DISPERSION_SECONDS at half the sampling rate, and change no magnitude.

    Harmonics whose phases are aligned peak at once; a delay that grows with the frequency parts them, as the phases of
    Schroeder (IEEE Transactions on Information Theory 16, 1970) do. (B, S) -> (B, S).
    """
    delay = DISPERSION_SECONDS * sample_rate  # In samples, at half the sampling rate.
    n_taps = 1 << math.ceil(math.log2(8 * delay))
    # The phase is the negative integral of the delay over the angular frequency pi f, f in [0, 1].
    frequency = torch.arange(n_taps // 2 + 1, dtype=torch.float64) / (n_taps // 2)
    phase = -math.pi * delay * frequency.square() / 2
    taps = torch.fft.irfft(torch.polar(torch.ones_like(phase), phase)).roll(n_taps // 2)
    # Overlap-save: blocks that share n_taps - 1 samples with the one before, each convolved by transforms of its own.
    n_block, n_samples = 8 * n_taps, waveform.shape[-1]
    n_new = n_block - n_taps + 1
    right = n_taps // 2 + -n_samples % n_new  # fills the last block
    blocks = F.pad(waveform, (n_taps // 2 - 1, right)).unfold(-1, n_block, n_new)  # (B, blocks, n_block)
    spectrum = torch.fft.rfft(blocks) * torch.fft.rfft(taps.to(waveform), n_block)
    return torch.fft.irfft(spectrum, n_block)[..., n_taps - 1 :].flatten(1)[:, :n_samples]


class ConvNeXtBlock(GradientCheckpointingLayer):
    """x + scale * linear(gelu(linear(norm(depthwise(x))))), arXiv 2201.03545, along time."""

    def __init__(self, config: VocoderConfig):
        super().__init__()
        D, hidden = config.width, config.expansion * config.width
        self.depthwise = FrameConv(D, D, config.kernel_size, padding=config.kernel_size // 2, groups=D)
        self.norm = nn.LayerNorm(D)
        self.widen = nn.Linear(D, hidden)
        self.narrow = nn.Linear(hidden, D)
        self.scale = LayerScale(D, 1 / config.n_layers)  # as in Vocos

    def forward(self, x: Tensor) -> Tensor:
        """(B, F, D) -> (B, F, D)."""
        y = self.norm(self.depthwise(x))  # along frames, channel by channel
        return self.scale(x, self.narrow(F.gelu(self.widen(y))))


class LayerScale(nn.Module):
    """A learned factor per channel, arXiv 2103.17239.

    Args:
        width: channels D.
        start: value at the start.
    """

    def __init__(self, width: int, start: float):
        super().__init__()
        self.start = start
        self.weight = nn.Parameter(torch.full((width,), start))

    def forward(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + weight * x, all (..., D)."""
        return torch.addcmul(residual, x, self.weight)


def pair_means(x: Tensor) -> Tensor:
    """(B, F, D) -> means of every two frames, (B, ceil(F / 2), D); a last odd frame is its own mean."""
    # Padding and slice rather than a remainder: they can be traced for any number of frames.
    n_pairs = (x.shape[1] + 1) // 2
    return torch.cat([x, x[:, -1:]], dim=1)[:, : 2 * n_pairs].unflatten(1, (n_pairs, 2)).mean(2)


class HarmonicGenerator(nn.Module):
    """Architecture "istft": prior, backbone, inverse transform, projections.

    Args:
        config: see `VocoderConfig`.
    """

    signs: Tensor

    def __init__(self, config: VocoderConfig):
        super().__init__()
        self.config = config
        D, n_bins = config.width, config.n_fft // 2 + 1
        self.prior = HarmonicPrior(config)
        self.transform = FourierTransform(config.n_fft, config.hop_length)
        # The stem reads the log-mel, pitch and voicing.
        self.stem = FrameConv(config.n_mels + 2, D, config.kernel_size, padding=config.kernel_size // 2)
        self.stem_norm = nn.LayerNorm(D)
        self.blocks = nn.ModuleList(ConvNeXtBlock(config) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(D)
        self.head = ZeroLinear(D, 3 * n_bins)  # gain, comb depth, phase
        # Phases are meant at a frame's centre, half a frame after the transform's origin: every other sign flips.
        self.register_buffer("signs", 1.0 - 2.0 * (torch.arange(n_bins) % 2))

    def forward(self, mel: Tensor, cycles: Tensor | None = None) -> Tensor:
        """(B, M, F) -> (B, F * hop_length). `cycles` of the fundamental, (B, F), where a longer mel gave them."""
        # The prior, without training and without gradients: magnitude (B, F, K), comb and phase of the harmonics.
        with torch.no_grad(), torch.autocast(mel.device.type, enabled=False):
            mel = mel.float()
            magnitude = self.prior.magnitude(mel)
            f0, voicing = self.prior.pitch(magnitude, self.transform)
            comb, phase = self.prior.harmonics(f0, self.prior.cycles(f0) if cycles is None else cycles)
            pitch = torch.log2(f0.float() * self.config.sample_rate / 128)  # octaves above 128 Hz
            # Brought to about unit size, (B, F, M + 2).
            features = torch.cat([mel.transpose(1, 2) / 4 + 1, pitch[..., None], voicing[..., None]], dim=-1)

        # The network's corrections of log-magnitude, comb depth and phase, (B, F, K) each; all 0 at the start.
        x = self.backbone(self.stem_norm(self.stem(features)))
        gain, depth, shift = self.head(self.norm(x)).float().chunk(3, dim=-1)

        # Corrected spectrum to waveform, then Griffin-Lim projections make neighbouring frames agree.
        with torch.autocast(mel.device.type, enabled=False):
            magnitude = magnitude * torch.exp((gain + depth * comb).clamp(-8, 4))  # bounded log-gain
            phase = phase + shift
            signed = magnitude * self.signs
            waveform = self.transform.inverse(signed * torch.cos(phase), signed * torch.sin(phase))
            for _ in range(self.config.n_projections):
                waveform = self.transform.project(waveform, magnitude)
            for _ in range(self.config.n_mel_projections):
                waveform = self.transform.rescale(waveform, partial(self.prior.mel_gain, mel))
        return waveform

    def backbone(self, x: Tensor) -> Tensor:
        """(B, F, D) -> (B, F, D). Blocks at half the rate work on the means of every two frames; what they add to a
        mean is added to both its frames."""
        # Blocks before, inside and after the part at half the rate.
        n_half = self.config.n_half_rate_layers
        first = (self.config.n_layers - n_half) // 2
        for block in self.blocks[:first]:
            x = block(x)
        if n_half:
            mean = y = pair_means(x)
            for block in self.blocks[first : first + n_half]:
                y = block(y)
            x = x + (y - mean).repeat_interleave(2, dim=1)[:, : x.shape[1]]
        for block in self.blocks[first + n_half :]:
            x = block(x)
        return x

    def chunk_arguments(self, mel: Tensor, chunk_frames: int) -> dict[str, Tensor]:
        """What the pieces of a long mel take from the whole: the cycles of the fundamental, (B, F)."""
        with torch.autocast(mel.device.type, enabled=False):
            # Pitch depends on its frame alone; its cycles add up over the whole mel.
            pieces = [
                self.prior.pitch(self.prior.magnitude(piece.float()), self.transform)[0]
                for piece in mel.split(chunk_frames, -1)
            ]
        return {"cycles": self.prior.cycles(torch.cat(pieces, dim=-1))}

    @property
    def context_frames(self) -> int:
        """Frames on either side that a frame's samples depend on, given the cycles."""
        n_half = self.config.n_half_rate_layers
        # Stem and blocks; at half the rate a position is two frames, and pairs reach one more.
        side = (self.config.kernel_size // 2) * (1 + self.config.n_layers + n_half) + (n_half > 0)
        overlap = self.config.n_fft // self.config.hop_length
        # The inverse transform reaches `overlap` frames, a projection (transform and inverse) twice that.
        return side + overlap * (1 + 2 * (self.config.n_projections + self.config.n_mel_projections))


GENERATORS = {"istft": HarmonicGenerator, "hifigan": HiFiGANGenerator}


class Vocoder(PreTrainedModel):
    """Log-mel to waveform.

    Args:
        config: see `VocoderConfig`.
    """

    config_class = VocoderConfig
    main_input_name = "mel"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False

    def __init__(self, config: VocoderConfig):
        super().__init__(config)
        self.generator = GENERATORS[config.architecture](config)
        self.post_init()

    @classmethod
    def from_preset(cls, preset: str, **overrides: Any) -> "Vocoder":
        """A new model from a row of `model.presets.VOCODER`; unknown names are refused with a suggestion."""
        return cls(from_preset(VocoderConfig, VOCODER, preset, **overrides))

    def forward(self, mel: Tensor) -> Tensor:
        """Args: mel: log-mel of `config.mel`, (B, M, F).
        Returns: waveform, nominally in [-1, 1], not clamped, (B, F * hop_length) fp32.
        Raises: ValueError: the mel has another number of bins, or too few frames.
        """
        self.check(mel)
        return self.generator(mel)

    def check(self, mel: Tensor) -> None:
        """Raises: ValueError: the mel cannot be vocoded."""
        if mel.ndim != 3 or mel.shape[1] != self.config.n_mels:
            raise ValueError(
                f"a mel of shape {tuple(mel.shape)} cannot be vocoded: expected (B, {self.config.n_mels}, F) for "
                f"n_mels={self.config.n_mels}"
            )
        if mel.shape[-1] * self.config.hop_length < self.config.mel.min_samples:
            raise ValueError(
                f"a mel of {mel.shape[-1]} frames is too short: its waveform needs at least "
                f"{self.config.mel.min_samples} samples"
            )

    def synthesize(self, mel: Tensor, chunk_frames: int = 0) -> Tensor:
        """The waveform of a log-mel for listening: as `forward`, without clicks at its ends and with lower peaks.

        - Frames that reach over an end of the recording hold its reflection, a kink that would become a click: they
          get no louder in any mel bin than the first frame that does not.
        - Architecture "istft" aligns the phases of all harmonics, as no voice does; `disperse` delays high ones more.

        Args:
            mel: (B, M, F).
            chunk_frames: frames per piece, see `vocode_chunked`; 0: all at once.
        Returns: as `forward`.
        """
        mel = self.soften_ends(mel)
        is_long = 0 < chunk_frames < mel.shape[-1]
        waveform = self.vocode_chunked(mel, chunk_frames) if is_long else self(mel)
        with torch.autocast(mel.device.type, enabled=False):
            is_aligned = self.config.architecture == "istft"
            return disperse(waveform.float(), self.config.sample_rate) if is_aligned else waveform

    def soften_ends(self, mel: Tensor) -> Tensor:
        """The log-mel (B, M, F) with the frames that reach over its ends limited by their neighbours."""
        # The recording is extended by (N - hop) / 2 samples.
        n_frames = -(-(self.config.n_fft - self.config.hop_length) // (2 * self.config.hop_length))
        if mel.shape[-1] <= 2 * n_frames:
            return mel
        first, middle, last = mel[..., :n_frames], mel[..., n_frames:-n_frames], mel[..., -n_frames:]
        return torch.cat([torch.minimum(first, middle[..., :1]), middle, torch.minimum(last, middle[..., -1:])], -1)

    def vocode_chunked(self, mel: Tensor, chunk_frames: int = 2000) -> Tensor:
        """As `forward`, piece by piece in bounded memory; equal to it but for rounding.

        Args:
            mel: (B, M, F), any F that `forward` takes.
            chunk_frames: frames per piece, without the context that pieces share.
        """
        self.check(mel)
        if chunk_frames < 1:
            raise ValueError(f"chunk_frames={chunk_frames} must be > 0")
        n_frames, context = mel.shape[-1], self.generator.context_frames
        hop = self.config.hop_length
        # Pieces overlap by the context that a frame's samples depend on; what it adds is cut off again.
        pieces = []
        whole = self.generator.chunk_arguments(mel, chunk_frames)
        for start in range(0, n_frames, chunk_frames):
            first, last = max(0, start - context), min(n_frames, start + chunk_frames + context)
            first -= first % 2  # Frames make pairs with the same neighbours as in the whole.
            extra = {name: value[..., first:last] for name, value in whole.items()}
            waveform = self.generator(mel[..., first:last], **extra)
            skipped = (start - first) * hop
            pieces.append(waveform[:, skipped : skipped + min(chunk_frames, n_frames - start) * hop])
        return torch.cat(pieces, dim=-1)

    def _init_weights(self, module: nn.Module) -> None:
        """Called once per module by `post_init`, and for what a checkpoint lacks.

        usual layers   see `init_layer`
        LayerScale     1 / number of blocks
        """
        init_layer(module)
        if isinstance(module, LayerScale):
            initialization.constant_(module.weight, module.start)
