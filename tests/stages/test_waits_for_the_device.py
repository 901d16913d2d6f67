"""Training steps on a device of its own: the numbers are the CPU's, and the host waits only where it must."""

import threading
from collections import Counter

import pytest
from transformers import TrainerCallback

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
from tests.helpers.runs import SMALL_DIFFUSION, SMALL_RUN, changed, relative_distance, run_stage
from tests.helpers.stand_in_device import trainer_on_stand_in
from tests.helpers.stream_caches import SMALL_STREAMS
from tests.helpers.text_cache import SMALL_CORE, SMALL_TEXT, make_text, with_dropout
from utils import seeds, training_utils
from utils.training.streams.stage import MultimodalStreamStage

STEPS, COUNTED = 4, 2  # The first steps set up what the others read, such as the state of the optimizer.

# Why the host waits in a step that does not log. (kind, file and function) -> times per optimizer step.
GUARD = {("_local_scalar_dense", "utils/optimizer_hooks.py is_too_large"): 1}  # Is the step skipped? After backward.
ADVERSARY = {("copy to the host", "utils/training/adversary.py update"): 1}  # The same; the device is done by then.

# Name -> stage, flags, what makes its cache, why its steps wait.
STAGES = {
    "image_vae": (ImageVAEStage, [*SMALL_RUN, "--latent_noise", "0.1"], "image_cache", {**GUARD, **ADVERSARY}),
    "recurrent_vae": (RecurrentVAEStage, SMALL_RUN, "image_cache", {**GUARD, **ADVERSARY}),
    "image_diffusion": (ImageDiffusionStage, SMALL_DIFFUSION, "latent_cache", GUARD),
    "vocoder": (VocoderStage, SMALL_VOCODER, make_audio_cache, {**GUARD, **dict.fromkeys(ADVERSARY, 0.5)}),
    "audio_vae": (
        AudioVAEStage,
        SMALL_AUDIO_VAE,
        lambda folder: write_mel_cache(folder, SETTINGS),
        {**GUARD, **ADVERSARY},
    ),
    "speech": (AudioDiffusionStage, SMALL_SPEECH, make_speech, GUARD),
    "text": (MultimodalStage, with_dropout(SMALL_TEXT), make_text, GUARD),
    "recurrent_text": (
        MultimodalStage,
        [*with_dropout(SMALL_CORE), "--eval_thinking_steps", "1"],
        make_text,
        GUARD,
    ),
    "streams": (MultimodalStreamStage, [*SMALL_STREAMS, "--batch_size", "6"], "stream_caches", GUARD),
}
# Noise whose shape changes from batch to batch.
LATE = {"speech": {"noise", "posterior"}}
# Their trainers are, but for their models, those of others.
SLOW = ("recurrent_vae", "vocoder", "audio_vae", "image_diffusion", "speech", "text")


class WaitsOfSteps(TrainerCallback):
    """What makes the host wait in the last steps, between the ends of two of them."""

    def __init__(self, notes: Counter):
        self.notes, self.waits = notes, Counter()
        self.epochs: set[int] = set()  # Their first steps.

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.epochs.add(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == STEPS - COUNTED:
            self.notes.clear()
        elif state.global_step == STEPS:
            for (kind, line), times in self.notes.items():
                place, _, function = line.partition(" ")
                self.waits[kind, f"{place.partition(':')[0]} {function}"] += times


def threads_that_make_noise(monkeypatch) -> list[tuple[int, str, bool]]:
    """A list that gets (step, stream, whether the training's thread makes it) of all noise of the trainers."""
    makers = []

    def noting(sampler):
        def sample(seed, step, indices, *, stream, shape):
            makers.append((step, stream, threading.current_thread() is threading.main_thread()))
            return sampler(seed, step, indices, stream=stream, shape=shape)

        return sample

    for sampler in (seeds.sample_normal, seeds.sample_uniform):
        monkeypatch.setattr(training_utils, sampler.__name__, noting(sampler))
    return makers


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in STAGES]
)
def test_steps_equal_the_cpu_and_wait_for_nothing_else(name, request, tmp_path, fresh_logging, monkeypatch):
    stage, common, source, reasons = STAGES[name]
    cache = request.getfixturevalue(source) if isinstance(source, str) else source(tmp_path / "cache")
    if name == "streams":  # The flags of its caches.
        common, cache = [*common, *cache], None
    common = changed(common, "--logging_steps", str(STEPS), "--eval_steps", "1000", "--save_steps", "1000")
    expected = run_stage(stage, common, cache, tmp_path, "cpu", STEPS)
    makers = threads_that_make_noise(monkeypatch)
    with trainer_on_stand_in() as notes:
        callback = WaitsOfSteps(notes)

        class Watched(stage):
            def build_callbacks(self, trainer, writer):
                return [callback]

        run = run_stage(Watched, common, cache, tmp_path, "device", STEPS)
    assert run.losses == pytest.approx(expected.losses, rel=1e-5)
    for weights in ("model", "ema"):
        assert relative_distance(expected.weights(weights), run.weights(weights)) <= 1e-5
    # The training's thread makes noise when a stream begins, at the first step of an epoch, and where shapes change.
    begins = {stream: min(step for step, other, _ in makers if other == stream) for _, stream, _ in makers}
    late = {
        (step, stream)
        for step, stream, is_main in makers
        if is_main and step > begins[stream] + 1 and step not in callback.epochs and stream not in LATE.get(name, ())
    }
    assert not late
    assert not makers or len(callback.epochs) == STEPS or not all(is_main for _, _, is_main in makers)
    assert dict(callback.waits) == {reason: times * COUNTED for reason, times in reasons.items()}
