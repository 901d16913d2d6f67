"""Noise beyond the posterior's in the training of VAEs, `--latent_noise`: which latents are decoded, and exactness."""

import json
import shutil

import pytest
import torch

from model.audio.vae import AudioVAE
from model.image.recurrent_vae import RecurrentVAE
from model.image.vae import ImageVAE
from model.vae import ChannelNoise
from tests.helpers.runs import largest_difference
from utils.seeds import sample_uniform
from utils.training.gan import VAEGANTrainer
from utils.training.latent_statistics import RunningLatents, image_moments, mean_and_std

NOISE = ["--latent_noise", "0.5"]


def image_vae() -> tuple[ImageVAE, torch.Tensor]:
    return ImageVAE.from_preset("tiny", image_size=16), torch.rand(2, 3, 16, 16)


def recurrent_vae() -> tuple[RecurrentVAE, torch.Tensor]:
    return RecurrentVAE.from_preset("tiny", image_size=16), torch.rand(2, 3, 16, 16)


def audio_vae(**fields) -> tuple[AudioVAE, torch.Tensor]:
    model = AudioVAE.from_preset("tiny", width=16, n_encoder_blocks=1, n_decoder_blocks=1, **fields)
    return model, torch.randn(2, model.config.n_mels, 8) - 5


def audio_vae_2d() -> tuple[AudioVAE, torch.Tensor]:
    return audio_vae(architecture="conv2d", patch_frames=4, latent_channels=8)


@pytest.mark.parametrize("build", [image_vae, recurrent_vae, audio_vae, audio_vae_2d])
def test_what_is_decoded_is_the_mean_and_noise_of_both_deviations(build):
    torch.manual_seed(0)
    model, sample = build()
    mean, logvar = model.encode(sample)
    noise = torch.randn_like(mean)
    added = ChannelNoise(torch.rand(2), torch.randn(mean.shape[1]), torch.rand(mean.shape[1]) + 0.1)
    latents = mean.clone()
    for b in range(2):
        for channel in range(mean.shape[1]):
            std = (0.5 * logvar[b, channel]).exp() + added.share[b] * added.std[channel]
            latents[b, channel] += std * noise[b, channel]
    torch.testing.assert_close(model(sample, noise=noise, channel_noise=added).reconstruction, model.decode(latents))
    plain = model(sample, noise=noise).reconstruction
    assert torch.equal(
        model(sample, noise=noise, channel_noise=added._replace(share=torch.zeros(2))).reconstruction, plain
    )


def test_latents_gain_nothing_by_growing():
    # Latents that are scaled have noise that is scaled: where the channel's mean and std are those of the batch, the
    # gradient of their scale is that of the whole sum of both.
    generator = torch.Generator().manual_seed(0)
    mean, logvar = torch.randn(2, 5, 2, 4, 4, generator=generator, dtype=torch.float64)
    center, std = (values.double() for values in mean_and_std(image_moments(mean, logvar)))
    share, scale = torch.rand(5, generator=generator).double(), torch.ones((), dtype=torch.float64, requires_grad=True)
    around = center.view(2, 1, 1)
    scaled = around + scale * (mean - around), logvar + 2 * scale.log()
    values = ChannelNoise(share, center, std).std_of(*scaled)
    torch.testing.assert_close(values, share.view(5, 1, 1, 1) * std.view(2, 1, 1).expand_as(mean))
    # The mean over the batch of d std / d scale is std itself.
    (values / share.view(5, 1, 1, 1)).mean((0, 2, 3))[0].backward()
    assert scale.grad.item() == pytest.approx(std[0].item(), rel=1e-6)


