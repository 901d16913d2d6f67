"""The log-mel that configurations of audio models share, and the configuration of diffusion on latents of audio."""

import dataclasses
from typing import Literal

from model.audio.spectral import MelSettings
from model.diffusion_process import ProcessConfig
from utils.options import option
from utils.strict_config import StrictConfig

MEL_FIELDS = [field.name for field in dataclasses.fields(MelSettings)]
SPEECH = ("conditioning", "speech")
CAPTION = ("conditioning", "caption")


class AudioConfig(StrictConfig):
    """The log-mel's definition, field by field as in `MelSettings`, which `mel` gives whole."""

    sample_rate: int = option(MelSettings.sample_rate, "samples per second", gt=0)
    n_fft: int = option(MelSettings.n_fft, "samples of a frame N", gt=0)
    hop_length: int = option(MelSettings.hop_length, "samples between frames", gt=0)
    n_mels: int = option(MelSettings.n_mels, "mel bins M", gt=0)
    f_min: float = option(MelSettings.f_min, "lower edge of the lowest mel bin in Hz", ge=0)
    f_max: float = option(MelSettings.f_max, "upper edge of the highest mel bin in Hz", gt=0)
    floor: float = option(MelSettings.floor, "smallest mel magnitude, the logarithm of silence", gt=0)

    @property
    def mel(self) -> MelSettings:
        """The definition as one value."""
        return MelSettings(**{name: getattr(self, name) for name in MEL_FIELDS})

    def validate_mel(self):
        _ = self.mel  # MelSettings checks itself.


class AudioDiffusionConfig(ProcessConfig):
    """Configuration of `AudioDiffusion`. Lists run from the finest level to the coarsest."""

    model_type = "audio_diffusion"
    OF_WEIGHTS = ("symbols", "pause_symbols", "speakers", "languages")

    # Latents.
    latent_channels: int = option(20, "latent channels Z of the VAE", gt=0)
    compression: int = option(2, "mel frames of a latent frame", gt=0)

    # Network.
    conditioning: Literal["speech", "caption"] = option(
        "speech", "speech: tokens with durations; caption: a description of the sound, without alignment"
    )
    widths: list[int] = option([192, 256], "channels of the levels; each halves the number of frames", gt=0)
    n_blocks: list[int] = option([2, 3], "residual blocks of the levels, down and again up (the coarsest once)", gt=0)
    n_attentions: list[int] = option([0, 2], "how many blocks of each level are followed by attention", ge=0)
    head_width: int = option(64, "width of an attention head", gt=0)
    conditioning_width: int = option(256, "width of the time embedding", gt=0)
    kernel_size: int = option(3, "frames that a convolution of the UNet sees", gt=0)
    network_dropout: float = option(0.1, "dropout of the UNet's residual blocks", ge=0, lt=1)

    # Tokens of speech.
    symbols: list[str] = option(
        [], "symbols of the tokens in the order of their numbers; [] before data", only_with=SPEECH
    )
    n_symbols: int = option(64, "rows of the table of symbols", gt=0, only_with=SPEECH)
    pause_symbols: list[int] = option(
        [], "numbers of the symbols that may last no mel frame: pauses", ge=0, only_with=SPEECH
    )
    text_width: int = option(192, "width of the states of tokens, or of the caption the network sees", gt=0)
    n_token_blocks: int = option(3, "blocks of the token encoder", ge=0, only_with=SPEECH)
    n_duration_blocks: int = option(2, "blocks of the duration predictor", ge=0, only_with=SPEECH)
    n_trunk_blocks: int = option(2, "blocks between expanded tokens and the network", ge=0, only_with=SPEECH)
    frame_width: int = option(192, "width of the conditioning of a latent frame", gt=0, only_with=SPEECH)
    token_kernel_size: int = option(
        5, "tokens, or latent frames of the trunk, that a convolution sees", gt=0, only_with=SPEECH
    )
    duration_kernel_size: int = option(
        3, "tokens that a convolution of the duration predictor sees", gt=0, only_with=SPEECH
    )
    text_dropout: float = option(0.3, "dropout of encoder, trunk and duration predictor", ge=0, lt=1, only_with=SPEECH)
    speakers: list[str] = option([], "names of the speakers; [] for none", only_with=SPEECH)
    languages: list[str] = option([], "names of the languages; [] for one", only_with=SPEECH)

    # Captions.
    caption_encoder: Literal["bytes", "frozen"] = option(
        "bytes", "bytes: a transformer trained with the network; frozen: states from the cache", only_with=CAPTION
    )
    caption_width: int | None = option(
        None, "width of the cached states of captions", gt=0, only_with=("caption_encoder", "frozen")
    )
    max_tokens: int = option(256, "tokens of a caption; longer ones are cut", gt=0, only_with=CAPTION)
    n_text_layers: int = option(
        2, "layers of the caption's transformer", ge=0, only_with=[CAPTION, ("caption_encoder", "bytes")]
    )

    @property
    def n_speakers(self) -> int:
        """Number of speakers the model is conditioned on; 0 for none."""
        return len(self.speakers)

    def validate_levels(self):
        for name in ("n_blocks", "n_attentions"):
            if len(getattr(self, name)) != len(self.widths):
                raise ValueError(f"{name}={getattr(self, name)} must have as many entries as widths={self.widths}")
        for width, n_blocks, n_attentions in zip(self.widths, self.n_blocks, self.n_attentions):
            if n_attentions > n_blocks:
                raise ValueError(f"n_attentions={self.n_attentions} must not exceed n_blocks={self.n_blocks}")
            if n_attentions and width % self.head_width:
                raise ValueError(f"head_width={self.head_width} must divide every width with attention, not {width}")
        if self.widths[0] % 2:
            raise ValueError(f"widths={self.widths}: the first must be even, for sines and cosines of the time")
        self.expect(self.head_width % 2 == 0, "head_width", "must be even, for pairs of channels that rotate")
        for name in ("kernel_size", "token_kernel_size", "duration_kernel_size"):
            self.expect(getattr(self, name) % 2 == 1, name, "must be odd, so that frames stay where they are")

    def validate_symbols(self):
        if self.symbols and len(self.symbols) != self.n_symbols:
            raise ValueError(f"n_symbols={self.n_symbols} must be the number of symbols, {len(self.symbols)}")
        if self.pause_symbols and max(self.pause_symbols) >= self.n_symbols:
            raise ValueError(f"pause_symbols={self.pause_symbols} must be below n_symbols={self.n_symbols}")
        for name in ("symbols", "speakers", "languages"):
            values = getattr(self, name)
            self.expect(len(set(values)) == len(values), name, "names one twice")

    def validate_captions(self):
        if self.conditioning == "speech":
            return
        frozen = self.caption_encoder == "frozen"
        if frozen and self.caption_width is None:
            raise ValueError("caption_width=None must be the width of the states for caption_encoder='frozen'")
        if not frozen and self.n_text_layers > 0 and self.text_width % self.head_width:
            raise ValueError(f"head_width={self.head_width} must divide text_width={self.text_width}")
