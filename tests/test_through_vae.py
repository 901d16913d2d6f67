"""Log-mels that an audio VAE reconstructed, beside the recorded waveforms: what the files hold, what a vocoder trained
on them records, and who refuses them."""

import json

import pytest
import torch

import evaluate
from dataset_loading.audio.cached import AudioVAEDataset, VocoderDataset
from model.audio.spectral import MelSettings
from preprocess_audio_vocoder_dataset import AudioVocoderPreprocess
from pretrain_audio_vae import AudioVAEStage
from pretrain_vocoder import VocoderStage
from tests.helpers.audio_latent_cache import save_audio_vae
from tests.helpers.mel_cache import SMALL_AUDIO_VAE
from tests.helpers.runs import changed, run_stage
from tests.helpers.vocoder_checkpoint import SMALL_MEL, save_stage_checkpoint, small_vocoder, write_sound
from utils.checkpoints import STAGE, mark_complete, write_json
from utils.evaluation.arguments.audio import AudioVAEEvaluationArguments
from utils.evaluation.audio_vae import AudioVAEEvaluator
from utils.evaluation.recordings import Recordings
from utils.generation.latents import load_vae, vae_fingerprint

SECONDS = {"a": 0.5, "b": 0.717, "c": 1.003}  # 62, 89 and 125 frames: odd lengths fill no last latent


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Three clips by two speakers."""
    folder = tmp_path_factory.mktemp("raw")
    for name, seconds in SECONDS.items():
        write_sound(folder / f"{name}.wav", seconds)
    rows = [f"{name}.wav,a glide,{speaker}" for name, speaker in zip(SECONDS, ("ann", "bob", "ann"))]
    (folder / "metadata.csv").write_text("\n".join(["file_name,text,speaker", *rows]))
    return folder


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    folder = save_audio_vae(tmp_path_factory.mktemp("vae"), settings=SMALL_MEL)
    record = json.loads((folder / STAGE).read_text())
    write_json(folder / STAGE, {**record, "data": {"folder": "gone", "fingerprint": "gone"}})
    mark_complete(folder)
    return folder


MEL_FLAGS = [word for name, value in SMALL_MEL.as_dict().items() for word in (f"--{name}", str(value))]


def prepare(raw, out, *flags, workers=0):
    words = ["--dataset_name", str(raw), "--validation_dataset", str(raw / "metadata.csv"), "--output_dir", str(out)]
    words += ["--keep_duplicates"]
    return AudioVocoderPreprocess.main(changed([*words, "--num_workers", str(workers)], *flags))


@pytest.fixture(scope="module")
def caches(raw, vae, tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches")
    prepare(raw, folder / "recorded", *MEL_FLAGS)
    prepare(raw, folder / "through", "--through_vae", str(vae))
    return folder


def test_mels_are_the_vaes_and_waveforms_those_of_the_recordings(caches, vae):
    recorded, through = (VocoderDataset(caches / name, "train") for name in ("recorded", "through"))
    assert recorded.vae_fingerprint == "" and through.vae_fingerprint == vae_fingerprint(vae)
    assert recorded.fingerprint != through.fingerprint and through.mel == SMALL_MEL
    assert "vae_fingerprint" not in recorded.manifest["settings"]
    assert through.manifest["settings"]["through_vae"] == str(vae)
    model, distances = load_vae(vae, media="audio"), []
    for i, entry in enumerate(through.entries):
        assert entry["key"] == recorded.entries[i]["key"] and entry["length"] == recorded.entries[i]["length"]
        assert torch.equal(through[i]["waveform"], recorded[i]["waveform"])
        # Frame by frame the clip's own reconstruction, whatever clips were padded beside it, but for the noise.
        with torch.inference_mode():
            mean, logvar = model.encode(recorded[i]["mel"][None])
            decoded = [model.decode(mean + scale * torch.exp(logvar / 2))[0] for scale in (-4, 0, 4)]
        mels = [mel[:, : entry["length"]].clamp_min(SMALL_MEL.log_floor) for mel in decoded]
        difference = (through[i]["mel"] - mels[1]).abs().mean()
        distances.append((difference / (mels[1] - recorded[i]["mel"]).abs().mean()).item())
        assert 0 < difference < (mels[2] - mels[0]).abs().mean()
        assert through[i]["mel"].min() >= SMALL_MEL.log_floor
    assert max(distances) < 0.5  # The posterior's noise is small compared with what the VAE loses.


def test_neither_batches_nor_workers_nor_a_second_run_change_the_mels(raw, vae, caches, tmp_path):
    through = VocoderDataset(caches / "through", "train")
    prepare(raw, tmp_path / "alone", "--through_vae", str(vae), "--batch_size", "1", workers=1)
    alone = VocoderDataset(tmp_path / "alone", "train")
    for i in range(len(through)):
        assert torch.allclose(alone[i]["mel"], through[i]["mel"], atol=1e-4)
    file = tmp_path / "alone/train" / f"{alone.entries[1]['key']}.pt"
    before = file.read_bytes()
    file.unlink()
    prepare(raw, tmp_path / "alone", "--through_vae", str(vae), "--batch_size", "1")
    assert file.read_bytes() == before
    prepare(raw, tmp_path / "seed", "--through_vae", str(vae), "--batch_size", "1", "--seed", "7", "--limit", "1")
    assert not torch.allclose(VocoderDataset(tmp_path / "seed", "train")[0]["mel"], alone[0]["mel"], atol=1e-4)


@pytest.mark.parametrize(
    "limit", ["preprocess_audio_vocoder_dataset.MAX_FRAMES", "utils.preprocessing.batched.MAX_BYTES"]
)
def test_long_clips_come_in_smaller_batches(raw, vae, caches, tmp_path, monkeypatch, limit):
    reconstruct, n_frames = AudioVocoderPreprocess.reconstruct, []

    def spy(self, examples):
        n_frames.append([example.data["mel"].shape[1] for example in examples])
        return reconstruct(self, examples)

    monkeypatch.setattr(AudioVocoderPreprocess, "reconstruct", spy)
    monkeypatch.setattr(limit, 1)
    prepare(raw, tmp_path / "out", "--through_vae", str(vae))
    small, through = (VocoderDataset(folder, "train") for folder in (tmp_path / "out", caches / "through"))
    assert {len(lengths) for lengths in n_frames} == {1} and len(n_frames) >= len(through) > 1
    assert all(torch.allclose(small[i]["mel"], through[i]["mel"], atol=1e-4) for i in range(len(through)))


def test_a_vocoder_is_fine_tuned_and_says_on_what(caches, vae, tmp_path, capsys):
    base = save_stage_checkpoint(small_vocoder(), "vocoder", tmp_path / "base")
    flags = "--config tiny --override width=16 n_layers=2 --segment_frames 16 --gan_weight 0 --n_logged_samples 0"
    flags = f"{flags} --stft_resolutions 256 --batch_size 2 --logging_steps 1".split()
    for name in ("recorded", "through"):
        cache = caches / name
        run_stage(VocoderStage, flags, cache, tmp_path, name, 1, "--init_from", str(base))
        record = json.loads((tmp_path / "vocoder" / name / "checkpoint-1/stage.json").read_text())
        assert record["vae_fingerprint"] == (vae_fingerprint(vae) if name == "through" else "")
    # Its own cache is evaluated, and it stands behind the VAE in the VAE's own evaluation.
    tuned, words = str(tmp_path / "vocoder/through"), ["--metrics", "mel", "--max_samples", "1"]
    scores = evaluate.main(["--checkpoint", tuned, *words])["scores"]
    assert scores["ground_truth"]["mel_l1"] > 0.1 and scores["model"]["mel_l1"] > 0
    assert vae_fingerprint(vae) in capsys.readouterr().out
    words += ["--cached_dataset", str(caches / "recorded"), "--output_dir", str(tmp_path / "after_vae")]
    report = evaluate.main(["--checkpoint", str(vae), "--vocoder_checkpoint", tuned, *words])
    assert report["scores"]["ground_truth"]["mel_l1"] < 1e-4 and tuned in report["model"]["vocoder"]


def test_who_needs_the_mels_of_recordings_refuses_them(caches, vae, tmp_path):
    folder, fingerprint = caches / "through", vae_fingerprint(vae)
    args = AudioVAEEvaluationArguments(cached_dataset=str(folder), metrics=["mel"])
    args.given = ["cached_dataset", "metrics"]
    readers = [
        lambda: AudioVAEDataset(folder, "train"),
        lambda: run_stage(AudioVAEStage, SMALL_AUDIO_VAE, folder, tmp_path, "vae", 1),
        lambda: Recordings(folder, SMALL_MEL, "the VAE"),
        AudioVAEEvaluator(args, vae).build_dataset,
    ]
    for read in readers:
        with pytest.raises((ValueError, SystemExit)) as caught:
            read()
        message = str(caught.value if isinstance(caught.value, ValueError) else caught.value.__cause__)
        assert f"vae_fingerprint={fingerprint!r}" in message and f"{folder}_recorded" in message
        assert "--through_vae" not in message
    with pytest.raises(ValueError, match="n_mels") as caught:
        VocoderDataset(folder, "train").expect_mel(MelSettings(), "the model")
    assert "--through_vae '<VAE of that log-mel>'" in str(caught.value) and "--n_mels" not in str(caught.value)


def test_unfit_vaes_and_flags_are_refused(raw, vae, caches, tmp_path, caplog, capsys):
    vocoder = save_stage_checkpoint(small_vocoder(), "vocoder", tmp_path / "vocoder")
    other = save_audio_vae(tmp_path / "other", settings=SMALL_MEL, latent_mean=0.3)
    fingerprints = vae_fingerprint(vae), vae_fingerprint(other)
    new = tmp_path / "new"
    cases = {
        (new, "--through_vae", str(vocoder)): "stage 'vocoder', which trains no VAE of type audio",
        (new, "--through_vae", str(tmp_path / "gone")): "gone: the folder does not exist",
        (new, "--through_vae", str(vae), "--n_mels", "64"): "n_mels=64",
        (new, "--through_vae", str(vae), "--mel", "22k"): "differ in sample_rate, n_fft, hop_length, n_mels, f_max",
        (new, "--through_vae", str(vae), "--vae_config", "small"): "was trained with preset 'tiny', not 'small'",
        (caches / "through", "--through_vae", str(other)): "vae_fingerprint={!r} there, {!r} now".format(
            *fingerprints
        ),
        (caches / "recorded", "--through_vae", str(vae)): f"vae_fingerprint=None there, {fingerprints[0]!r} now",
    }
    for (out, *flags), message in cases.items():
        caplog.clear()
        with pytest.raises(SystemExit) as caught:
            prepare(raw, out, *flags)
        assert caught.value.code == 2 and message in caplog.text
    for flag in ("--vae_config tiny", "--batch_size 4", "--bf16"):
        with pytest.raises(SystemExit):
            prepare(raw, new, *flag.split())
        assert f"{flag.split()[0]} has no effect with through_vae=''" in capsys.readouterr().err
    assert not new.exists()


def test_speakers_are_told_to_the_vae_and_unknown_ones_left_out(raw, tmp_path):
    vae = save_audio_vae(tmp_path / "vae", settings=SMALL_MEL, architecture="conv2d", patch_bins=8, speakers=["ann"])
    manifest = prepare(raw, tmp_path / "out", "--through_vae", str(vae), "--bf16")
    assert {entry["speaker"] for entry in manifest["entries"]["train"]} == {"ann"}
    assert [row["source"] for row in manifest["skipped"]] == ["b.wav", "b.wav"]
    assert "knows no speaker 'bob'" in manifest["skipped"][0]["reason"]
