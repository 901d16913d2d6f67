"""The peers of our causal transformer, with the same shape, random weights and a common interface.

transformers' `LlamaForCausalLM`, litgpt's `GPT` and x-transformers' `TransformerWrapper`: each has its own loss and
its own function for generation.  B batch, L sequence.
"""

import dataclasses
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from model.causal import MegaTransformerForCausalLM


@dataclasses.dataclass(frozen=True)
class Shape:
    """The shape of all sides, with rotary embedding, pre-RMSNorm, SwiGLU and no biases."""

    hidden_size: int = 256
    n_layers: int = 8
    n_heads: int = 8
    n_query_groups: int = 8
    intermediate_size: int = 704
    vocab_size: int = 4096
    is_tied: bool = False
    max_length: int = 2048


class Ours:
    """MegaTransformerForCausalLM with a loss in chunks of 512 tokens, which returns no logits."""

    def __init__(self, shape: Shape, **overrides):
        # The names of our configuration where they differ from those of the shape.
        sizes = dataclasses.asdict(shape)
        tied, length = sizes.pop("is_tied"), sizes.pop("max_length")
        sizes |= {"tie_word_embeddings": tied, "max_position_embeddings": length, "loss_chunk_size": 512, **overrides}
        self.model: nn.Module = MegaTransformerForCausalLM.from_preset("llama-8m", **sizes)

    def blocks(self) -> Iterable[nn.Module]:
        """The layers, to be compiled separately."""
        return self.model.get_submodule("model.main.layers").children()

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean cross-entropy of tokens (B, L)."""
        return self.model(input_ids=tokens, labels=tokens, use_cache=False).loss

    def generate(self, prompt: Tensor, mask: Tensor, n_new: int) -> Tensor:
        """Prompts (B, L) with their mask, followed by greedy tokens: (B, L + n_new)."""
        settings = {"max_new_tokens": n_new, "min_new_tokens": n_new, "do_sample": False, "pad_token_id": 0}
        return self.model.generate(prompt, attention_mask=mask, **settings)


class Llama(Ours):
    """transformers' LlamaForCausalLM with scaled_dot_product_attention; it returns all logits with the loss."""

    def __init__(self, shape: Shape):
        from transformers import LlamaConfig, LlamaForCausalLM

        # No end token: all continuations have the same length.
        config = LlamaConfig(
            hidden_size=shape.hidden_size,
            num_hidden_layers=shape.n_layers,
            num_attention_heads=shape.n_heads,
            num_key_value_heads=shape.n_query_groups,
            intermediate_size=shape.intermediate_size,
            vocab_size=shape.vocab_size,
            tie_word_embeddings=shape.is_tied,
            max_position_embeddings=shape.max_length,
            attn_implementation="sdpa",
            bos_token_id=None,
            eos_token_id=None,
        )
        self.model = LlamaForCausalLM(config)

    def blocks(self):
        return self.model.model.layers


class LitGPT:
    """litgpt's GPT with the loss of its pretraining script and the function `generate` of its command line."""

    def __init__(self, shape: Shape):
        from litgpt.config import Config
        from litgpt.model import GPT

        # The settings of Llama in litgpt.
        config = Config(
            name="peer",
            block_size=shape.max_length,
            vocab_size=shape.vocab_size,
            padded_vocab_size=shape.vocab_size,
            n_layer=shape.n_layers,
            n_head=shape.n_heads,
            n_query_groups=shape.n_query_groups,
            n_embd=shape.hidden_size,
            rotary_percentage=1.0,
            parallel_residual=False,
            bias=False,
            norm_class_name="RMSNorm",
            mlp_class_name="LLaMAMLP",
            intermediate_size=shape.intermediate_size,
        )
        assert not shape.is_tied, "litgpt does not tie weights"
        self.model = GPT(config)

    def blocks(self):
        return self.model.transformer.h

    def loss(self, tokens: Tensor) -> Tensor:
        from litgpt.utils import chunked_cross_entropy

        # Chunk size 0: the whole batch at once, as in its pretraining script.
        return chunked_cross_entropy(self.model(tokens)[:, :-1], tokens[:, 1:], chunk_size=0)

    def generate(self, prompt: Tensor, mask: Tensor, n_new: int) -> Tensor:
        from litgpt.generate.base import generate

        length = prompt.shape[1] + n_new
        # The cache is allocated once and emptied before every prompt.
        if self.model.mask_cache is None:
            self.model.set_kv_cache(batch_size=1, max_seq_length=length)
        for block in self.model.transformer.h:
            block.attn.kv_cache.reset_parameters()
        with torch.inference_mode():
            return generate(self.model, prompt[0], length, temperature=0.0)[None]


class XTransformers:
    """x-transformers' TransformerWrapper and AutoregressiveWrapper with PyTorch's fused attention."""

    def __init__(self, shape: Shape):
        from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

        assert not shape.is_tied and shape.n_query_groups == shape.n_heads, "not supported here"
        # Flash attention, rotary embedding, RMSNorm and SwiGLU are options of the decoder.
        layers = Decoder(
            dim=shape.hidden_size,
            depth=shape.n_layers,
            heads=shape.n_heads,
            attn_dim_head=shape.hidden_size // shape.n_heads,
            attn_flash=True,
            rotary_pos_emb=True,
            use_rmsnorm=True,
            ff_mult=shape.intermediate_size / shape.hidden_size,
            ff_swish=True,
            ff_glu=True,
            ff_no_bias=True,
        )
        sizes = {"num_tokens": shape.vocab_size, "max_seq_len": shape.max_length, "use_abs_pos_emb": False}
        self.model = AutoregressiveWrapper(TransformerWrapper(attn_layers=layers, **sizes))

    def blocks(self):
        # A layer is [norms, block, residual]; attention and feed-forward are separate layers.
        return [layer[1] for layer in self.model.net.attn_layers.layers]

    def loss(self, tokens: Tensor) -> Tensor:
        return self.model(tokens)

    def generate(self, prompt: Tensor, mask: Tensor, n_new: int) -> Tensor:
        new = self.model.generate(prompt, n_new, temperature=0.0, cache_kv=True)
        return torch.cat([prompt, new], dim=1)


SIDES: dict[str, Callable] = {"ours": Ours, "llama": Llama, "litgpt": LitGPT, "x-transformers": XTransformers}
