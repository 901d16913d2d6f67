import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.image.diffusion import ImageDiffusion, ImageDiffusionConfig
from model.image.ldm_unet import config_from_diffusers, rename_diffusers_weights

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
# What diffusers' UNet2DConditionModel writes into config.json for two levels of 8 and 16 channels, where it is read.
DIFFUSERS_CONFIG = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "attention_head_dim": 2,
    "block_out_channels": [8, 16],
    "cross_attention_dim": 12,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 4,
    "out_channels": 4,
    "sample_size": 8,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "use_linear_projection": False,
}
# Its blocks beside ours.
BLOCKS = {
    "time_embedding.linear_1.": "time.hidden.",
    "time_embedding.linear_2.": "time.output.",
    "conv_in.": "stem.",
    "conv_norm_out.": "norm.",
    "conv_out.": "head.",
    "down_blocks.0.resnets.0.": "down.0.0.block.",
    "down_blocks.0.attentions.0.": "down.0.0.transformer.",
    "down_blocks.0.downsamplers.0.conv.": "downsamples.0.conv.",
    "down_blocks.1.resnets.0.": "down.1.0.block.",
    "mid_block.resnets.0.": "middle.0.block.",
    "mid_block.resnets.1.": "middle.1.block.",
    "mid_block.attentions.0.": "middle.0.transformer.",
    "up_blocks.0.resnets.0.": "up.0.0.block.",
    "up_blocks.0.resnets.1.": "up.0.1.block.",
    "up_blocks.0.upsamplers.0.conv.": "upsamples.0.conv.",
    "up_blocks.1.resnets.0.": "up.1.0.block.",
    "up_blocks.1.resnets.1.": "up.1.1.block.",
    "up_blocks.1.attentions.0.": "up.1.0.transformer.",
    "up_blocks.1.attentions.1.": "up.1.1.transformer.",
}
# Their layers within the blocks; the others are named alike.
LAYERS = {
    "time.": "time_emb_proj.",
    "shortcut.": "conv_shortcut.",
    "hidden.": "transformer_blocks.0.ff.net.0.proj.",
    "output.": "transformer_blocks.0.ff.net.2.",
    **{f"norm{i}.": f"transformer_blocks.0.norm{i}." for i in (1, 2, 3)},
}
for ours, theirs in {"attention.": "attn1.", "text_attention.": "attn2."}.items():
    for layer, its in {"query.": "to_q.", "key.": "to_k.", "value.": "to_v.", "output.": "to_out.0."}.items():
        LAYERS[ours + layer] = f"transformer_blocks.0.{theirs}{its}"


def tiny_model(seed=0, **changes):
    torch.manual_seed(seed)
    model = ImageDiffusion(ImageDiffusionConfig(**config_from_diffusers({**DIFFUSERS_CONFIG, **changes}))).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def under_diffusers_names(weights):
    renamed = {}
    for name, value in weights.items():
        (prefix,) = [theirs for theirs, ours in BLOCKS.items() if name.startswith(ours)]
        rest = name.removeprefix(BLOCKS[prefix])
        in_resnet = "resnets" in prefix
        for ours, theirs in LAYERS.items():
            if rest.startswith(ours) and not (in_resnet and ours.startswith("norm")):
                rest = theirs + rest.removeprefix(ours)
                break
        renamed[prefix + rest] = value
    return renamed


@pytest.fixture
def folder(tmp_path):
    """A folder as diffusers saves it, with the weights of tiny_model(0)."""
    (tmp_path / "config.json").write_text(json.dumps(DIFFUSERS_CONFIG))
    save_file(under_diffusers_names(tiny_model(0).network.state_dict()), tmp_path / WEIGHTS_FILE)
    return tmp_path


def assert_equal_weights(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_names_are_understood():
    weights = tiny_model(0).network.state_dict()
    assert_equal_weights(rename_diffusers_weights(under_diffusers_names(weights)), weights)


def test_a_folder_is_read(folder):
    model = ImageDiffusion.from_diffusers(folder)
    assert_equal_weights(model.network.state_dict(), tiny_model(0).network.state_dict())
    assert model.latent_shape() == (4, 8, 8)
    assert (model.process.schedule, model.process.prediction) == ("scaled_linear", "epsilon")


def test_other_fields_can_be_given(folder):
    model = ImageDiffusion.from_diffusers(
        folder, prediction="v", text_encoder="bytes", text_embedding_width=None, text_head_width=4
    )
    assert model.process.prediction == "v"
    assert model.encode_text(torch.ones(1, 8, dtype=torch.int64)).states.shape == (1, 8, 12)


def test_frozen_embeddings_reach_the_network_as_they_are():
    states = torch.randn(2, 8, 12)
    assert torch.equal(tiny_model().encode_text(text_states=states).states, states)


def test_compiles_without_graph_breaks():
    model = tiny_model()
    inputs = {"latents": torch.randn(2, 4, 8, 8), "time": torch.rand(2), "text_states": torch.randn(2, 8, 12)}
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**inputs).prediction, model(**inputs).prediction)


