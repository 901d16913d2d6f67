import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.image.ldm_vae import config_from_diffusers, rename_diffusers_weights
from model.image.vae import ImageVAE, ImageVAEConfig

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
# What diffusers' AutoencoderKL writes into config.json for two stages of 8 and 16 channels.
DIFFUSERS_CONFIG = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [8, 16],
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "latents_mean": None,
    "latents_std": None,
    "mid_block_add_attention": True,
    "norm_num_groups": 4,
    "out_channels": 3,
    "sample_size": 16,
    "scaling_factor": 0.5,
    "shift_factor": 0.25,
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}
BLOCK_TYPES = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
# Its layers beside ours; what follows the prefix is equal but for the shortcut.
NAMES = {
    "encoder.conv_in.": "encoder.stem.",
    "encoder.down_blocks.0.resnets.0.": "encoder.stages.0.0.",
    "encoder.down_blocks.0.downsamplers.0.": "encoder.stages.0.1.",
    "encoder.down_blocks.1.resnets.0.": "encoder.stages.1.0.",
    "encoder.conv_norm_out.": "encoder.norm.",
    "encoder.conv_out.": "encoder.head.",
    "quant_conv.": "encoder.posterior.",
    "post_quant_conv.": "decoder.prior.",
    "decoder.conv_in.": "decoder.stem.",
    "decoder.up_blocks.0.resnets.0.": "decoder.stages.0.0.",
    "decoder.up_blocks.0.resnets.1.": "decoder.stages.0.1.",
    "decoder.up_blocks.0.upsamplers.0.": "decoder.stages.0.2.",
    "decoder.up_blocks.1.resnets.0.": "decoder.stages.1.0.",
    "decoder.up_blocks.1.resnets.1.": "decoder.stages.1.1.",
    "decoder.conv_norm_out.": "decoder.norm.",
    "decoder.conv_out.": "decoder.head.",
}
for half in ("encoder", "decoder"):
    NAMES[f"{half}.mid_block.resnets.0."] = f"{half}.middle.0."
    NAMES[f"{half}.mid_block.resnets.1."] = f"{half}.middle.2."
    for theirs, ours in {"group_norm": "norm", "to_q": "query", "to_k": "key", "to_v": "value"}.items():
        NAMES[f"{half}.mid_block.attentions.0.{theirs}."] = f"{half}.middle.1.{ours}."
    NAMES[f"{half}.mid_block.attentions.0.to_out.0."] = f"{half}.middle.1.output."


def tiny_model(seed=0, **changes):
    fields, _, _ = config_from_diffusers({**DIFFUSERS_CONFIG, **changes})
    torch.manual_seed(seed)
    return ImageVAE(ImageVAEConfig(**fields)).eval()


def own_weights(model):
    """The state dict without the statistics of the latents, which diffusers keeps in the configuration."""
    return {name: value for name, value in model.state_dict().items() if not name.startswith("latent_")}


def under_diffusers_names(weights):
    renamed = {}
    for name, value in weights.items():
        (prefix,) = [theirs for theirs, ours in NAMES.items() if name.startswith(ours)]
        renamed[prefix + name.removeprefix(NAMES[prefix]).replace("shortcut", "conv_shortcut")] = value
    return renamed


def under_old_names(weights):
    """Attention as diffusers stored it before 0.13, and as the original checkpoints do: 1x1 convolutions."""
    old = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    renamed = {}
    for name, value in weights.items():
        for recent, former in old.items():
            if f"attentions.0.{recent}" in name:
                name, value = name.replace(recent, former), value[:, :, None, None] if value.ndim == 2 else value
        renamed[name] = value
    return renamed


@pytest.fixture
def folder(tmp_path):
    """A folder as diffusers saves it, with the weights of tiny_model(0)."""
    (tmp_path / "config.json").write_text(json.dumps(DIFFUSERS_CONFIG))
    save_file(under_diffusers_names(own_weights(tiny_model(0))), tmp_path / WEIGHTS_FILE)
    return tmp_path


def change_config(folder, **changes):
    config = {**DIFFUSERS_CONFIG, **changes}
    (folder / "config.json").write_text(json.dumps(config))


