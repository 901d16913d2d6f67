"""The list of complete checkpoints: what is on it, and that nothing else can be chosen."""

import os
import shlex
import shutil
from pathlib import Path

import pytest

from model.presets import IMAGE_VAE, RECURRENT_VAE
from tests.test_docs import SCRIPTS
from utils.app.metrics import names as metrics_names
from utils.app.run_folders import run_names
from utils.app.runs import TRAINED_BY, Runs
from utils.command_line import parse_arguments
from utils.exporting.stages import MODELS

NAME = "image_diffusion/small/checkpoint-4"


@pytest.fixture
def copied(runs, tmp_path):
    """A folder of runs of its own, with a second, newer checkpoint, a copied VAE and an incomplete one."""
    folder = tmp_path / "runs"
    shutil.copytree(runs, folder)
    run = folder / "image_diffusion" / "small"
    shutil.copytree(run / "checkpoint-4", run / "checkpoint-12")
    os.utime(run / "checkpoint-12" / "COMPLETE.json", (2_000_000_000,) * 2)
    shutil.copytree(run / "checkpoint-4", run / "vae")
    shutil.copytree(run / "checkpoint-4", run / "checkpoint-20")
    (run / "checkpoint-20" / "COMPLETE.json").unlink()
    return folder


def test_complete_checkpoints_are_listed_newest_first(copied):
    listed = Runs(copied)
    assert listed.names("image_diffusion") == ["image_diffusion/small/checkpoint-12", NAME]
    assert listed.names("vocoder") == []
    assert listed.choose(NAME, "vocoder", "image_diffusion").folder == copied / NAME
    weights = copied / NAME / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert listed.names("image_diffusion") == ["image_diffusion/small/checkpoint-12"]
    assert Runs(copied / "nothing").names("image_diffusion") == []


def test_exported_folders_are_listed_under_any_name(copied):
    shutil.move(copied / NAME, copied / "my_model")
    assert "my_model" in Runs(copied).names("image_diffusion")


@pytest.mark.parametrize(
    "name",
    [
        "../runs/" + NAME,
        "image_diffusion/../" + NAME,
        NAME + "/",
        "image_diffusion/small",
        "image_diffusion/small/checkpoint-20",
        "image_diffusion/small/vae",
        "/etc",
        "",
        None,
    ],
)
def test_what_is_not_listed_cannot_be_chosen(copied, name):
    with pytest.raises(ValueError, match=r"is no complete checkpoint of image_diffusion in .*; choose one of"):
        Runs(copied).choose(name, "image_diffusion")
    with pytest.raises(ValueError, match="is no complete checkpoint"):
        Runs(copied).choose(str(copied / NAME), "image_diffusion")


def test_links_that_lead_out_are_not_followed(copied, tmp_path):
    outside = tmp_path / "elsewhere" / "checkpoint-4"
    shutil.copytree(copied / NAME, outside)
    (copied / "linked").symlink_to(outside.parent)
    (copied / "image_diffusion" / "inside").symlink_to(copied / "image_diffusion" / "small")
    names = Runs(copied).names("image_diffusion")
    assert "image_diffusion/inside/checkpoint-4" in names and not any(name.startswith("linked") for name in names)
    with pytest.raises(ValueError, match="is no complete checkpoint"):
        Runs(copied).choose("linked/checkpoint-4", "image_diffusion")
    # The folder of runs itself may be a link.
    (tmp_path / "link").symlink_to(copied)
    assert NAME in Runs(tmp_path / "link").names("image_diffusion")


def test_what_a_link_leads_to_elsewhere_is_not_looked_at(copied, tmp_path, monkeypatch):
    outside = tmp_path / "elsewhere"
    shutil.copytree(copied / "image_diffusion", outside / "image_diffusion")
    (copied / "linked").symlink_to(outside)
    (copied / "image_diffusion" / "small" / "checkpoint-30").symlink_to(outside / "image_diffusion/small/checkpoint-4")
    listed: list[Path] = []
    for name in ("iterdir", "glob", "read_text", "read_bytes"):
        original = getattr(Path, name)

        def spy(self, *args, original=original, **kwargs):
            listed.append(self.resolve())
            return original(self, *args, **kwargs)

        monkeypatch.setattr(Path, name, spy)
    for names in (Runs(copied).names("image_diffusion"), run_names(Runs(copied)), metrics_names(Runs(copied))):
        assert names and not any("linked" in name or "checkpoint-30" in name for name in names)
    assert copied in listed and not any(path.is_relative_to(outside) for path in listed)


def test_a_kind_without_a_checkpoint_says_what_trains_one(copied):
    words = (
        r"no complete checkpoint of vocoder; train one with `python preprocess_audio_vocoder_dataset\.py .*`, then "
    )
    with pytest.raises(ValueError, match=words + r"`python pretrain_vocoder\.py .*`\. `make demo` trains"):
        Runs(copied).choose("x", "vocoder")
    blocks = Runs(copied).advice_of_page("image_vae", "recurrent_vae").split("```")[1::2]
    assert [block.split("\n")[1:-1] for block in blocks] == [
        [*TRAINED_BY[kind]] for kind in ("image_vae", "recurrent_vae")
    ]


def test_the_commands_that_train_are_commands():
    assert TRAINED_BY.keys() == MODELS.keys()
    for kind, lines in TRAINED_BY.items():
        arguments = []
        for line in lines:
            program, script, *words = shlex.split(line)
            arguments.append(parse_arguments(SCRIPTS[script], words, ""))
            assert program == "python" and (len(arguments) < len(lines)) == (
                script.startswith("preprocess_") or ("_vae.py" in script and not kind.endswith("vae"))
            )
        stage = {"text": "multimodal", "captioned_sounds": "audio_diffusion"}.get(kind, kind)
        assert arguments[-1].stage == stage
        if hasattr(arguments[0], "image_size"):
            assert arguments[0].image_size == IMAGE_VAE["tiny"]["image_size"] == RECURRENT_VAE["tiny"]["image_size"]
        # A step reads what one before has written.
        made = {each.vae_checkpoint.rpartition("/")[2] for each in arguments if getattr(each, "vae_checkpoint", "")}
        assert made <= {each.run_name for each in arguments if hasattr(each, "run_name")}
