"""Which fields of a configuration a run may change that starts from the weights of another one."""

import re

import pytest
import torch

from model.audio.diffusion import AudioDiffusion
from model.audio.vae import AudioVAE
from model.audio.vocoders import Vocoder
from model.causal import MegaTransformerForCausalLM
from model.image.vae import ImageVAE
from tests.helpers.vocoder_checkpoint import save_stage_checkpoint
from utils.training.initial_weights import model_with_weights

SMALL_TEXT = {"hidden_size": 32, "n_layers": 1, "n_heads": 2, "n_query_groups": 2, "vocab_size": 64}
# Model, its fields, changes that shape no weights.
FREE = {
    "vocoder": (Vocoder, {"width": 16, "n_layers": 1}, {"n_mel_projections": 0, "f0_max": 400.0}),
    "speech": (AudioDiffusion, {"speakers": ["ann", "bob"]}, {"text_dropout": 0.0, "prediction": "x0"}),
    "audio vae": (AudioVAE, {"width": 32}, {"speaker_width": 8}),
    "image vae": (ImageVAE, {"image_size": 32}, {"image_size": 64}),
    "text": (MegaTransformerForCausalLM, SMALL_TEXT, {"rotary_theta": 5e5, "hidden_dropout": 0.1}),
}


@pytest.fixture
def save(tmp_path):
    def save(model_class, fields):
        torch.manual_seed(0)
        model = model_class.from_preset("tiny", **fields)
        return model, save_stage_checkpoint(model, "any", tmp_path / "run")

    return save


@pytest.mark.parametrize("case", FREE.values(), ids=FREE)
def test_fields_that_shape_no_weights_may_change(case, save, caplog):
    model_class, fields, changes = case
    source, folder = save(model_class, fields)
    config = source.config.replace(**changes)
    state = torch.random.get_rng_state()
    model = model_with_weights(model_class, folder, config)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(getattr(model.config, name) == value for name, value in changes.items())
    weights = model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in source.state_dict().items())
    # What has changed is named, since a preset changes it back without being asked.
    for name, value in changes.items():
        assert f"{name}={value!r} (there {getattr(source.config, name)!r})" in caplog.text


@pytest.mark.parametrize(
    ("model_class", "fields", "changes", "refused"),
    [
        # Shapes, and what only goes with them: the projections may change.
        (Vocoder, {"width": 16, "n_layers": 1}, {"width": 24, "n_mel_projections": 0}, "width"),
        # Saved buffers that the configuration determines.
        (Vocoder, {"width": 16, "n_layers": 1}, {"f_max": 7000.0}, "f_max"),
        # What rows of the same table mean.
        (AudioDiffusion, {"speakers": ["ann", "bob"]}, {"speakers": ["ann", "eve"]}, "speakers"),
        (AudioDiffusion, {"symbols": ["a", "b"], "n_symbols": 2}, {"symbols": ["b", "a"]}, "symbols"),
        (AudioVAE, {"width": 32, "speakers": ["a"]}, {"speakers": ["b"]}, "speakers"),
        # What loaded weights make useless.
        (MegaTransformerForCausalLM, SMALL_TEXT, {"initializer_range": 0.1}, "initializer_range"),
        # Fields that fit together only.
        (Vocoder, {"width": 16, "n_layers": 1}, {"n_layers": 3, "n_half_rate_layers": 2}, "n_layers"),
    ],
)
def test_fields_that_belong_to_the_weights_are_refused_by_name(model_class, fields, changes, refused, save):
    source, folder = save(model_class, fields)
    with pytest.raises(
        ValueError, match=rf"has other {refused}, which its weights .*{re.escape(repr(changes[refused]))}"
    ):
        model_with_weights(model_class, folder, source.config.replace(**changes))
