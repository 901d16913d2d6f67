"""Every stage, killed at random moments and resumed until it is done: bit for bit the run that was left alone."""

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from pretrain_audio_diffusion import AudioDiffusionStage
from pretrain_audio_vae import AudioVAEStage
from pretrain_image_diffusion import ImageDiffusionStage
from pretrain_image_vae import ImageVAEStage
from pretrain_multimodal import MultimodalStage
from pretrain_recurrent_vae import RecurrentVAEStage
from pretrain_vocoder import VocoderStage
from tests.helpers.audio_cache import SMALL_VOCODER, make_audio_cache
from tests.helpers.audio_latent_cache import SMALL_SPEECH, make_speech
from tests.helpers.mel_cache import SETTINGS, SMALL_AUDIO_VAE, write_mel_cache
from tests.helpers.runs import SMALL_DIFFUSION, SMALL_RUN, equal, largest_difference, run_stage
from tests.helpers.text_cache import SMALL_CORE, SMALL_TEXT, make_text, with_dropout
from utils.checkpoints import checkpoints_in, newest_complete

pytestmark = pytest.mark.slow
STEPS = 16
TARGETS = [(1, 3), (6, 8), (11, 13)]  # The first and the last step that a process may be killed after.
FLAGS = ["--batch_size", "8", "--save_steps", "1", "--eval_steps", "5"]
WORKERS = ["--num_workers", "2"]
SPEECH = [word.replace("text_dropout=0", "text_dropout=0.2") for word in SMALL_SPEECH]

# Name -> stage, common flags, the fixture or function that makes its cache, further flags.
STAGES = {
    "image_vae": (ImageVAEStage, SMALL_RUN, "image_cache", []),
    "recurrent_vae": (RecurrentVAEStage, SMALL_RUN, "image_cache", WORKERS),
    "image_diffusion": (ImageDiffusionStage, SMALL_DIFFUSION, "latent_cache", WORKERS),
    "vocoder": (VocoderStage, SMALL_VOCODER, make_audio_cache, []),
    "audio_vae": (AudioVAEStage, SMALL_AUDIO_VAE, lambda folder: write_mel_cache(folder, SETTINGS), WORKERS),
    "audio_diffusion": (AudioDiffusionStage, SPEECH, make_speech, ["--batch_frames", "0", *WORKERS]),
    "text_flat": (MultimodalStage, with_dropout(SMALL_TEXT), make_text, []),
    "text_recurrent": (MultimodalStage, with_dropout(SMALL_CORE), make_text, WORKERS),
}


def begin_and_run(begun: Path, *args) -> None:
    """What the processes do that are killed."""
    torch.set_num_threads(1)
    # As in a run from the command line: workers are children of the run, and end after it has been killed.
    multiprocessing.set_start_method("fork", force=True)
    begun.touch()
    run_stage(*args)


def start(begun: Path, *args) -> multiprocessing.Process:
    """Start a process, and wait until its imports are done. A server imports once for all processes."""
    begun.unlink(missing_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=begin_and_run, args=(begun, *args))
    process.start()
    while not begun.exists() and process.is_alive():
        time.sleep(0.01)
    return process


@pytest.mark.parametrize("name", STAGES)
def test_killed_at_random_moments_and_resumed_equals_straight_through(name, tmp_path, request, fresh_logging):
    stage, common, source, flags = STAGES[name]
    cache = request.getfixturevalue(source) if isinstance(source, str) else source(tmp_path / "cache")
    arguments = (stage, common, cache, tmp_path)
    straight = run_stage(*arguments, "straight", STEPS, *FLAGS, *flags)
    moments = [(folder / "COMPLETE.json").stat().st_mtime for folder in checkpoints_in(straight.folder.parent)]
    seconds_per_step = (moments[-1] - moments[0]) / (len(moments) - 1)

    # Three processes are killed within the save or the step after a random one.
    draw, folder = random.Random(name), tmp_path / stage.name / "killed"
    reached = []
    for first, last in TARGETS:
        target = draw.randint(first, last)
        process = start(tmp_path / "begun", *arguments, "killed", STEPS, *FLAGS, *flags, "--resume_from_checkpoint")
        while not (folder / f"checkpoint-{target}").exists() and process.is_alive():
            time.sleep(0.002)
        process.join(draw.uniform(0, seconds_per_step))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        newest = newest_complete(folder)
        reached.append((target, newest and newest.name))
    print(name, "killed after (step, newest complete checkpoint)", reached)
    assert sum(newest is not None for _, newest in reached) >= 2, "nothing was resumed"

    # The last one is not.
    process = start(tmp_path / "begun", *arguments, "killed", STEPS, *FLAGS, *flags, "--resume_from_checkpoint")
    process.join()
    assert process.exitcode == 0
    resumed = type(straight)(folder, STEPS)
    for weights in ("model", "ema"):
        assert largest_difference(straight.weights(weights), resumed.weights(weights)) == 0
    files = ["optimizer.pt", "scheduler.pt", *(file.name for file in straight.folder.glob("stage_state.pt"))]
    for file in files:
        first, second = (torch.load(run.folder / file, weights_only=True) for run in (straight, resumed))
        assert equal(first, second), file
    assert straight.losses == resumed.losses
