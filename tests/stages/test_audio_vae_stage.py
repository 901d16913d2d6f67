"""The audio VAE stage in one process: segments, losses, statistics, exactness, conditions, refusals."""

import copy
import json
import logging
import shutil

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dataset_loading.audio.cached import AudioVAEDataset
from dataset_loading.audio.conditions import DescribedAudioDataset
from dataset_loading.collators import collate_audio
from model.audio.mel_criteria import character_loss
from model.audio.spectral import MelSettings
from model.audio.vae import AudioVAE
from model.text.tokenizer import encode_caption
from pretrain_audio_vae import AudioVAEStage
from tests.helpers.mel_cache import SETTINGS, SMALL_AUDIO_VAE, write_mel_cache
from tests.helpers.runs import changed, largest_difference, run_stage
from tests.helpers.vocoder_checkpoint import SMALL_MEL, save_stage_checkpoint, small_vocoder
from utils.checkpoints import load_model, read_stage
from utils.command_line import parse_arguments
from utils.evaluation.audio_vae import AudioVAEEvaluator
from utils.training.arguments.audio_vae import AudioVAEArguments
from utils.training.audio_vae import AudioVAEGANTrainer, SpreadMels


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return write_mel_cache(tmp_path_factory.mktemp("mels") / "audio_vae", SETTINGS)


@pytest.fixture(scope="module")
def train(cache, tmp_path_factory):
    """train("name", steps, *flags) -> Run."""
    folder = tmp_path_factory.mktemp("runs")
    yield lambda name, steps, *flags: run_stage(AudioVAEStage, SMALL_AUDIO_VAE, cache, folder, name, steps, *flags)
    logging.getLogger().handlers.clear()


@pytest.fixture(scope="module")
def whole(train):
    return train("whole", 8, "--batch_size", "8", "--save_steps", "4")


# ---- Segments and losses.


def test_a_step_leaves_its_batch_as_it_was(train, monkeypatch):
    original, lengths = AudioVAEGANTrainer.generate, []

    def compare(self, model, inputs):
        before = copy.deepcopy(inputs)
        generation = original(self, model, inputs)
        assert inputs.keys() == before.keys()
        assert all((torch.as_tensor(value) == torch.as_tensor(before[name])).all() for name, value in inputs.items())
        assert generation.sample.shape == generation.target.shape and generation.target.shape[-1] == 32
        lengths.append((inputs["n_frames"], generation.n_frames))
        return generation

    monkeypatch.setattr(AudioVAEGANTrainer, "generate", compare)
    train("unchanged", 1, "--batch_size", "8")
    ((whole, cropped),) = lengths
    assert torch.equal(cropped, whole.clamp_max(32))


def test_character_loss_is_that_of_each_sample_alone():
    logits = torch.randn(2, 12, 258, generator=torch.Generator().manual_seed(0))
    texts = [encode_caption(text, 99) for text in ("abba", "c")]
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(text) for text in texts], batch_first=True)
    losses = character_loss(logits, torch.tensor([12, 7]), tokens, token_lengths=torch.tensor([5, 2]))
    # All alignments of "c" to 7 frames, added up: blanks, a run of the letter, blanks.
    chances = logits[1, :7].double().softmax(-1)
    blank, letter = chances[:, 0], chances[:, texts[1][1]]
    total = sum(blank[:i].prod() * letter[i:j].prod() * blank[j:].prod() for i in range(7) for j in range(i + 1, 8))
    assert losses[1].item() == pytest.approx(-total.log().item(), rel=1e-5)
    alone = character_loss(logits[:1], torch.tensor([12]), tokens[:1, :5], token_lengths=torch.tensor([5]))
    assert losses[0].item() == pytest.approx(alone.item(), rel=1e-6)
    impossible = character_loss(logits[:1], torch.tensor([3]), tokens[:1], token_lengths=torch.tensor([5]))
    assert impossible.tolist() == [0.0]


def test_an_empty_transcript_is_unknown_and_teaches_nothing():
    logits = torch.randn(2, 12, 258, generator=torch.Generator().manual_seed(0)).requires_grad_()
    tokens = torch.tensor([[*encode_caption("ab", 99)], [*encode_caption("", 99), 0, 0]])
    losses = character_loss(logits, torch.tensor([12, 12]), tokens, token_lengths=torch.tensor([3, 1]))
    losses.sum().backward()
    assert losses[0] > 0 and losses[1] == 0
    assert logits.grad[0].any() and not logits.grad[1].any()