def test_the_running_std_is_that_of_a_weighted_loop_whatever_the_split_and_skips_leave_it():
    generator = torch.Generator().manual_seed(0)
    steps = [torch.randn(2, 4, 3, 2, 2, generator=generator) * (1 + k) + k for k in range(3)]  # means, logvars
    whole, split = RunningLatents(), RunningLatents()
    assert whole.moments is None
    for mean, logvar in steps:
        whole.add(image_moments(mean, logvar))
        whole.update(skips=False)
        for b in range(4):
            split.add(image_moments(mean[b : b + 1], logvar[b : b + 1]))
        split.update(skips=False)
        split.add(torch.full((3, 3), torch.nan, dtype=torch.float64))
        split.update(skips=True)
    torch.testing.assert_close(split.moments, whole.moments)
    means, stds = mean_and_std(whole.moments)
    for channel in range(3):
        weights, values, variances = [], [], []
        for age, (mean, logvar) in zip((2, 1, 0), steps):
            values.append(mean[:, channel].double().flatten())
            variances.append(logvar[:, channel].double().exp().flatten())
            weights.append(torch.full_like(values[-1], 0.99**age))
        weights, values, variances = (torch.cat(parts) for parts in (weights, values, variances))
        mean = (weights * values).sum() / weights.sum()
        variance = (weights * ((values - mean).square() + variances)).sum() / weights.sum()
        assert means[channel].item() == pytest.approx(mean.item(), rel=1e-6)
        assert stds[channel].item() == pytest.approx(variance.sqrt().item(), rel=1e-6)


def test_noise_belongs_to_seed_step_and_sample_and_may_begin_and_end_on_resume(train, monkeypatch):
    calls, original = [], VAEGANTrainer.channel_noise

    def channel_noise(self, inputs):
        calls.append((self.state.global_step, inputs["index"], original(self, inputs)))
        return calls[-1][-1]

    monkeypatch.setattr(VAEGANTrainer, "channel_noise", channel_noise)
    # At such a rate the weights stay: a step's losses and the evaluation are those of the same model.
    flags = "--batch_size 4 --gan_weight 0 --learning_rate 1e-14 --lr_scheduler_type constant --eval_steps 3".split()  # noqa: SIM905
    noisy = train("noisy", 3, *flags, *NOISE)
    assert [step for step, *_ in calls] == [0, 1, 2] and calls[0][-1] is None
    for step, index, added in calls[1:]:
        assert torch.equal(added.share, 0.5 * sample_uniform(42, step, index, stream="latent_noise", shape=()))
        assert added.share.min() > 0
    assert noisy.logged("latent_std") == pytest.approx([added.std.mean().item() for _, _, added in calls[1:]])
    assert json.loads((noisy.folder / "stage.json").read_text())["arguments"]["latent_noise"] == 0.5

    # The first step has no such noise, and evaluations have none.
    plain = train("plain", 3, *flags)
    assert noisy.losses[0] == plain.losses[0]
    assert all(high > 1.01 * low for high, low in zip(noisy.losses[1:], plain.losses[1:]))
    assert noisy.logged("eval_psnr") == plain.logged("eval_psnr")

    # On resume: from its second step on; and no more, where the statistics are dropped.
    more = [*flags, "--resume_from_checkpoint"]
    begun = train("plain", 5, *more, *NOISE)
    assert calls[-2][-1] is None and calls[-1][-1] is not None
    assert "latent_moments" in torch.load(begun.folder / "stage_state.pt", weights_only=True)
    ended = train("plain", 6, *more, "--latent_noise", "0")
    assert calls[-1][-1] is None
    assert "latent_moments" not in torch.load(ended.folder / "stage_state.pt", weights_only=True)


def test_accumulation_equals_one_batch_and_a_resume_is_exact(train):
    flags = [*NOISE, "--gan_start_step", "1", "--save_steps", "2"]
    whole = train("whole", 4, "--batch_size", "8", *flags)
    parts = train("parts", 4, "--batch_size", "4", "--gradient_accumulation_steps", "2", *flags)
    assert parts.losses == pytest.approx(whole.losses, rel=1e-5)
    shutil.copytree(whole.folder.parent / "checkpoint-2", whole.folder.parents[1] / "resumed" / "checkpoint-2")
    resumed = train("resumed", 4, *flags, "--resume_from_checkpoint")
    assert resumed.losses == whole.losses
    assert all(largest_difference(whole.weights(name), resumed.weights(name)) == 0 for name in ("model", "ema"))
