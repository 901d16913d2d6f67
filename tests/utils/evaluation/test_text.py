"""evaluate.py on small language models: numbers against their definitions, and what it refuses."""

import json
import math
import re
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import evaluate
from dataset_loading.text.windows import TextDataset
from model.causal import MegaTransformerForCausalLM
from tests.helpers.text_cache import make_text
from tests.helpers.text_checkpoint import save_text_checkpoint
from utils.checkpoints import load_model
from utils.evaluation import text as text_evaluator
from utils.metrics import text as text_metrics

ROOT = Path(__file__).resolve().parents[3]
# A core that converges quickly, so that tokens leave it at different steps.
CORE = {"recurrent_mean_thinking_steps": 6, "recurrent_max_thinking_steps": 16, "recurrent_exit_criterion": "kl"}


@pytest.fixture(scope="module")
def text_cache(tmp_path_factory):
    return make_text(tmp_path_factory.mktemp("texts") / "bytes")


@pytest.fixture(scope="module")
def flat(text_cache, tmp_path_factory):
    return save_text_checkpoint(tmp_path_factory.mktemp("runs") / "flat", text_cache, "tiny", loss_chunk_size=64)


@pytest.fixture(scope="module")
def deep(text_cache, tmp_path_factory):
    return save_text_checkpoint(tmp_path_factory.mktemp("runs") / "deep", text_cache, "recurrent-tiny", **CORE)


@pytest.fixture(scope="module")
def report(flat):
    return evaluate.main(["--checkpoint", str(flat.parent), "--batch_size", "3", "--speed_tokens", "4"])


@pytest.fixture(scope="module")
def deep_report(deep):
    words = f"--checkpoint {deep.parent} --batch_size 5 --speed_tokens 4 --thinking_steps 1 6 8"
    return evaluate.main([*words.split(), "--exit_thresholds", "0.001", "0.3", "1e9"])


def test_numbers_are_those_of_all_targets(report, flat, text_cache):
    texts, model = TextDataset(text_cache, "validation", 32), load_model(MegaTransformerForCausalLM, flat)
    nats, hits = 0.0, 0
    for item in texts:
        batch = {name: item[name][None] for name in ("input_ids", "segment_ids")}
        with torch.no_grad():
            logits = model(**batch, use_cache=False).logits[0, :-1].double()
        ids = item["input_ids"][1:]
        counted = item["segment_ids"][1:] == item["segment_ids"][:-1]
        nats -= logits.log_softmax(-1).gather(1, ids[:, None])[:, 0][counted].sum().item()
        hits += int((logits.argmax(-1) == ids)[counted].sum())
    scores = report["scores"]["model"]
    assert report["n_targets"] == texts.n_targets and report["n_bytes"] == texts.n_bytes
    assert scores["loss"] == pytest.approx(nats / texts.n_targets, rel=1e-6)
    assert scores["bits_per_byte"] == pytest.approx(nats / math.log(2) / texts.n_bytes, rel=1e-6)
    assert scores["accuracy"] == pytest.approx(hits / texts.n_targets, abs=1e-9)
    assert report == json.loads((flat.parent / "metrics.json").read_text())
    assert report["data"]["is_the_runs_own"] and report["tokens_per_second"] > 0


def test_baselines_have_their_definitions(report, text_cache):
    train, held_out = (TextDataset(text_cache, split, 32) for split in ("train", "validation"))
    counts = [1 + int((train.tokens == token).sum()) for token in range(258)]
    nats = 0.0
    for number in range(held_out.n_documents):
        nats -= sum(math.log(counts[token] / sum(counts)) for token in held_out.document(number)[1:].tolist())
    scores = report["scores"]
    assert scores["unigram"]["loss"] == pytest.approx(nats / held_out.n_targets, rel=1e-6)
    text = b"".join(bytes((held_out.document(n)[1:-1] - 2).tolist()) for n in range(held_out.n_documents))
    assert len(text) == held_out.n_bytes
    packed = 8 * (len(zlib.compress(text, 9)) + 12) / len(text)  # gzip's header and check are 12 bytes longer.
    assert scores["gzip"]["bits_per_byte"] == pytest.approx(packed, rel=1e-3)
    assert "lzma" in scores and scores["unigram"]["bits_per_byte"] > scores["gzip"]["bits_per_byte"]


