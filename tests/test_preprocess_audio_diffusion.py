"""Audio and texts to latents: what a file holds, what is left out and why, resumed runs, wrong models and flags."""

# ruff: noqa: RUF001 (letters of phonetics)

import json
import re
import shutil

import pytest
import soundfile
import torch

from dataset_loading.audio.cached import AudioVAEDataset
from dataset_loading.audio.latents import AudioLatentDataset, collate_audio_latents
from dataset_loading.cache_writer import save_tensors
from dataset_loading.cached import CachedDataset
from dataset_loading.files import read_record
from model.audio.alignment import PhoneHMM, latents_at_frames
from model.audio.speaker_aligners import SpeakerAligners
from model.audio.spectral import MelSettings
from model.text.phonemes import SpeechTokenizer
from preprocess_audio_diffusion_dataset import AudioDiffusionPreprocess
from tests.helpers.audio_latent_cache import (
    SENTENCES,
    SETTINGS,
    make_audio_latents,
    save_audio_vae,
    write_manifest,
    write_spoken_cache,
)
from tests.helpers.text_encoder_folder import save_text_encoder, text_of
from utils.generation.latents import load_vae, vae_fingerprint
from utils.preprocessing import audio_latents
from utils.preprocessing.audio_cache import describe_lengths


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return save_audio_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def mels(tmp_path_factory):
    return write_spoken_cache(tmp_path_factory.mktemp("cache") / "mels")


