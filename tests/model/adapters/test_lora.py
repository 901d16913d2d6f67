"""Low-rank adapters: which layers get them, what is frozen, and that merged weights are those of peft."""

import copy
import re

import pytest
import torch

from model.adapters.lora import (
    ADAPTED_CLASSES,
    adapters_of,
    add_adapters,
    is_of_adapter,
    linear_layers,
    load_merged,
    merge_adapters,
)
from model.audio.diffusion import AudioDiffusion
from model.causal import MegaTransformerForCausalLM
from model.image.diffusion import ImageDiffusion
from model.image.vae import ImageVAE
from model.multimodal import MegaTransformerMultimodal
from model.multimodal.parameters import freeze, rate_factors
from tests.helpers.runs import SMALL_LDM_UNET, equal, largest_difference
from utils.devices import compile_in_place

SMALL_UNET = {"widths": [32, 64], "n_blocks": [1, 1], "conditioning_width": 64, "text_width": 32}
OF_TRANSFORMER = {"attention.qkv_proj", "attention.o_proj", "ffn.in_proj", "ffn.out_proj"}
OF_ATTENTION = {
    f"{name}.{layer}" for name in ("attention", "text_attention") for layer in ("query", "key_value", "out")
}
# Model, its preset and fields, and the last two parts of the names of the layers that are adapted by default.
MODELS = {
    "text": (MegaTransformerForCausalLM, "tiny", {"hidden_size": 32}, OF_TRANSFORMER),
    "recurrent text": (MegaTransformerForCausalLM, "recurrent-tiny", {"hidden_size": 32}, OF_TRANSFORMER),
    "streams": (MegaTransformerMultimodal, "multimodal-tiny", {"hidden_size": 32, "head_width": 16}, OF_TRANSFORMER),
    "image UNet": (ImageDiffusion, "tiny", SMALL_UNET, {*OF_ATTENTION, "0.hidden", "0.out"}),
    "ldm": (
        *(ImageDiffusion, "ldm", SMALL_LDM_UNET),
        {
            *(f"{name}attention.{layer}" for name in ("", "text_") for layer in ("query", "key", "value", "output")),
            *("transformer.hidden", "transformer.output"),
        },
    ),
    "audio UNet": (AudioDiffusion, "tiny", {}, {"attention.query", "attention.key_value", "attention.out"}),
}


def build(case):
    model_class, preset, fields, _ = MODELS[case]
    torch.manual_seed(0)
    return model_class.from_preset(preset, **fields)


@pytest.mark.parametrize("case", MODELS)
def test_attention_and_feed_forward_layers_are_adapted_by_default(case):
    model = build(case)
    layers = linear_layers(model)
    assert {".".join(name.split(".")[-2:]) for name in layers} == MODELS[case][3]
    n_before, state = len(list(model.parameters())), copy.deepcopy(model.state_dict())
    assert add_adapters(model, rank=2, alpha=3.0) == layers
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name in model.state_dict() if is_of_adapter(name)} and len(trained) == 2 * len(layers)
    assert len(list(model.parameters())) == n_before + len(trained)
    # B is zero: the plain model is the given one, bit for bit.
    assert adapters_of(model) == {"rank": 2, "alpha": 3.0}
    assert equal(merge_adapters(model.state_dict(), adapters_of(model)), dict(state))


def test_merged_weights_are_those_of_peft():
    model = build("text")
    add_adapters(model, rank=4, alpha=16.0, names=["qkv_proj", "ffn.out_proj"])
    for name, parameter in model.named_parameters():
        if is_of_adapter(name):
            torch.nn.init.normal_(parameter, std=0.1)
    merged = merge_adapters(model.state_dict(), adapters_of(model))
    for module in model.modules():
        if hasattr(module, "merge"):
            module.merge()
    expected = {name: value for name, value in model.state_dict().items() if not is_of_adapter(name)}
    expected = {name.replace(".base_layer.", "."): value for name, value in expected.items()}
    assert largest_difference(expected, merged) <= 1e-6


