"""Keys and values of past tokens: a transformers `Cache` that grows in place.

B batch, G key/value groups, S keys, K head width. transformers' own `DynamicCache` copies the whole past for every
token. Here each slot owns a buffer with room to spare, so that a token costs one small write. A slot belongs to one
attention layer, of a recurrent core to one layer at one step.
"""

from dataclasses import fields
from operator import attrgetter

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

ROOM = 256  # Buffers hold multiples of so many keys.

# The one place that knows what transformers calls a model's cache, in the arguments of `forward`, in outputs and in
# what `generate` hands on: `past_key_values` at first (5.17), `cache` later (5.24).
CACHE_NAMES = ("cache", "past_key_values")
CACHE_NAME = next(field.name for field in fields(CausalLMOutputWithPast) if field.name in CACHE_NAMES)

# What the model overrides or uses of transformers' generation: see `RELIES_ON` in utils/training_utils.py.
GENERATION_RELIES_ON: dict[str, tuple[str, str]] = {
    "_prepare_cache_for_generation": (
        "generation_config, model_kwargs, generation_mode, batch_size, max_cache_length",
        "`generate` begins with a KeyValueCache, whose slots serve the steps of a recurrent core",
    ),
    "_init_weights": ("module", "initialization of each module"),
}
LAYER_RELIES_ON: dict[str, tuple[str, str]] = {
    "lazy_initialization": ("key_states, value_states", "dtype, device and empty tensors of a new slot"),
    "update": ("key_states, value_states, args, kwargs", "keys and values are written in place"),
    "get_seq_length": ("", "the number of keys in a slot"),
    "crop": ("tokens_to_remove", "assisted generation takes tokens back"),
    "reset": ("", "buffers are forgotten with the keys"),
    "reorder_cache": ("beam_idx", "beam search replaces the views"),
    "batch_repeat_interleave": ("repeats", "replaces the views"),
    "batch_select_indices": ("indices", "replaces the views"),
}


class GrowingLayer(DynamicLayer):
    """One slot: `keys` and `values` are the filled parts of larger buffers, (B, G, S, K)."""

    buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append keys and values, (B, G, L, K) each; returns all of them, (B, G, S + L, K)."""
        if key_states.requires_grad:
            self.buffers = None
            return super().update(key_states, value_states)  # Writing in place would break the backward pass.
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        # A larger buffer where the keys do not fit, or a new one where inference mode made the old.
        length = self.get_seq_length()
        end = length + key_states.shape[-2]
        if self.buffers is None or self.buffers[0].shape[-2] < end or self.is_frozen():
            self.buffers = tuple(
                move(old, new, length, end)
                for old, new in ((self.keys, key_states), (self.values, value_states))  # type: ignore[assignment]
            )
        keys, values = self.buffers  # type: ignore[misc]
        keys[:, :, length:end] = key_states
        values[:, :, length:end] = value_states
        self.keys, self.values = keys[:, :, :end], values[:, :, :end]
        return self.keys, self.values

    def is_frozen(self) -> bool:
        """Whether the buffers come from inference mode, outside of which they cannot be written."""
        return self.buffers is not None and self.buffers[0].is_inference() and not torch.is_inference_mode_enabled()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, as assisted generation does; slots that were never written stay empty."""
        if self.get_seq_length():
            super().crop(tokens_to_remove)

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = self.buffers = None
        self.is_initialized = False

    # What follows puts other tensors in the place of the views.

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in another order, as beam search needs."""
        super().reorder_cache(beam_idx)
        self.buffers = None

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row so many times."""
        super().batch_repeat_interleave(repeats)
        self.buffers = None

    def batch_select_indices(self, indices: Tensor) -> None:
        """Some rows only."""
        super().batch_select_indices(indices)
        self.buffers = None


def move(old: Tensor, new: Tensor, length: int, end: int) -> Tensor:
    """A buffer for at least `end` keys and half as many again as before, with the `length` old ones in it."""
    room = -(-max(end, length * 3 // 2) // ROOM) * ROOM
    buffer = new.new_empty((*new.shape[:2], room, new.shape[3]))
    if length:
        buffer[:, :, :length] = old
    return buffer


def chosen_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """The cache of a call of `forward`, which accepts both names.

    Raises: ValueError: both are given, or it is no `Cache`.
    """
    if cache is not None and past_key_values is not None:
        raise ValueError("cache and past_key_values are two names of one argument; give one of them")
    cache = past_key_values if cache is None else cache
    if cache is not None and not isinstance(cache, Cache):
        raise ValueError(f"past_key_values is a {type(cache).__name__}; give a Cache, such as DynamicCache()")
    return cache


class CacheOutput:
    """Mixed into an output: its cache has both names. Newer transformers offer the old name themselves."""

    if CACHE_NAME == "past_key_values":
        cache = property(attrgetter("past_key_values"))


class KeyValueCache(DynamicCache):
    """A cache whose slots are made when they are first written, so that it serves any number of layers and steps.

    Libraries such as PEFT ask for a `DynamicCache` where a cache may grow.
    """

    def __init__(self):
        Cache.__init__(self, layer_class_to_replicate=GrowingLayer)


def take_back(cache: Cache, slot: int, length: int) -> None:
    """Drop the last `length` keys of a slot, for a later step of a recurrent core that shares it.

    Raises: ValueError: the cache cannot be shortened (a static one).
    """
    layer = cache.layers[slot]
    if not isinstance(layer, DynamicLayer):
        raise ValueError(f"recurrent_cache_steps needs a cache that can be shortened, not {type(layer).__name__}")
    # Shorter views; the next update writes over what they leave out.
    layer.keys, layer.values = layer.keys[:, :, :-length], layer.values[:, :, :-length]
