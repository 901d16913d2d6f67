"""Text to latents of images.  B batch, Z latent channels, y x latent rows and columns, T text tokens, E width of
frozen embeddings.

A UNet predicts what the diffusion process asks for, from noisy latents, time and caption. Architecture "residual" is
the one of `model/diffusion.py`; "ldm" (`ldm_unet.py`) is latent diffusion's and loads diffusers' weights.
Captions are bytes through a small trained transformer, or the stored embeddings of a frozen encoder.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from model.diffusion import (
    ByteTextEncoder,
    FrozenText,
    FrozenTextAdapter,
    NullCondition,
    TextCondition,
    UNet,
    init_diffusion_weights,
    pool,
)
from model.diffusion_process import ProcessConfig
from model.image.ldm_unet import LDMUNet, config_from_diffusers, rename_diffusers_weights
from model.presets import IMAGE_DIFFUSION
from model.text.tokenizer import TOKENS_MULTIPLE
from utils.options import from_preset, option


class ImageDiffusionConfig(ProcessConfig):
    """Configuration of `ImageDiffusion`. Lists run from the finest level to the coarsest."""

    model_type = "image_diffusion"

    # Latents.
    latent_channels: int = option(16, "latent channels Z of the VAE", gt=0)
    latent_size: int = option(32, "side of the training latents: image side over the VAE's compression", gt=0)

    # Network.
    architecture: Literal["residual", "ldm"] = option(
        "residual", "network; ldm loads diffusers' UNet2DConditionModel weights"
    )
    widths: list[int] = option([128, 256], "channels of the levels; each halves the resolution", gt=0)
    n_blocks: list[int] = option(
        [2, 2],
        "residual blocks of the levels, down and again up (residual: the coarsest once; ldm: one more up)",
        gt=0,
    )
    use_attention: list[bool] = option([False, True], "levels with attention to themselves and to the text")
    head_width: int = option(32, "width of an attention head; ldm with n_heads derives its own", gt=0)
    conditioning_width: int | None = option(None, "width of the time embedding; None: 4 x the first width", gt=0)
    n_heads: int | None = option(
        None, "heads of every attention, instead of head_width", gt=0, only_with=("architecture", "ldm")
    )
    n_norm_groups: int = option(32, "groups of each GroupNorm", gt=0, only_with=("architecture", "ldm"))
    use_linear_projection: bool = option(
        False, "linear layers around attention, not 1x1 convolutions", only_with=("architecture", "ldm")
    )

    # Text.
    text_encoder: Literal["bytes", "frozen"] = option(
        "bytes", "bytes: a transformer over bytes, trained with the network; frozen: embeddings from the cache"
    )
    text_width: int = option(256, "width of the text the network sees", gt=0)
    max_tokens: int = option(128, "tokens of a caption; longer ones are cut", gt=0)
    n_text_layers: int = option(2, "bytes only: layers of the text transformer", ge=0)
    text_head_width: int = option(32, "bytes only: width of an attention head of the text transformer", gt=0)
    n_gram_sizes: list[int] = option([3, 4, 5, 6], "bytes only: lengths of the hashed n-grams; [] for none", ge=2)
    n_gram_buckets: int = option(1024, "bytes only: rows of the n-gram table for each length", gt=0)
    text_embedding_width: int | None = option(
        None, "width E of the embeddings", gt=0, only_with=("text_encoder", "frozen")
    )

    @property
    def time_width(self) -> int:
        """The width of the time embedding."""
        return 4 * self.widths[0] if self.conditioning_width is None else self.conditioning_width

    def validate_levels(self):
        for name in ("n_blocks", "use_attention"):
            if len(getattr(self, name)) != len(self.widths):
                raise ValueError(f"{name}={getattr(self, name)} must have as many entries as widths={self.widths}")
        # Sides are halved once between two levels.
        smallest = 2 ** (len(self.widths) - 1)
        if self.latent_size % smallest:
            raise ValueError(
                f"latent_size={self.latent_size} must be divisible by {smallest}, for {len(self.widths)} levels"
            )
        if self.widths[0] % 2:
            raise ValueError(f"widths={self.widths}: the first must be even, for sines and cosines of the time")

    def validate_architecture(self):
        if self.architecture == "ldm":
            self._validate_ldm()
            return
        for fine, coarse in zip(self.widths, self.widths[1:]):
            if 4 * fine % coarse:
                raise ValueError(
                    f"widths={self.widths}: {coarse} must divide 4 * {fine}, so that the shortcut between the levels "
                    "averages or repeats whole channels"
                )
        for width, has_attention in zip(self.widths, self.use_attention):
            if has_attention and width % self.head_width:
                raise ValueError(f"head_width={self.head_width} must divide every width with attention, not {width}")

    def _validate_ldm(self):
        if self.conditioning_width not in (None, 4 * self.widths[0]):
            raise ValueError(
                f"conditioning_width={self.conditioning_width} must be None or 4 * {self.widths[0]} in 'ldm'"
            )
        for width in self.widths:
            if width % self.n_norm_groups:
                raise ValueError(f"n_norm_groups={self.n_norm_groups} must divide every width, not {width}")
            name = "head_width" if self.n_heads is None else "n_heads"
            if width % getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)} must divide every width, not {width}")

    def validate_text(self):
        if self.max_tokens % TOKENS_MULTIPLE:
            raise ValueError(
                f"max_tokens={self.max_tokens} must be divisible by {TOKENS_MULTIPLE}, to which captions are padded"
            )
        if self.text_encoder == "bytes":
            if self.n_text_layers > 0 and self.text_width % self.text_head_width:
                raise ValueError(f"text_head_width={self.text_head_width} must divide text_width={self.text_width}")
        elif self.text_embedding_width is None:
            raise ValueError("text_embedding_width=None must be the width of the embeddings for text_encoder='frozen'")
        elif self.architecture == "ldm" and self.text_embedding_width != self.text_width:
            raise ValueError(
                f"text_embedding_width={self.text_embedding_width} must be text_width={self.text_width} in 'ldm', "
                "which takes the embeddings as they are"
            )


@dataclass
class DiffusionOutput(ModelOutput):
    """What `ImageDiffusion.forward` returns.

    Args:
        prediction: (B, Z, y, x) fp32, in the terms of the process (velocity, v, epsilon or x0).
    """

    prediction: Tensor | None = None


def build_residual(config: ImageDiffusionConfig) -> UNet:
    """The network of architecture "residual"."""
    return UNet(
        in_channels=config.latent_channels,
        out_channels=config.latent_channels,
        widths=config.widths,
        n_blocks=config.n_blocks,
        use_attention=config.use_attention,
        head_width=config.head_width,
        conditioning_width=config.time_width,
        text_width=config.text_width,
    )


class ImageDiffusion(PreTrainedModel):
    """Diffusion model of latents, standardised to zero mean and unit std per channel.

    `network(x, network_time, condition)` is the bare network, for samplers that scale its input themselves.
    """

    config_class = ImageDiffusionConfig
    config: ImageDiffusionConfig
    main_input_name = "latents"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False

    def __init__(self, config: ImageDiffusionConfig):
        super().__init__(config)
        # Process and network.
        self.process = config.build_process()
        self.network = build_residual(config) if config.architecture == "residual" else LDMUNet(config)
        # Text encoder; ldm was trained on the embeddings as they are.
        if config.text_encoder == "bytes":
            self.text_encoder = ByteTextEncoder(
                config.text_width,
                config.n_text_layers,
                head_width=config.text_head_width,
                max_tokens=config.max_tokens,
                n_gram_sizes=config.n_gram_sizes,
                n_gram_buckets=config.n_gram_buckets,
            )
        elif config.architecture == "ldm":
            self.text_encoder = FrozenText()
        else:
            assert config.text_embedding_width is not None
            self.text_encoder = FrozenTextAdapter(config.text_embedding_width, config.text_width)
        # The learned condition of captions that are dropped.
        self.null = NullCondition(config.text_width)
        self.post_init()

    def forward(
        self,
        latents: Tensor,
        time: Tensor,
        tokens: Tensor | None = None,
        *,
        text_states: Tensor | None = None,
        mask: Tensor | None = None,
        drop: Tensor | None = None,
    ) -> DiffusionOutput:
        """The network's prediction; without a caption that of the null condition.

        Args:
            latents: x_t as the process gives it, (B, Z, y, x), y and x divisible by 2^(levels - 1).
            time: t in [0, 1], (B,).
            tokens, text_states, mask, drop: see `encode_text`.
        """
        # Condition, then prediction.
        if tokens is None and text_states is None:
            condition = self.null_condition(latents.shape[0])
        else:
            condition = self.encode_text(tokens, text_states=text_states, mask=mask, drop=drop)
        return DiffusionOutput(prediction=self.predict(latents, time, condition))

    def encode_text(
        self,
        tokens: Tensor | None = None,
        *,
        text_states: Tensor | None = None,
        mask: Tensor | None = None,
        drop: Tensor | None = None,
    ) -> TextCondition:
        """Captions as the network takes them.

        Args:
            tokens: byte tokens, (B, T) int64; for text_encoder="bytes".
            text_states: embeddings, (B, T, E); for text_encoder="frozen".
            mask: (B, T) bool, True where there is a token, at least one per row; None where nothing is padded.
            drop: (B,) bool, True where the learned null condition replaces the caption; None for nowhere. Give it in
                training, so that the null condition takes part in every step on every process.
        Raises:
            ValueError: the text does not fit the model's text encoder, or is longer than max_tokens.
        """
        # Exactly the kind of text that the model was built for, no wider and no longer than it takes.
        kinds = {"bytes": "tokens", "frozen": "text_states"}
        given = [name for name, value in (("tokens", tokens), ("text_states", text_states)) if value is not None]
        if given != [kinds[self.config.text_encoder]]:
            raise ValueError(
                f"text_encoder={self.config.text_encoder!r} takes {kinds[self.config.text_encoder]} and nothing else, "
                f"but {' and '.join(given) or 'no caption'} came; use the cache of the same text encoder"
            )
        text = tokens if text_states is None else text_states
        assert text is not None
        if text_states is not None and text_states.shape[-1] != self.config.text_embedding_width:
            raise ValueError(
                f"text_states of width {text_states.shape[-1]} do not fit "
                f"text_embedding_width={self.config.text_embedding_width}"
            )
        if text.shape[1] > self.config.max_tokens:
            raise ValueError(
                f"captions of {text.shape[1]} tokens exceed max_tokens={self.config.max_tokens} of this model; "
                "cut them there"
            )
        if mask is None:
            mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        # States (B, T, E) and pooled vector (B, E), with the null condition in dropped rows.
        states = self.text_encoder(text, mask)
        condition = TextCondition(states, mask, pool(states, mask))
        return condition if drop is None else self.null.replace(condition, drop)

    def null_condition(self, batch_size: int) -> TextCondition:
        """The learned condition for no caption: (B, 1, D) states."""
        return self.null(batch_size)

    def predict(self, latents: Tensor, time: Tensor, condition: TextCondition) -> Tensor:
        """The prediction for captions that are encoded already.

        Args:
            latents: x_t, (B, Z, y, x), y and x divisible by 2^(levels - 1).
            time: t in [0, 1], (B,).
        Returns:
            (B, Z, y, x) fp32.
        Raises:
            ValueError: wrong number of channels, or sides that cannot be halved.
        """
        Z, multiple = self.config.latent_channels, 2 ** (len(self.config.widths) - 1)
        if latents.ndim != 4 or latents.shape[1] != Z or latents.shape[2] % multiple or latents.shape[3] % multiple:
            raise ValueError(
                f"latents of shape {tuple(latents.shape)} do not fit: expected (B, {Z}, y, x) with y and x divisible "
                f"by {multiple}"
            )
        # Input and time as the process scales them for the network.
        x = self.process.network_input(latents.float(), time)
        return self.network(x, self.process.network_time(time), condition)

    def latent_shape(self) -> tuple[int, int, int]:
        """(Z, y, x) of the training latents."""
        return self.config.latent_channels, self.config.latent_size, self.config.latent_size

    def _init_weights(self, module: nn.Module) -> None:
        """Called once per module by `post_init`, and for what a checkpoint lacks; see `init_diffusion_weights`."""
        init_diffusion_weights(module)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "ImageDiffusion":
        """A model with fresh weights of a size in `IMAGE_DIFFUSION`; ValueError for an unknown name or field."""
        return cls(from_preset(ImageDiffusionConfig, IMAGE_DIFFUSION, name, **overrides))

    @classmethod
    def from_diffusers(cls, folder: str | Path, **overrides: Any) -> "ImageDiffusion":
        """Read a folder written by diffusers' `UNet2DConditionModel.save_pretrained` as architecture "ldm".

        The text comes from a frozen encoder as wide as the cross-attention, and by default the process is that of
        Stable Diffusion 1: epsilon, scaled-linear. The null condition is fresh: train it, or put an encoded empty
        caption there.
        Args:
            overrides: other fields of `ImageDiffusionConfig`, as the process or the text encoder.
        Raises:
            FileNotFoundError: config.json or diffusion_pytorch_model.safetensors is missing.
            ValueError: the configuration asks for something the architecture does not have, or weights do not fit.
        """
        folder = Path(folder)
        for name in ("config.json", "diffusion_pytorch_model.safetensors"):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"{folder / name} is missing; expected a folder saved by diffusers' UNet2DConditionModel"
                )
        fields = config_from_diffusers(json.loads((folder / "config.json").read_text()))
        model = cls(ImageDiffusionConfig(**{**fields, **overrides}))  # overrides win over the file
        model.load_diffusers_weights(load_file(folder / "diffusion_pytorch_model.safetensors"))
        return model

    def load_diffusers_weights(self, state_dict: dict[str, Tensor]) -> None:
        """Copy the weights of diffusers' UNet2DConditionModel into the network of this model of architecture "ldm".

        Args:
            state_dict: as `UNet2DConditionModel.state_dict()`.
        Raises:
            ValueError: other architecture, or weights whose names or shapes differ from this network's.
        """
        if self.config.architecture != "ldm":
            raise ValueError(f"architecture={self.config.architecture!r} cannot take diffusers' weights; use 'ldm'")
        weights, expected = rename_diffusers_weights(state_dict), self.network.state_dict()
        # Names and shapes must match one to one.
        theirs, ours = ({name: tuple(value.shape) for name, value in state.items()} for state in (weights, expected))
        wrong = sorted(name for name in theirs | ours if theirs.get(name) != ours.get(name))
        if wrong:
            raise ValueError(
                "weights do not fit this network: "
                + ", ".join(f"{name} has shape {theirs.get(name)}, needed {ours.get(name)}" for name in wrong[:5])
            )
        self.network.load_state_dict(weights)