@pytest.mark.parametrize("case", ["text", "audio UNet"])
def test_a_plain_model_gets_merged_weights_in_place(case):
    adapted, plain = build(case), build(case)
    add_adapters(adapted, rank=4, alpha=16.0)
    for name, parameter in adapted.named_parameters():
        if is_of_adapter(name):
            torch.nn.init.normal_(parameter, std=0.1)
    own = {name: value.data_ptr() for name, value in plain.state_dict().items()}
    state, adapters = adapted.state_dict(), adapters_of(adapted)
    load_merged(plain, state, adapters)
    assert equal(dict(plain.state_dict()), merge_adapters(state, adapters))
    assert {name: value.data_ptr() for name, value in plain.state_dict().items()} == own
    # Nothing is left as it was, or out.
    (first, *_), rest = plain.state_dict(), dict(state)
    del rest[next(name for name in rest if name.replace(".base_layer.", ".") == first)]
    with pytest.raises(ValueError, match=f"{re.escape(first)} of the plain model is no weight of the adapted one"):
        load_merged(plain, rest, adapters)
    with pytest.raises(ValueError, match="further of the adapted model is no weight of the plain one"):
        load_merged(plain, {**state, "further": torch.zeros(1)}, adapters)


@pytest.mark.parametrize("case", ["text", "image UNet"])
def test_an_adapted_model_is_compiled_whole_and_computes_the_same(case):
    """By the backend without kernels of its own, since those for CPUs are not used."""
    model = build(case)
    add_adapters(model, rank=2, alpha=4.0)
    for parameter in model.parameters():  # Layers that begin with zeros would hide what lies before them.
        torch.nn.init.normal_(parameter, std=0.1)
    compiled, results = copy.deepcopy(model), []
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_in_place(compiled, backend="aot_eager")
    for network in (model, compiled):
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(1, 99, (2, 8), generator=generator)
        if case == "text":
            output = network(input_ids=tokens).logits
        else:
            latents = torch.randn(2, *network.latent_shape(), generator=generator)
            text = {"tokens": tokens, "mask": torch.ones_like(tokens, dtype=torch.bool)}
            output = network(latents=latents, time=torch.tensor([0.3, 0.6]), **text).prediction
        output.square().mean().backward()
        gradients = {name: value.grad for name, value in network.named_parameters() if is_of_adapter(name)}
        results.append({"output": output.detach(), **gradients})
    assert all(value.any() for value in results[0].values())
    for name, expected in results[0].items():
        assert (results[1][name] - expected).abs().max() <= 1e-4 * expected.abs().max(), name
    # Adapters do not break the graph of a layer into pieces.
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0 and not torch._dynamo.utils.counters["graph_break"]


def test_names_are_ends_of_full_names():
    model = build("image UNet")
    layers = linear_layers(model, ["text_attention.query", "time.output"])
    ends = [".".join(name.split(".")[-2:]) for name in layers]
    assert set(ends) == {"text_attention.query", "time.output"} and ends.count("time.output") == 1
    # `out` is also the name of convolutions, which stay as they are.
    assert all(isinstance(model.get_submodule(name), torch.nn.Linear) for name in linear_layers(model, ["out"]))
    with pytest.raises(ValueError, match=r"--lora_modules 'querry' names no linear layer.*did you mean 'query'"):
        linear_layers(model, ["querry"])
    with pytest.raises(ValueError, match="has no attention or feed-forward layers; give --lora_modules"):
        linear_layers(ImageVAE.from_preset("tiny", image_size=32))


def test_flags_of_parts_without_adapters_have_no_effect():
    model = build("streams")
    add_adapters(model, rank=2, alpha=4.0)
    with pytest.raises(ValueError, match=r"--freeze text has no effect.*no adapters of --lora_rank"):
        freeze(model, ["audio", "text"])
    with pytest.raises(ValueError, match=r"--learning_rates text:2 has no effect.*--lora_rank gives it no adapters"):
        rate_factors(model, ["trunk:2", "text:2"])
    # What is refused has frozen nothing.
    assert all(parameter.requires_grad for name, parameter in model.named_parameters() if is_of_adapter(name))


def test_every_class_that_is_adapted_exists():
    classes = {type(module).__name__ for case in MODELS for module in build(case).modules()}
    assert set(ADAPTED_CLASSES) <= classes