def assert_equal_weights(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("names", [under_diffusers_names, lambda w: under_old_names(under_diffusers_names(w))])
def test_both_generations_of_names_are_understood(names):
    weights = own_weights(tiny_model(0))
    assert_equal_weights(rename_diffusers_weights(names(weights)), weights)


def test_every_layer_of_the_written_out_list_is_used():
    renamed = under_diffusers_names(own_weights(tiny_model()))
    assert all(any(name.startswith(prefix) for name in renamed) for prefix in NAMES)
    assert {name for name in renamed if "shortcut" in name} == {
        f"{block}.resnets.0.conv_shortcut.{kind}"
        for block in ("encoder.down_blocks.1", "decoder.up_blocks.1")
        for kind in ("weight", "bias")
    }


def test_a_folder_is_read(folder):
    model = ImageVAE.from_diffusers(folder)
    assert_equal_weights(own_weights(model), own_weights(tiny_model(0)))
    assert (model.config.architecture, model.config.image_size, model.config.compression) == ("ldm", 16, 2)
    assert model.latent_shape(16) == (4, 8, 8)


def test_scaling_and_shift_become_the_latent_statistics(folder):
    model, z = ImageVAE.from_diffusers(folder), torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(model.normalize_latents(z), (z - 0.25) * 0.5)


def test_statistics_per_channel_win(folder):
    change_config(folder, latents_mean=[0.0, 1.0, 2.0, 3.0], latents_std=[1.0, 2.0, 3.0, 4.0])
    model = ImageVAE.from_diffusers(folder)
    assert model.latent_mean.tolist() == [0.0, 1.0, 2.0, 3.0] and model.latent_std.tolist() == [1.0, 2.0, 3.0, 4.0]


def test_shift_may_be_missing_and_scaling_has_diffusers_default():
    old = {name: value for name, value in DIFFUSERS_CONFIG.items() if "factor" not in name and "latents_" not in name}
    _, mean, std = config_from_diffusers(old)
    assert mean == 0.0 and std == pytest.approx(1 / 0.18215)


def test_without_quant_conv():
    model = tiny_model(use_quant_conv=False, use_post_quant_conv=False)
    assert not any("posterior" in name or "prior" in name for name in model.state_dict())
    other = tiny_model(1, use_quant_conv=False, use_post_quant_conv=False)
    other.load_diffusers_weights(under_diffusers_names(own_weights(model)))
    assert_equal_weights(own_weights(other), own_weights(model))


def test_gradient_reaches_every_weight():
    model = tiny_model().train()
    image = torch.rand(2, 3, 16, 16) * 2 - 1
    output = model(image, noise=torch.randn(2, 4, 8, 8))
    (output.reconstruction.square().mean() + output.logvar.square().mean()).backward()
    # A constant added to every key leaves the softmax as it is.
    silent = {name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-7}
    assert silent <= {"encoder.middle.1.key.bias", "decoder.middle.1.key.bias"}


def test_checkpointing_and_compilation_change_nothing():
    model, image = tiny_model().train(), torch.rand(2, 3, 16, 16) * 2 - 1
    expected = model(image).reconstruction
    expected.mean().backward()
    plain = [p.grad.clone() for p in model.parameters()]
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(image).reconstruction, expected)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(image).reconstruction.mean().backward()
    for first, p in zip(plain, model.parameters(), strict=True):
        assert torch.equal(first, p.grad)


@pytest.mark.parametrize("name", ["config.json", WEIGHTS_FILE])
def test_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name}.* is missing; .*AutoencoderKL"):
        ImageVAE.from_diffusers(folder)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"_class_name": "VQModel"}, "_class_name='VQModel'.*only diffusers' AutoencoderKL"),
        ({"act_fn": "relu"}, "act_fn='relu'.*'silu'"),
        ({"mid_block_add_attention": False}, "mid_block_add_attention=False.*True"),
        ({"in_channels": 1}, "in_channels=1.*3"),
        ({"out_channels": 4}, "out_channels=4.*3"),
        ({"use_post_quant_conv": False}, "use_quant_conv and use_post_quant_conv differ"),
        ({"norm_num_groups": 3}, "n_norm_groups=3 must divide"),
    ],
)
def test_other_variants_are_refused(folder, changes, message):
    change_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        ImageVAE.from_diffusers(folder)


def test_weights_of_another_layout_are_named(folder):
    weights = load_file(folder / WEIGHTS_FILE)
    weights["encoder.surprise.weight"] = weights.pop("encoder.conv_in.weight")
    save_file(weights, folder / WEIGHTS_FILE)
    with pytest.raises(ValueError, match=r"missing \['encoder.stem.weight'\], .*\['encoder.surprise.weight'\]"):
        ImageVAE.from_diffusers(folder)


def test_wrong_shape_is_named(folder):
    change_config(folder, latent_channels=8)
    with pytest.raises(ValueError, match=r"(encoder|decoder)\.\w+\.\w+ has shape \(.*\), this model needs \(.*\)"):
        ImageVAE.from_diffusers(folder)


def test_other_architecture_is_refused():
    model = ImageVAE.from_preset("tiny", architecture="residual")
    with pytest.raises(ValueError, match="architecture='residual' cannot take diffusers' weights"):
        model.load_diffusers_weights(under_diffusers_names(own_weights(tiny_model())))


@pytest.fixture(scope="module")
def autoencoder_kl():
    return pytest.importorskip("diffusers").AutoencoderKL


@pytest.mark.parametrize("changes", [{}, {"block_out_channels": [8, 8, 16], "layers_per_block": 2}])
@torch.no_grad()
def test_parity_with_diffusers(autoencoder_kl, tmp_path, changes):
    stages = len(changes.get("block_out_channels", [8, 16]))
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * stages, "up_block_types": ["UpDecoderBlock2D"] * stages}
    torch.manual_seed(0)
    config = {name: value for name, value in DIFFUSERS_CONFIG.items() if name != "_class_name"}
    reference = autoencoder_kl(**{**config, **blocks, **changes}).eval()
    for parameter in reference.parameters():  # norms and biases too
        parameter.add_(0.1 * torch.randn(parameter.shape))
    reference.save_pretrained(tmp_path)
    model = ImageVAE.from_diffusers(tmp_path).eval()

    image = torch.rand(2, 3, 16, 24) * 2 - 1
    expected = reference.encode(image).latent_dist
    mean, logvar = model.encode(image)
    torch.testing.assert_close(mean, expected.mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(logvar, expected.logvar, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.decode(mean), reference.decode(expected.mean).sample, rtol=0, atol=1e-5)


def test_the_written_out_names_are_those_of_diffusers(autoencoder_kl, folder):
    reference = autoencoder_kl.from_config({**DIFFUSERS_CONFIG, **BLOCK_TYPES})
    written_out = {name: value.shape for name, value in load_file(folder / WEIGHTS_FILE).items()}
    assert {name: value.shape for name, value in reference.state_dict().items()} == written_out
    reference.load_state_dict(load_file(folder / WEIGHTS_FILE))
    reference.save_pretrained(folder)
    assert_equal_weights(own_weights(ImageVAE.from_diffusers(folder)), own_weights(tiny_model(0)))
