"""What a multimodal run trains on and from: a model of text to start from, frozen parts, learning rates of parts,
texts beside latents, batches by tokens."""

import json
import math
import re
from pathlib import Path

import pytest
import torch

from dataset_loading.cache_writer import save_tensors
from dataset_loading.text.windows import TextDataset
from model.causal import MegaTransformerForCausalLM
from model.multimodal import MegaTransformerMultimodal
from model.multimodal.generation import Sampling
from model.multimodal.layout import Part, join_streams
from model.multimodal.mask import stream_mask
from model.presets import MULTIMODAL
from tests.helpers.runs import Run, equal, largest_difference, relative_distance
from tests.helpers.stream_caches import SMALL_RECURRENT, SMALL_STREAMS, make_stream_caches, text_of
from tests.helpers.text_cache import make_text
from tests.helpers.text_checkpoint import save_text_checkpoint
from utils.checkpoints import load_model
from utils.configuration import MegaTransformerConfig
from utils.generation.multimodal import MultimodalPipeline
from utils.generation.text_weights import is_free
from utils.options import declared_fields, from_preset
from utils.training.streams.trainer import window_stream

SIZES = {"hidden_size": 32, "head_width": 16, "n_heads": 2, "n_layers": 1}  # Those of SMALL_STREAMS.


def trunk_of(preset: str) -> dict:
    """Fields of a model of text whose trunk is that of the small models of streams."""
    config = from_preset(MegaTransformerConfig, MULTIMODAL, preset)
    names = [field.name for field in declared_fields(config)]
    names = [name for name in names if not is_free(name) or name.startswith("recurrent_")]
    return {**{name: getattr(config, name) for name in names}, **SIZES}


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> Path:
    return make_text(tmp_path_factory.mktemp("beside") / "texts", 40)


def without_caption_flags(common: list[str]) -> list[str]:
    """Flags of a run whose captions have the tokenizer of another run, or of texts."""
    place = common.index("--caption_vocab_size")
    return common[:place] + common[place + 2 :]


def text_run(folder: Path, texts: Path, preset: str, fields: dict, **others) -> Path:
    return save_text_checkpoint(folder / "text", texts, preset, **{**fields, **others}).parent


# ---- From a model of text.


@pytest.mark.parametrize(
    ("common", "preset"),
    [(SMALL_STREAMS, "tiny"), (SMALL_RECURRENT, "recurrent-tiny")],
    ids=["flat", "recurrent"],
)
def test_the_trunk_and_the_rows_of_a_model_of_text_are_taken_over(common, preset, texts, train, tmp_path, caplog):
    caplog.set_level("INFO")
    source = text_run(tmp_path, texts, preset, trunk_of(f"multimodal-{preset}"), vocab_size=264)
    flags = ["--init_from", str(source), "--cached_dataset", str(texts), "--sequence_length", "24"]
    flags += ["--tasks", "text-image", "text-audio", "text", "--freeze", "trunk", "model.embed_tokens", "lm_head"]
    run = train(without_caption_flags(common), "from_text", 2, *flags, "--batch_size", "6", "--learning_rate", "0.1")
    text = load_model(MegaTransformerForCausalLM, source)
    state = load_model(MegaTransformerMultimodal, run.folder).state_dict()
    for name, value in text.state_dict().items():
        taken = state[name][:258] if "embed" in name or "head" in name else state[name]
        assert torch.equal(taken, value[:258] if "embed" in name or "head" in name else value), name
    # The rest is new, and the log names it. Frozen parts have no state of the optimizer.
    assert re.search(r"258 rows.*rows 258 to 358.*encoder.encoders.image, decoders.image", caplog.text)
    optimizer = torch.load(run.folder / "optimizer.pt", weights_only=True)
    n_trained = sum(name.startswith(("encoder", "decoders")) for name in run.weights())
    assert len(optimizer["state"]) == sum(len(group["params"]) for group in optimizer["param_groups"]) == n_trained
    # Packed documents pass the trunk as they pass that of the model of text.
    window = next(window for window in TextDataset(texts, "train", 24) if window["segment_ids"].max() > 0)
    n_tokens = int((window["segment_ids"] >= 0).sum())
    ids, documents = window["input_ids"][:n_tokens], window["segment_ids"][:n_tokens]
    batch = join_streams([window_stream(ids.tolist(), documents.tolist())], 0)
    model = load_model(MegaTransformerMultimodal, run.folder)
    given = {"input_ids": ids[None], "position_ids": batch.positions, "attention_mask": stream_mask(batch.placement)}
    logits = model.lm_head(model.model(**given, use_cache=False, return_dict=True).last_hidden_state)[0, :, :258]
    expected = text(input_ids=ids[None], segment_ids=documents[None], use_cache=False).logits[0, :, :258]
    assert largest(logits - expected) <= 1e-5 * largest(expected)
    assert run.logged("eval_text_nats")[-1] > 0 and run.logged("eval_text_bits_per_byte")[-1] > 0


