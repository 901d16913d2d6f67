"""What runs of the audio stages leave in their TensorBoard folders."""

import io
import logging
import wave
from functools import partial

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dataset_loading.audio.cached import VocoderDataset
from dataset_loading.collators import collate_by_length
from model.audio.griffin_lim import griffin_lim
from model.audio.spectral import MelSettings
from model.audio.vae import AudioVAE
from pretrain_audio_vae import AudioVAEStage
from pretrain_vocoder import VocoderStage
from tests.helpers.audio_cache import make_audio_cache
from tests.helpers.runs import largest_difference, run_stage
from tests.helpers.vocoder_checkpoint import save_stage_checkpoint, small_vocoder
from utils.checkpoints import load_model
from utils.drawing.playback import playable
from utils.generation.audio import load_vocoder
from utils.metrics.audio import not_measured
from utils.training.audio_vae import AudioReconstructionCallback, AudioVAEGANTrainer
from utils.training.vocoder import VocoderCallback, VocoderTrainer

COMMON = "--config tiny --logging_steps 1 --eval_steps 1 --save_steps 1000 --gan_weight 0 --batch_size 4".split()  # noqa: SIM905
VOCODER = [*COMMON, "--override", "width=16", "n_layers=1", "--segment_frames", "8"]
AUDIO_VAE = [*COMMON, "--override", "width=16", "latent_channels=4", "n_encoder_blocks=1", "n_decoder_blocks=1"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_audio_cache(tmp_path_factory.mktemp("sound") / "cache", 16)


@pytest.fixture(scope="module")
def vocoder(tmp_path_factory):
    """A checkpoint of a vocoder with the log-mel of the cache."""
    model = small_vocoder(**MelSettings().as_dict())
    return save_stage_checkpoint(model, "vocoder", tmp_path_factory.mktemp("runs") / "vocoder" / "small")


@pytest.fixture
def listen(cache, tmp_path):
    """listen(stage, words, callback or None, steps) -> Run of a stage with this callback alone."""

    def run(stage, words, callback, steps):
        class ListeningStage(stage):
            def build_callbacks(self, trainer, writer):
                return [callback(trainer, writer)] if callback else []

        return run_stage(ListeningStage, words, cache, tmp_path, f"run_{callback is not None}", steps)

    yield run
    logging.getLogger().handlers.clear()


def read(run) -> EventAccumulator:
    return EventAccumulator(str(run.folder.parent), size_guidance={"images": 0, "audio": 0}).Reload()


def samples_of(event) -> np.ndarray:
    with wave.open(io.BytesIO(event.encoded_audio_string)) as file:
        return np.frombuffer(file.readframes(file.getnframes()), np.int16) / 32767


def test_a_vocoder_run_can_be_listened_to(listen, cache):
    run = listen(VocoderStage, VOCODER, partial(VocoderCallback, n_clips=2), 2)
    events = read(run)
    tags = events.Tags()
    assert set(tags["audio"]) == {
        f"sounds/{clip}_{kind}" for clip in ("00", "01") for kind in ("1_real", "2_griffin_lim", "3_generated")
    }
    assert {"images/mel", "images/waveform", "images/phase"} <= set(tags["images"])
    scores = {"pesq", "stoi", "mel_l1", "phase_error", "frequency_error", "real_time_factor"}
    scores -= not_measured(["pesq"]).keys()
    assert {f"listening/{name}" for name in scores} <= set(tags["scalars"])
    assert [event.step for event in events.Audio("sounds/00_3_generated")] == [0, 1, 2]
    (real,) = events.Audio("sounds/00_1_real")
    waveform = VocoderDataset(cache, "validation")[0]["waveform"].numpy()
    assert real.sample_rate == 16000 and np.abs(samples_of(real) - waveform).max() < 1e-3

    (baseline,) = events.Audio("sounds/00_2_griffin_lim")
    target = VocoderDataset(cache, "validation")[0]["mel"]
    expected = playable(griffin_lim(target[None], MelSettings())[0]).numpy()
    assert np.abs(samples_of(baseline) - expected).max() < 1e-3

    first, *_, last = (samples_of(event) for event in events.Audio("sounds/00_3_generated"))
    assert len(first) == len(waveform) and not np.array_equal(first, last)
    assert [event.step for event in events.Images("images/mel")] == [0, 1, 2]


def test_listening_does_not_change_the_training(listen):
    with_clips = listen(VocoderStage, VOCODER, partial(VocoderCallback, n_clips=3), 2)
    without = listen(VocoderStage, VOCODER, None, 2)
    assert largest_difference(with_clips.weights(), without.weights()) == 0 and with_clips.losses == without.losses


def test_an_audio_vae_run_can_be_listened_to(listen, vocoder):
    run = listen(
        AudioVAEStage, AUDIO_VAE, partial(AudioReconstructionCallback, n_clips=2, vocoder_checkpoint=str(vocoder)), 1
    )
    events = read(run)
    tags = events.Tags()
    assert {"sounds/00_1_real", "sounds/01_3_generated"} <= set(tags["audio"])
    assert {"images/mel", "images/latents"} <= set(tags["images"])
    assert {"latents/mean_00", "latents/mean_03", "latents/posterior_std"} <= set(tags["histograms"])
    assert {"listening/mel_l1", "listening/stoi", "latents/dead_channels"} <= set(tags["scalars"])
    assert [event.step for event in events.Audio("sounds/00_3_generated")] == [0, 1]
    assert [event.step for event in events.Audio("sounds/00_1_real")] == [0]


def test_without_a_vocoder_griffin_lim_makes_the_sound(listen):
    events = read(listen(AudioVAEStage, AUDIO_VAE, partial(AudioReconstructionCallback, n_clips=1), 1))
    assert np.abs(samples_of(events.Audio("sounds/00_3_generated")[0])).max() > 0


def test_vocoders_are_loaded_whole_and_others_refused(vocoder, listen, tmp_path):
    from model.audio.vocoders import Vocoder

    expected, found = load_model(Vocoder, vocoder).state_dict(), load_vocoder(vocoder).state_dict()
    assert largest_difference(expected, found) == 0
    other = save_stage_checkpoint(small_vocoder(), "vocoder", tmp_path / "other")  # At 8 kHz.
    with pytest.raises(ValueError, match=r"sample_rate=16000(.|\n)*sample_rate=8000"):
        listen(
            AudioVAEStage, AUDIO_VAE, partial(AudioReconstructionCallback, n_clips=1, vocoder_checkpoint=str(other)), 1
        )
    wrong = save_stage_checkpoint(small_vocoder(), "image_vae", tmp_path / "wrong")
    with pytest.raises(ValueError, match="of stage 'image_vae'; one of stage 'vocoder' is needed"):
        listen(
            AudioVAEStage, AUDIO_VAE, partial(AudioReconstructionCallback, n_clips=1, vocoder_checkpoint=str(wrong)), 1
        )


def test_broken_waveforms_are_shown_as_silence(listen):
    class Broken(VocoderCallback):
        def run(self, model, sample, device):
            waveform, time = super().run(model, sample, device)
            return waveform * torch.nan, time

    events = read(listen(VocoderStage, VOCODER, partial(Broken, n_clips=1), 1))
    assert not samples_of(events.Audio("sounds/00_3_generated")[0]).any()
    assert "listening/pesq" not in events.Tags()["scalars"]


def test_terms_come_back_in_the_order_of_the_clips():
    clips = [{"mel": torch.randn(3, n), "index": torch.tensor(n)} for n in (9, 3, 30, 4)]

    class Summing(AudioVAEGANTrainer):
        def __init__(self):
            pass

        def evaluation_terms(self, model, inputs):
            sums = [mel[:, :n].sum() for mel, n in zip(inputs["mel"], inputs["n_frames"])]
            return {"sum": torch.stack(sums), "index": inputs["index"]}

    whole, parts = (Summing().batch_terms(None, collate_by_length(clips, -9.0, size)) for size in (200, 20))
    assert whole["index"].tolist() == parts["index"].tolist() == [9, 3, 30, 4]
    torch.testing.assert_close(parts["sum"], whole["sum"])


@pytest.mark.parametrize("trainer_class", [AudioVAEGANTrainer, VocoderTrainer])
def test_weights_that_zero_3_shards_have_one_pass_per_batch(trainer_class, monkeypatch):
    """The processes' clips differ in length, and each pass gathers the weights from all of them."""
    monkeypatch.setattr("utils.training.audio.BATCH_FRAMES", 20)
    clips = [{"mel": torch.randn(80, n), "index": torch.tensor(n)} for n in (9, 3, 30, 4)]
    model = small_vocoder() if trainer_class is VocoderTrainer else AudioVAE.from_preset("tiny", width=16)
    trainer = trainer_class.__new__(trainer_class)
    trainer.model, trainer.ema_model = model, None
    assert len(trainer.whole_collator(clips)["batches"]) == 3
    next(model.parameters()).ds_id = 0
    assert len(trainer.whole_collator(clips)["batches"]) == 1
    # Averaged weights are on every process.
    trainer.ema_model = small_vocoder()
    assert len(trainer.whole_collator(clips)["batches"]) == 3
