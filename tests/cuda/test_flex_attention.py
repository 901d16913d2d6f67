"""FlexAttention on a GPU: outputs and gradients are those of the dense mask."""

import pytest
import torch

from model.attention import attention_in_blocks
from model.multimodal.layout import Part, build_stream, join_streams
from model.multimodal.mask import stream_blocks, stream_mask
from model.presets import MULTIMODAL
from utils.configuration import MegaTransformerConfig
from utils.options import from_preset

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no NVIDIA GPU"),
]


def test_compiled_attention_equals_the_dense_mask():
    config = from_preset(MegaTransformerConfig, MULTIMODAL, "multimodal-tiny")
    for n_text in (40, 200):  # Another length, compiled anew.
        parts = [Part("text", range(2, 2 + n_text)), Part("image", n_tokens=16), Part("text", [5] * 7)]
        batch = join_streams([build_stream(config, parts), build_stream(config, parts[:2])], 0)
        placement = type(batch.placement)(*(vector.cuda() for vector in batch.placement))
        length = batch.ids.shape[1]
        torch.manual_seed(0)
        leaves = [torch.randn(2, heads, length, 64, device="cuda", requires_grad=True) for heads in (4, 2, 2)]
        gradient, results = torch.randn(2, 4, length, 64, device="cuda"), []
        for kind in ("blocks", "dense"):
            for leaf in leaves:
                leaf.grad = None
            if kind == "blocks":
                out = attention_in_blocks(*leaves, stream_blocks(placement))
            else:
                mask = stream_mask(placement)
                out = torch.nn.functional.scaled_dot_product_attention(*leaves, attn_mask=mask, enable_gqa=True)
            out.backward(gradient)
            results.append([out.detach(), *(leaf.grad for leaf in leaves)])
        for blocks, dense in zip(*results, strict=True):
            assert (blocks - dense).abs().max() <= 2e-2 * dense.abs().max()  # TF32 in the compiled kernel.