def test_depths_and_exits(deep_report, deep):
    depths = {row["steps"]: row for row in deep_report["thinking_steps"]}
    assert list(depths) == [1, 6, 8]
    assert depths[6]["loss"] == pytest.approx(deep_report["scores"]["model"]["loss"], rel=1e-6)
    assert depths[1]["loss"] != pytest.approx(depths[6]["loss"], rel=1e-3)
    rows = deep_report["exits"]
    assert [row["threshold"] for row in rows] == [0, 0.001, 0.3, 1e9]
    steps = [row["thinking_steps"] for row in rows]
    assert steps[0] == 6 and steps[-1] == 2 and steps == sorted(steps, reverse=True) and 2 < steps[2] < 6
    assert rows[0]["loss_difference"] == 0 and rows[0]["relative_seconds"] == 1
    assert all(row["tokens_per_second"] > 0 for row in rows)
    assert rows[0]["loss"] == pytest.approx(deep_report["scores"]["model"]["loss"], rel=1e-6)
    events = EventAccumulator(str(deep.parent), {"scalars": 0}).Reload()
    (name,) = [tag for tag in events.Tags()["scalars"] if tag.endswith("loss_by_thinking_steps")]
    assert [event.step for event in events.Scalars(name)] == [1, 6, 8]


def test_another_criterion_and_limit(deep, tmp_path):
    words = f"--checkpoint {deep} --output_dir {tmp_path} --max_samples 4 --weights raw --speed_tokens 0"
    exits = "--exit_thresholds 0.5 --exit_criterion latent_difference --max_thinking_steps 12"
    report = evaluate.main([*words.split(), *exits.split()])
    assert report["exits"][0]["thinking_steps"] == 12 and report["exits"][1]["thinking_steps"] < 12
    assert "tokens_per_second" not in report and report["data"]["n_samples"] == 4 and report["weights"] == "raw"


@pytest.mark.parametrize(
    ("kind", "words", "message"),
    [
        ("flat", "--thinking_steps 2", "has no recurrent core"),
        ("deep", "--thinking_steps 17", "17 thinking steps exceed recurrent_max_thinking_steps=16"),
        ("flat", "--contact_sheet 4", "--contact_sheet: no effect on"),
        ("deep", "--n_steps 4", "--n_steps: no effect on"),
    ],
)
def test_what_does_not_fit_is_refused(kind, words, message, request, caplog):
    with pytest.raises(SystemExit) as end:
        evaluate.main(["--checkpoint", str(request.getfixturevalue(kind)), *words.split()])
    assert end.value.code == 2 and message in caplog.text


def test_flags_without_effect(capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["--checkpoint", "runs/x", "--exit_criterion", "kl"])
    assert "--exit_criterion has no effect with exit_thresholds=[]" in capsys.readouterr().err


def test_texts_of_another_tokenizer_are_refused(flat, tmp_path, caplog):
    other = make_text(tmp_path / "bpe", tokenizer="bpe", vocab_size=300)
    with pytest.raises(SystemExit) as end:
        evaluate.main(["--checkpoint", str(flat), "--cached_dataset", str(other)])
    assert end.value.code == 2
    assert re.search(r"with tokenizer \w{16} of 258 tokens, .* tokenizer \w{16} of 300 tokens", caplog.text)


def test_only_the_beginning_is_compressed(flat, text_cache, tmp_path, monkeypatch, report, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(text_evaluator, "COMPRESSED_BYTES", 500)
    monkeypatch.setattr(text_metrics, "LOGITS_AT_ONCE", 32 * 258 * 2)
    words = ["--checkpoint", str(flat), "--speed_tokens", "0", "--output_dir", str(tmp_path)]
    short = evaluate.main(words)["scores"]
    assert re.search(r"loss: (\d+) of \1 batches in", caplog.text)
    texts = TextDataset(text_cache, "validation", 32)
    text = b"".join(bytes((texts.document(n)[1:-1] - 2).tolist()) for n in range(texts.n_documents))[:500]
    assert short["gzip"]["bits_per_byte"] == pytest.approx(8 * (len(zlib.compress(text, 9)) + 12) / 500, rel=1e-3)
    for name in ("model", "unigram"):
        assert short[name] == pytest.approx(report["scores"][name], rel=1e-6)


def test_no_model_of_audio_or_images_is_loaded():
    program = "import sys, utils.evaluation.text; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    names = loaded.stdout.split()
    assert "model.causal" in names
    assert not [name for name in names if name.startswith(("model.audio", "model.image", "utils.training"))]
