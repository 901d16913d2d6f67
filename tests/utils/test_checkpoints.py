import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.causal import MegaTransformerForCausalLM
from utils.checkpoints import (
    COMPLETE,
    EMA,
    STAGE,
    check_files,
    checkpoints_in,
    data_of,
    is_complete,
    load_model,
    mark_complete,
    newest_complete,
    read_stage,
    resolve_checkpoint,
    warn_of_former_data,
    without_copies,
    write_card,
    write_json,
)
from utils.saving import rotate


def checkpoint(run, step, complete=True, **record):
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "stage.json").write_text(json.dumps(record))
    if complete:
        mark_complete(folder)
    return folder


def test_half_written_is_passed_over(tmp_path):
    whole = checkpoint(tmp_path, 2)
    checkpoint(tmp_path, 10, complete=False)
    assert newest_complete(tmp_path) == whole == resolve_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="not written completely"):
        resolve_checkpoint(tmp_path / "checkpoint-10")
    with pytest.raises(FileNotFoundError, match=r"stage\.json: it is a file"):
        resolve_checkpoint(whole / "stage.json")


def test_truncated_or_missing_file_is_not_complete(tmp_path):
    folder = checkpoint(tmp_path, 2)
    (folder / "model.safetensors").write_bytes(b"wei")
    assert not is_complete(folder)
    (folder / "model.safetensors").unlink()
    assert not is_complete(folder)
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        resolve_checkpoint(tmp_path)


def test_rotation_counts_complete_ones_only(tmp_path):
    for step in (1, 2, 3):
        checkpoint(tmp_path, step)
    checkpoint(tmp_path, 1000, complete=False)
    rotate(tmp_path, 2)
    assert [folder.name for folder in checkpoints_in(tmp_path)] == ["checkpoint-2", "checkpoint-3", "checkpoint-1000"]


@pytest.mark.parametrize("is_tied", [True, False])
def test_tied_weights_are_written_once_and_loaded_under_both_names(tmp_path, is_tied):
    names = ("model.embed_tokens.weight", "lm_head.weight")
    model = MegaTransformerForCausalLM.from_preset("tiny", hidden_size=64, n_layers=1, tie_word_embeddings=is_tied)
    averaged = {name: value + 1 for name, value in model.state_dict().items()}
    folder = tmp_path / "checkpoint-1"
    model.save_pretrained(folder)
    save_file(without_copies(model, averaged), folder / EMA)
    mark_complete(folder)
    assert len(set(names) & load_file(folder / EMA).keys()) == (1 if is_tied else 2)
    for kind, state in (("raw", model.state_dict()), ("ema", averaged)):
        loaded = load_model(MegaTransformerForCausalLM, folder, kind).state_dict()
        assert all(torch.equal(loaded[name], state[name]) for name in state)
        assert torch.equal(*(loaded[name] for name in names)) == is_tied


# ---- Damage.


def flip_byte(file, position=-3):
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


def without_digests(folder):
    """As a checkpoint of an older version lists its files."""
    write_json(folder / COMPLETE, {"files": json.loads((folder / COMPLETE).read_text())["files"]})


@pytest.fixture
def model_folder(tmp_path):
    """A checkpoint of a small model whose averaged weights are all 1 above the raw ones."""
    model = MegaTransformerForCausalLM.from_preset("tiny", hidden_size=64, n_layers=1)
    folder = tmp_path / "run" / "checkpoint-4"
    model.save_pretrained(folder)
    save_file(without_copies(model, {name: v + 1 for name, v in model.state_dict().items()}), folder / EMA)
    write_json(folder / STAGE, {"stage": "multimodal", "preset": "tiny", "arguments": {}, "data": {}})
    torch.save({"state": torch.arange(1000)}, folder / "optimizer.pt")
    write_card(folder, MegaTransformerForCausalLM, "multimodal")
    mark_complete(folder)
    return folder


@pytest.mark.parametrize("name", ["optimizer.pt", "model.safetensors", EMA, STAGE, "README.md"])
def test_a_flipped_byte_is_named_and_the_checkpoint_before_goes_on(model_folder, name, caplog):
    before = checkpoint(model_folder.parent, 2)
    check_files(model_folder)
    flip_byte(model_folder / name)
    assert is_complete(model_folder) and newest_complete(model_folder.parent) == model_folder  # by size alone
    with pytest.raises(ValueError, match=rf"{name} is damaged: .*; use another checkpoint .*\(checkpoint-2\)"):
        check_files(model_folder)
    assert newest_complete(model_folder.parent, check=True) == before
    assert f"{name} is damaged" in caplog.text
    flip_byte(before / "model.safetensors")
    with pytest.raises(ValueError, match=rf"{name} is damaged.* no checkpoint of {before.parent} is whole"):
        newest_complete(model_folder.parent, check=True)


def test_only_what_is_read_is_checked(model_folder):
    for name in ("optimizer.pt", "model.safetensors"):
        flip_byte(model_folder / name)
    load_model(MegaTransformerForCausalLM, model_folder)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        load_model(MegaTransformerForCausalLM, model_folder, "raw")


@pytest.mark.parametrize("name", ["optimizer.pt", EMA, "config.json"])
def test_older_checkpoints_load_and_the_form_of_their_files_is_checked(model_folder, name):
    without_digests(model_folder)
    check_files(model_folder)
    load_model(MegaTransformerForCausalLM, model_folder)
    size = (model_folder / name).stat().st_size
    (model_folder / name).write_text("not what it should be".ljust(size))
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        check_files(model_folder)