def largest(values: torch.Tensor) -> float:
    return values.abs().max().item()


def test_what_does_not_fit_a_model_of_text_is_refused(texts, train, tmp_path):
    source = text_run(tmp_path, texts, "tiny", {**trunk_of("multimodal-tiny"), "hidden_size": 64, "norm_eps": 1e-5})
    flags = ["--init_from", str(source), "--batch_size", "6"]
    message = (
        r"'hidden_size': \(64, 32\), 'norm_eps': \(1e-05, 1e-06\)\}; give --override hidden_size=64 norm_eps=1e-05"
    )
    with pytest.raises(ValueError, match=message):
        train(without_caption_flags(SMALL_STREAMS), "other", 1, *flags)
    same = text_run(tmp_path / "same", texts, "tiny", trunk_of("multimodal-tiny"), vocab_size=264)
    with pytest.raises(
        ValueError, match=r"--freeze trunk text with --init_from .*--learning_rates text:0\.01 in place"
    ):
        train(without_caption_flags(SMALL_STREAMS), "other", 1, "--init_from", str(same), "--freeze", "trunk", "text")
    with pytest.raises(ValueError, match=r"--lora_rank=4 with --init_from .*start from a run on streams"):
        train(without_caption_flags(SMALL_STREAMS), "other", 1, "--init_from", str(same), "--lora_rank", "4")
    with pytest.raises(ValueError, match=r"--caption_vocab_size 280.*tokenizer of .*text, which is another one"):
        train(SMALL_STREAMS, "other", 1, *flags)
    others = make_text(tmp_path / "others", 30, tokenizer="bpe", vocab_size=300)
    with pytest.raises(ValueError, match=r"was trained with tokenizer .* prepare them with --tokenizer"):
        train(without_caption_flags(SMALL_STREAMS), "other", 1, *flags, "--cached_dataset", str(others))


def test_a_run_on_the_same_latents_goes_on_with_its_tokenizer(train):
    first = train(SMALL_STREAMS, "first", 1, "--batch_size", "6")
    flags = ["--init_from", str(first.folder.parent), "--batch_size", "6", "--learning_rate", "1e-12"]
    second = train(without_caption_flags(SMALL_STREAMS), "second", 1, *flags)
    assert largest_difference(first.weights("ema"), second.weights()) <= 1e-9
    assert (first.folder / "tokenizer.json").read_text() == (second.folder / "tokenizer.json").read_text()


# ---- What is trained, and how fast.


def test_parts_have_their_own_rates_and_frozen_ones_none(train):
    flags = ["--batch_size", "6", "--freeze", "text", "decoders.image", "--lr_scheduler_type", "constant"]
    flags += ["--weight_decay", "0.1", "--warmup_ratio", "0", "--save_steps", "2"]
    rates = ["--learning_rates", "trunk:0.1", "image:2", "model.norm:3"]
    before = train(SMALL_STREAMS, "before", 1, *flags[:2], "--learning_rate", "1e-12").weights()
    run = train(SMALL_STREAMS, "rates", 4, *flags, *rates)
    after, optimizer = run.weights(), torch.load(run.folder / "optimizer.pt", weights_only=True)
    moved = {name: (after[name] - before[name]).abs().max().item() for name in after}
    frozen = {name for name in moved if name.startswith(("model.embed", "lm_head", "decoders.image"))}
    assert all(moved[name] <= 1e-9 for name in frozen) and all(moved[name] > 0 for name in moved.keys() - frozen)
    groups = [(group["lr"], group["weight_decay"], len(group["params"])) for group in optimizer["param_groups"]]
    assert {rate for rate, *_ in groups} == {1e-3, 1e-4, 2e-3, 3e-3} and groups[0][0] == 1e-3
    assert sum(n for *_, n in groups) == len(moved) - len(frozen)
    assert {(rate, decay) for rate, decay, _ in groups if rate == 3e-3} == {(3e-3, 0.0)}  # The last entry counts.
    # A resumed run is the same, its average too; other parts are another run.
    (run.folder.parent / "checkpoint-4").rename(kept := run.folder.parent.with_name("kept"))
    resumed = train(SMALL_STREAMS, "rates", 4, "--resume_from_checkpoint")
    straight = Run(kept.parent, 4)
    straight.folder = kept
    for name in ("model", "ema"):
        assert largest_difference(straight.weights(name), resumed.weights(name)) == 0
    for words in (["--freeze", "text"], ["--learning_rates", "trunk:1"]):
        with pytest.raises(ValueError, match=rf"{words[0]} .*cannot change within a run"):
            train(SMALL_STREAMS, "rates", 6, "--resume_from_checkpoint", *words)


# ---- Texts beside latents, and batches by tokens.


