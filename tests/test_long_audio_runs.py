"""Two thousand steps in bfloat16 on clips of which a fifth are silent, clipped, constant, a click, or one frame
shorter than the vocoder's training crop: nothing becomes nan, and no step is skipped."""

import math

import pytest
import torch

from pretrain_audio_vae import AudioVAEStage
from pretrain_vocoder import VocoderStage
from tests.helpers.audio_cache import SMALL_VOCODER, make_audio_cache, spoil
from tests.helpers.mel_cache import SMALL_AUDIO_VAE
from tests.helpers.runs import run_stage

N_STEPS = 2000
STAGES = {"vocoder": (VocoderStage, SMALL_VOCODER), "audio_vae": (AudioVAEStage, SMALL_AUDIO_VAE)}


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_spoiled_clips_never_give_nan(name, tmp_path, fresh_logging):
    stage, common = STAGES[name]
    cache = spoil(make_audio_cache(tmp_path / "spoiled", 60), n_frames=7)  # The vocoder's crops have 8, the VAE's 32.
    flags = ["--batch_size", "4", "--bf16", "--gan_start_step", "500", "--logging_steps", "20"]
    run = run_stage(stage, common, cache, tmp_path, "long", N_STEPS, *flags)
    assert len(run.losses) == N_STEPS / 20 and all(map(math.isfinite, run.losses))
    assert sum(run.losses[-10:]) < sum(run.losses[:10]) * 1.5
    assert not run.logged("skipped_steps")
    assert run.adversary["skipped_updates"] == 0
    for weights in (run.weights(), run.weights("ema"), run.adversary["discriminator"]):
        assert all(torch.isfinite(value).all() for value in weights.values() if value.is_floating_point())