@pytest.mark.parametrize("name", ["config.json", WEIGHTS_FILE])
def test_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name}.* is missing; .*UNet2DConditionModel"):
        ImageDiffusion.from_diffusers(folder)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"_class_name": "AutoencoderKL"}, "_class_name='AutoencoderKL'.*only diffusers' UNet2DConditionModel"),
        ({"out_channels": 8}, "in_channels=4 and out_channels=8 differ"),
        ({"act_fn": "gelu"}, "act_fn='gelu'.*'silu'"),
        ({"addition_embed_type": "text_time"}, "addition_embed_type='text_time'.*None"),
        ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift='scale_shift'.*'default'"),
        ({"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]}, "down_block_types=.*AttnDownBlock2D"),
        ({"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]}, "attention at the same levels down and up"),
        ({"cross_attention_dim": [12, 16]}, r"cross_attention_dim=\[12, 16\]"),
        ({"attention_head_dim": [2, 2]}, r"attention_head_dim=\[2, 2\].*heads of one width"),
        ({"norm_num_groups": 3}, "n_norm_groups=3 must divide"),
    ],
)
def test_other_variants_are_refused(folder, changes, message):
    (folder / "config.json").write_text(json.dumps({**DIFFUSERS_CONFIG, **changes}))
    with pytest.raises(ValueError, match=message):
        ImageDiffusion.from_diffusers(folder)


def test_weights_of_another_layout_are_named(folder):
    weights = load_file(folder / WEIGHTS_FILE)
    weights["surprise.weight"] = weights.pop("conv_in.weight")
    save_file(weights, folder / WEIGHTS_FILE)
    with pytest.raises(ValueError, match=r"stem.weight has shape None, needed \(8, 4, 3, 3\), surprise.weight has"):
        ImageDiffusion.from_diffusers(folder)


def test_other_architecture_is_refused():
    with pytest.raises(ValueError, match="architecture='residual' cannot take diffusers' weights"):
        ImageDiffusion.from_preset("tiny").load_diffusers_weights({})


@pytest.fixture(scope="module")
def unet_2d_condition():
    return pytest.importorskip("diffusers").UNet2DConditionModel


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_head_dim": [2, 4], "use_linear_projection": True, "layers_per_block": 2},
        {"layers_per_block": [2, 1]},
        {
            "block_out_channels": [8, 16, 16],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        },
    ],
)
@torch.no_grad()
def test_parity_with_diffusers(unet_2d_condition, tmp_path, changes):
    torch.manual_seed(0)
    config = {name: value for name, value in DIFFUSERS_CONFIG.items() if name != "_class_name"}
    reference = unet_2d_condition(**{**config, **changes}).eval()
    for parameter in reference.parameters():  # norms and biases too
        parameter.add_(0.1 * torch.randn(parameter.shape))
    reference.save_pretrained(tmp_path)
    model = ImageDiffusion.from_diffusers(tmp_path).eval()
    latents, states = torch.randn(2, 4, 8, 12), torch.randn(2, 8, 12)
    mask = torch.arange(8) < torch.tensor([[8], [3]])
    for steps in ([0, 999], [17, 500]):
        expected = reference(latents, torch.tensor(steps), states, encoder_attention_mask=mask).sample
        time = (torch.tensor(steps) + 1.0) / 1000  # the end of a step, as the process counts
        prediction = model(latents, time, text_states=states, mask=mask).prediction
        assert expected.abs().mean() > 0.05
        torch.testing.assert_close(prediction, expected, rtol=0, atol=1e-4)


def test_the_written_out_names_are_those_of_diffusers(unet_2d_condition, folder):
    reference = unet_2d_condition.from_config(DIFFUSERS_CONFIG)
    written_out = {name: value.shape for name, value in load_file(folder / WEIGHTS_FILE).items()}
    assert {name: value.shape for name, value in reference.state_dict().items()} == written_out