def test_texts_and_batches_by_tokens_are_exact(texts, train, tmp_path):
    """Accumulated or at once, straight through or resumed."""
    common = without_caption_flags(SMALL_STREAMS)
    flags = ["--cached_dataset", str(texts), "--sequence_length", "24", "--save_steps", "2", "--eval_steps", "2"]
    whole = train(common, "whole", 4, *flags, "--batch_tokens", "240")
    parts = train(common, "parts", 4, *flags, "--batch_tokens", "120", "--gradient_accumulation_steps", "2")
    assert parts.losses == pytest.approx(whole.losses, rel=1e-5)
    assert parts.logged("samples_per_step") == pytest.approx(whole.logged("samples_per_step"))
    assert relative_distance(whole.weights(), parts.weights()) <= 1e-5
    assert len(set(whole.logged("samples_per_step"))) > 1
    for name in ("eval_text_nats", "eval_text_bits_per_byte", "eval_text-image-text_nats"):
        assert len(whole.logged(name)) == 2, name
    # Resumed from its second step, without naming the texts again.
    folder = tmp_path / "multimodal" / "whole"
    (folder / "checkpoint-4").rename(kept := tmp_path / "kept")
    resumed = train(common, "whole", 4, "--resume_from_checkpoint")
    straight = Run(folder, 4)
    straight.folder = kept
    assert straight.losses == resumed.losses and largest_difference(straight.weights(), resumed.weights()) == 0
    states = [torch.load(run.folder / "optimizer.pt", weights_only=True) for run in (straight, resumed)]
    assert equal(*states)
    record = json.loads((resumed.folder / "stage.json").read_text())
    assert record["texts"] == {"folder": str(texts)}
    with pytest.raises(ValueError, match="240 tokens per optimizer step, this run has 120"):
        train(common, "whole", 6, "--resume_from_checkpoint", "--batch_tokens", "120")


# ---- Damaged items.


def damage(folder: Path, value: float) -> Path:
    """Fill the latents of the third training image with a value, as a faulty encoder would; returns its file."""
    manifest = folder / "image" / "manifest.json"
    content = json.loads(manifest.read_text())
    entry = content["entries"]["train"][2]
    file = folder / "image" / "train" / f"{entry['key']}.pt"
    sample = torch.load(file, weights_only=True)
    entry |= save_tensors(file, {**sample, "mean": torch.full_like(sample["mean"], value)})
    manifest.write_text(json.dumps(content))
    return file


def test_latents_that_are_not_finite_are_named(train, tmp_path):
    caches = make_stream_caches(tmp_path / "damaged")
    file = damage(tmp_path / "damaged", float("nan"))
    with pytest.raises(ValueError, match=rf"{file} is damaged \('mean' holds NaN values"):
        train(SMALL_STREAMS, "nan", 20, *caches, "--batch_size", "12")


@pytest.mark.slow
def test_thousands_of_bf16_steps_with_a_damaged_item_leave_finite_weights(train, tmp_path):
    """Latents of 6e4 are the largest that the cache's float16 holds, and their squares in the loss."""
    caches = make_stream_caches(tmp_path / "damaged", frames=5)
    damage(tmp_path / "damaged", 6e4)
    tiny = ["hidden_size=16", "head_width=8", "n_heads=2", "n_layers=1", "image_encoder_patch_size=2"]
    flags = ["--override", *tiny, "--bf16", "--batch_size", "4", "--logging_steps", "100"]
    run = train(SMALL_STREAMS, "large", 2000, *caches, *flags)
    assert all(value.isfinite().all() for name in ("model", "ema") for value in run.weights(name).values())
    assert max(run.logged("loss/image")) > 1e3 and all(math.isfinite(loss) for loss in run.losses)
    assert run.logged("eval_loss")[-1] < 1e3  # Validation has no such item.


# ---- Interleaved streams.


@pytest.mark.slow
def test_answers_go_on_after_spans_once_streams_have_taught_it(train):
    """The model itself begins spans, and ends its answers, although begins of spans hardly count in its loss."""
    tasks = ["--tasks", "text-image-text", "image-text-audio-text"]
    flags = [
        "--learning_rate",
        "3e-3",
        "--batch_size",
        "8",
        "--lr_scheduler_type",
        "constant",
        "--logging_steps",
        "50",
    ]
    run = train(SMALL_STREAMS, "taught", 300, *tasks, *flags)
    pipeline = MultimodalPipeline.load(run.folder)
    config = pipeline.model.config
    latents = torch.randn(config.image_n_tokens, config.token_width("image"), generator=torch.Generator())
    prompts = [[pipeline.text_part(text_of(5))], [Part("image", latents=latents)]]
    answers = pipeline.answer(prompts, [0, 1], Sampling(n_steps={"image": 2, "audio": 2}))
    kinds = [[part.modality for part in answer] for answer in answers]
    assert kinds[0] == ["image", "text"] and kinds[1][:3] == ["text", "audio", "text"]
    assert all(3 < len(text.ids) < 32 for text in (answers[0][1], answers[1][0]))  # It ended them.
    lengths = {3, 4}  # Tokens of the clips that it was trained on.
    assert answers[1][1].n_tokens in lengths and run.logged("loss/begin")[-1] < 0.5
