"""Configuration of the transformer and the world model, from which docs/configuration.md is generated."""

from typing import ClassVar, Literal, Self

from utils.options import Section, declared_fields, default_value, option
from utils.strict_config import StrictConfig

# Of `model/samplers.py` and `model/diffusion_process.py`, which lie above this module, what suits rectified flows.
FlowSampler = Literal["dpmpp_2m", "ddim", "euler", "heun"]
FlowPrediction = Literal["velocity", "x0"]
FlowTimes = Literal["logit_normal", "uniform"]

# Conditions of several fields, see `option`: (other field, its value).
ROTATES = ("use_rotary_embedding", True)
IS_RECURRENT = ("n_recurrent_layers", bool)
SAMPLES_STEPS = ("recurrent_steps_distribution", "lognormal_poisson")
EXITS_EARLY = ("recurrent_exit_criterion", ("kl", "latent_difference"))
HAS_SPANS = ("modalities", ("audio", "image"))
AUDIO_LOGIT_NORMAL = ("audio_time_sampling", "logit_normal")
IMAGE_LOGIT_NORMAL = ("image_time_sampling", "logit_normal")


# Former defaults of fields without effect in models of text alone, whose files state all fields.
NOTHING = object()
FORMER_DEFAULTS = {
    "audio_sampler": "euler",
    "audio_n_sampling_steps": 16,
    "image_sampler": "euler",
    "image_n_sampling_steps": 32,
}