def test_a_flipped_byte_in_an_older_file_of_torch_is_found(model_folder):
    without_digests(model_folder)
    flip_byte(model_folder / "optimizer.pt", (model_folder / "optimizer.pt").stat().st_size // 2)
    with pytest.raises(ValueError, match=r"optimizer\.pt is damaged: the checksum of .*data/0"):
        check_files(model_folder)


@pytest.mark.parametrize(
    "mark",
    [
        *("text", "[]", "{}", '{"files": []}', '{"files": {"a": "b"}}', '{"files": {}, "sha256": {"a": "b"}}'),
        f'{{"files": {{"config.json": 3}}, "sha256": {{"config.jsoo": "{"0" * 64}"}}}}',
        '{"files": {}, "sha257": {}}',
    ],
)
def test_a_damaged_mark_is_named(model_folder, mark):
    (model_folder / COMPLETE).write_text(mark)
    assert not is_complete(model_folder)
    with pytest.raises(FileNotFoundError, match=rf"checkpoint-4 was not written completely \(.*{COMPLETE}"):
        resolve_checkpoint(model_folder)


@pytest.mark.parametrize(
    ("record", "part"),
    [
        ("text", "is damaged"),
        ("[1, 2]", r"is damaged \(it holds \[1, 2\], not an object\)"),
        ("{}", "lacks 'stage'"),
        ('{"stage": ["multimodal"]}', "stage=.* must be str"),
        ('{"stage": "multimodal", "data": []}', "data=.* must be dict"),
        ('{"stage": "vocoder"}', "is of stage 'vocoder'; one of stage 'multimodal' is needed"),
    ],
)
def test_a_damaged_record_is_named(model_folder, record, part):
    (model_folder / STAGE).write_text(record)
    mark_complete(model_folder)
    with pytest.raises(ValueError, match=f"checkpoint-4.*{part}"):
        read_stage(model_folder, "multimodal")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"text"),
        ("config.json", b"[]"),
        ("config.json", b'{"hidden_size": -1}'),
        ("config.json", b"{}"),  # weights of another size than the defaults
        (EMA, b"text"),
        (EMA, b""),
    ],
)
def test_what_cannot_be_loaded_is_named(model_folder, name, content):
    (model_folder / name).write_bytes(content)
    mark_complete(model_folder)
    expected = EMA if content == b"{}" else name
    with pytest.raises((ValueError, OSError), match=f"checkpoint-4/{expected}"):
        load_model(MegaTransformerForCausalLM, model_folder)


# ---- Names and places.


def test_a_checkpoint_keeps_its_meaning_under_another_name(model_folder):
    renamed = model_folder.rename(model_folder.parent / "best")
    assert resolve_checkpoint(renamed) == renamed and read_stage(renamed)["stage"] == "multimodal"
    checkpoint(model_folder.parent, 8)
    with pytest.raises(FileNotFoundError, match=r"checkpoint-4: .*; .*run has checkpoint-8"):
        resolve_checkpoint(model_folder)


@pytest.mark.parametrize("recorded", ["cached_datasets/texts", "/gone/project/cached_datasets/texts"])
def test_data_that_moved_with_its_run_is_found_from_any_working_folder(tmp_path, recorded, monkeypatch):
    project = tmp_path / "project"
    cache = project / "cached_datasets" / "texts"
    cache.mkdir(parents=True)
    (cache / "manifest.json").write_text('{"fingerprint": "a"}')
    folder = checkpoint(project / "runs" / "multimodal" / "demo", 4, data={"folder": recorded, "fingerprint": "a+b"})
    elsewhere = tmp_path / "cached_datasets" / "texts"
    elsewhere.mkdir(parents=True)
    (elsewhere / "manifest.json").write_text('{"fingerprint": "other"}')
    monkeypatch.chdir(tmp_path)
    assert data_of(folder) == cache
    (cache / "manifest.json").write_text('{"fingerprint": "rebuilt"}')
    assert str(data_of(folder)) == recorded


def test_a_run_on_a_former_content_of_its_data_is_told(tmp_path, caplog):
    cache = tmp_path / "cache"
    cache.mkdir()
    folder = checkpoint(tmp_path / "runs" / "demo", 4, data={"folder": str(cache), "fingerprint": "a+b"})
    for manifest, is_told in (
        ({"fingerprint": "a"}, False),
        ({"fingerprint": "new", "settings_fingerprint": "a"}, False),  # A run of an earlier version.
        ({"fingerprint": "new", "settings_fingerprint": "s"}, True),
    ):
        write_json(cache / "manifest.json", manifest)
        caplog.clear()
        warn_of_former_data(folder)
        assert (
            f"{folder} was trained on a former content of {cache} (fingerprint a, now new)" in caplog.text
        ) == is_told
    (cache / "manifest.json").unlink()
    caplog.clear()
    warn_of_former_data(folder), warn_of_former_data(checkpoint(tmp_path / "runs" / "other", 4))
    assert not caplog.text


def test_the_line_of_the_card_loads_the_averaged_weights(model_folder):
    lines = (model_folder / "README.md").read_text().split("```python\n")[1].partition("\n```")[0]
    assert "\n" not in lines
    names = {}
    exec(lines, names)
    averaged = load_file(model_folder / EMA)
    assert all(torch.equal(names["model"].state_dict()[name], averaged[name]) for name in averaged)
    raw = MegaTransformerForCausalLM.from_pretrained(model_folder).state_dict()
    assert all(torch.equal(raw[name] + 1, averaged[name]) for name in averaged)
    text = (model_folder / "README.md").read_text()
    assert "`model.safetensors` holds the raw weights" in text and "`from_pretrained`" in text
