import re
from pathlib import Path

import pytest
import torch

from model import presets
from model.audio.diffusion import AudioDiffusion
from model.audio.vae import AudioVAE
from model.audio.vocoders import Vocoder
from model.causal import MegaTransformerForCausalLM
from model.image.diffusion import ImageDiffusion
from model.image.ldm_unet import rename_diffusers_weights as rename_diffusers_unet_weights
from model.image.ldm_vae import rename_diffusers_weights
from model.image.recurrent_vae import RecurrentVAE
from model.image.vae import ImageVAE
from model.multimodal import MegaTransformerMultimodal
from utils.options import from_preset

SOURCE = Path(presets.__file__).read_text()
MODELS = {
    "IMAGE_VAE": ImageVAE,
    "RECURRENT_VAE": RecurrentVAE,
    "IMAGE_DIFFUSION": ImageDiffusion,
    "AUDIO_VAE": AudioVAE,
    "AUDIO_DIFFUSION": AudioDiffusion,
    "VOCODER": Vocoder,
    "MEGATRANSFORMER": MegaTransformerForCausalLM,
    "MULTIMODAL": MegaTransformerMultimodal,
}


ROWS = [(table, name) for table in MODELS for name, row in getattr(presets, table).items() if isinstance(row, dict)]
ALIASES = [(table, name) for table in MODELS for name, row in getattr(presets, table).items() if isinstance(row, str)]


def test_every_table_is_tested():
    tables = {name for name, value in vars(presets).items() if name.isupper() and isinstance(value, dict)}
    assert tables == MODELS.keys()


@pytest.mark.parametrize("table, name", ROWS)
def test_parameters_are_as_stated(table, name):
    with torch.device("meta"):
        model = MODELS[table].from_preset(name)
    assert sum(p.numel() for p in model.parameters()) == getattr(presets, table)[name]["parameters"]


@pytest.mark.parametrize("table", ["IMAGE_VAE", "RECURRENT_VAE", "AUDIO_VAE"])
def test_compression_is_as_stated(table):
    lines = SOURCE[SOURCE.index(f"\n{table}: ") : SOURCE.index("\n}", SOURCE.index(f"\n{table}: "))]
    stated = re.findall(r"# f(\d+)$", lines, flags=re.MULTILINE)
    configs = [
        from_preset(MODELS[name].config_class, getattr(presets, name), row) for name, row in ROWS if name == table
    ]
    assert [int(f) for f in stated] == [config.compression for config in configs]


@pytest.mark.parametrize("table, name", ALIASES)
def test_a_former_name_gives_the_renamed_row_with_a_notice(table, name, caplog):
    rows, config_class = getattr(presets, table), MODELS[table].config_class
    former = from_preset(config_class, rows, name)
    assert repr(name) in caplog.text and repr(rows[name]) in caplog.text
    assert former.to_dict() == from_preset(config_class, rows, rows[name]).to_dict()


def test_names_are_sizes_and_variants_by_hyphen():
    sizes = {"tiny", "small", "medium", "large", "ldm", "hifigan", "llama"}
    assert ALIASES and all("_" not in name and sizes & set(name.split("-")) for _, name in ROWS)


def test_an_unknown_name_lists_no_former_ones():
    with pytest.raises(ValueError, match="unknown preset 'bases'") as error:
        Vocoder.from_preset("bases")
    assert "medium" in str(error.value) and "'base'" not in str(error.value)


def test_ldm_preset_has_the_layout_of_stable_diffusion():
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        theirs = diffusers.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
        ours = ImageVAE.from_preset("ldm")
    weights = rename_diffusers_weights(theirs.state_dict())
    own = {name: value.shape for name, value in ours.state_dict().items() if not name.startswith("latent_")}
    assert {name: value.shape for name, value in weights.items()} == own


def test_ldm_diffusion_preset_has_the_layout_of_stable_diffusion():
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        ours = ImageDiffusion.from_preset("ldm").network
    weights = rename_diffusers_unet_weights(theirs.state_dict())
    own = {name: value.shape for name, value in ours.state_dict().items()}
    assert {name: value.shape for name, value in weights.items()} == own
