"""Text to latents of speech, and captions to latents of any sound.  B batch, L latent frames, Z latent channels,
T tokens of speech, E width of the text, D width of the frames, S caption tokens.

conditioning="speech": tokens with known or predicted durations are expanded to frames (`text_conditioning.py`). A
linear layer on the frames predicts the latents, the prior (as in Grad-TTS, arXiv 2105.06337). The UNet (`unet1d.py`)
sees noisy latents beside frames and prior, and predicts what the diffusion process asks for.

conditioning="caption": the same UNet without alignment attends to a caption and knows the clip's length.

Latents have the time first, (B, L, Z), and are standardised per channel. Clips of a batch may have any lengths: a
clip's results are those that it has alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, initialization
from transformers.utils import ModelOutput

from model.audio.configuration import AudioDiffusionConfig
from model.audio.lengths import valid_frames
from model.audio.text_conditioning import (
    N_PLACE_FEATURES,
    DurationPredictor,
    FrameTrunk,
    SpeechText,
    TokenEncoder,
    expand_tokens,
    whole_durations,
)
from model.audio.unet1d import KEYS_PER_PART, AudioCondition, UNet1d
from model.diffusion import (
    ByteTextEncoder,
    FrozenTextAdapter,
    NullCondition,
    TextCondition,
    TimeEmbedding,
    init_diffusion_weights,
    pool,
)
from model.dropout import check_keys, fold
from model.layers import to_device
from model.presets import AUDIO_DIFFUSION
from model.samplers import OnEstimate, guided_denoiser, sample
from utils.flags.choices import SamplerKind
from utils.options import from_preset

FACTOR_RANGE = (0.5, 2.0)  # of a plausible duration factor
# Dropout keys of the encoder are the clips' own, those of the other parts follow.
DURATION_KEYS, TRUNK_KEYS, NETWORK_KEYS = KEYS_PER_PART, 2 * KEYS_PER_PART, 3 * KEYS_PER_PART


@dataclass
class AudioDiffusionOutput(ModelOutput):
    """What `AudioDiffusion.forward` returns; everything is 0 in padding.

    Args:
        prediction: (B, L, Z) fp32, in the terms of the process (velocity, v, epsilon or x0).
        prior: the latents that a frame's text alone predicts, (B, L, Z) fp32; None for captions.
        log_durations: predicted log(1 + mel frames) of tokens, (B, T) fp32; None for captions.
    """

    prediction: Tensor | None = None
    prior: Tensor | None = None
    log_durations: Tensor | None = None


class AudioDiffusion(PreTrainedModel):
    """Diffusion model of latents of audio, with durations and prior for speech.

    `network(x, network_time, condition)` is the bare network, for samplers that scale its input themselves.
    """

    config_class = AudioDiffusionConfig
    config: AudioDiffusionConfig
    main_input_name = "latents"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False

    duration_factor: Tensor

    def __init__(self, config: AudioDiffusionConfig):
        super().__init__(config)
        self.process = config.build_process()
        # Real mel frames per predicted one, fitted on the training set: means of logarithms are below those of frames.
        self.register_buffer("duration_factor", torch.ones(()))
        is_speech = config.conditioning == "speech"
        self.build_speech(config) if is_speech else self.build_captions(config)
        self.network = UNet1d(
            in_channels=config.latent_channels,
            frame_width=config.frame_width + config.latent_channels if is_speech else 0,
            vector_width=config.text_width if config.n_speakers or not is_speech else 0,
            text_width=0 if is_speech else config.text_width,
            widths=config.widths,
            n_blocks=config.n_blocks,
            n_attentions=config.n_attentions,
            head_width=config.head_width,
            conditioning_width=config.conditioning_width,
            kernel_size=config.kernel_size,
            dropout=config.network_dropout,
        )
        self.post_init()

    def build_speech(self, config: AudioDiffusionConfig) -> None:
        """Encoder, durations, trunk, prior, and the frame that stands for no text."""
        E, D, dropout = config.text_width, config.frame_width, config.text_dropout
        token_size = {"kernel_size": config.token_kernel_size, "dropout": dropout}
        self.text_encoder = TokenEncoder(
            config.n_symbols, E, n_blocks=config.n_token_blocks, n_languages=len(config.languages), **token_size
        )
        self.speaker_embedding = nn.Embedding(config.n_speakers, E) if config.n_speakers else None
        self.durations = DurationPredictor(
            E, n_blocks=config.n_duration_blocks, kernel_size=config.duration_kernel_size, dropout=dropout
        )
        rows_width = config.compression * (E + N_PLACE_FEATURES)
        self.trunk = FrameTrunk(rows_width, D, n_blocks=config.n_trunk_blocks, **token_size)
        self.prior = nn.Linear(D, config.latent_channels)
        self.null = NullCondition(D)

    def build_captions(self, config: AudioDiffusionConfig) -> None:
        """Caption encoder, null caption, and the embedding of a clip's length."""
        if config.caption_encoder == "bytes":
            self.text_encoder = ByteTextEncoder(
                config.text_width,
                config.n_text_layers,
                head_width=config.head_width,
                max_tokens=config.max_tokens,
                n_gram_sizes=[3, 4, 5, 6],
                n_gram_buckets=1024,
            )
        else:
            assert config.caption_width is not None
            self.text_encoder = FrozenTextAdapter(config.caption_width, config.text_width)
        self.null = NullCondition(config.text_width)
        self.length = TimeEmbedding(config.widths[0], config.text_width)

    # ---- Training.

    def forward(
        self,
        latents: Tensor,
        time: Tensor,
        n_latent_frames: Tensor,
        *,
        tokens: Tensor | None = None,
        n_tokens: Tensor | None = None,
        durations: Tensor | None = None,
        speakers: Tensor | None = None,
        languages: Tensor | None = None,
        caption_states: Tensor | None = None,
        n_caption: Tensor | None = None,
        drop: Tensor | None = None,
        dropout_keys: Tensor | None = None,
    ) -> AudioDiffusionOutput:
        """Predictions for clips whose text, and durations for speech, are known.

        Args:
            latents: x_t as the process gives it, (B, L, Z).
            time: t in [0, 1], (B,).
            n_latent_frames: valid latent frames of each clip, (B,), at least 1.
            tokens, n_tokens, speakers, languages: see `encode_speech`.
            durations: mel frames of each token, (B, T) integers.
            caption_states, n_caption: see `caption_condition`.
            drop: (B,) bool, True where the network gets no text; None for nowhere. Give it in training, so that the
                null condition takes part in every step on every process. Prior and durations always have the text.
            dropout_keys: (B,) int64, numbers that dropout is a function of (`model.dropout`); default: PyTorch's.
        Raises: ValueError: shapes do not fit, or (seen on the CPU) durations do not fill the latent frames.
        """
        Z = self.config.latent_channels
        if latents.ndim != 3 or latents.shape[2] != Z:
            raise ValueError(f"latents of shape {tuple(latents.shape)} do not fit: expected (B, L, {Z}), time first")
        check_keys(dropout_keys, latents.shape[0])
        # The condition, in captions' case without prior and durations.
        prior, log_durations = None, None
        if self.config.conditioning == "caption":
            condition = self.caption_condition(
                n_latent_frames, caption_states, n_caption, drop=drop, n_all=latents.shape[1]
            )
        else:
            if tokens is None or n_tokens is None or durations is None:
                raise ValueError("conditioning='speech' needs tokens, n_tokens and durations of every clip")
            voices = {"speakers": speakers, "languages": languages}
            text = self.encode_speech(tokens, n_tokens, **voices, dropout_keys=dropout_keys)
            log_durations = text.log_durations
            lengths = {"n_all": latents.shape[1], "n_latent_frames": n_latent_frames}
            condition, prior = self.speech_condition(text, durations, drop=drop, **lengths, dropout_keys=dropout_keys)
        # Input and time as the process scales them for the network.
        x = self.process.network_input(latents.float(), time)
        keys = fold(dropout_keys, NETWORK_KEYS)
        prediction = self.network(x, self.process.network_time(time), condition, keys)
        return AudioDiffusionOutput(prediction=prediction, prior=prior, log_durations=log_durations)

    # ---- Conditions.

    def encode_speech(
        self,
        tokens: Tensor,
        n_tokens: Tensor,
        *,
        speakers: Tensor | None = None,
        languages: Tensor | None = None,
        dropout_keys: Tensor | None = None,
    ) -> SpeechText:
        """States and predicted durations of tokens.

        Args:
            tokens: (B, T, 3) integers: symbol, stress (0 none, 1 secondary, 2 primary), place in the word (0 within,
                1 first, 2 last, 3 both).
            n_tokens: (B,), at least 1.
            speakers, languages: (B,) places in `config.speakers` and `config.languages`; None where there are none.
            dropout_keys: see `forward`.
        Raises: ValueError: no speaker or language where the model needs one, or one where it knows none.
        """
        if tokens.ndim != 3 or tokens.shape[2] != 3:
            raise ValueError(f"tokens of shape {tuple(tokens.shape)} do not fit: expected (B, T, 3)")
        # Batches may say who speaks although the model does not listen; the model may not lack what it needs.
        for name, value in (("speakers", speakers), ("languages", languages)):
            if getattr(self.config, name) and value is None:
                raise ValueError(f"this model knows {name} {getattr(self.config, name)}; give {name}, one per clip")
        mask = valid_frames(n_tokens, tokens.shape[1])
        states = self.text_encoder(tokens, mask, languages if self.config.languages else None, dropout_keys)
        # A speaker's voice and tempo: the same vector at every token.
        speaker = None
        if self.speaker_embedding is not None:
            speaker = self.speaker_embedding(speakers)
            states = states + speaker[:, None] * mask[..., None]
        pauses = to_device(torch.tensor(self.config.pause_symbols, dtype=torch.long), tokens.device)
        is_pause = (tokens[..., 0, None] == pauses).any(-1)
        log_durations = self.durations(states, mask, fold(dropout_keys, DURATION_KEYS))
        return SpeechText(states, mask, log_durations, is_pause, speaker)

    def speech_condition(
        self,
        text: SpeechText,
        durations: Tensor,
        *,
        drop: Tensor | None = None,
        n_all: int | None = None,
        n_latent_frames: Tensor | None = None,
        dropout_keys: Tensor | None = None,
    ) -> tuple[AudioCondition, Tensor]:
        """The network's condition, and the prior (B, L, Z) fp32.

        Args:
            durations: mel frames of each token, (B, T) integers.
            drop, dropout_keys: see `forward`.
            n_all: L; None: that of the longest clip.
            n_latent_frames: what the durations must fill, (B,), checked on the CPU; None: whatever they fill.
        """
        durations = durations.long().where(text.mask, 0)
        n_latents = self.latent_frames(durations.sum(1))
        if (
            n_latent_frames is not None
            and n_latents.device.type == "cpu"
            and not n_latents.equal(n_latent_frames.long())
        ):
            raise ValueError(
                f"durations fill {n_latents.tolist()} latent frames of {self.config.compression} mel frames, but "
                f"n_latent_frames={n_latent_frames.tolist()}; align the latents' own clips"
            )
        n_all = int(n_latents.max()) if n_all is None else n_all
        mask = valid_frames(n_latents, n_all)
        rows = expand_tokens(text.states, durations, n_latents=n_all, compression=self.config.compression)
        frames = self.trunk(rows, mask, fold(dropout_keys, TRUNK_KEYS))
        # The prior in fp32; the network sees it as a given, so that its loss alone shapes it.
        with torch.autocast(frames.device.type, enabled=False):
            prior = self.prior(frames.float()) * mask[..., None]
        condition = self._speech_frames(mask, frames, prior, text.speaker)
        if drop is not None:
            null = self.null_condition(condition)
            assert condition.frames is not None and null.frames is not None
            condition.frames = torch.where(
                drop[:, None, None], null.frames.to(condition.frames.dtype), condition.frames
            )
        return condition, prior

    def _speech_frames(self, mask: Tensor, frames: Tensor, prior: Tensor, vector: Tensor | None) -> AudioCondition:
        """Vectors of frames beside the prior, as the network takes them."""
        return AudioCondition(mask, torch.cat([frames.float(), prior.detach()], dim=-1), vector)

    def caption_condition(
        self,
        n_latent_frames: Tensor,
        caption_states: Tensor | None,
        n_caption: Tensor | None,
        *,
        drop: Tensor | None = None,
        n_all: int | None = None,
    ) -> AudioCondition:
        """The network's condition of described clips.

        Args:
            n_latent_frames: (B,).
            caption_states: states of a frozen encoder (B, S, E), or byte tokens (B, S) int64 for
                caption_encoder="bytes".
            n_caption: tokens of each caption, (B,), at least 1.
            drop: see `forward`.
            n_all: L; None: that of the longest clip.
        """
        n_axes = {"bytes": 2, "frozen": 3}[self.config.caption_encoder]
        if caption_states is None or n_caption is None or caption_states.ndim != n_axes:
            shape = None if caption_states is None else tuple(caption_states.shape)
            raise ValueError(
                f"caption_encoder={self.config.caption_encoder!r} takes n_caption and caption_states of {n_axes} "
                f"axes, not {shape}; use the cache of the same encoder"
            )
        text_mask = valid_frames(n_caption, caption_states.shape[1])
        states = self.text_encoder(caption_states, text_mask)
        text = TextCondition(states, text_mask, pool(states, text_mask))
        if drop is not None:
            text = self.null.replace(text, drop)
        n_all = int(n_latent_frames.max()) if n_all is None else n_all
        return self._described(valid_frames(n_latent_frames, n_all), text)

    def _described(self, mask: Tensor, text: TextCondition) -> AudioCondition:
        """A caption with the clip's length, which is known even where the caption is dropped."""
        vector = text.pooled.float() + self.length(mask.sum(1).float())
        return AudioCondition(mask, vector=vector, text=text)

    def null_condition(self, condition: AudioCondition) -> AudioCondition:
        """The same clips without their text: of the same lengths, by the same speakers."""
        if condition.frames is None:
            return self._described(condition.mask, self.null(len(condition)))
        # One learned vector in every frame; a prior of 0, the mean of standardised latents.
        B, L = condition.mask.shape
        frames = self.null(B).states.expand(B, L, -1) * condition.mask[..., None]
        prior = frames.new_zeros(B, L, self.config.latent_channels)
        return self._speech_frames(condition.mask, frames, prior, condition.vector)

    # ---- Durations.

    def latent_frames(self, n_frames: Tensor) -> Tensor:
        """Latent frames of clips with so many mel frames, of the same shape."""
        return -(-n_frames // self.config.compression)  # rounded up

    def expected_durations(self, log_durations: Tensor) -> Tensor:
        """Mel frames that predictions of log(1 + mel frames) mean, before the fitted factor; of the same shape."""
        return log_durations.float().exp().sub(1).clamp_min(0)

    def predicted_durations(self, text: SpeechText, speed: float = 1.0) -> Tensor:
        """Mel frames of each token, (B, T) int64: predictions times the fitted factor over `speed`, rounded so that
        the total is right. Pauses may have none, other tokens have at least one."""
        if not speed > 0:
            raise ValueError(f"speed={speed} must be above 0; 1 is the speed of the training data")
        expected = self.expected_durations(text.log_durations) * self.duration_factor / speed
        durations = whole_durations(expected, text.is_pause, text.mask)
        # A text of pauses alone has one frame, so that there is something to sample.
        durations[:, 0] += durations.sum(1) == 0
        return durations

    def set_duration_factor(self, factor: float) -> None:
        """Store real mel frames over predicted ones; held within 0.5 and 2, for models that have not learned yet."""
        if not np.isfinite(factor):
            raise ValueError(f"duration factor={factor} is not finite: the predicted durations are broken")
        self.duration_factor.fill_(min(max(factor, FACTOR_RANGE[0]), FACTOR_RANGE[1]))

    # ---- Sampling.

    @torch.no_grad()
    def sample(
        self,
        condition: AudioCondition,
        generators: Sequence[np.random.Generator],
        *,
        sampler: SamplerKind = "euler",
        n_steps: int = 8,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        temperature: float = 1.0,
        on_estimate: OnEstimate | None = None,
    ) -> Tensor:
        """Latents of clips, by a deterministic sampler at equal steps of time.

        Args:
            generators: one per clip. A clip's noise depends on its generator alone, so that a seed gives the same
                sound in every batch.
            guidance_scale: of classifier-free guidance; 1: none.
            guidance_interval: times in which guidance acts.
            temperature: std of the noise that sampling starts from, relative to that of training (Grad-TTS,
                arXiv 2105.06337, section 3.3); below 1 clips are nearer to their mean.
            on_estimate: called with estimates of the latents (B, L, Z), see `model.samplers.sample`.
        Returns: (B, L, Z) fp32, standardised; 0 in padding.
        Raises: ValueError: a stochastic sampler, whose noise would depend on the batch; another number of generators.
        """
        if sampler == "ddpm":
            raise ValueError("sampler='ddpm' adds noise of the padded length; use euler, heun, dpmpp_2m or ddim")
        if len(generators) != len(condition):
            raise ValueError(f"generators has {len(generators)} entries for {len(condition)} clips; give one per clip")
        device = condition.mask.device
        # Noise times sigma(1), as many frames per clip as it has.
        noise = torch.zeros(*condition.mask.shape, self.config.latent_channels)
        for row, n_frames, generator in zip(noise, condition.mask.sum(1).tolist(), generators):
            shape = (n_frames, self.config.latent_channels)
            row[:n_frames] = torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))
        sigma = self.process.alpha_sigma(torch.ones(1, dtype=torch.float64))[1].item()
        x = to_device(temperature * sigma * noise, device)
        # The denoiser combines predictions with text and without.
        denoiser = guided_denoiser(
            self.process,
            self.network,
            condition,
            null_condition=None if guidance_scale == 1 else self.null_condition(condition),
            scale=guidance_scale,
            interval=guidance_interval,
        )
        times = self.process.sampling_times(n_steps, "uniform")
        latents = sample(sampler, denoiser, x, process=self.process, times=times, on_estimate=on_estimate)
        return latents.where(condition.mask[..., None], 0.0)

    def _init_weights(self, module: nn.Module) -> None:
        """As `init_diffusion_weights`, but for embeddings:

        Embedding of tokens, speakers     normal, std 0.5; of a caption's bytes 0.02
        duration factor                   1
        """
        init_diffusion_weights(module)
        if isinstance(module, AudioDiffusion):
            initialization.ones_(module.duration_factor)
        elif isinstance(module, nn.Embedding) and self.config.conditioning == "speech":
            initialization.normal_(module.weight, std=0.5)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "AudioDiffusion":
        """A model with fresh weights of a size in `AUDIO_DIFFUSION`; ValueError for an unknown name or field."""
        return cls(from_preset(AudioDiffusionConfig, AUDIO_DIFFUSION, name, **overrides))