@pytest.fixture(scope="module")
def latents(mels, vae, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache") / "latents"
    make_audio_latents(mels, vae, folder)
    return folder


def samples(folder):
    """All samples of a folder by the name of the recording."""
    data = [CachedDataset(folder, split) for split in ("train", "validation")]
    return {entry["source"]: (entry, part[i]) for part in data for i, entry in enumerate(part.entries)}


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*.pt"))}


def test_a_file_holds_standardised_latents_tokens_and_durations(latents, mels, vae):
    model, all_samples = load_vae(vae, media="audio"), samples(latents)
    originals = [AudioVAEDataset(mels, split) for split in ("train", "validation")]
    by_source = {entry["source"]: part[i]["mel"] for part in originals for i, entry in enumerate(part.entries)}
    manifest = CachedDataset(latents, "train").manifest
    tokenizer = SpeechTokenizer.from_dict(manifest["settings"]["tokenizer"])
    aligner = PhoneHMM.load(latents / "aligner.safetensors")
    for name, (entry, sample) in all_samples.items():
        mel = by_source[name]
        with torch.no_grad():
            mean, logvar = model.encode(mel[None])
        assert sample["mean"].dtype == sample["std"].dtype == torch.float16
        expected = (mean[0] - model.latent_mean[:, None]) / model.latent_std[:, None]
        assert torch.allclose(sample["mean"].float(), expected, rtol=2**-9, atol=1e-6)
        assert torch.allclose(sample["std"].float(), (logvar[0] / 2).exp() / model.latent_std[:, None], rtol=2**-9)
        assert torch.equal(sample["tokens"], tokenizer.encode(entry["caption"]))
        alignment = aligner.align([mel], [sample["tokens"][:, 0]])
        assert torch.equal(sample["durations"], alignment.durations[0]) and sample["durations"].dtype == torch.int16
        assert sample["durations"].sum() == sample["n_mel_frames"] == mel.shape[1] == entry["mel_frames"]
        assert entry["length"] == sample["mean"].shape[1] == -(-mel.shape[1] // 2)
        assert entry["log_likelihood"] == pytest.approx(alignment.log_likelihood[0], abs=1e-3)
        assert entry["likelihood_ratio"] == pytest.approx(alignment.likelihood_ratio[0], abs=1e-3)
    assert len(all_samples) == 24 and "likelihood_ratio" not in manifest["totals"]["train"]
    settings = manifest["settings"]
    assert settings["vae_fingerprint"] == vae_fingerprint(vae) and settings["mel"] == SETTINGS.as_dict()
    assert (settings["latent_channels"], settings["mel_frames_per_latent"]) == (5, 2)


def test_workers_and_resuming_change_no_byte_and_keep_the_aligner(latents, mels, vae, tmp_path):
    whole = contents(latents)
    make_audio_latents(mels, vae, tmp_path / "2", "--num_workers", "2", "--batch_size", "5")
    assert contents(tmp_path / "2") == whole and len(whole) == 24
    # A folder with clips missing, and an aligner that a new fit would not give.
    for name in sorted(whole)[::3]:
        (tmp_path / "2" / name).unlink()
    make_audio_latents(mels, vae, tmp_path / "2")
    assert contents(tmp_path / "2") == whole
    # The aligner of another folder serves a part of the clips.
    manifest = make_audio_latents(mels, vae, tmp_path / "part", "--limit", "4", "--aligner_from", str(latents))
    assert (
        manifest["settings"]["aligner_fingerprint"]
        == CachedDataset(latents, "train").manifest["settings"]["aligner_fingerprint"]
    )
    assert all(whole[name] == content for name, content in contents(tmp_path / "part").items())
    # A flipped byte of its tensors would shift the durations of further clips.
    file = tmp_path / "part" / "aligner.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(SystemExit) as damaged:
        make_audio_latents(mels, vae, tmp_path / "part", "--limit", "5")
    assert re.search(rf"{file} is damaged \(its fingerprint is .*another --output_dir", str(damaged.value.__cause__))


def test_clips_that_cannot_be_used_are_named_with_reasons(mels, vae, tmp_path, caplog):
    folder = shutil.copytree(mels, tmp_path / "mels")
    data = AudioVAEDataset(folder, "train")
    entries = data.manifest["entries"]
    save_tensors(folder / "train" / f"{entries['train'][0]['key']}.pt", {"mel": data[0]["mel"][:, :9]})
    entries["train"][0]["length"] = 9
    entries["train"][1]["caption"] = "  "
    entries["train"][2]["caption"] = "..."
    entries["validation"][0]["caption"] = "vision"  # ʒ is in no training text.
    write_manifest(folder, entries)
    manifest = make_audio_latents(folder, vae, tmp_path / "out")
    reasons = {row["source"]: row["reason"] for row in manifest["skipped"]}
    names = [entries["train"][i]["source"] for i in range(3)] + [entries["validation"][0]["source"]]
    assert list(reasons) == names
    assert "9 mel frames are too few" in reasons[names[0]] and reasons[names[1]] == "empty text"
    assert "nothing to say" in reasons[names[2]] and reasons[names[3]].startswith(
        "phones that no training text has: v ɪ ʒ"
    )
    assert "4 clips left out" in caplog.text and names[0] in caplog.text
    assert "1 of them have phones that no training text has; to keep them, add training clips" in caplog.text
    assert manifest["left_out"]["phones that no training text has"] == {"count": 1, "names": names[3:]}
    assert "held out" not in caplog.text  # Three other clips are.
    seconds = [entry["seconds"] for rows in manifest["entries"].values() for entry in rows]
    n_short = sum(value < 2 for value in seconds)
    shortest = f"{n_short} shorter than 2 s (the shortest {min(seconds):.1f} s): "
    assert f"of {len(seconds)} clips, {shortest}" in caplog.text


def test_where_no_validation_clip_is_left_the_reason_and_what_helps_are_named(mels, vae, tmp_path, caplog):
    folder = shutil.copytree(mels, tmp_path / "mels")
    entries = AudioVAEDataset(folder, "train").manifest["entries"]
    entries["validation"] = entries["validation"][:1]
    (entry,) = entries["validation"]
    entry["caption"] = "vision"
    write_manifest(folder, entries)
    make_audio_latents(folder, vae, tmp_path / "out")
    reason = (
        f"none of the 1 held-out samples can be used: {entry['source']} (phones that no training text has: v ɪ ʒ in "
        f"'vision'). Hold out others with a larger --validation_fraction or a --validation_dataset of the audio cache "
        f"{folder}, whose split is kept, in another --output_dir; the same command leaves out the same"
    )
    assert f"no validation sample is left: {reason}" in caplog.text and "no sample is held out" not in caplog.text
    with pytest.raises(FileNotFoundError, match=re.escape(f"'validation': 0}}): {reason}. It was made with: python")):
        AudioLatentDataset(tmp_path / "out", "validation")
    # What the message names helps: clips with these phones beside others, but in another folder.
    caplog.clear()
    entries["train"][0]["caption"] = "vision"
    write_manifest(folder, entries)
    assert not make_audio_latents(folder, vae, tmp_path / "out")["entries"]["validation"]
    caplog.clear()
    assert make_audio_latents(folder, vae, tmp_path / "new")["entries"]["validation"]
    assert "vision" not in caplog.text and "validation sample" not in caplog.text


def test_latents_follow_the_log_mels_that_they_were_made_from(mels, vae, tmp_path, caplog):
    folder, out = shutil.copytree(mels, tmp_path / "mels"), tmp_path / "out"
    manifest = read_record(folder / "manifest.json", "")
    entries, former = manifest["entries"], manifest["fingerprint"]

    def written() -> dict[str, int]:
        """When the file of each clip was written, by the name of the recording."""
        rows = make_audio_latents(folder, vae, out, "--conditioning", "caption")["entries"].items()
        places = {entry["source"]: out / split / f"{entry['key']}.pt" for split, entries in rows for entry in entries}
        assert sorted(places.values()) == sorted(out.rglob("*.pt"))
        return {source: file.stat().st_mtime_ns for source, file in places.items()}

    before = written()
    # One clip is another one, one is gone, and the cache says so.
    changed, gone = entries["train"][1], entries["train"].pop()
    file = folder / "train" / f"{changed['key']}.pt"
    content = save_tensors(file, {"mel": torch.load(file)["mel"].flip(1)})
    changed.update(content)
    text = {**manifest, "entries": entries, "fingerprint": "updated", "settings_fingerprint": former}
    (folder / "manifest.json").write_text(json.dumps(text))
    CachedDataset(out, "train")
    assert f"{out} was made from a former content of {folder} (fingerprint {former}, now updated)" in caplog.text
    after = written()
    assert before.keys() - after.keys() == {gone["source"]}
    assert [source for source, stamp in after.items() if before[source] != stamp] == [changed["source"]]
    assert "changed: 1" in caplog.text and "gone: 1" in caplog.text
    caplog.clear()
    CachedDataset(out, "train")
    assert "former content" not in caplog.text


def test_a_damaged_log_mel_is_named_with_the_command_that_writes_it_again(mels, vae, tmp_path, caplog):
    folder = shutil.copytree(mels, tmp_path / "mels")
    file = folder / "train" / f"{AudioVAEDataset(folder, 'train').entries[1]['key']}.pt"
    flags = ("--max_broken_fraction", "1", "--conditioning", "caption")
    for content, reason in ((b"no archive", "no file of tensors"), (None, "lacks 'mel'"), (torch.nan, "NaN")):
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            mel = torch.load(mels / "train" / file.name)["mel"]
            save_tensors(file, {"mel": mel * content} if content else {"melody": mel})
        manifest = make_audio_latents(folder, vae, tmp_path / "out", *flags)
        (row,) = manifest["broken"]
        assert f"{file} is damaged" in row["reason"] and reason in row["reason"]
        assert "run: python preprocess_audio_vae_dataset.py" in row["reason"]
    # Clips that the aligner is fitted to are read before all others.
    with pytest.raises(SystemExit):
        make_audio_latents(folder, vae, tmp_path / "speech")
    assert f"{file} is damaged" in caplog.text


def test_clips_that_are_no_sentences_by_their_length_are_counted():
    def rows(*seconds: float) -> list[dict]:
        return [{"source": f"{number}.wav", "seconds": value} for number, value in enumerate(seconds)]

    assert describe_lengths(rows(2.0, 7.5, 15.0)) == ""
    both = describe_lengths([*rows(0.5, 1.9, 71.04, 3.0), *rows(0.5)])  # The last is a second caption of the first.
    assert both.startswith(
        "of 4 clips, 2 shorter than 2 s (the shortest 0.5 s) and 1 longer than 15 s (the longest 71.0 s): "
    )
    assert "join short ones and cut long ones between sentences with their transcripts" in both
    assert "join" not in describe_lengths(rows(16.0)) and "cut" not in describe_lengths(rows(1.0))


def test_the_worst_clips_are_those_with_wrong_transcripts(mels, vae, tmp_path, caplog):
    folder = shutil.copytree(mels, tmp_path / "mels")
    entries = AudioVAEDataset(folder, "train").manifest["entries"]
    wrong = next(entry for entry in entries["train"] if entry["caption"] == SENTENCES[5])
    wrong["caption"] = SENTENCES[2]
    write_manifest(folder, entries)
    caplog.set_level("INFO")
    make_audio_latents(folder, vae, tmp_path / "out")
    lines = caplog.text.split("per frame):")[1].splitlines()[1:]
    assert len(lines) == 10 and wrong["source"] in lines[0]


def test_captions_are_bytes_or_states_of_an_encoder(mels, vae, tmp_path):
    make_audio_latents(mels, vae, tmp_path / "bytes", "--conditioning", "caption", "--max_tokens", "10")
    for entry, sample in samples(tmp_path / "bytes").values():
        assert sample.keys() == {"mean", "std", "n_mel_frames", "caption_tokens", "index"}
        assert text_of(sample["caption_tokens"].tolist()) == entry["caption"][:9]
    encoder = str(save_text_encoder(tmp_path / "encoder"))
    flags = ("--conditioning", "caption", "--text_encoder", encoder, "--limit", "3")
    manifest = make_audio_latents(mels, vae, tmp_path / "states", *flags)
    states = samples(tmp_path / "states")["000.flac"][1]["caption_states"]
    assert states.dtype == torch.bfloat16 and states.shape[1] == manifest["settings"]["text_embedding_width"] == 16
    assert not (tmp_path / "states" / "aligner.safetensors").exists()


def test_characters_have_one_state_and_a_warning(mels, vae, tmp_path, caplog):
    manifest = make_audio_latents(mels, vae, tmp_path / "out", "--units", "characters")
    assert "w" in manifest["settings"]["tokenizer"]["symbols"] and "tell no pronunciation" in caplog.text
    assert PhoneHMM.load(tmp_path / "out" / "aligner.safetensors").n_states == 1


def test_rows_of_latents_are_further_channels_and_speakers_are_told(mels, tmp_path):
    fields = {"architecture": "conv2d", "patch_bins": 8, "latent_channels": 4, "speakers": ["ann"]}
    vae = save_audio_vae(tmp_path / "vae", **fields)
    manifest = make_audio_latents(mels, vae, tmp_path / "out")
    assert manifest["settings"]["latent_channels"] == 20
    assert {entry["speaker"] for entry in manifest["entries"]["train"]} == {"ann"}
    assert "knows no speaker 'bob'" in manifest["skipped"][0]["reason"] and len(manifest["skipped"]) == 12
    assert CachedDataset(tmp_path / "out", "train")[0]["mean"].shape[0] == 20


def test_raw_audio_becomes_log_mels_of_the_vae_first(vae, tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    lines = ["file_name,text,speaker"]
    for i, text in enumerate(("one two", "two one", "one one")):
        soundfile.write(raw / f"{i}.wav", 0.1 * torch.randn(20000).numpy(), 16000)
        lines.append(f"{i}.wav,{text},ann")
    (raw / "metadata.csv").write_text("\n".join(lines))
    words = ["--dataset_name", str(raw), "--vae_checkpoint", str(vae), "--output_dir", str(tmp_path / "out")]
    words += ["--num_workers", "0", "--validation_fraction", "0"]
    manifest = AudioDiffusionPreprocess.main(words)
    assert [entry["source"] for entry in manifest["entries"]["train"]] == ["0.wav", "1.wav", "2.wav"]
    assert AudioVAEDataset(tmp_path / "out_mels", "train").mel == SETTINGS
    assert manifest["command"] == ["preprocess_audio_diffusion_dataset.py", *manifest["command"][1:]]
    assert ["--dataset_name", str(raw)] == manifest["command"][1:3] and "--audio_cache" not in manifest["command"]
    with pytest.raises(SystemExit):
        AudioDiffusionPreprocess.main([*words, "--mel", "22k"])


@pytest.mark.parametrize("conditioning", ["speech", "caption"])
def test_a_clip_with_several_captions_is_held_once_and_its_latents_for_each(vae, tmp_path, conditioning):
    (tmp_path / "raw").mkdir()
    rows = [{"file_name": "0.wav", "text": ["one two", "two one"]}, {"file_name": "1.wav", "text": "one one"}]
    for row in rows:
        soundfile.write(tmp_path / "raw" / row["file_name"], 0.1 * torch.randn(20000).numpy(), 16000)
    (tmp_path / "raw/train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["--dataset_name", str(tmp_path / "raw"), "--vae_checkpoint", str(vae), "--num_workers", "0"]
    words += ["--output_dir", str(tmp_path / "out"), "--validation_fraction", "0", "--conditioning", conditioning]
    manifest = AudioDiffusionPreprocess.main(words)
    captions = [(entry["source"], entry["caption"]) for entry in manifest["entries"]["train"]]
    assert captions == [("0.wav", "one two"), ("0.wav", "two one"), ("1.wav", "one one")]
    assert [entry["caption"] for entry in AudioVAEDataset(tmp_path / "out_mels", "train").entries] == [
        *("one two", "one one")
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--audio_cache", "x"], "--vae_checkpoint is missing"),
        (["--vae_checkpoint", "x"], "none is given"),
        (["--audio_cache", "x", "--dataset_name", "y", "--vae_checkpoint", "x"], "both are given"),
        (["--audio_cache", "x", "--vae_checkpoint", "x", "--trim_db", "30"], "--trim_db has no effect"),
        (["--audio_cache", "x", "--vae_checkpoint", "x", "--text_encoder", "y"], "--text_encoder has no effect"),
        (["--audio_cache", "x", "--vae_checkpoint", "x", "--max_tokens", "9"], "--max_tokens has no effect"),
        (
            ["--audio_cache", "x", "--vae_checkpoint", "x", "--units", "characters", "--language", "fr"],
            "--language has no effect",
        ),
        (
            ["--audio_cache", "x", "--vae_checkpoint", "x", "--conditioning", "caption", "--language", "fr-fr"],
            "--language has no effect with conditioning='caption'",
        ),
    ],
)
def test_wrong_flags(flags, message, capsys):
    with pytest.raises(SystemExit):
        AudioDiffusionPreprocess.main(flags)
    assert message in capsys.readouterr().err


def test_a_validation_fraction_splits_an_audio_cache_without_a_split_and_is_refused_for_others(mels, vae, tmp_path):
    with pytest.raises(SystemExit) as refused:
        make_audio_latents(mels, vae, tmp_path / "out", "--validation_fraction", "0.3")
    assert str(refused.value.__cause__) == (
        f"--validation_fraction=0.3 has no effect with --audio_cache {mels}, whose validation split of 4 clips is "
        "kept; leave it out, or split the clips anew with: python preprocess_audio_vae_dataset.py --dataset_name "
        f"spoken --validation_fraction 0.3 --output_dir {mels}_split"
    )
    assert not (tmp_path / "out").exists()
    folder = shutil.copytree(mels, tmp_path / "mels")
    write_manifest(folder, {"train": read_record(folder / "manifest.json", "")["entries"]["train"], "validation": []})
    manifest = make_audio_latents(folder, vae, tmp_path / "out", "--validation_fraction", "0.3")
    assert {split: total["samples"] for split, total in manifest["totals"].items()} == {"train": 14, "validation": 6}


def test_unfit_models_languages_and_folders_are_refused(latents, mels, vae, tmp_path, caplog):
    other_mel = save_audio_vae(tmp_path / "mel", settings=MelSettings(n_mels=80))
    other = save_audio_vae(tmp_path / "other", latent_mean=0.3)
    cases = {
        (mels, tmp_path / "gone", tmp_path / "new"): "does not exist",
        (mels, other_mel, tmp_path / "new"): "n_mels",
        (tmp_path / "no_cache", vae, tmp_path / "new"): "no_cache does not exist",
        (mels, vae, tmp_path / "new", "--language", "fr-ffr"): "did you mean 'fr-fr'",
        (mels, vae, tmp_path / "new", "--vae_config", "small"): "was trained with preset 'tiny'",
        (mels, other, latents): f"vae_fingerprint='{vae_fingerprint(vae)}' there, '{vae_fingerprint(other)}' now",
        (mels, vae, latents, "--units", "characters"): "units='phonemes' there, 'characters' now",
        (mels, vae, tmp_path / "new", "--aligner_from", str(latents), "--no_gaps"): "gaps=True there, False now",
    }
    before = contents(latents)
    for (cache, checkpoint, out, *flags), message in cases.items():
        caplog.clear()
        with pytest.raises(SystemExit) as caught:
            make_audio_latents(cache, checkpoint, out, *flags)
        assert caught.value.code == 2 and message in caplog.text
    assert contents(latents) == before and not (tmp_path / "new").exists()


def in_two_languages(mels, folder, languages=("de", "en-us")):
    """The spoken cache with the language of every clip: all of bob's are in the first one."""
    folder = shutil.copytree(mels, folder)
    entries = AudioVAEDataset(folder, "train").manifest["entries"]
    for entry in [*entries["train"], *entries["validation"]]:
        entry["language"] = languages[entry["speaker"] == "ann"]
    write_manifest(folder, entries)
    return folder


def test_clips_in_several_languages_share_a_table_and_are_read_in_their_own(mels, vae, tmp_path, caplog):
    folder = in_two_languages(mels, tmp_path / "mels")
    manifest = make_audio_latents(folder, vae, tmp_path / "out")
    settings = manifest["settings"]
    assert settings["language"] == "en-us" and settings["tokenizer"]["languages"] == ["de", "en-us"]
    data = AudioLatentDataset(tmp_path / "out", "train")
    for item, entry in zip(data, data.entries):
        assert data.languages[item["language"]] == entry["language"] == ("en-us", "de")[entry["speaker"] == "bob"]
        assert torch.equal(item["tokens"], data.tokenizer.encode(entry["caption"], entry["language"]).long())
        assert not torch.equal(item["tokens"], data.tokenizer.encode(entry["caption"]).long()) or item["language"]
    assert collate_audio_latents([data[0], data[1]])["languages"].tolist() == [1, 0]
    # Clips whose language has changed are written again, the others are not.
    entries = AudioVAEDataset(folder, "train").manifest["entries"]
    entries["train"][1]["language"] = "en-us"
    write_manifest(folder, entries)
    caplog.set_level("INFO")
    make_audio_latents(folder, vae, tmp_path / "out", "--aligner_from", str(tmp_path / "out"))
    assert re.search(r"out: \d+ samples there already, 1 written", caplog.text)


def test_unknown_languages_are_named(mels, vae, tmp_path, caplog):
    folder = in_two_languages(mels, tmp_path / "mels", ("german", "en-us"))
    with pytest.raises(SystemExit):
        make_audio_latents(folder, vae, tmp_path / "out")
    assert "001.flac: language 'german' is unknown" in caplog.text and "--language_column" in caplog.text
    # An aligner of other languages leaves their clips out.
    folder = in_two_languages(mels, tmp_path / "fr", ("fr-fr", "en-us"))
    make_audio_latents(mels, vae, tmp_path / "english")
    manifest = make_audio_latents(folder, vae, tmp_path / "new", "--aligner_from", str(tmp_path / "english"))
    assert len(manifest["skipped"]) == 12
    assert "language 'fr-fr' is unknown; known: en-us" in manifest["skipped"][0]["reason"]


def test_latents_align_jointly_without_log_mels_in_the_search(latents, mels, vae, tmp_path, caplog):
    make_audio_latents(mels, vae, tmp_path / "joint", "--aligner", "joint")
    model, ours = load_vae(vae, media="audio"), samples(tmp_path / "joint")
    aligner = PhoneHMM.load(tmp_path / "joint" / "aligner.safetensors")
    assert aligner.inputs == "latents"
    for name, (entry, sample) in ours.items():
        frames = latents_at_frames(sample["mean"].T, entry["mel_frames"], model.config.compression)
        assert torch.equal(sample["durations"], aligner.align([frames], [sample["tokens"][:, 0]]).durations[0])
        assert sample["durations"].sum() == entry["mel_frames"] == samples(latents)[name][0]["mel_frames"]
    # Resumed, and for another folder; an aligner of other inputs or of another VAE is refused.
    make_audio_latents(mels, vae, tmp_path / "again", "--aligner", "joint", "--aligner_from", str(tmp_path / "joint"))
    assert contents(tmp_path / "again") == contents(tmp_path / "joint")
    other = save_audio_vae(tmp_path / "other", latent_mean=0.3)
    cases = {
        (vae, tmp_path / "joint", "hmm"): "aligner='joint' there, 'hmm' now",
        (vae, latents, "joint"): "aligner='hmm' there, 'joint' now",
        (other, tmp_path / "joint", "joint"): "vae_fingerprint=",
    }
    for (checkpoint, folder, aligner), message in cases.items():
        caplog.clear()
        with pytest.raises(SystemExit):
            words = ("--aligner", aligner, "--aligner_from", str(folder))
            make_audio_latents(mels, checkpoint, tmp_path / "new", *words)
        assert message in caplog.text


def test_an_aligner_of_captions_is_refused(mels, vae, tmp_path, caplog, capsys):
    make_audio_latents(mels, vae, tmp_path / "captions", "--conditioning", "caption", "--limit", "4")
    with pytest.raises(SystemExit):
        make_audio_latents(mels, vae, tmp_path / "new", "--aligner_from", str(tmp_path / "captions"))
    assert "captions holds captions" in caplog.text
    with pytest.raises(SystemExit):
        make_audio_latents(mels, vae, tmp_path / "new", "--aligner", "joint", "--conditioning", "caption")
    assert "--aligner has no effect" in capsys.readouterr().err


def test_speakers_with_enough_speech_have_an_aligner_of_their_own(latents, mels, vae, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(audio_latents, "SPEAKER_SECONDS", 6)
    manifest = make_audio_latents(mels, vae, tmp_path / "out")
    aligners = SpeakerAligners.load(tmp_path / "out" / "aligner.safetensors")
    assert list(aligners.speakers) == ["ann", "bob"] and "ann: 12, " in caplog.text and ", own, " in caplog.text
    before = CachedDataset(latents, "train").manifest
    # The shared aligner and its likelihoods are those of a run without others.
    assert aligners.shared.dump() == PhoneHMM.load(latents / "aligner.safetensors").dump()
    likelihoods = [[row["likelihood_ratio"] for row in each["entries"]["train"]] for each in (manifest, before)]
    assert likelihoods[0] == likelihoods[1] and contents(tmp_path / "out") != contents(latents)
    assert manifest["settings"]["aligner_fingerprint"] != before["settings"]["aligner_fingerprint"]
