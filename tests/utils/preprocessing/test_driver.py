import json
import os
import signal
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset_loading.cache_writer import Journal, sample_key
from dataset_loading.image.pixels import ImageDataset
from dataset_loading.locks import only_writer
from dataset_loading.sources import Source
from preprocess_image_vae_dataset import ImageVAEPreprocess
from tests.helpers.processes import has_files, run_until
from tests.helpers.runs import changed
from utils.command_line import parse_arguments
from utils.preprocessing.driver import Preprocess, PreprocessArguments, command_words
from utils.preprocessing.samples import is_validation

AUGMENTED = ["--num_augmented_copies", "2", "--random_resized_crop", "--horizontal_flip", "--color_jitter"]


@pytest.fixture
def raw(tmp_path) -> Path:
    """40 different images with captions."""
    return write_images(tmp_path / "raw", 40)


def write_images(folder: Path, count: int, first_seed: int = 0) -> Path:
    (folder / "sub").mkdir(parents=True)
    lines = ["file_name,text"]
    for i in range(count):
        pixels = np.random.default_rng(first_seed + i).integers(0, 256, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"sub/image {i}.png")
        lines.append(f"sub/image {i}.png,caption {i}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


def prepare(raw: Path, out: Path, *flags: str) -> dict:
    """Run the image stage in this process."""
    argv = ["--dataset_name", str(raw), "--output_dir", str(out), "--image_size", "16", "--num_workers", "0"]
    return ImageVAEPreprocess(parse_arguments(ImageVAEPreprocess.arguments_class, changed(argv, *flags), "")).run()


def contents(out: Path) -> dict[str, bytes]:
    return {str(file.relative_to(out)): file.read_bytes() for file in out.rglob("*.pt")}


def test_manifest_describes_every_sample(raw, tmp_path):
    (raw / "LICENSE").write_text("CC0")
    manifest = prepare(raw, tmp_path / "out", "--validation_fraction", "0.2")
    assert manifest == json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["licence"] == "CC0" and manifest["broken"] == manifest["skipped"] == []
    n_train, n_validation = (manifest["totals"][split]["samples"] for split in ("train", "validation"))
    assert n_train + n_validation == 40 and n_validation > 0
    assert manifest["totals"]["train"]["pixels"] == n_train * 16 * 16
    entry = next(entry for entry in manifest["entries"]["train"] if entry["source"] == "sub/image 1.png")
    assert entry["caption"] == "caption 1"
    assert (entry["copy"], entry["length"], entry["pixels"]) == (0, 16, 256)
    assert not (tmp_path / "out/progress.jsonl").exists()
    assert len(ImageDataset(tmp_path / "out", "validation")) == n_validation


def test_number_of_workers_changes_nothing(raw, tmp_path):
    manifests = [prepare(raw, tmp_path / n, *AUGMENTED, "--num_workers", n) for n in ("0", "1", "2")]
    files = [contents(tmp_path / n) for n in ("0", "1", "2")]
    assert files[0] == files[1] == files[2] and len(files[0]) > 100
    assert manifests[0]["entries"] == manifests[1]["entries"] == manifests[2]["entries"]
    assert manifests[0]["fingerprint"] == manifests[2]["fingerprint"]


def test_seed_changes_augmented_copies_only(raw, tmp_path):
    for seed in ("1", "2"):
        prepare(raw, tmp_path / seed, *AUGMENTED, "--seed", seed)
    first, second = contents(tmp_path / "1"), contents(tmp_path / "2")
    assert first.keys() == second.keys()
    assert all((first[name] == second[name]) == ("-copy" not in name) for name in first)


def test_validation_holds_no_copies_and_no_source_of_training(raw, tmp_path):
    entries = prepare(raw, tmp_path / "out", *AUGMENTED, "--validation_fraction", "0.3")["entries"]
    sources = {split: {entry["source"] for entry in entries[split]} for split in entries}
    assert not sources["train"] & sources["validation"] and len(sources["train"] | sources["validation"]) == 40
    assert len(entries["train"]) == 3 * len(sources["train"])
    assert {entry["copy"] for entry in entries["validation"]} == {0}


def test_files_that_differ_in_their_endings_alone_stay_together(tmp_path):
    (tmp_path / "raw").mkdir()
    for i in range(20):
        pixels = np.random.default_rng(i).integers(0, 256, (24, 32, 3), dtype=np.uint8)
        for ending in ("png", "jpg"):
            Image.fromarray(pixels).save(tmp_path / f"raw/{i}.{ending}")
    for fraction in ("0.4", "0.001"):  # The other one holds out a single name.
        entries = prepare(tmp_path / "raw", tmp_path / fraction, "--validation_fraction", fraction)["entries"]
        stems = {split: {Path(entry["source"]).stem for entry in entries[split]} for split in entries}
        assert stems["validation"] and not stems["train"] & stems["validation"]
        assert len(entries["validation"]) == 2 * len(stems["validation"])


@pytest.mark.parametrize("cell", ['{"en": "a cat"}', "true", '"a\\u0000b"'])
def test_captions_that_are_no_texts_are_named_with_file_and_column(raw, tmp_path, cell):
    (raw / "metadata.csv").unlink()
    rows = ['{"file_name": "sub/image 0.png"}', '{"file_name": "sub/image 1.png", "text": ' + cell + "}"]
    (raw / "metadata.jsonl").write_text("\n".join(rows))
    with pytest.raises(ValueError, match=r"raw:train: sub/image 1.png, column 'text': a caption"):
        prepare(raw, tmp_path / "out")


def test_split_does_not_depend_on_other_files():
    chosen = [is_validation(f"{i}.png", 0.1) for i in range(5000)]
    assert 400 < sum(chosen) < 600
    assert all(is_validation(f"{i}.png", 0.2) for i, is_chosen in enumerate(chosen) if is_chosen)


def test_validation_set_of_its_own(raw, tmp_path):
    own = write_images(tmp_path / "own/test", 3, first_seed=100).parent
    manifest = prepare(
        raw, tmp_path / "out", "--validation_dataset", str(own), "--validation_split", "test", "--limit", "5"
    )
    assert [manifest["totals"][split]["samples"] for split in ("train", "validation")] == [5, 3]
    with pytest.raises(ValueError, match="would both read"):
        prepare(raw, tmp_path / "out", "--validation_dataset", str(raw))


def test_same_names_in_training_and_validation_stay_apart(raw, tmp_path):
    own = write_images(tmp_path / "own", 40, first_seed=100)
    (own / "metadata.csv").write_text((own / "metadata.csv").read_text().replace("caption", "other"))
    for _ in range(2):
        entries = prepare(raw, tmp_path / "out", "--validation_dataset", str(own))["entries"]
        assert [entry["caption"] for entry in entries["train"][:2]] == ["caption 0", "caption 1"]
        assert [entry["caption"] for entry in entries["validation"][:2]] == ["other 0", "other 1"]
    assert len(contents(tmp_path / "out")) == 80


def test_second_run_adds_only_what_is_missing(raw, tmp_path):
    out = tmp_path / "out"
    prepare(raw, out, "--limit", "10")
    old = {file: file.stat().st_mtime_ns for file in out.rglob("*.pt")}
    lost = next(iter(old))
    lost.unlink()
    captions = (raw / "metadata.csv").read_text().replace("caption 0", "better words")
    (raw / "metadata.csv").write_text(captions)
    manifest = prepare(raw, out)
    assert sum(totals["samples"] for totals in manifest["totals"].values()) == 40
    assert all(file.stat().st_mtime_ns == stamp for file, stamp in old.items() if file != lost) and lost.exists()
    assert manifest["entries"]["train"][0]["caption"] == "better words"
    prepare(raw, tmp_path / "fresh")
    assert contents(out) == contents(tmp_path / "fresh")


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> tuple[Path, dict[str, bytes]]:
    """150 images, and what an uninterrupted run makes of them."""
    folder = tmp_path_factory.mktemp("large")
    prepare(write_images(folder / "raw", 150), folder / "out", *AUGMENTED)
    return folder / "raw", contents(folder / "out")


def test_a_process_that_ends_by_itself_is_not_waited_for():
    with pytest.raises(AssertionError, match="ended too early, with exit code 3"):
        run_until(lambda: False, signal.SIGKILL, target=os._exit, args=(3,))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_run_is_finished_by_the_next(tmp_path, large, number):
    (raw, whole), out = large, tmp_path / "out"
    argv = [
        "--dataset_name",
        str(raw),
        "--output_dir",
        str(out),
        "--image_size",
        "16",
        "--num_workers",
        "1",
        *AUGMENTED,
    ]
    exit_code = run_until(has_files(out / "train", 20), number, target=ImageVAEPreprocess.main, args=(argv,))
    assert exit_code == (-number if number == signal.SIGKILL else 128 + number)
    time.sleep(0.1)  # The worker of a killed process ends by itself.
    written = len(contents(out))
    assert written < 400 and not (out / "manifest.json").exists()
    with pytest.raises(FileNotFoundError, match="incomplete"):
        ImageDataset(out, "train")
    with open(out / "progress.jsonl", "a") as journal:
        journal.write('{"key": "cut o')
    assert prepare(raw, out, *AUGMENTED)["broken"] == []
    assert contents(out) == whole
    assert not list(out.rglob(".*.tmp"))


def test_other_settings_are_refused_by_name(raw, tmp_path):
    out = tmp_path / "out"
    first = prepare(raw, out, "--limit", "4")
    before = contents(out)
    with pytest.raises(ValueError, match="image_size=16 there, 20 now; seed=42 there, 7 now") as caught:
        prepare(raw, out, "--image_size", "20", "--seed", "7")
    assert first["fingerprint"] in str(caught.value) and "Choose another --output_dir" in str(caught.value)
    assert contents(out) == before and json.loads((out / "manifest.json").read_text()) == first
    (out / "manifest.json").unlink()
    (out / "progress.jsonl").write_text(json.dumps(first) + "\n")
    with pytest.raises(ValueError, match="resize_mode='crop' there, 'pad' now"):
        prepare(raw, out, "--resize_mode", "pad")


def test_file_names_in_no_encoding_are_no_obstacle(raw, tmp_path):
    (raw / "metadata.csv").unlink()
    os.rename(raw / "sub/image 0.png", os.fsencode(raw) + b"/sub/\xff\xfe.png")
    prepare(raw, tmp_path / "out")
    entries = ImageDataset(tmp_path / "out", "train").entries
    assert any(entry["source"] == "sub/\\udcff\\udcfe.png" for entry in entries)


def test_damaged_manifest_is_named(raw, tmp_path):
    prepare(raw, tmp_path / "out", "--limit", "2")
    (tmp_path / "out/manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        prepare(raw, tmp_path / "out", "--limit", "2")


@pytest.mark.parametrize("damage", ["empty", "flipped", "other"])
def test_damaged_samples_are_written_again(raw, tmp_path, caplog, damage):
    out = tmp_path / "out"
    prepare(raw, out, "--limit", "5")
    whole = contents(out)
    first, second = sorted((out / "train").iterdir())[:2]
    changes = {"empty": b"", "flipped": bytes([first.read_bytes()[0] ^ 1]) + first.read_bytes()[1:]}
    first.write_bytes(changes.get(damage, second.read_bytes()))
    caplog.set_level("INFO")
    manifest = prepare(raw, out, "--limit", "5")
    assert f"{out}: 4 samples there already, 1 written in" in caplog.text
    assert contents(out) == whole
    assert f"{first} is damaged" in caplog.text and str(second) not in caplog.text
    entry = next(entry for entry in manifest["entries"]["train"] if entry["key"] == first.stem)
    assert entry["bytes"] == first.stat().st_size and entry["crc32"] == f"{zlib.crc32(first.read_bytes()):08x}"


def test_samples_of_earlier_versions_are_kept(raw, tmp_path):
    out = tmp_path / "out"
    manifest = prepare(raw, out, "--limit", "5")
    for entry in manifest["entries"]["train"] + manifest["entries"]["validation"]:
        del entry["bytes"], entry["crc32"]
    (out / "manifest.json").write_text(json.dumps(manifest))
    stamps = {file: file.stat().st_mtime_ns for file in out.rglob("*.pt")}
    prepare(raw, out, "--limit", "5")
    assert stamps == {file: file.stat().st_mtime_ns for file in out.rglob("*.pt")}


GARBAGE = [
    b"\0\0\0\0",
    b"\xff\xfe",
    b"5",
    b'["train"]',
    b'["train", {"key": 1}]',
    b"[[], {}]",
    b'{"settings": 1}',
    b"[" * 99999,
]


def test_garbage_in_a_journal_costs_its_samples_alone(raw, tmp_path, caplog):
    out = tmp_path / "out"
    prepare(raw, tmp_path / "whole", "--limit", "12")
    manifest = prepare(raw, out, "--limit", "6")
    # An interrupted run: a journal in place of the manifest.
    (out / "manifest.json").unlink()
    header = {name: manifest[name] for name in ("schema", "stage", "settings")}
    header["fingerprint"] = manifest["settings_fingerprint"]
    rows = [[split, entry] for split, entries in manifest["entries"].items() for entry in entries]
    del rows[0][1]["length"]  # It lacks what the others have.
    lines = [json.dumps(value).encode() for value in (header, *rows)]
    (out / "progress.jsonl").write_bytes(b"\n".join([*GARBAGE, *lines, *GARBAGE]))
    stamps = {file: file.stat().st_mtime_ns for file in out.rglob("*.pt")}
    prepare(raw, out, "--limit", "12")
    assert contents(out) == contents(tmp_path / "whole")
    rewritten = [file.stem for file, stamp in stamps.items() if file.stat().st_mtime_ns != stamp]
    assert rewritten == [rows[0][1]["key"]]
    assert f"progress.jsonl: {2 * len(GARBAGE)} damaged lines" in caplog.text


def test_a_flipped_letter_in_a_journal_costs_its_sample_alone(raw, tmp_path, caplog):
    out, journal = tmp_path / "out", tmp_path / "out" / "progress.jsonl"
    manifest = prepare(raw, out, "--limit", "3")
    entry = manifest["entries"]["train"][0]
    (out / "manifest.json").unlink()
    header = {name: manifest[name] for name in ("schema", "stage", "settings")}
    header["fingerprint"] = manifest["settings_fingerprint"]
    with Journal(out, header) as lines:
        lines.add("train", manifest["entries"]["train"])
    journal.write_text(journal.read_text().replace(f'"source": "{entry["source"]}"', '"source": "others.png"'))
    assert prepare(raw, out, "--limit", "3")["entries"] == manifest["entries"]
    assert "progress.jsonl: 1 damaged lines" in caplog.text


def test_a_journal_without_its_settings_is_not_believed(raw, tmp_path):
    out = tmp_path / "out"
    manifest = prepare(raw, out, "--limit", "3")
    (out / "manifest.json").unlink()
    lines = [json.dumps(["train", entry]) for entry in manifest["entries"]["train"]]
    (out / "progress.jsonl").write_text("\n".join(lines))
    stamps = {file.stat().st_mtime_ns for file in (out / "train").iterdir()}
    prepare(raw, out, "--limit", "3")
    assert not stamps & {file.stat().st_mtime_ns for file in (out / "train").iterdir()}


def test_a_second_preprocessing_into_the_same_folder_is_refused(raw, tmp_path, caplog):
    with only_writer(tmp_path / "out", "wait"):
        argv = ["--dataset_name", str(raw), "--output_dir", f"{tmp_path}/x/../out", "--num_workers", "0"]
        (tmp_path / "x").mkdir()
        with pytest.raises(SystemExit) as stop:
            ImageVAEPreprocess.main(argv)
        assert stop.value.code == 2 and f"process {os.getpid()} on " in caplog.text and "--output_dir" in caplog.text
        assert os.listdir(tmp_path / "out") == [".lock"]
    prepare(raw, tmp_path / "out")


class OverflowingPreprocess(ImageVAEPreprocess):
    """Divides by the red channel's minimum, which is 0 in some images."""

    def encode(self, example, generator):
        image = super().encode(example, generator)["image"].float()
        return {"image": image / (0 if example.name == "sub/image 3.png" else 1)}


def test_tensors_that_are_not_finite_are_reported_and_left_out(raw, tmp_path):
    argv = ["--dataset_name", str(raw), "--output_dir", str(tmp_path / "out"), "--num_workers", "0"]
    manifest = OverflowingPreprocess.main([*argv, "--max_broken_fraction", "0.03"])
    (broken,) = manifest["broken"]
    assert broken["source"] == "sub/image 3.png" and "'image' holds" in broken["reason"]
    assert sum(totals["samples"] for totals in manifest["totals"].values()) == 39
    assert not list((tmp_path / "out").rglob("sub_image_3-*"))


def test_foreign_folder_is_not_written_into(raw, tmp_path):
    with pytest.raises(ValueError, match="not empty and no preprocessed folder"):
        prepare(raw, raw)


def test_a_complete_folder_loses_no_samples_to_fewer_wanted_ones(raw, tmp_path):
    out, copies = tmp_path / "out", [*AUGMENTED[2:], "--num_augmented_copies"]
    prepare(raw, out, "--limit", "3", *copies, "2")
    before = contents(out)
    with pytest.raises(ValueError, match=r"out was made with --limit=3; --limit=2 would delete samples: choose ano"):
        prepare(raw, out, "--limit", "2", *copies, "2")
    with pytest.raises(ValueError, match="or give --num_augmented_copies=2"):
        prepare(raw, out, "--limit", "4", *copies, "1")
    assert contents(out) == before
    prepare(raw, out, "--limit", "4", *copies, "2")
    assert contents(out).items() > before.items()
    prepare(raw, out, *copies, "2")
    with pytest.raises(ValueError, match="made with --limit=-1; --limit=99 would"):
        prepare(raw, out, "--limit", "99", *copies, "2")


def test_broken_files_are_reported_and_left_out(raw, tmp_path):
    (raw / "sub/image 3.png").write_bytes(b"no image")
    (raw / "sub/image 5.png").unlink()
    manifest = prepare(raw, tmp_path / "out", "--max_broken_fraction", "0.05", "--num_workers", "2")
    assert [broken["source"] for broken in manifest["broken"]] == ["sub/image 3.png", "sub/image 5.png"]
    assert manifest["broken"][0]["reason"] == "ValueError: no image of a known format (8 bytes)"
    assert sum(totals["samples"] for totals in manifest["totals"].values()) == 38


def test_too_many_broken_files_stop_the_run_and_repair_finishes_it(raw, tmp_path):
    good = (raw / "sub/image 3.png").read_bytes()
    (raw / "sub/image 3.png").write_bytes(good[:100])
    with pytest.raises(ValueError, match=r"1 of 40 raw files are broken.*sub/image 3\.png \(OSError"):
        prepare(raw, tmp_path / "out")
    assert not (tmp_path / "out/manifest.json").exists()
    (raw / "sub/image 3.png").write_bytes(good)
    assert prepare(raw, tmp_path / "out")["broken"] == []


def test_small_images_are_skipped_without_counting_as_broken(raw, tmp_path):
    Image.new("RGB", (100, 10)).save(raw / "sub/image 2.png")
    manifest = prepare(raw, tmp_path / "out", "--max_broken_fraction", "0")
    assert manifest["skipped"] == [
        {"source": "sub/image 2.png", "reason": "100x10 pixels, the shorter side is under 16"}
    ]
    with pytest.raises(ValueError, match=r"no training samples among 40 raw ones; .*; and 35 more"):
        prepare(raw, tmp_path / "none", "--min_image_size", "500")


def test_unwritable_file_stops_the_run_with_its_name(raw, tmp_path):
    key = sample_key("sub/image 0.png", 0, 0)
    split = "validation" if is_validation("sub/image 0.png", 0.05) else "train"
    prepare(raw, tmp_path / "out", "--limit", "1", "--validation_fraction", "0")
    (tmp_path / f"out/{split}/{key}.pt").unlink()
    (tmp_path / f"out/{split}/{key}.pt").mkdir()
    (tmp_path / "out/manifest.json").unlink()
    (tmp_path / "out/progress.jsonl").touch()
    with pytest.raises(OSError, match=key):
        prepare(raw, tmp_path / "out", "--validation_fraction", "0")


class DyingPreprocess(ImageVAEPreprocess):
    """Its worker ends as if the system had killed it."""

    def encode(self, example, generator):
        os._exit(9)


def test_dead_worker_is_an_error(raw, tmp_path):
    argv = ["--dataset_name", str(raw), "--output_dir", str(tmp_path / "out"), "--num_workers", "1"]
    with pytest.raises(ChildProcessError, match="fewer --num_workers"):
        DyingPreprocess(parse_arguments(DyingPreprocess.arguments_class, argv, "")).run()


def test_keys_are_safe_unique_and_legible():
    names = ["a/b.png", "a_b.png", "a/b.jpg", "A/B.png", "ä.png", "../../etc/passwd", "x" * 300 + ".png", "日本.png"]
    keys = [sample_key(name, occurrence, copy) for name in names for occurrence in (0, 1) for copy in (0, 1)]
    assert len({key.lower() for key in keys}) == len(keys)
    assert all(len(key) < 100 and all(c.isalnum() or c in "_-" for c in key) and key.isascii() for key in keys)
    assert sample_key("cats/tom cat.png", 0, 2).startswith("cats_tom_cat-")


def test_command_repeats_the_run():
    argv = ["--dataset_name", "my data", "--limit", "3", "--validation_fraction", "0.5"]
    args = parse_arguments(PreprocessArguments, argv, "")
    words = command_words("script.py", args)
    assert parse_arguments(PreprocessArguments, words[1:], "") == args
    assert words == ["script.py", *argv]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--dataset_name is missing"),
        (["--dataset_name", "x", "--limit", "0"], "--limit=0 reads nothing"),
        (["--dataset_name", "x", "--validation_fraction", "1"], "must be < 1"),
        (["--dataset_name", "x", "--validation_split", "test"], "--validation_split has no effect"),
        (["--dataset_name", "x", "--validation_dataset", "y", "--validation_fraction", "0.1"], "has no effect"),
        (["--dataset_name", "x", "--sead", "3"], "unknown argument --sead; did you mean '--seed'"),
    ],
)
def test_wrong_flags(flags, message, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_arguments(PreprocessArguments, flags, "")
    assert caught.value.code == 2 and message in capsys.readouterr().err


def test_progress_is_drawn_on_a_terminal(raw, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    prepare(raw, tmp_path / "out")
    assert "image_vae" in (shown := capsys.readouterr().err) and "40/40" in shown


def test_wrong_caption_column_is_refused(raw, tmp_path):
    with pytest.raises(ValueError, match=r"--caption_column='caption' is no column .*there is: image, text"):
        prepare(raw, tmp_path / "out", "--caption_column", "caption")


def test_main_reports_a_missing_source_and_exits(tmp_path, caplog):
    with pytest.raises(SystemExit) as caught:
        ImageVAEPreprocess.main(["--dataset_name", str(tmp_path / "gone"), "--output_dir", str(tmp_path / "out")])
    assert caught.value.code == 2 and "gone does not exist" in caplog.text
    assert not (tmp_path / "out").exists()


class UndeclaredPreprocess(Preprocess):
    name, media, suffixes = "films", "film", (".film",)

    def settings(self):
        return {"length": self.args.film_length}


@pytest.mark.parametrize("source, parts", [("local", ["--film_length", "arguments_class"]), ("org/set", ["'film'"])])
def test_an_unfinished_stage_says_what_it_lacks(source, parts, tmp_path, caplog):
    (tmp_path / "local").mkdir()
    (tmp_path / "local/a.film").touch()
    name = str(tmp_path / source) if source == "local" else source
    with pytest.raises(SystemExit) as stop:
        UndeclaredPreprocess.main(["--dataset_name", name, "--output_dir", str(tmp_path / "out")])
    assert stop.value.code == 2 and all(part in caplog.text for part in parts)


def test_a_column_is_found_that_lost_its_capitals():
    source = Source("x", "", "image", ["image", "text"], [])
    assert (
        Preprocess(PreprocessArguments(caption_column="Text", output_dir="x")).find_column(
            source, "caption_column", ()
        )
        == "text"
    )
