"""Exported folders: they open with the averaged weights, scripts accept them as checkpoints, and nothing is mixed."""

import json
import shlex

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import evaluate
import model.auto  # noqa: F401
from inference.export_model import main
from inference.generate_text import generate
from model.causal import MegaTransformerForCausalLM
from model.image.vae import ImageVAE
from tests.helpers.image_vae_checkpoint import save_checkpoint
from tests.helpers.text_cache import make_text
from tests.helpers.text_checkpoint import save_text_checkpoint
from utils.checkpoints import load_model
from utils.command_line import parse_arguments
from utils.exporting.card import evaluation, evaluation_command
from utils.generation.arguments.text import GenerateTextArguments
from utils.generation.latents import vae_fingerprint


@pytest.fixture(scope="module")
def text_run(tmp_path_factory):
    cache = make_text(tmp_path_factory.mktemp("texts") / "bytes", 20)
    return save_text_checkpoint(tmp_path_factory.mktemp("runs") / "small", cache, "tiny")


@pytest.fixture(scope="module")
def vae_run(image_cache, tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("runs") / "vae", image_cache)


def export(checkpoint, output, *words):
    return main(["--checkpoint", str(checkpoint), "--output", str(output), *words])


def test_a_language_model_opens_with_its_averaged_weights(text_run, tmp_path, capsys):
    folder = export(text_run, tmp_path / "my model", "--license", "mit")
    # The command is run as it is printed.
    *_, last = capsys.readouterr().out.splitlines()
    assert last.startswith("next: python inference/generate_text.py --checkpoint ")
    words = shlex.split(last)[3:]
    words += ["--max_new_tokens", "2", "--output_dir", str(tmp_path / "texts")]
    generate(parse_arguments(GenerateTextArguments, words, ""))
    assert (tmp_path / "texts" / "000.txt").read_text().startswith("The")
    ours = load_model(MegaTransformerForCausalLM, text_run)
    ids = AutoTokenizer.from_pretrained(folder)("a list of", return_tensors="pt").input_ids
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
        assert (theirs - ours(ids).logits).abs().max() < 1e-5
        raw = load_model(MegaTransformerForCausalLM, text_run, "raw")(ids).logits
    assert (theirs - raw).abs().max() > 1e-2
    assert "license: mit" in (folder / "README.md").read_text()


def test_an_image_vae_keeps_its_fingerprint_and_is_evaluated(vae_run, tmp_path):
    folder = export(vae_run, tmp_path / "out")
    assert isinstance(AutoModel.from_pretrained(folder), ImageVAE)
    assert vae_fingerprint(folder) == vae_fingerprint(vae_run)
    (folder / "README.md").write_text("edited")  # A card is edited by whoever publishes the model.
    report = evaluate.main(["--checkpoint", str(folder), "--max_samples", "2"])
    assert (report["step"], report["weights"]) == (4, "ema")
    # The report says by which command it was made.
    assert report["arguments"] == {"checkpoint": str(folder), "max_samples": 2}
    words = shlex.split(evaluation_command(report))
    assert words == ["python", "evaluate.py", "--checkpoint", str(folder), "--max_samples", "2"]
    earlier = {"checkpoint": "runs/a b"}
    assert evaluation_command(earlier) == "python evaluate.py --checkpoint 'runs/a b'"
    assert "arguments.max_samples" not in evaluation(report) and shlex.join(words) in evaluation(report)
    assert json.loads((folder / "metrics.json").read_text())["stage"] == "image_vae"


def test_half_precision_is_stored(text_run, tmp_path):
    folder = export(text_run, tmp_path / "out", "--dtype", "bfloat16")
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16


def test_a_folder_with_content_is_refused(vae_run, tmp_path, caplog):
    (tmp_path / "note").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        export(vae_run, tmp_path)
    assert stop.value.code == 2 and str(tmp_path) in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["note"]
