"""The vocoder stage in one process: crops, exactness, clips that go wrong, evaluation, refusals."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from dataset_loading.audio.cached import VocoderDataset
from dataset_loading.collators import collate_by_length
from model.audio.lengths import crop_starts
from model.audio.spectral import LogMel, MelSettings
from model.audio.vocoders import Vocoder
from model.audio.waveform_discriminators import PeriodDiscriminator, ResolutionDiscriminator
from pretrain_vocoder import VocoderArguments, VocoderStage
from tests.helpers.audio_cache import SMALL_VOCODER, make_audio_cache, spoil
from tests.helpers.runs import changed, largest_difference, named_runs, run_stage
from utils.checkpoints import load_model
from utils.seeds import sample_uniform
from utils.training.vocoder import VocoderTrainer, pad_crops


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_audio_cache(tmp_path_factory.mktemp("sound") / "cache")


@pytest.fixture(scope="module")
def runs(cache, tmp_path_factory):
    yield from named_runs(VocoderStage, SMALL_VOCODER, cache, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def whole(runs):
    return runs("whole", 6, "--batch_size", "8", "--save_steps", "3")


# ---- Crops.


def test_crops_never_begin_beyond_the_last_place():
    last = torch.arange(100_000)
    assert torch.equal(crop_starts(last + 8, 8, torch.full((len(last),), 1 - 2**-24)), last)


def test_every_place_is_as_likely():
    uniforms = torch.rand(4000, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(crop_starts(torch.full((4000,), 12), 8, uniforms))
    assert len(counts) == 5 and (counts / 800 - 1).abs().max() < 0.15


def test_short_crops_end_in_silence():
    mel, waveform = torch.ones(3, 4, 5), torch.ones(3, 5 * 16)
    mels, sounds = pad_crops(mel, waveform, segment_frames=8, hop_length=16, log_floor=-9.0)
    assert mels.shape == (3, 4, 8) and (mels[..., :5] == 1).all() and (mels[..., 5:] == -9).all()
    assert sounds.shape == (3, 128) and (sounds[:, :80] == 1).all() and not sounds[:, 80:].any()


@pytest.mark.parametrize("parts", [("4", "1"), ("2", "2")], ids=["one batch", "accumulation"])
def test_every_step_has_the_crops_of_its_seed_step_and_samples(parts, cache, whole, tmp_path, monkeypatch):
    """In every epoch, and after a resume."""
    batches, generate = [], VocoderTrainer.generate

    def compare(self, model, inputs):
        batches.append((self.state.global_step, inputs["index"].tolist()))
        dataset, seed = VocoderDataset(cache, "train"), self.args.seed
        uniforms = sample_uniform(seed, self.state.global_step, inputs["index"], stream="crop", shape=(1,))[:, 0]
        for row, index in enumerate(inputs["index"].tolist()):
            clip = dataset[index]
            start = int(crop_starts(torch.tensor(clip["mel"].shape[1]), 8, uniforms[row]))
            assert torch.equal(inputs["mel"][row], clip["mel"][:, start : start + 8])
            assert torch.equal(inputs["waveform"][row], clip["waveform"][start * 256 : (start + 8) * 256])
        return generate(self, model, inputs)

    monkeypatch.setattr(VocoderTrainer, "generate", compare)
    words = ["--gan_weight", "0", "--batch_size", parts[0], "--gradient_accumulation_steps", parts[1]]
    words += ["--save_steps", "9", "--lr_scheduler_type", "constant"]
    run_stage(VocoderStage, SMALL_VOCODER, cache, tmp_path, "crops", 9, *words)
    run_stage(VocoderStage, SMALL_VOCODER, cache, tmp_path, "crops", 11, *words, "--resume_from_checkpoint")
    # Epochs have seven steps.
    assert len(batches) == 11 * int(parts[1]) and [step for step, _ in batches][-1] == 10


# ---- Exactness.


def test_accumulation_equals_one_batch(runs, whole):
    parts = runs("parts", 6, "--batch_size", "2", "--gradient_accumulation_steps", "4", "--save_steps", "3")
    assert parts.losses == pytest.approx(whole.losses, rel=2e-5)
    # Rounding grows in the generator's projections, and Adam scales small gradients of the discriminator up.
    assert largest_difference(parts.adversary["discriminator"], whole.adversary["discriminator"]) <= 1e-4
    assert parts.adversary["updates"] == whole.adversary["updates"] == 2  # At steps 2 and 4.


def test_resumed_equals_straight_through(runs, whole):
    half = runs("whole", 6).folder.parent / "checkpoint-3"
    resumed_dir = half.parent.parent / "resumed"
    resumed_dir.mkdir()
    half.rename(resumed_dir / half.name)
    resumed = runs("resumed", 6, "--batch_size", "8", "--save_steps", "3", "--resume_from_checkpoint")
    for name in ("model", "ema"):
        assert largest_difference(whole.weights(name), resumed.weights(name)) == 0
    assert largest_difference(whole.adversary["discriminator"], resumed.adversary["discriminator"]) == 0
    assert whole.losses == resumed.losses


def test_gradient_checkpointing_changes_nothing(runs, whole):
    recomputed = runs("recomputed", 6, "--batch_size", "8", "--use_gradient_checkpointing")
    assert recomputed.losses == pytest.approx(whole.losses, rel=1e-5)


def test_average_of_weights_is_kept_and_evaluated(runs, whole):
    assert 0 < largest_difference(whole.weights(), whole.weights("ema")) < 0.1
    line = next(line for line in whole.history if "loss" in line and "loss/weighted_feature_matching" in line)
    parts = [value for name, value in line.items() if name.startswith("loss/")]
    assert line["loss"] == pytest.approx(sum(parts), rel=1e-3)


def test_init_from_takes_the_averaged_weights(runs, whole):
    second = runs("second", 1, "--init_from", str(whole.folder), "--learning_rate", "1e-12")
    assert largest_difference(whole.weights("ema"), second.weights()) < 1e-8


def test_fine_tuning_may_leave_a_projection_out(runs, whole):
    start = ["--init_from", str(whole.folder), "--learning_rate", "1e-12", "--gan_weight", "0"]
    tuned = runs("tuned", 1, *start, "--override", "width=32", "n_layers=1", "n_mel_projections=0")
    assert json.loads((tuned.folder / "config.json").read_text())["n_mel_projections"] == 0
    assert largest_difference(whole.weights("ema"), tuned.weights()) < 1e-8
    with pytest.raises(ValueError, match=r"--init_from .* has other width, .*width=32"):
        runs("wider", 1, *start, "--override", "width=48", "n_layers=1", "n_mel_projections=0")


# ---- Clips that go wrong.


@pytest.mark.parametrize("flags", [[], ["--discriminator_every", "1", "--gan_loss", "least_squares", "--bf16"]])
def test_silent_clipped_constant_and_short_clips_train_without_nan(flags, runs, tmp_path):
    spoiled = spoil(make_audio_cache(tmp_path / "spoiled", 16))
    all_terms = ["--phase_weight", "1", "--complex_stft_weight", "1", "--learning_rate", "2e-3"]
    name = "spoiled_bf16" if flags else "spoiled"
    run = runs(name, 24, "--batch_size", "4", "--gan_start_step", "0", *all_terms, *flags, cache=spoiled)
    assert len(run.losses) == 24 and all(map(math.isfinite, run.losses))
    assert not run.logged("skipped_steps")
    assert run.adversary["skipped_updates"] == 0
    values = [*run.weights().values(), *run.weights("ema").values(), *run.adversary["discriminator"].values()]
    assert all(
        value.isfinite().all() and value.dtype == torch.float32 for value in values if value.is_floating_point()
    )


# ---- Evaluation.


def test_evaluation_is_of_whole_clips_and_padding_does_not_count(cache, whole):
    model = load_model(Vocoder, whole.folder)
    args = VocoderArguments()
    stage = VocoderStage(args)
    criterion = stage.build_trainer_parts(model)["criterion"]
    trainer = VocoderTrainer.__new__(VocoderTrainer)  # Without the machinery of training.
    trainer.model, trainer.criterion, trainer.stage_arguments = model, criterion, args
    dataset = VocoderDataset(cache, "validation")
    floor = dataset.mel.log_floor
    samples = sorted((dataset[i] for i in range(len(dataset))), key=lambda sample: sample["mel"].shape[1])
    with torch.no_grad():
        together = trainer.batch_terms(model, collate_by_length(samples, floor, 300))
        alone = trainer.batch_terms(model, collate_by_length(samples[:1], floor, 300))
        generated = model(mel=samples[-1]["mel"][None])
    for name, values in together.items():
        assert values.shape == (len(samples),)
        assert values[0].item() == pytest.approx(alone[name].item(), rel=1e-5, abs=1e-6), name
    log_mel = LogMel(dataset.mel)
    expected = (log_mel(generated) - log_mel(samples[-1]["waveform"][None])).abs().mean().item()
    assert together["mel_l1"][-1].item() == pytest.approx(expected, rel=0.1)
    weighted = sum(criterion.weights[name] * together[{"mel": "mel_l1"}.get(name, name)] for name in criterion.weights)
    torch.testing.assert_close(together["loss"], weighted)


# ---- The log-mel.


def test_a_new_model_takes_the_log_mel_of_the_cache(tmp_path, fresh_logging):
    other = make_audio_cache(tmp_path / "other", 12, "--n_mels", "40", "--hop_length", "128", "--n_fft", "512")
    run = run_stage(VocoderStage, SMALL_VOCODER, other, tmp_path, "other", 1, "--batch_size", "2")
    config = json.loads((run.folder / "config.json").read_text())
    assert (config["n_mels"], config["hop_length"], config["n_fft"]) == (40, 128, 512)


@pytest.mark.parametrize("flag", ["--override", "--init_from", "--resume_from_checkpoint"])
def test_another_log_mel_is_refused_with_both_definitions_and_the_command(flag, cache, whole, tmp_path, fresh_logging):
    if flag == "--override":
        words, folder = ["--override", "width=32", "n_layers=1", "n_mels=40"], cache
    else:
        words, folder = [flag, str(whole.folder)], make_audio_cache(tmp_path / "other", 12, "--n_mels", "40")
    with pytest.raises(ValueError) as refused:
        run_stage(VocoderStage, SMALL_VOCODER, folder, tmp_path, "refused", 6, "--batch_size", "8", *words)
    message = str(refused.value)
    assert "use different log-mels, they differ in n_mels" in message
    assert MelSettings().describe() in message and MelSettings(n_mels=40).describe() in message
    assert "python preprocess_audio_vocoder_dataset.py --dataset_name" in message
    assert ("--n_mels 40" if flag == "--override" else "--n_mels 80") in message


# ---- Refusals.


@pytest.mark.parametrize(
    "words, message",
    [
        ("--segment_frames 1", "--segment_frames=1 must be > 1"),
        ("--stft_weight 0", "--stft_resolutions has no effect with stft_weight=0.0"),
        ("--gan_loss lsgan", "--gan_loss='lsgan' must be one of"),
        ("--discriminator_every 0", "--discriminator_every=0 must be > 0"),
        ("--gan_weight 0", "has no effect with gan_weight=0"),
    ],
)
def test_flags_that_cannot_take_effect_are_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        VocoderStage.main(changed(SMALL_VOCODER, *words.split()))
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, message",
    [
        ("--cached_dataset nowhere", "preprocess_audio_vocoder_dataset.py"),
        ("--segment_frames 2 --stft_resolutions 4096", "--segment_frames=2"),
        ("--stft_resolutions 100", r"\[100\] must be multiples of 8"),
        ("--discriminator_periods 0", r"periods \[0\] must be > 0"),
        ("--discriminator_periods --discriminator_resolutions", "without periods and resolutions sees nothing"),
        ("--discriminator_periods 4099", "shorter --discriminator_periods and --discriminator_resolutions"),
        ("--mel_weight 0 --stft_weight 0 --phase_weight 0", "nothing would be learned"),
    ],
)
@pytest.mark.parametrize("extra", [[], ["--dry_run"]], ids=["run", "dry-run"])
def test_bad_input_is_a_clear_error(words, message, extra, cache, tmp_path, fresh_logging):
    common = [word for word in SMALL_VOCODER if word not in ("--stft_resolutions", "256", "1024")]
    common = changed(common, "--discriminator_resolutions", "256")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_stage(VocoderStage, common, cache, tmp_path, "bad", 1, "--batch_size", "2", *words.split(), *extra)


def test_a_list_without_values_is_no_such_part():
    model = Vocoder.from_preset("tiny")
    for flags, expected in (
        ({}, (3, 3)),
        ({"discriminator_periods": []}, (0, 3)),
        ({"discriminator_resolutions": []}, (3, 0)),
    ):
        stage = VocoderStage(VocoderArguments(**flags))
        parts = stage.build_trainer_parts(model)["adversary"].discriminator.parts
        kinds = [type(part) for part in parts]
        assert (kinds.count(PeriodDiscriminator), kinds.count(ResolutionDiscriminator)) == expected


def test_the_cache_of_the_vocoder_is_the_default():
    assert str(VocoderStage(VocoderArguments()).cache_dir) == "cached_datasets/audio_vocoder"


def test_files_of_a_checkpoint_load_by_path_alone(whole, cache):
    model = load_model(Vocoder, whole.folder.parent)
    assert model.config.mel == VocoderDataset(cache, "train").mel
    assert largest_difference(load_file(whole.folder / "ema.safetensors"), dict(model.state_dict())) == 0
