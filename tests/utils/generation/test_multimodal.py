"""A trained multimodal run as a pipeline: latents in and out by its own VAEs, answers by their seeds."""

import pytest
import torch

from model.multimodal.layout import Part, audio_latents, build_stream, image_latents
from pretrain_multimodal import MultimodalStage
from tests.helpers.stream_caches import SMALL_STREAMS, make_stream_caches, save_vaes
from utils.generation.latents import standardized_posterior
from utils.generation.multimodal import MultimodalPipeline

STEPS = {"n_steps": {"image": 2, "audio": 2}}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    words = ["--output_dir", str(folder), "--run_name", "run", "--max_steps", "1", "--batch_size", "4"]
    MultimodalStage.main([*SMALL_STREAMS, *make_stream_caches(folder / "caches"), *words])
    return folder / "multimodal" / "run"


@pytest.fixture(scope="module")
def pipeline(run):
    return MultimodalPipeline.load(run)


def test_parts_hold_the_latents_of_the_vaes(pipeline):
    generator = torch.Generator().manual_seed(0)
    image, mel = torch.rand(3, 32, 32, generator=generator) * 2 - 1, torch.randn(40, 17, generator=generator) - 4
    part, vae = pipeline.image_part(image), pipeline.vaes["image"]
    mean, _ = standardized_posterior(vae, image[None])
    assert torch.equal(image_latents(part.latents, 2), mean[0])
    expected = vae.decode(vae.encode(image[None])[0])[0].clamp(-1, 1)
    torch.testing.assert_close(pipeline.image_of(part), expected, atol=1e-5, rtol=0)
    # Audio: 17 mel frames are 9 latent frames and 3 tokens, of which the last one is filled up.
    part, vae = pipeline.audio_part(mel), pipeline.vaes["audio"]
    assert part.latents.shape == (3, 20) and pipeline.mel_of(part).shape == (40, 24)
    mean, _ = standardized_posterior(vae, mel[None])
    assert torch.equal(audio_latents(part.latents, 4)[:9], mean[0].T)
    waveform, rate = pipeline.sound_of(part)
    assert waveform.shape == (24 * vae.config.hop_length,) and rate == vae.config.sample_rate


def test_answers_go_by_their_seeds(pipeline):
    texts = ["a red bear", "a blue fish at the left"]
    images = pipeline.draw(texts, [1, 2], **STEPS)
    assert (
        images[0].shape == (3, 32, 32) and (images[0] - pipeline.draw(texts[:1], [1], **STEPS)[0]).abs().max() < 1e-4
    )
    assert not torch.equal(images[0], pipeline.draw(texts[:1], [2], **STEPS)[0])
    mels = pipeline.speak(texts, [1, 2], **STEPS)
    assert len(mels) == 2 and mels[0].shape[0] == 40 and mels[0].isfinite().all()
    said = pipeline.say([pipeline.image_part(images[0]), pipeline.audio_part(mels[0])], max_new_tokens=3)
    assert [type(text) for text in said] == [str, str]
    assert pipeline.text_of(pipeline.text_part(texts[1])) == texts[1]


def test_new_tokens_fit_behind_the_longest_prompt(pipeline, monkeypatch):
    prompts = [[pipeline.text_part("a")], [Part("image", n_tokens=4)]]  # <bos> a, <bos> <image> 4 tokens </image>
    longest = max(len(build_stream(pipeline.model.config, parts, is_open=True)) for parts in prompts)
    for limit, expected in ((2048, 20), (longest + 20, 20), (longest + 3, 3), (longest, 1)):
        monkeypatch.setattr(pipeline.model.config, "max_position_embeddings", limit)
        assert pipeline.room(prompts, 20) == expected
    assert longest == 7 and pipeline.room([], 20) == 7


def test_other_vaes_are_refused(run, tmp_path):
    image_vae, _ = save_vaes(tmp_path, value=0.2)
    with pytest.raises(ValueError, match=r"image latents that .* come from the VAE"):
        MultimodalPipeline.load(run, vae_checkpoints={"image": str(image_vae)})