def test_it_trains_and_logs_all_terms(whole):
    assert all(whole.logged(name) for name in ("loss/l1", "loss/kl", "gan/generator", "gan/discriminator"))
    assert whole.logged("loss/l1")[-1] < whole.logged("loss/l1")[0]
    assert whole.adversary["updates"] == 6


def test_evaluation_is_over_whole_clips(whole, cache):
    model = load_model(AudioVAE, whole.folder)
    dataset = DescribedAudioDataset(cache, "validation", [], use_tokens=False)
    errors, nats = [], []
    with torch.no_grad():
        for i in range(len(dataset)):
            mel = dataset[i]["mel"][None]
            output = model(mel)
            errors.append((output.reconstruction.clamp_min(SETTINGS.log_floor) - mel).abs().mean().item())
            kl = output.mean**2 + output.logvar.exp() - 1 - output.logvar
            nats.append(0.5 * kl.sum().item() / mel.numel())
    assert whole.logged("eval_mel_l1")[-1] == pytest.approx(sum(errors) / len(errors), rel=1e-4)
    assert whole.logged("eval_kl")[-1] == pytest.approx(sum(nats) / len(nats), rel=1e-4)


# ---- Statistics.


def test_mel_statistics_are_those_of_the_training_set(whole, cache):
    model = load_model(AudioVAE, whole.folder)
    everything = torch.cat([*SpreadMels(DescribedAudioDataset(cache, "train", [], use_tokens=False), 10**6)], 1)
    torch.testing.assert_close(model.band_mean, everything.mean(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.band_std, everything.std(1, correction=0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["conv1d", "conv2d"])
def test_latent_statistics_are_those_of_a_loop_and_standardise(architecture, train, cache, whole):
    run = whole
    if architecture == "conv2d":
        fields = ["architecture=conv2d", "patch_frames=4", "patch_bins=4", "latent_channels=3", "width=16"]
        run = train("conv2d", 4, "--batch_size", "8", "--override", *fields)
    model = load_model(AudioVAE, run.folder)
    dataset, generator = DescribedAudioDataset(cache, "train", [], use_tokens=False), torch.Generator().manual_seed(0)
    means, draws = [], []
    with torch.no_grad():
        for mel in SpreadMels(dataset, 10**6):
            mean, logvar = model.encode(mel[None])
            means.append(torch.stack([mean[0], logvar[0].exp()]).flatten(2) if mean.ndim == 4 else None)
            noise = torch.randn(mean.shape, generator=generator)
            draws.append(model.normalize_latents(mean + (0.5 * logvar).exp() * noise)[0].flatten(1))
            means[-1] = torch.stack([mean[0].flatten(1), logvar[0].exp().flatten(1)])
    mean, variance = torch.cat(means, 2).double()
    torch.testing.assert_close(model.latent_mean.double(), mean.mean(1), rtol=1e-3, atol=1e-4)
    std = (mean.var(1, correction=0) + variance.mean(1)).sqrt()
    torch.testing.assert_close(model.latent_std.double(), std, rtol=1e-3, atol=1e-4)
    drawn = torch.cat(draws, 1).std(1)
    assert (drawn > 0.9).all() and (drawn < 1.1).all()
    # No dead channel: the means vary more than the posterior's own noise.
    assert (mean.var(1) > variance.mean(1)).all()


# ---- Exactness.


def test_accumulation_equals_one_batch(train, whole):
    parts = train("parts", 8, "--batch_size", "2", "--gradient_accumulation_steps", "4", "--save_steps", "4")
    assert parts.losses == pytest.approx(whole.losses, rel=1e-5)
    assert largest_difference(whole.adversary["discriminator"], parts.adversary["discriminator"]) <= 1e-5


def test_accumulation_of_whole_clips_equals_one_batch(train):
    flags = ["--segment_frames", "0", "--gan_weight", "0", "--l2_weight", "0.1", "--gradient_weight", "0.1"]
    flags += ["--latent_noise", "0.5"]
    one = train("clips", 4, "--batch_size", "8", *flags)
    parts = train("clip_parts", 4, "--batch_size", "2", "--gradient_accumulation_steps", "4", *flags)
    assert parts.losses == pytest.approx(one.losses, rel=1e-5)
    assert parts.logged("loss/gradient") == pytest.approx(one.logged("loss/gradient"), rel=1e-5)


def test_gradient_checkpointing_changes_nothing(train, whole):
    plain = train("plain", 3, "--batch_size", "8")
    recomputed = train("recomputed", 3, "--batch_size", "8", "--use_gradient_checkpointing")
    assert recomputed.losses == pytest.approx(plain.losses, rel=1e-6)


def test_resumed_equals_straight_through(train, whole, monkeypatch):
    run_dir = whole.folder.parent.parent / "resumed"
    run_dir.mkdir()
    (run_dir / "checkpoint-4").symlink_to(whole.folder.parent / "checkpoint-4")
    fitted = []
    monkeypatch.setattr(AudioVAE, "fit_to_data", lambda *_: fitted.append(1))
    resumed = train("resumed", 8, "--batch_size", "8", "--save_steps", "4", "--resume_from_checkpoint")
    assert not fitted  # The checkpoint has it all.
    for name in ("model", "ema"):
        assert largest_difference(whole.weights(name), resumed.weights(name)) == 0
    assert largest_difference(whole.adversary["discriminator"], resumed.adversary["discriminator"]) == 0
    assert whole.losses == resumed.losses


def test_another_run_starts_from_its_weights(train, whole):
    second = train("second", 1, "--init_from", str(whole.folder), "--learning_rate", "1e-12", "--batch_size", "8")
    first, second = whole.weights("ema"), second.weights()
    kept = [name for name in first if not name.startswith("latent_")]  # Measured anew.
    assert largest_difference({n: first[n] for n in kept}, {n: second[n] for n in kept}) < 1e-8


@pytest.mark.parametrize("segment_frames", ["0", "8"])
def test_silent_constant_and_short_clips_give_finite_numbers_under_bf16(train, segment_frames):
    flags = ["--segment_frames", segment_frames, "--discriminator", "patch_1d", "--use_spectral_norm"]
    run = train(f"bf16_{segment_frames}", 5, "--batch_size", "36", "--bf16", "--lecam_weight", "0.01", *flags)
    assert all(value.isfinite().all() and value.dtype == torch.float32 for value in run.weights().values())
    assert all(torch.tensor(run.losses).isfinite()) and not run.logged("skipped_steps")


# ---- Speakers and characters.


def test_speakers_are_told_and_matter(train, cache):
    run = train("speakers", 12, "--batch_size", "8", "--use_speakers", "--learning_rate", "1e-2", "--gan_weight", "0")
    model = load_model(AudioVAE, run.folder, "raw")
    assert model.config.speakers == ["high", "low"]
    sample = DescribedAudioDataset(cache, "validation", model.config.speakers, use_tokens=False)[0]
    assert sample["speaker"] == model.config.speakers.index("low")
    batch = collate_audio([sample], SETTINGS.log_floor)
    with torch.no_grad():
        one, two = (model(batch["mel"], speaker=torch.tensor([place])).reconstruction for place in (0, 1))
    assert (one - two).abs().mean() > 1e-3


def test_characters_become_legible(train, cache):
    flags = ["--segment_frames", "0", "--ctc_weight", "0.3", "--gan_weight", "0", "--learning_rate", "5e-3"]
    run = train("characters", 40, "--batch_size", "16", *flags)
    losses = run.logged("loss/ctc")
    assert sum(losses[-4:]) < 0.6 * sum(losses[:4])
    assert run.logged("eval_ctc")[-1] > 0
    dataset = DescribedAudioDataset(cache, "train", [], use_tokens=True)
    tokens = dataset[2]["tokens"]
    assert tokens.tolist() == encode_caption(dataset.entries[2]["caption"], 99) and len(tokens) == 4


def test_other_transcripts_and_speakers_are_other_data(cache, tmp_path):
    plain = AudioVAEDataset(cache, "train").fingerprint
    assert DescribedAudioDataset(cache, "train", [], use_tokens=False).fingerprint == plain
    manifest = json.loads((cache / "manifest.json").read_text())
    entries = manifest["entries"]["train"]
    entries[0] |= {"caption": entries[0]["caption"].upper() + " "}  # Reads the same.
    entries[1] |= {"caption": "other", "speaker": "high"}
    shutil.copytree(cache, tmp_path / "changed")
    (tmp_path / "changed" / "manifest.json").write_text(json.dumps(manifest))
    folders = (cache, tmp_path / "changed")
    for speakers, use_tokens, same in (([], False, True), ([], True, False), (["high", "low"], False, False)):
        first, second = (
            DescribedAudioDataset(each, "train", speakers, use_tokens=use_tokens).fingerprint for each in folders
        )
        assert (first == second) == same and first.partition("+")[0] == plain
    entries[1] |= {"caption": "other", "speaker": "low"}
    (tmp_path / "changed" / "manifest.json").write_text(json.dumps(manifest))
    first, second = (
        DescribedAudioDataset(each, "train", ["high", "low"], use_tokens=False).fingerprint for each in folders
    )
    assert first == second  # Transcripts that are not served do not count.


def test_a_run_with_other_speakers_does_not_go_on(train, cache, tmp_path):
    folder = tmp_path / "letters"
    shutil.copytree(cache, folder)
    flags = ["--use_speakers", "--cached_dataset", str(folder), "--batch_size", "4"]
    run = train("who", 1, *flags)
    evaluator = AudioVAEEvaluator.__new__(AudioVAEEvaluator)  # Without a model.
    evaluator.args, evaluator.record = AudioVAEEvaluator.arguments_class(), read_stage(run.folder)
    evaluator.checkpoint = run.folder
    assert evaluator.describe_data(AudioVAEDataset(folder, "validation"), 1)["is_the_runs_own"]
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["entries"]["train"][0]["speaker"] = "low"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="was trained on a former content"):
        train("who", 2, *flags, "--resume_from_checkpoint")


# ---- Listening.


def test_listening_changes_nothing_and_is_written(train, whole):
    heard = train("heard", 4, "--batch_size", "8", "--n_logged_samples", "1", "--lr_scheduler_type", "constant")
    plain = train("unheard", 4, "--batch_size", "8", "--lr_scheduler_type", "constant")
    assert heard.losses == plain.losses
    events = EventAccumulator(str(heard.folder.parent / "tensorboard"), {"images": 1})
    events.Reload()
    assert "images/mel" in events.Tags()["images"] and "listening/mel_l1" in events.Tags()["scalars"]


# ---- Refusals.


def test_another_mel_is_refused(train, whole, tmp_path):
    other = write_mel_cache(tmp_path / "other", MelSettings(n_mels=16, f_max=7000.0), 20)
    with pytest.raises(ValueError, match=r"(?s)f_max=8000.*f_max=7000|f_max=7000.*f_max=8000"):
        train("other", 2, "--cached_dataset", str(other), "--init_from", str(whole.folder))
    with pytest.raises(ValueError, match=r"(?s)hop_length.*preprocess_audio_vae_dataset.py"):
        train("override", 2, "--override", "hop_length=512")
    taken = train("taken", 1, "--cached_dataset", str(other))
    assert load_model(AudioVAE, taken.folder).config.f_max == 7000.0


def test_a_vocoder_of_another_mel_and_none_are_refused_before_anything_runs(train, tmp_path):
    vocoder = save_stage_checkpoint(small_vocoder(), "vocoder", tmp_path / "other")
    with pytest.raises(ValueError) as refused:
        train("deaf", 1, "--n_logged_samples", "1", "--vocoder_checkpoint", str(vocoder), "--dry_run")
    message = str(refused.value)
    assert SETTINGS.describe() in message and SMALL_MEL.describe() in message
    assert "--vocoder_checkpoint" in message and "preprocess_audio_vae_dataset.py" in message
    assert "--sample_rate 8000" in message
    with pytest.raises(FileNotFoundError, match="no checkpoint at nowhere"):
        train("deaf", 1, "--n_logged_samples", "1", "--vocoder_checkpoint", "nowhere", "--dry_run")


@pytest.mark.parametrize(
    "words, message",
    [
        ("--ctc_weight 1", "--ctc_weight=1.0 needs --segment_frames=0"),
        ("--segment_frames 3", "--segment_frames=3 must be >= 4, which --discriminator_layers=2 needs"),
        ("--gan_weight 0", "has no effect with gan_weight=0"),
        ("--vocoder_checkpoint runs/x", "--vocoder_checkpoint has no effect with n_logged_samples=0"),
        ("--discriminator patch", "--discriminator='patch' must be one of 'patch_1d', 'patch_2d'"),
    ],
)
def test_flags_that_cannot_work_are_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        AudioVAEStage.main(changed(SMALL_AUDIO_VAE, *words.split()))
    assert message in capsys.readouterr().err


def test_conditions_that_the_cache_lacks_are_refused(train, tmp_path):
    nameless = str(write_mel_cache(tmp_path / "nameless", SETTINGS, 20, speakers=False))
    with pytest.raises(ValueError, match="nameless names no speakers; train without --use_speakers"):
        train("nameless", 1, "--cached_dataset", nameless, "--use_speakers")
    with pytest.raises(ValueError, match="speaker '', which is not among the model's 1 speakers"):
        DescribedAudioDataset(nameless, "train", ["high"], use_tokens=False)
    with pytest.raises(ValueError, match="use_ctc: it follows from --use_speakers and --ctc_weight"):
        train("overridden", 1, "--override", "use_ctc=true")


def test_segments_of_any_length_train_without_a_discriminator():
    words = ["--gan_weight", "0", "--segment_frames", "3"]
    assert parse_arguments(AudioVAEArguments, words, "").segment_frames == 3
