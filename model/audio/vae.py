"""Audio VAE: log-mels to latents and back.  B batch, M mel bins, F mel frames, c frames of a patch (the compression),
L = ceil(F / c) latent frames, m latent rows, D width, Z latent channels, V characters.

- Mels are normalised per mel bin, with statistics that are measured on the training set and stored with the weights.
- The network runs at the latent rate alone: the stem takes a patch of c frames as one position. Its blocks are those
  of ConvNeXt (arXiv 2201.03545): depthwise convolution, norm, two linear layers; they start as the identity.
- A linear path beside the network projects every patch on its Z principal patterns and back. It starts there
  (`fit_to_data`), whitened, and is trained; the network's own output starts at zero.
- Architecture "conv1d" takes all mel bins of a patch as channels, latents are (B, Z, L). Architecture "conv2d" takes a
  mel as an image of one channel and cuts it into patches in frequency, too; latents are (B, Z, m, L).
- Padding changes nothing: hidden states beyond a clip's last patch are zero before every convolution, as those before
  its first one are. Inside the last patch, padding is the log-mel of silence.
- Speakers, where there are any, scale and shift the normalised states of every block, starting at no effect.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization

from model.audio.configuration import AudioConfig
from model.audio.lengths import valid_frames
from model.audio.vae_network import CharacterHead, Decoder, Encoder, PatchCode, PosteriorHead
from model.presets import AUDIO_VAE
from model.vae import VAE, ChannelNoise, VAEOutput, reparametrize
from utils.options import from_preset, option

MIN_STD = 0.1  # Smallest std that mels are divided by: a bin that never changes stays finite.


class AudioVAEConfig(AudioConfig):
    """Configuration of `AudioVAE`; the log-mel's fields are those of `AudioConfig`."""

    model_type = "audio_vae"
    OF_WEIGHTS = ("speakers",)

    # Patches and latents.
    architecture: Literal["conv1d", "conv2d"] = option("conv1d", "mel bins as channels, or as rows of an image")
    latent_channels: int = option(20, "latent channels Z", gt=0)
    patch_frames: int = option(2, "mel frames c per latent frame", gt=0)
    patch_bins: int = option(8, "mel bins per latent row", gt=0, only_with=("architecture", "conv2d"))

    # Network.
    width: int = option(256, "channels D of the network", gt=0)
    n_encoder_blocks: int = option(2, "residual blocks of the encoder", ge=0)
    n_decoder_blocks: int = option(3, "residual blocks of the decoder", ge=0)
    kernel_size: int = option(7, "positions that a block's depthwise convolution sees along each axis", gt=0)

    # Speakers and characters.
    speakers: list[str] = option([], "names of the speakers the model is conditioned on; [] for none")
    speaker_width: int = option(64, "width of a speaker's embedding", gt=0)
    use_ctc: bool = option(False, "a head that reads characters out of the latents, for a CTC loss")

    @property
    def compression(self) -> int:
        """Mel frames per latent frame."""
        return self.patch_frames

    @property
    def n_speakers(self) -> int:
        """Number of speakers the model is conditioned on; 0 for none."""
        return len(self.speakers)

    @property
    def n_rows(self) -> int:
        """Latent rows m, 1 for conv1d."""
        return 1 if self.architecture == "conv1d" else self.n_mels // self.patch_bins

    @property
    def patch_size(self) -> int:
        """Mel values of a patch."""
        return self.n_mels // self.n_rows * self.patch_frames

    def validate_patches(self):
        if self.architecture == "conv2d" and self.n_mels % self.patch_bins:
            raise ValueError(f"patch_bins={self.patch_bins} must divide n_mels={self.n_mels} for conv2d")
        if self.latent_channels > self.patch_size:
            raise ValueError(
                f"latent_channels={self.latent_channels} exceed the {self.patch_size} mel values of a patch"
            )

    def validate_network(self):
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={self.kernel_size} must be odd")

    def validate_speakers(self):
        if len(set(self.speakers)) < len(self.speakers):
            raise ValueError(f"speakers={self.speakers} names one twice")


@dataclass
class AudioVAEOutput(VAEOutput):
    """What `AudioVAE.forward` returns.

    Args:
        reconstruction: log-mel (B, M, F) fp32, not clamped at the floor; padding is the log-mel of silence.
        mean: posterior mean, (B, Z, L) or (B, Z, m, L) fp32, 0 in padding.
        logvar: logarithm of the posterior variance, of the same shape, 0 in padding: padding costs no KL divergence.
        character_logits: (B, L, V) fp32 of the CTC head, or None.
    """

    character_logits: Tensor | None = None


