"""Runs that start from folders of diffusers and transformers: what they compute at first, and refusals."""

import re

import diffusers
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dataset_loading.text.tokenizers import load_tokenizer
from model.causal import MegaTransformerForCausalLM
from model.diffusion import TextCondition
from model.image.diffusion import ImageDiffusion
from model.image.vae import ImageVAE
from pretrain_image_diffusion import ImageDiffusionStage
from pretrain_image_vae import ImageVAEStage
from pretrain_multimodal import MultimodalStage
from tests.helpers.runs import SMALL_DIFFUSION, SMALL_LDM_UNET, SMALL_LDM_VAE, SMALL_RUN, changed, run_stage
from tests.helpers.text_cache import SMALL_TEXT, make_text
from utils.checkpoints import load_model
from utils.exporting.diffusers_folder import unet_fields, vae_fields
from utils.generation.text_weights import is_text_run

STILL = ["--learning_rate", "1e-12", "--batch_size", "4", "--no_use_ema"]  # Trains, and leaves the weights.
LLAMA = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "vocab_size": 260,
    "rms_norm_eps": 1e-5,
}


def random_weights(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def remedy(error) -> list[str]:
    """The flags that an error ends with."""
    return re.search(r"; give (--config .*)$", str(error.value))[1].split()


def following(common: list[str], flags: list[str], *overrides: str) -> list[str]:
    """A command line with the flags of a remedy, which end with overrides, and further ones."""
    return [*changed(common, *flags), *overrides]


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    config = ImageVAE.from_preset("ldm", **SMALL_LDM_VAE).config
    model = diffusers.AutoencoderKL(**vae_fields(config, torch.full((4,), 0.5), torch.full((4,), 2.0)))
    random_weights(model).save_pretrained(folder := tmp_path_factory.mktemp("pipeline") / "vae")
    return model, folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
    model = random_weights(LlamaForCausalLM(LlamaConfig(**LLAMA, rope_parameters=rope)))
    model.save_pretrained(folder := tmp_path_factory.mktemp("llama"), max_shard_size="50KB")
    load_tokenizer(str(make_text(tmp_path_factory.mktemp("texts") / "bytes", 20) / "tokenizer")).save_pretrained(
        folder
    )
    return model, folder


@torch.no_grad()
def test_an_image_vae_goes_on_from_an_autoencoder(train, autoencoder, image_cache, tmp_path):
    theirs, folder = autoencoder
    pipeline = ["--init_from", str(folder.parent), *STILL]  # The folder of a pipeline will do.
    with pytest.raises(ValueError, match=r"encoder_widths=\[8, 16\] \(here \[128, 256, 512, 512\]\)") as error:
        train("other", 2, *pipeline, "--config", "ldm", "--override", "image_size=32")
    common = following(SMALL_RUN, remedy(error))
    with torch.enable_grad():
        run = run_stage(ImageVAEStage, common, image_cache, tmp_path, "run", 2, *pipeline)
    ours, image = load_model(ImageVAE, run.folder), torch.rand(1, 3, 32, 32) * 2 - 1
    mean, _ = ours.encode(image)
    assert (theirs.encode(image).latent_dist.mean - mean).abs().max() < 1e-5
    assert (theirs.decode(mean).sample - ours.decode(mean)).abs().max() < 1e-5


@torch.no_grad()
def test_a_text_to_image_model_goes_on_from_a_unet(train_diffusion, autoencoder, latent_cache, tmp_path, caplog):
    heads = {"n_heads": None, "head_width": 4, "latent_channels": 16}
    config = ImageDiffusion.from_preset("ldm", **{**SMALL_LDM_UNET, **heads}).config
    theirs = random_weights(diffusers.UNet2DConditionModel(**unet_fields(config)))
    theirs.save_pretrained(tmp_path / "pipeline" / "unet")
    autoencoder[0].save_pretrained(tmp_path / "pipeline" / "vae")
    diffusers.DDIMScheduler(prediction_type="v_prediction").save_pretrained(tmp_path / "pipeline" / "scheduler")
    bytes_only = ["text_encoder=bytes", "text_embedding_width=null", "n_text_layers=0"]
    flags = ["--init_from", str(tmp_path / "pipeline"), *STILL]
    with pytest.raises(ValueError, match=r"schedule='linear'.*prediction='v'") as error:
        levels = ["widths=[32,64]", "n_blocks=[1,1]", "use_attention=[true,false]"]
        train_diffusion("other", 2, *flags, "--config", "ldm", "--override", *levels, *bytes_only)
    common = following(SMALL_DIFFUSION, remedy(error), "n_text_layers=0")
    with torch.enable_grad():
        run = run_stage(ImageDiffusionStage, common, latent_cache, tmp_path, "run", 2, *flags)
    assert "has no null_condition.safetensors: what stands for no caption is random" in caplog.text
    ours, latents, states = load_model(ImageDiffusion, run.folder), torch.randn(1, 16, 4, 4), torch.randn(1, 8, 12)
    text = TextCondition(states, torch.ones(1, 8, dtype=torch.bool), states.amax(1))
    prediction = ours.predict(latents, torch.full((1,), 0.5), text)
    assert (theirs(latents, 499, states).sample - prediction).abs().max() < 1e-5


@torch.no_grad()
def test_a_language_model_goes_on_from_a_llama_with_its_tokenizer(llama, tmp_path, fresh_logging):
    theirs, folder = llama
    texts = tmp_path / "texts.txt"
    texts.write_text("a red house and a blue bird\n" * 200)
    flags = ["--init_from", str(folder), *STILL, "--text_dataset", str(texts), "--document_bytes", "500"]
    cache = tmp_path / "cache"
    with pytest.raises(ValueError, match=r"n_layers=2 \(here 8\).*vocab_size=260.*--config") as error:
        run_stage(MultimodalStage, changed(SMALL_TEXT, "--config", "small"), cache, tmp_path, "other", 2, *flags)
    common = following(SMALL_TEXT, remedy(error))
    with torch.enable_grad():
        run = run_stage(MultimodalStage, common, cache, tmp_path, "run", 2, *flags)
    tokens = torch.randint(260, (1, 30))
    ours = load_model(MegaTransformerForCausalLM, run.folder)
    assert (theirs(tokens).logits - ours(tokens).logits).abs().max() < 1e-4
    # Texts of another tokenizer mean nothing to it.
    other = make_text(tmp_path / "bpe", 20, tokenizer="bpe", vocab_size=260)
    with pytest.raises(ValueError, match=re.escape(f"--tokenizer {folder}")):
        run_stage(MultimodalStage, common, other, tmp_path, "words", 2, *flags[:-4])


def test_other_folders_are_refused(train, autoencoder, llama, tmp_path):
    for folder, words in [(llama[1], "LlamaForCausalLM, which pretrain_multimodal.py"), (tmp_path, "no complete")]:
        with pytest.raises((ValueError, OSError), match=words):
            train("refused", 2, "--init_from", str(folder))
    with pytest.raises(ValueError, match="--include_modes text"):  # Streams start from runs.
        is_text_run(llama[1])
    (weights,) = autoencoder[1].glob("*.safetensors")
    (tmp_path / "config.json").write_text((autoencoder[1] / "config.json").read_text())
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(weights.read_bytes()[:-100])
    small = [f"{name}={value}".replace(" ", "") for name, value in SMALL_LDM_VAE.items()]
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.safetensors"):
        train("damaged", 2, "--init_from", str(tmp_path), "--config", "ldm", "--override", *small)