class MegaTransformerConfig(StrictConfig):
    """Configuration of the transformer: text alone, or text, audio and images in one stream (`modalities`).

    Layers run in the order prelude, main, recurrent core, coda.  D hidden, H query heads, G key/value heads, K head
    width, V vocabulary, Z latent channels.
    """

    model_type = "megatransformer"
    keys_to_ignore_at_inference = ["cache", "past_key_values", "cross_entropy", "z_loss", "thinking_steps"]
    attribute_map = {"num_attention_heads": "n_heads", "num_key_value_heads": "groups", "head_dim": "width_per_head"}
    ALIASES: ClassVar = {
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_query_groups",
        "head_dim": "head_width",
        "num_hidden_layers": "n_layers",
    }

    OF_WEIGHTS = (
        *("pad_token_id", "bos_token_id", "eos_token_id", "null_token_id"),
        *("audio_begin_token_id", "audio_end_token_id", "audio_length_token_id"),
        *("image_begin_token_id", "image_end_token_id", "initializer_range", "embedding_initializer_range"),
        *("use_depth_scaled_initialization", "use_zero_output_initialization"),
    )

    # Fields of earlier versions, which had no effect, with their defaults: config.json of those may hold them.
    REMOVED: ClassVar = {
        "audio_sample_rate": 16000,
        "audio_n_fft": 1024,
        "audio_hop_length": 256,
        "audio_n_mels": 80,
        "audio_compression": 2,
        "audio_block_frames": 16,
        "audio_max_blocks": 64,
        "audio_n_noise_copies": 2,
        "audio_exit_threshold": 0.0,
        "audio_carried_thinking_steps": None,
        "image_decoder_type": "flow",
        "image_decoder_width": None,
        "image_decoder_n_tokens": 64,
        "image_n_noise_copies": 2,
        "image_exit_threshold": 0.0,
        "image_carried_thinking_steps": None,
    }

    SECTION_STACK: ClassVar = Section("Stack")
    modalities: list[Literal["text", "audio", "image"]] = option(["text"], "modalities of the stream; text always")
    hidden_size: int = option(256, "width D of the hidden states", gt=0)
    n_layers: int = option(8, "main layers, each applied once", ge=0)
    n_prelude_layers: int = option(0, "layers before the main ones", ge=0)
    n_recurrent_layers: int = option(0, "layers of the core, which is applied several times; 0: no core", ge=0)
    n_coda_layers: int = option(0, "layers after the core", ge=0)
    max_position_embeddings: int = option(2048, "maximum sequence length in tokens", gt=0)
    hidden_dropout: float = option(0.0, "dropout probability of every residual branch", ge=0, lt=1)
    embedding_dropout: float = option(0.0, "dropout probability of the token embeddings", ge=0, lt=1)
    use_embedding_scale: bool = option(False, "multiply token embeddings by sqrt(D)")
    use_cache: bool = option(True, "cache keys and values in generation")
    tie_word_embeddings: bool = option(True, "share the weights of the token embedding and the language head")

    SECTION_ATTENTION: ClassVar = Section("Attention")
    n_heads: int = option(8, "query heads H", gt=0)
    n_query_groups: int | None = option(None, "key/value heads G, each shared by H / G query heads; None: H", gt=0)
    head_width: int | None = option(None, "width K of a head; None: D / H", gt=0)
    use_attention_bias: bool = option(False, "biases in the four projections")
    use_qk_norm: bool = option(False, "normalise queries and keys per head, before the rotation")
    attention_dropout: float = option(0.0, "dropout probability of attention weights", ge=0, lt=1)

    SECTION_POSITION: ClassVar = Section("Position")
    use_rotary_embedding: bool = option(True, "rotary position embedding of queries and keys (arXiv 2104.09864)")
    rotary_theta: float = option(10000.0, "base of the rotation's wavelengths", gt=1, only_with=ROTATES)
    rotary_fraction: float = option(1.0, "fraction of the head width K that is rotated", gt=0, le=1, only_with=ROTATES)
    rotary_interpolation: float = option(1.0, "divisor of positions (arXiv 2306.15595)", ge=1, only_with=ROTATES)
    rotary_ntk_factor: float = option(1.0, "factor of the context length, by a larger base", ge=1, only_with=ROTATES)
    use_alibi_bias: bool = option(False, "bias attention scores by distance, one slope per head (arXiv 2108.12409)")
    position_embedding: Literal["none", "sinusoidal", "learned"] = option("none", "added to the embeddings")

    SECTION_NORM: ClassVar = Section("Norm")
    norm_type: Literal["rmsnorm", "layernorm"] = option("rmsnorm", "type of all norms")
    norm_eps: float = option(1e-6, "epsilon added to the mean square", gt=0)
    use_norm_bias: bool = option(False, "biases of the layer norms", only_with=("norm_type", "layernorm"))
    use_pre_attention_norm: bool = option(True, "normalise the input of attention")
    use_post_attention_norm: bool = option(False, "normalise its output; without a pre-norm, the residual sum")
    use_pre_ffn_norm: bool = option(True, "normalise the input of the feed-forward network")
    use_post_ffn_norm: bool = option(False, "normalise its output; without a pre-norm, the residual sum")
    use_final_norm: bool = option(True, "normalise the hidden states before the language head")

    SECTION_FEED_FORWARD: ClassVar = Section("Feed-forward")
    intermediate_size: int | None = option(None, "inner width; None: 4 D, if gated 8/3 D up to a multiple of 64", gt=0)
    ffn_activation: Literal["swiglu", "geglu", "gelu", "gelu_tanh", "relu", "relu_squared", "silu"] = option(
        "swiglu", "activation; swiglu and geglu are gated"
    )
    use_ffn_bias: bool = option(False, "biases in the projections")
    ffn_dropout: float = option(0.0, "dropout probability of the inner activations", ge=0, lt=1)

    SECTION_RECURRENT: ClassVar = Section("Recurrent core", only_with=IS_RECURRENT)
    recurrent_mean_thinking_steps: int = option(8, "mean thinking steps in training (arXiv 2502.05171)", gt=0)
    recurrent_sigma: float = option(0.5, "std of the logarithm of the Poisson rate", ge=0, only_with=SAMPLES_STEPS)
    recurrent_min_thinking_steps: int = option(1, "minimum in training", gt=0, only_with=SAMPLES_STEPS)
    recurrent_max_thinking_steps: int = option(32, "maximum in training and generation", gt=0)
    recurrent_steps_distribution: Literal["lognormal_poisson", "fixed"] = option(
        "lognormal_poisson", "distribution of the thinking steps in training; fixed: always the mean"
    )
    recurrent_backprop_steps: int = option(4, "last steps that are backpropagated; earlier ones build no graph", gt=0)
    recurrent_test_thinking_steps: int | None = option(None, "thinking steps outside training; None: the mean", gt=0)
    recurrent_adapter_method: Literal["sum", "gate", "linear"] = option("sum", "how a step combines input and state")
    recurrent_state_initialization: Literal["zeros", "normal", "embedding", "learned"] = option(
        "zeros", "initial state; normal: random in training, zeros in evaluation"
    )
    recurrent_state_std: float = option(
        0.02, "std of the initial state", gt=0, only_with=("recurrent_state_initialization", ("normal", "learned"))
    )
    recurrent_use_sandwich_norm: bool = option(True, "norms before and after the branches of the core")
    recurrent_use_state_norm: bool = option(True, "normalise the state after every thinking step")
    recurrent_exit_criterion: Literal["none", "kl", "latent_difference"] = option(
        "none", "criterion of an early exit from thinking"
    )
    recurrent_exit_criteria_threshold: float = option(
        1e-3,
        "threshold of the criterion: nats (kl), or relative norm of the change of the state",
        gt=0,
        only_with=EXITS_EARLY,
    )
    recurrent_exit_min_steps: int = option(2, "thinking steps before the first exit", gt=0, only_with=EXITS_EARLY)
    recurrent_cache_steps: int | None = option(
        None,
        "number c of cache slots that the steps share (step r uses slot r mod c); None: one per step, exact",
        gt=0,
    )

    SECTION_TEXT: ClassVar = Section("Text")
    vocab_size: int = option(258, "vocabulary size V in tokens", gt=0)
    pad_token_id: int | None = option(0, "padding token", ge=0)
    bos_token_id: int | None = option(1, "token that begins a document", ge=0)
    eos_token_id: int | None = option(None, "token that ends a document and generation", ge=0)
    null_token_id: int | None = option(
        None,
        "token that replaces dropped text, for classifier-free guidance",
        ge=0,
        only_with=HAS_SPANS,
    )
    text_loss_weight: float = option(
        1.0, "weight of the cross-entropy relative to the flows' losses", ge=0, only_with=HAS_SPANS
    )
    begin_loss_weight: float = option(
        0.02,
        "weight of the cross-entropy of tokens that begin a span, which often cannot be known",
        ge=0,
        only_with=HAS_SPANS,
    )
    z_loss_weight: float = option(0.0, "weight of the squared log-partition of the softmax (z-loss)", ge=0)
    loss_chunk_size: int = option(
        0, "tokens per chunk of the loss, which bounds the memory of the logits; 0: all at once", ge=0
    )

    SECTION_AUDIO: ClassVar = Section("Audio", only_with=("modalities", "audio"))
    audio_latent_channels: int = option(20, "latent channels Z of the audio VAE", gt=0)
    audio_latent_rows: int = option(1, "latent rows of the audio VAE; a latent frame has all rows", gt=0)
    audio_encoder_patch_size: int = option(4, "latent frames that are one token", gt=0)
    audio_max_tokens: int = option(96, "maximum number of tokens of an audio clip, each number a token", gt=0)
    audio_position: Literal["text", "count"] = option(
        "text", "positions of audio: spread over those of the text that it speaks, or counted"
    )
    audio_n_prelude_layers: int = option(1, "layers before all others, for audio alone", ge=0)
    audio_n_coda_layers: int = option(1, "layers after all others, for audio alone", ge=0)
    audio_begin_token_id: int | None = option(None, "token before an audio clip and its length", ge=0)
    audio_end_token_id: int | None = option(None, "token after an audio clip", ge=0)
    audio_length_token_id: int | None = option(
        None, "first of the tokens that say how many tokens an audio clip has, from 1 to audio_max_tokens", ge=0
    )
    audio_loss_weight: float = option(1.0, "weight of the flow's loss", ge=0)
    audio_length_loss_weight: float = option(0.1, "weight of the cross-entropy of the length", ge=0)
    audio_prediction: FlowPrediction = option("velocity", "prediction target of the coda; x0: clean latents")
    audio_time_sampling: FlowTimes = option("logit_normal", "distribution of the training times")
    audio_time_mean: float = option(
        0.0, "mean of the times' logits; above 0: more noise", only_with=AUDIO_LOGIT_NORMAL
    )
    audio_time_std: float = option(1.0, "std of the times' logits", gt=0, only_with=AUDIO_LOGIT_NORMAL)
    audio_time_shift: float = option(1.0, "shift s of the times, t -> s t / (1 + (s - 1) t)", gt=0)
    audio_condition_dropout: float = option(
        0.1, "fraction of clips trained without their text, for guidance", ge=0, lt=1
    )
    audio_sampler: FlowSampler = option("dpmpp_2m", "solver of the flow's differential equation")
    audio_n_sampling_steps: int = option(10, "solver steps per clip", gt=0)
    audio_guidance_scale: float = option(
        1.0, "scale of classifier-free guidance; 1: none", ge=1, only_with=("audio_condition_dropout", bool)
    )

    SECTION_IMAGE: ClassVar = Section("Image", only_with=("modalities", "image"))
    image_size: int = option(64, "side of the images in pixels", gt=0)
    image_compression: int = option(8, "pixels per latent side of the image VAE", gt=0)
    image_latent_channels: int = option(16, "latent channels Z of the image VAE", gt=0)
    image_encoder_patch_size: int = option(1, "side of the latent patch that is one token", gt=0)
    image_position_embedding: Literal["learned", "sinusoidal"] = option("learned", "of rows and columns")
    image_n_prelude_layers: int = option(1, "layers before all others, for images alone", ge=0)
    image_n_coda_layers: int = option(1, "layers after all others, for images alone", ge=0)
    image_begin_token_id: int | None = option(None, "token before an image", ge=0)
    image_end_token_id: int | None = option(None, "token after an image", ge=0)
    image_loss_weight: float = option(1.0, "weight of the flow's loss", ge=0)
    image_prediction: FlowPrediction = option("velocity", "prediction target of the coda; x0: clean latents")
    image_time_sampling: FlowTimes = option("logit_normal", "distribution of the training times")
    image_time_mean: float = option(
        0.0, "mean of the times' logits; above 0: more noise", only_with=IMAGE_LOGIT_NORMAL
    )
    image_time_std: float = option(1.0, "std of the times' logits", gt=0, only_with=IMAGE_LOGIT_NORMAL)
    image_time_shift: float = option(1.0, "shift s of the times, t -> s t / (1 + (s - 1) t)", gt=0)
    image_condition_dropout: float = option(
        0.1, "fraction of images trained without their text, for guidance", ge=0, lt=1
    )
    image_sampler: FlowSampler = option("dpmpp_2m", "solver of the flow's differential equation")
    image_n_sampling_steps: int = option(10, "solver steps per image", gt=0)
    image_guidance_scale: float = option(
        1.0, "scale of classifier-free guidance; 1: none", ge=1, only_with=("image_condition_dropout", bool)
    )

    SECTION_INITIALISATION: ClassVar = Section("Initialisation")
    initializer_range: float = option(0.02, "std of the projection weights", gt=0)
    embedding_initializer_range: float = option(0.02, "std of the embeddings", gt=0)
    use_depth_scaled_initialization: bool = option(
        True,
        "branches' last projections: std over sqrt(2 x layers)",
        only_with=("use_zero_output_initialization", False),
    )
    use_zero_output_initialization: bool = option(False, "initialise the last projection of each branch to zero")

    def __post_init__(self, **kwargs):
        # A text model's file of an earlier version: what has gone had no effect, nor had defaults of then.
        removed = {name for name, value in kwargs.items() if self.REMOVED.get(name, NOTHING) == value}
        if removed and self.modalities == ["text"]:
            for name, former in FORMER_DEFAULTS.items():
                if getattr(self, name) == former:
                    setattr(self, name, default_value(type(self).__dataclass_fields__[name]))
        super().__post_init__(**{name: value for name, value in kwargs.items() if name not in removed})
        self.architectures = self.architectures or []  # AutoModel, which has two models of it, reads a list.

    @property
    def groups(self) -> int:
        """Key/value heads G."""
        return self.n_query_groups or self.n_heads

    @groups.setter
    def groups(self, value: int | None) -> None:
        self.n_query_groups = value

    @property
    def width_per_head(self) -> int:
        """Head width K."""
        return self.head_width or self.hidden_size // self.n_heads

    @width_per_head.setter
    def width_per_head(self, value: int | None) -> None:
        self.head_width = value

    @property
    def rotary_width(self) -> int:
        """Rotated values of a head."""
        return round(self.width_per_head * self.rotary_fraction)

    @property
    def is_gated(self) -> bool:
        """Whether the feed-forward network multiplies its activation with a second projection."""
        return self.ffn_activation in ("swiglu", "geglu")

    @property
    def ffn_size(self) -> int:
        """Inner width of the feed-forward network."""
        return self.intermediate_size or (
            -(-8 * self.hidden_size // 192) * 64 if self.is_gated else 4 * self.hidden_size
        )

    @property
    def effective_depth(self) -> int:
        """Layers that a token passes in training; the core counts as often as it is applied on average, and of the
        modalities' own layers those of the deepest one."""
        core = self.n_recurrent_layers * self.recurrent_mean_thinking_steps
        spans = [name for name in ("audio", "image") if name in self.modalities]
        own = [getattr(self, f"{name}_n_prelude_layers") + getattr(self, f"{name}_n_coda_layers") for name in spans]
        return self.n_prelude_layers + self.n_layers + core + self.n_coda_layers + max(own, default=0)

    @property
    def image_n_tokens(self) -> int:
        """Tokens of an image."""
        return (self.image_size // self.image_compression // self.image_encoder_patch_size) ** 2

    def with_modalities(self, modalities: list[str]) -> Self:
        """A copy with some modalities alone; the fields of the others have their defaults."""
        absent = tuple(f"{name}_" for name in ("audio", "image") if name not in modalities)
        changes = {f.name: default_value(f) for f in declared_fields(self) if f.name.startswith(absent)}
        return self.replace(modalities=modalities, **changes)

    def token_width(self, modality: str) -> int:
        """Latent values of a token of a modality: W."""
        if modality == "image":
            return self.image_latent_channels * self.image_encoder_patch_size**2
        return self.audio_latent_channels * self.audio_latent_rows * self.audio_encoder_patch_size

    @property
    def num_hidden_layers(self) -> int:
        """Slots of the key/value cache: one per layer; of the core and the coda one per cached step."""
        n_thinking_slots = self.n_recurrent_layers + self.n_coda_layers
        if self.n_recurrent_layers:
            n_thinking_slots *= self.recurrent_cache_steps or self.recurrent_max_thinking_steps
        return self.n_prelude_layers + self.n_layers + n_thinking_slots

    @num_hidden_layers.setter
    def num_hidden_layers(self, value: int) -> None:
        if self.n_recurrent_layers:
            raise ValueError(
                f"num_hidden_layers={value} cannot be set: n_recurrent_layers={self.n_recurrent_layers} and thinking "
                "steps give it; set n_layers, n_recurrent_layers or recurrent_max_thinking_steps"
            )
        self.n_layers = value - self.n_prelude_layers - self.n_coda_layers

    def validate_stack(self):
        """The model has at least one layer. `modalities` names each modality once, among them text."""
        n_layers = self.n_prelude_layers + self.n_layers + self.n_recurrent_layers + self.n_coda_layers
        self.expect(
            n_layers > 0, "n_layers", "gives no layer, nor do the other layer counts; at least one must be above 0"
        )
        self.expect(
            "text" in self.modalities, "modalities", "must contain 'text', whose tokens announce the other modalities"
        )
        self.expect(len(set(self.modalities)) == len(self.modalities), "modalities", "must name each modality once")

    def validate_attention(self):
        """`n_heads` divides `hidden_size` unless `head_width` is given. `n_query_groups` divides `n_heads`."""
        is_whole = self.head_width is not None or self.hidden_size % self.n_heads == 0
        self.expect(is_whole, "n_heads", f"must divide hidden_size={self.hidden_size}, or give head_width")
        self.expect(self.n_heads % self.groups == 0, "n_query_groups", f"must divide n_heads={self.n_heads}")

    def validate_position(self):
        """Rotary embedding and ALiBi exclude each other. The number of rotated values of K is even, and above 2 with
        `rotary_ntk_factor`. `position_embedding='sinusoidal'` needs an even `hidden_size`."""
        if self.use_rotary_embedding:
            # Values are rotated in pairs.
            self.expect(not self.use_alibi_bias, "use_alibi_bias", "needs use_rotary_embedding=False")
            width = self.width_per_head * self.rotary_fraction
            is_even = abs(width - self.rotary_width) < 1e-6 and self.rotary_width % 2 == 0 < self.rotary_width
            self.expect(
                is_even,
                "rotary_fraction",
                f"rotates {width:g} of {self.width_per_head} values, which must be an even number",
            )
            # NTK scaling multiplies the base by factor^(d / (d - 2)), which is undefined for d = 2 rotated values.
            has_middle = self.rotary_width > 2 or self.rotary_ntk_factor == 1
            self.expect(has_middle, "rotary_ntk_factor", "needs more than 2 rotated values per head")
        is_even = self.position_embedding != "sinusoidal" or self.hidden_size % 2 == 0
        self.expect(is_even, "hidden_size", "must be even for position_embedding='sinusoidal'")

    def validate_norm(self):
        """Attention and the feed-forward network each have a norm before or after them."""
        for branch in ("attention", "ffn"):
            has_norm = getattr(self, f"use_pre_{branch}_norm") or getattr(self, f"use_post_{branch}_norm")
            self.expect(has_norm, f"use_pre_{branch}_norm", f"needs use_post_{branch}_norm=True")

    def validate_recurrent(self):
        """Minimum <= mean <= maximum thinking steps. Backprop, test and cached steps are at most the maximum. Exits
        come within the steps of generation; exits by `kl` need a cache slot per step."""
        minimum, mean, maximum = (getattr(self, f"recurrent_{name}_thinking_steps") for name in ("min", "mean", "max"))
        rule = f"must lie between recurrent_min_thinking_steps={minimum} and recurrent_max_thinking_steps={maximum}"
        self.expect(minimum <= mean <= maximum, "recurrent_mean_thinking_steps", rule)
        for name in ["recurrent_backprop_steps", "recurrent_test_thinking_steps", "recurrent_cache_steps"]:
            is_within = (getattr(self, name) or 1) <= maximum
            self.expect(is_within, name, f"must be <= recurrent_max_thinking_steps={maximum}")

        # Early exits. `kl` compares the predictions of two consecutive steps.
        steps = self.recurrent_test_thinking_steps or mean
        is_reached = self.recurrent_exit_criterion == "none" or self.recurrent_exit_min_steps <= steps
        self.expect(is_reached, "recurrent_exit_min_steps", f"must be <= {steps}, the steps of generation")
        is_early = self.recurrent_exit_criterion == "kl" and self.recurrent_exit_min_steps < 2
        self.expect(not is_early, "recurrent_exit_min_steps", "must be >= 2 with recurrent_exit_criterion='kl'")
        is_exact = self.recurrent_cache_steps is None or self.recurrent_exit_criterion != "kl"
        self.expect(is_exact, "recurrent_cache_steps", "must be None with recurrent_exit_criterion='kl'")

    def validate_text(self):
        """Token ids are below `vocab_size` and differ; only pad, bos and eos may share an id."""
        ids = {f.name: getattr(self, f.name) for f in declared_fields(self) if f.name.endswith("_token_id")}
        for name, value in ids.items():
            self.expect(value is None or value < self.vocab_size, name, f"must be < vocab_size={self.vocab_size}")
            same = {other for other in ids if ids[other] == value}
            may_share = value is None or len(same) == 1 or same <= {"pad_token_id", "bos_token_id", "eos_token_id"}
            self.expect(may_share, name, f"must differ from {', '.join(sorted(same - {name}))}")

    def validate_audio(self):
        """`audio_max_tokens` tokens are not longer than the maximum sequence, and the tokens of lengths are below
        `vocab_size`. `audio_position='text'` has fractions as positions, which need the rotary embedding."""
        if "audio" not in self.modalities:
            return
        max_length, first = self.max_position_embeddings, self.audio_length_token_id
        self.expect(
            self.audio_max_tokens <= max_length, "audio_max_tokens", f"must be <= max_position_embeddings={max_length}"
        )
        fits = first is None or first + self.audio_max_tokens <= self.vocab_size
        rule = f"and audio_max_tokens={self.audio_max_tokens} exceed vocab_size={self.vocab_size}"
        self.expect(fits, "audio_length_token_id", rule)
        rotates = self.use_rotary_embedding and self.position_embedding == "none"
        rule = "needs use_rotary_embedding=True and position_embedding='none'"
        self.expect(rotates or self.audio_position == "count", "audio_position", rule)

    def validate_image(self):
        """`image_compression` divides `image_size`; `image_encoder_patch_size` divides the side of the latents. An
        image is not longer than the maximum sequence. `image_position_embedding='sinusoidal'` needs a `hidden_size`
        divisible by 4. `position_embedding='learned'` has whole positions, those of text alone."""
        is_whole = self.image_size % self.image_compression == 0
        self.expect(is_whole, "image_compression", f"must divide image_size={self.image_size}")
        side, patch = self.image_size // self.image_compression, self.image_encoder_patch_size
        self.expect(side % patch == 0, "image_encoder_patch_size", f"must divide the side {side} of the latents")
        n_tokens, max_length = self.image_n_tokens, self.max_position_embeddings
        fits = "image" not in self.modalities or n_tokens <= max_length
        self.expect(fits, "image_size", f"gives {n_tokens} tokens, more than max_position_embeddings={max_length}")
        # Sines and cosines of the row in one half of D, of the column in the other.
        has_rows = self.position_embedding != "learned" or self.modalities == ["text"]
        self.expect(
            has_rows, "position_embedding", "needs modalities=['text']: positions of other streams are fractions"
        )
        is_pair = self.image_position_embedding == "learned" or self.hidden_size % 4 == 0
        self.expect(is_pair, "hidden_size", "must be divisible by 4 for image_position_embedding='sinusoidal'")