class AudioVAE(VAE):
    """Audio VAE of either architecture."""

    config_class = AudioVAEConfig
    config: AudioVAEConfig
    main_input_name = "mel"

    band_mean: Tensor
    band_std: Tensor

    def __init__(self, config: AudioVAEConfig):
        super().__init__(config)
        # Until `fit_to_data`, what speech is like.
        self.register_buffer("band_mean", torch.full((config.n_mels,), -5.0))
        self.register_buffer("band_std", torch.full((config.n_mels,), 2.0))
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.speaker_embedding = nn.Embedding(config.n_speakers, config.speaker_width) if config.n_speakers else None
        self.character_head = CharacterHead(config) if config.use_ctc else None
        self.post_init()

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "AudioVAE":
        """A model with fresh weights of a size in `presets.AUDIO_VAE`; ValueError for an unknown name or field."""
        return cls(from_preset(AudioVAEConfig, AUDIO_VAE, name, **overrides))

    # ---- Mels to latents and back.

    def forward(
        self,
        mel: Tensor,
        n_frames: Tensor | None = None,
        noise: Tensor | None = None,
        *,
        channel_noise: ChannelNoise | None = None,
        speaker: Tensor | None = None,
    ) -> AudioVAEOutput:
        """Encode, add `noise` in units of the posterior's std, decode.

        Args:
            mel: log-mel (B, M, F).
            n_frames: valid frames of each clip, (B,); None: all. What lies after them changes nothing.
            noise: standard normal, of the shape of the latents, or None to decode the posterior mean.
            channel_noise: raises the std of the noise.
            speaker: (B,) int64, places in `config.speakers`; None where there are none.
        """
        n_frames = self.check_frames(n_frames, mel.shape[0], mel.shape[-1], device=mel.device)
        mean, logvar = self.encode(mel, n_frames, speaker)
        # Reparametrised latents, cut to the frames of the input after decoding.
        latents = reparametrize(mean, logvar, noise, channel_noise)
        reconstruction = self.decode_all(latents, n_frames, speaker)[..., : mel.shape[-1]]
        logits = self.read_characters(latents, n_frames) if self.character_head is not None else None
        return AudioVAEOutput(reconstruction=reconstruction, mean=mean, logvar=logvar, character_logits=logits)

    def encode(
        self, mel: Tensor, n_frames: Tensor | None = None, speaker: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The posterior of a log-mel.

        Args: as for `forward`.
        Returns: mean and logvar, each (B, Z, L) or (B, Z, m, L) fp32; 0 in padding.
        Raises: ValueError: other mel bins, no frame, not one length per clip or a length that the mel does not have
            (seen on the CPU), a speaker where the model knows none, or none where it needs one.
        """
        if mel.ndim != 3 or mel.shape[1] != self.config.n_mels or mel.shape[-1] == 0:
            raise ValueError(
                f"a mel of shape {tuple(mel.shape)} cannot be encoded: expected (B, {self.config.n_mels}, F), F > 0"
            )
        # Pad to whole patches; padding, there and after each clip's last frame, is the log-mel of silence.
        n_frames = self.check_frames(n_frames, mel.shape[0], mel.shape[-1], device=mel.device)
        n_padded = -mel.shape[-1] % self.config.compression
        mel = F.pad(mel.float(), (0, n_padded), value=self.config.mel.log_floor)
        mel = mel.where(valid_frames(n_frames, mel.shape[-1])[:, None], self.config.mel.log_floor)
        mask = self.latent_mask(n_frames, mel.shape[-1] // self.config.compression)
        patches = self.to_patches(self.normalize_mel(mel))
        mean, logvar = self.encoder.in_windows(patches, mask, self.embed_speaker(speaker))
        return (mean * mask).movedim(-1, 1), (logvar * mask).movedim(-1, 1)

    def decode(self, latents: Tensor, n_frames: Tensor | None = None, speaker: Tensor | None = None) -> Tensor:
        """The log-mel of latents.

        Args:
            latents: (B, Z, L) or (B, Z, m, L), in the units of `encode` (not standardised).
            n_frames: valid mel frames of each clip, (B,); None: L * c. The mel is cut to the longest.
            speaker: as for `forward`.
        Returns: (B, M, F) fp32, not clamped at the floor; padding is the log-mel of silence.
        Raises: ValueError: other channels or rows, no frame; lengths and speakers as for `encode`.
        """
        lead = (self.config.latent_channels, *([self.config.n_rows] if self.config.architecture == "conv2d" else []))
        if tuple(latents.shape[1:-1]) != lead or latents.shape[-1] == 0:
            raise ValueError(
                f"latents of shape {tuple(latents.shape)} cannot be decoded: expected (B, "
                f"{', '.join(map(str, lead))}, L), L > 0, for architecture={self.config.architecture!r}"
            )
        F_all = latents.shape[-1] * self.config.compression
        n_frames = None if n_frames is None else n_frames.cpu()  # Checked, and the longest one is needed there.
        checked = self.check_frames(n_frames, latents.shape[0], F_all, device=latents.device)
        mel = self.decode_all(latents, checked, speaker)
        return mel if n_frames is None else mel[..., : int(n_frames.max())]

    def decode_all(self, latents: Tensor, n_frames: Tensor, speaker: Tensor | None) -> Tensor:
        """As `decode`, without checks and without cutting: (B, M, L * c)."""
        mask = self.latent_mask(n_frames, latents.shape[-1])
        # Latents of padding are zero, as those of `encode`.
        (patches,) = self.decoder.in_windows(latents.movedim(1, -1) * mask, mask, self.embed_speaker(speaker))
        mel = self.denormalize_mel(self.from_patches(patches))
        return mel.where(valid_frames(n_frames, mel.shape[-1])[:, None], self.config.mel.log_floor)

    def read_characters(self, latents: Tensor, n_frames: Tensor | None = None) -> Tensor:
        """Logits of the CTC head, (B, L, V) fp32; frames beyond `latents_lengths(n_frames)` mean nothing."""
        x = latents.movedim(1, -1)
        if self.config.architecture == "conv2d":
            x = x.transpose(1, 2).flatten(2)  # (B, L, m * Z)
        return self.character_head(x).float()

    # ---- Lengths and shapes.

    def latents_lengths(self, n_frames: Tensor) -> Tensor:
        """Valid latent frames of clips with so many mel frames, of the same shape."""
        return -(-n_frames // self.config.compression)  # rounded up

    def latent_shape(self, n_frames: int) -> tuple[int, ...]:
        """(Z, L) or (Z, m, L) of a mel with so many frames."""
        rows = () if self.config.architecture == "conv1d" else (self.config.n_rows,)
        return (self.config.latent_channels, *rows, -(-n_frames // self.config.compression))

    def latent_mask(self, n_frames: Tensor, n_latents: int) -> Tensor:
        """1 in valid latent frames, 0 in padding: (B, L, 1), for conv2d (B, 1, L, 1)."""
        mask = valid_frames(self.latents_lengths(n_frames), n_latents).float()[..., None]
        return mask if self.config.architecture == "conv1d" else mask[:, None]

    def check_frames(self, n_frames: Tensor | None, B: int, n_all: int, *, device: torch.device) -> Tensor:
        """The lengths of all clips on the device; None means all frames.

        Lengths that are on a GPU are clamped to [1, n_all] instead of checked: nothing waits for it.

        Raises: ValueError: not one length per clip, or a length outside [1, n_all].
        """
        if n_frames is None:
            return torch.full((B,), n_all, device=device)
        if tuple(n_frames.shape) != (B,):
            raise ValueError(f"n_frames has shape {tuple(n_frames.shape)}, expected ({B},): one length per clip")
        can_check = n_frames.device.type == "cpu" and not torch.compiler.is_compiling()
        if can_check and ((n_frames < 1) | (n_frames > n_all)).any():
            raise ValueError(f"n_frames={n_frames.tolist()} must lie between 1 and {n_all}, the frames there are")
        return n_frames.to(device).clamp(1, n_all)

    def embed_speaker(self, speaker: Tensor | None) -> Tensor | None:
        """(B,) -> (B, 1, E), for conv2d (B, 1, 1, E)."""
        if (speaker is None) != (self.speaker_embedding is None):
            what = "needs a speaker" if speaker is None else "knows no speakers, but one is given"
            raise ValueError(f"this audio VAE {what}: config.speakers has {self.config.n_speakers} names")
        if speaker is None:
            return None
        embedded = self.speaker_embedding(speaker)[:, None]
        return embedded if self.config.architecture == "conv1d" else embedded[:, None]

    def normalize_mel(self, mel: Tensor) -> Tensor:
        """Log-mel (B, M, F) -> about zero mean and unit std per mel bin."""
        return (mel - self.band_mean[:, None]) / self.band_std[:, None]

    def denormalize_mel(self, mel: Tensor) -> Tensor:
        """The inverse of `normalize_mel`."""
        return mel * self.band_std[:, None] + self.band_mean[:, None]

    def to_patches(self, mel: Tensor) -> Tensor:
        """(B, M, L * c) -> (B, L, M * c), for conv2d (B, m, L, M / m * c)."""
        patches = mel.unflatten(-1, (-1, self.config.patch_frames)).unflatten(1, (self.config.n_rows, -1))
        patches = patches.transpose(2, 3).flatten(3)  # (B, m, L, M / m * c)
        return patches[:, 0] if self.config.architecture == "conv1d" else patches

    def from_patches(self, patches: Tensor) -> Tensor:
        """The inverse of `to_patches`."""
        patches = patches[:, None] if self.config.architecture == "conv1d" else patches
        # (B, m, L, M / m * c) -> (B, m, M / m, L * c) -> (B, M, L * c).
        return patches.unflatten(3, (-1, self.config.patch_frames)).transpose(2, 3).flatten(3).flatten(1, 2)

    # ---- What it starts as.

    @torch.no_grad()
    def fit_to_data(self, mels: Iterable[Tensor]) -> None:
        """Measure mean and std of every mel bin, and make the linear path the principal components of patches.

        Components are those of log-mel values, not of normalised ones, and whitened: every latent channel starts with
        unit std. The posterior starts with the same noise on all of them, small compared with what they leave out.

        Args:
            mels: log-mels (M, F) of the training set, iterated over twice.
        """
        device, c = self.band_mean.device, self.config.patch_frames
        # First pass: count, sum and sum of squares per mel bin, (3, M) fp64.
        moments = torch.zeros(3, self.config.n_mels, dtype=torch.float64)
        for mel in mels:
            mel = mel.cpu().double()
            moments += torch.stack([torch.full((len(mel),), mel.shape[1]), mel.sum(1), mel.square().sum(1)])
        mean = moments[1] / moments[0]
        std = (moments[2] / moments[0] - mean.square()).clamp_min(MIN_STD**2).sqrt()
        self.band_mean.copy_(mean)
        self.band_std.copy_(std)

        # Second pass: covariance of the normalised patches in log-mel units, (patch_size, patch_size) fp64.
        covariance = torch.zeros(self.config.patch_size, self.config.patch_size, dtype=torch.float64)
        n_patches = 0
        # Log-mel units per normalised unit, for each value of a patch.
        units = std.view(self.config.n_rows, -1).square().mean(0).sqrt().repeat_interleave(c)
        for mel in mels:
            whole = mel[None, :, : mel.shape[1] // c * c].to(device)
            patches = self.to_patches(self.normalize_mel(whole)).flatten(0, -2).cpu().double() * units
            covariance += patches.T @ patches
            n_patches += len(patches)
        self.set_code(covariance / max(n_patches, 1), units)

    def set_code(self, covariance: Tensor, units: Tensor) -> None:
        """Make the linear path the principal components of patches with this covariance, (patch_size, patch_size)."""
        # Principal components: eigenvalues in ascending order, so the last Z are the largest.
        values, vectors = torch.linalg.eigh(covariance)
        Z = self.config.latent_channels
        values, vectors = values.flip(0)[:Z].clamp_min(1e-4), vectors.flip(1)[:, :Z]
        vectors = vectors * vectors.sum(0).sign().where(vectors.sum(0) != 0, 1.0)  # eigh leaves the sign open.
        # Whitened codes: encoder V^T / sqrt(lambda), decoder V sqrt(lambda), both in units of the normalised mel.
        self.encoder.code.weight.copy_((vectors * units[:, None] / values.sqrt()).T)
        self.decoder.code.weight.copy_(vectors / units[:, None] * values.sqrt())
        # Posterior variance: 5 % of the variance that the components leave out, relative to each channel's own.
        lost = (covariance.trace() - values.sum()).clamp_min(0) / Z
        self.encoder.head.bias[Z:] = (0.05 * lost.clamp_min(1e-4) / values).clamp_max(1.0).log()

    def _init_weights(self, module: nn.Module) -> None:
        """As `VAE._init_weights`, and:

        Embedding                 weight N(0, 1)
        PatchCode                 truncated cosine transform, bias 0
        PosteriorHead             weight 0, bias 0 for the mean, -5 for logvar
        mel statistics            mean -5, std 2
        """
        super()._init_weights(module)
        if isinstance(module, PatchCode):
            initialization.copy_(module.weight, module.initial_weight())
        elif isinstance(module, PosteriorHead):
            bias = torch.zeros(module.out_features)
            bias[module.out_features // 2 :] = module.LOGVAR
            initialization.copy_(module.bias, bias)
        elif isinstance(module, nn.Embedding):
            initialization.normal_(module.weight)
        elif isinstance(module, AudioVAE):
            initialization.constant_(module.band_mean, -5.0)
            initialization.constant_(module.band_std, 2.0)
