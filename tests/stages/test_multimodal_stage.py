"""The multimodal stage on text in one process: exactness under accumulation, checkpointing, resume; clear refusals."""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoTokenizer

from dataset_loading.text.windows import TextDataset
from model.causal import MegaTransformerForCausalLM
from pretrain_multimodal import MultimodalStage
from tests.helpers.image_vae_checkpoint import save_checkpoint
from tests.helpers.runs import Run, equal, largest_difference, relative_distance, run_stage
from tests.helpers.text_cache import SMALL_CORE, SMALL_TEXT, make_text, with_dropout
from utils.checkpoints import load_model

MODELS = pytest.mark.parametrize("common", [SMALL_TEXT, SMALL_CORE], ids=["flat", "recurrent"])
TIED = ("lm_head.weight", "model.embed_tokens.weight")


@pytest.fixture(scope="session")
def text_cache(tmp_path_factory) -> Path:
    return make_text(tmp_path_factory.mktemp("texts") / "bytes")


@pytest.fixture
def train_text(text_cache, tmp_path, fresh_logging):
    """train_text(common, "name", steps, *flags) -> Run."""

    def call(common: list[str], *words) -> Run:
        return run_stage(MultimodalStage, common, text_cache, tmp_path, *words)

    return call


@MODELS
def test_a_checkpoint_holds_tokenizer_record_and_tied_weights(common, train_text, text_cache):
    run = train_text(common, "record", 2)
    record = json.loads((run.folder / "stage.json").read_text())
    texts = TextDataset(text_cache, "train", 32)
    assert record["stage"] == "multimodal" and record["data"]["fingerprint"] == texts.fingerprint
    tokenizer = AutoTokenizer.from_pretrained(run.folder)
    assert tokenizer.encode("Bär") == texts.tokenizer.encode("Bär")
    config = json.loads((run.folder / "config.json").read_text())
    assert config["vocab_size"] == texts.vocab_size == 258 and config["use_cache"] is True
    assert (config["pad_token_id"], config["bos_token_id"], config["eos_token_id"]) == (0, 1, 1)
    for name, kind in (("model", "raw"), ("ema", "ema")):
        assert len(set(TIED) & run.weights(name).keys()) == 1
        model = load_model(MegaTransformerForCausalLM, run.folder, kind)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        written = {**model.state_dict(), **run.weights(name)}
        assert largest_difference(written, dict(model.state_dict())) == 0
    loaded = MegaTransformerForCausalLM.from_pretrained(run.folder)
    raw = load_model(MegaTransformerForCausalLM, run.folder, "raw")
    assert largest_difference(dict(loaded.state_dict()), dict(raw.state_dict())) == 0


@MODELS
@pytest.mark.parametrize("flags", ["", "--use_gradient_checkpointing"], ids=["plain", "checkpointed_dropout"])
def test_accumulation_equals_one_batch(common, flags, train_text, text_cache):
    common = with_dropout(common) if flags else common
    texts = TextDataset(text_cache, "train", 32)
    counts = {int((item["segment_ids"][1:] == item["segment_ids"][:-1]).sum()) for item in texts}
    assert len(counts) >= 3, "windows have equal numbers of targets: the test would show nothing"
    whole = train_text(common, "whole", 6, "--batch_size", "8", "--no_use_ema")
    parts = train_text(
        common, "parts", 6, "--batch_size", "2", "--gradient_accumulation_steps", "4", "--no_use_ema", *flags.split()
    )
    assert parts.losses == pytest.approx(whole.losses, rel=1e-6)
    for name in ("grad_norm", "loss/cross_entropy", "loss/z", "targets_per_step"):
        assert parts.logged(name) == pytest.approx(whole.logged(name), rel=1e-5), name
    assert len(set(whole.logged("targets_per_step"))) > 1
    # Adam divides by the root of a gradient's square, which scales up the rounding of gradients near zero.
    assert largest_difference(whole.weights(), parts.weights()) <= 1e-5
    assert relative_distance(whole.weights(), parts.weights()) <= 1e-6


@MODELS
def test_resumed_equals_straight_through(common, train_text, tmp_path):
    common = with_dropout(common)
    flags = ["--batch_size", "8", "--save_steps", "3", "--trainer", "grokfast_ema"]
    straight = train_text(common, "straight", 6, *flags)
    half = tmp_path / "multimodal" / "half"
    half.mkdir()
    (straight.folder.parent / "checkpoint-3").rename(half / "checkpoint-3")
    resumed = train_text(common, "half", 6, *flags, "--resume_from_checkpoint")
    for name in ("model", "ema"):
        assert largest_difference(straight.weights(name), resumed.weights(name)) == 0
    for file in ("optimizer.pt", "scheduler.pt"):
        first, second = (torch.load(run.folder / file, weights_only=True) for run in (straight, resumed))
        assert equal(first, second), file
    assert straight.losses == resumed.losses
    assert straight.logged("thinking_steps") == resumed.logged("thinking_steps")
    assert straight.logged("eval_loss") == resumed.logged("eval_loss")


@MODELS
def test_evaluations_do_not_change_a_run_with_dropout(common, train_text):
    train = partial(train_text, with_dropout(common))
    plain = train("plain", 4, "--batch_size", "8")
    flags = ["--eval_steps", "2", "--n_samples", "1", "--sample_tokens", "2"]
    evaluated = train("evaluated", 4, "--batch_size", "8", *flags)
    for name in ("model", "ema"):
        assert largest_difference(plain.weights(name), evaluated.weights(name)) == 0
    without = train_text(common, "without", 4, "--batch_size", "8")
    assert relative_distance(plain.weights(), without.weights()) > 1e-3


@MODELS
def test_bf16_reaches_the_loss_of_fp32_with_fp32_weights(common, train_text):
    flags = ["--batch_size", "8", "--ema_decay", "0.9"]
    runs = [train_text(common, "fp32", 12, *flags), train_text(common, "bf16", 12, *flags, "--bf16")]
    assert sum(runs[1].losses[-6:]) == pytest.approx(sum(runs[0].losses[-6:]), rel=0.01)
    assert all(value.dtype == torch.float32 for value in runs[1].weights().values())


def test_chunks_of_the_loss_change_nothing(train_text):
    plain = train_text(SMALL_TEXT, "plain", 4, "--batch_size", "8")
    override = ["--override", "hidden_size=64", "loss_chunk_size=50"]
    chunked = train_text(SMALL_TEXT, "chunked", 4, "--batch_size", "8", *override)
    assert chunked.losses == pytest.approx(plain.losses, rel=1e-6)
    assert chunked.logged("eval_loss") == pytest.approx(plain.logged("eval_loss"), rel=1e-5)
    assert not chunked.logged("eval_accuracy") and plain.logged("eval_accuracy")


def test_evaluation_equals_a_sum_over_single_tokens(train_text, text_cache):
    run = train_text(SMALL_TEXT, "evaluated", 8, "--batch_size", "8", "--eval_batch_size", "3", "--ema_decay", "0.5")
    model, texts = load_model(MegaTransformerForCausalLM, run.folder), TextDataset(text_cache, "validation", 32)
    nats, n_targets, hits, n_bytes = 0.0, 0, 0, 0
    for item in texts:
        ids, segments = item["input_ids"], item["segment_ids"]
        n_bytes += int(item["n_bytes"])
        for position in range(len(ids) - 1):
            if segments[position] != segments[position + 1]:
                continue
            first = int((segments == segments[position]).nonzero()[0])
            with torch.no_grad():
                logits = model(input_ids=ids[None, first : position + 1], use_cache=False).logits[0, -1]
            nats -= logits.double().log_softmax(-1)[ids[position + 1]].item()
            hits += int(logits.argmax() == ids[position + 1])
            n_targets += 1
    last = run.history[-1]
    assert n_bytes == texts.n_bytes and n_targets == texts.n_targets
    assert last["eval_loss"] == pytest.approx(nats / n_targets, rel=1e-5)
    assert last["eval_bits_per_byte"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)
    assert last["eval_perplexity"] == pytest.approx(math.exp(nats / n_targets), rel=1e-4)
    assert last["eval_accuracy"] == pytest.approx(hits / n_targets, abs=1e-6)


def test_a_curriculum_begins_with_one_step_and_the_depths_are_evaluated(train_text):
    flags = ["--recurrent_curriculum", "0.5", "--eval_thinking_steps", "1", "5"]
    fixed = [word for word in SMALL_CORE if word != "recurrent_state_initialization=normal"]
    fixed.insert(fixed.index("--override") + 1, "recurrent_steps_distribution=fixed")
    run = train_text(fixed, "curriculum", 8, "--batch_size", "8", *flags)
    assert run.logged("thinking_steps") == [1, 2, 2, 2, 3, 3, 3, 3]  # Means 1, 1.5, 2, 2.5, 3, ..., rounded.
    last = run.history[-1]
    assert last.keys() >= {"eval_loss_1_steps", "eval_loss_5_steps"} and "eval_loss_3_steps" not in last


def test_tensorboard_shows_texts_losses_and_steps(train_text):
    override = SMALL_CORE[SMALL_CORE.index("--override") : SMALL_CORE.index("--sequence_length")]
    exits = ["recurrent_exit_criterion=kl", "recurrent_exit_criteria_threshold=1000.0"]
    run = train_text(
        SMALL_CORE, "shown", 4, "--batch_size", "8", "--eval_steps", "2", "--n_samples", "2", "--sample_tokens", "8",
        *override, *exits,
    )  # fmt: skip
    events = EventAccumulator(str(run.folder.parent), {"histograms": 0}).Reload()
    tags = events.Tags()
    assert {"thinking_steps/drawn", "thinking_steps/used"} <= set(tags["histograms"])
    assert run.logged("eval_loss_with_exits") == run.logged("eval_loss_2_steps") != run.logged("eval_loss")
    names = {"train/loss", "loss/cross_entropy", "loss/z", "train/thinking_steps", "train/tokens_per_second"}
    assert names | {"eval/bits_per_byte", "eval/loss_1_steps", "eval/thinking_steps"} <= set(tags["scalars"])
    drawn = events.Histograms("thinking_steps/drawn")
    assert [histogram.histogram_value.num for histogram in drawn] == [2, 2]
    assert sum(each.histogram_value.sum for each in drawn) == sum(run.logged("thinking_steps"))
    # Every token leaves at the first occasion.
    assert run.logged("eval_thinking_steps") == [2, 2]
    used = events.Histograms("thinking_steps/used")[-1].histogram_value
    assert used.min == used.max == 2
    shown = events.Tensors("samples/01/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert all(title in shown for title in ("**prompt**", "**true continuation**", "**greedy**", "**sampled**"))


def test_the_vocabulary_comes_from_the_tokenizer_and_may_be_rounded_up(tmp_path, fresh_logging):
    cache = make_text(tmp_path / "bpe", tokenizer="bpe", vocab_size=300)
    common = [*SMALL_TEXT, "--batch_size", "4"]
    train = partial(run_stage, MultimodalStage, common, cache, tmp_path)
    run = train("own", 1)
    assert run.weights()["model.embed_tokens.weight"].shape == (300, 64)
    rounded = train("rounded", 1, "--override", "hidden_size=64", "vocab_size=320")
    assert rounded.weights()["model.embed_tokens.weight"].shape == (320, 64)
    with pytest.raises(ValueError, match=r"vocab_size=299 does not fit .* must be at least 300"):
        train("below", 1, "--override", "hidden_size=64", "vocab_size=299")
    with pytest.raises(ValueError, match=r"bos_token_id=0 does not fit"):
        train("token", 1, "--override", "hidden_size=64", "bos_token_id=0")


def test_another_tokenizer_is_refused_with_both_fingerprints(train_text, tmp_path):
    run = train_text(SMALL_TEXT, "bytes", 2)
    cache = make_text(tmp_path / "bpe", tokenizer="bpe", vocab_size=300)
    train = partial(run_stage, MultimodalStage, SMALL_TEXT, cache, tmp_path)
    message = r"trained with tokenizer \w{16} of 258 tokens, .* have tokenizer \w{16} of 300 tokens"
    with pytest.raises(ValueError, match=message):
        train("other", 1, "--init_from", str(run.folder))
    with pytest.raises(ValueError, match=message):
        train("bytes", 4, "--resume_from_checkpoint")
    with pytest.raises(ValueError, match=r"trained with --sequence_length 32, this run has 16"):
        train_text(SMALL_TEXT, "bytes", 4, "--resume_from_checkpoint", "--sequence_length", "16")


def test_another_stages_checkpoint_is_refused(train_text, image_cache, tmp_path):
    vae = save_checkpoint(tmp_path / "image_vae" / "small", image_cache)
    for flag in ("--init_from", "--resume_from_checkpoint"):
        with pytest.raises(ValueError, match=r"is of stage 'image_vae', .* stage 'multimodal'"):
            train_text(SMALL_TEXT, "other_stage", 1, flag, str(vae))


def test_a_tokenizer_from_elsewhere_reads_no_special_tokens_of_texts(tmp_path, fresh_logging, text_cache):
    foreign = TextDataset(text_cache, "train", 32).tokenizer
    foreign.split_special_tokens = foreign.init_kwargs["split_special_tokens"] = False
    foreign.save_pretrained(tmp_path / "foreign")
    cache = make_text(tmp_path / "texts", tokenizer=str(tmp_path / "foreign"))
    assert 1 in TextDataset(cache, "train", 32).tokenizer.encode("a<bos>", add_special_tokens=False)
    run = run_stage(MultimodalStage, SMALL_TEXT, cache, tmp_path, "foreign_run", 1, "--batch_size", "4")
    saved = AutoTokenizer.from_pretrained(run.folder)
    assert saved.encode("a<bos>", add_special_tokens=False) == [byte + 2 for byte in b"a<bos>"]


def test_samples_fit_into_learned_positions(train_text):
    override = ["hidden_size=64", "position_embedding=learned", "use_rotary_embedding=false"]
    flags = ["--batch_size", "8", "--n_samples", "2", "--eval_steps", "1"]
    train_text(SMALL_TEXT, "learned", 1, *flags, "--override", *override, "max_position_embeddings=32")


def test_init_from_takes_the_averaged_weights(train_text):
    first = train_text(SMALL_TEXT, "first", 2)
    second = train_text(SMALL_TEXT, "second", 1, "--init_from", str(first.folder), "--learning_rate", "1e-12")
    assert largest_difference(first.weights("ema"), second.weights("ema")) < 1e-8


def test_texts_are_prepared_by_the_first_run(tmp_path, fresh_logging):
    (tmp_path / "text.txt").write_text("".join(f"{n} times {n} is {n * n}.\n" for n in range(4000)))
    words = ["--text_dataset", str(tmp_path / "text.txt"), "--tokenizer", "bpe", "--tokenizer_vocab_size", "270"]
    train = partial(run_stage, MultimodalStage, SMALL_TEXT, tmp_path / "cache", tmp_path)
    with pytest.raises(FileNotFoundError, match="name texts with --text_dataset"):
        train("nothing", 1)
    train("first", 1, *words, "--batch_size", "2")
    assert (tmp_path / "cache" / "manifest.json").is_file()
    train("second", 1, "--batch_size", "2")


@MODELS
def test_dry_run_prints_and_trains_nothing(common, text_cache, tmp_path, capsys):
    words = ["--cached_dataset", str(text_cache), "--output_dir", str(tmp_path), "--dry_run", "--max_steps", "7"]
    assert MultimodalStage.main([*common, *words]) == {}
    shown = capsys.readouterr().out
    for part in ("vocab_size = 258", "eos_token_id = 1", "parameters: ", "samples: train", "optimizer steps: 7"):
        assert part in shown
    assert not list(tmp_path.iterdir())


def test_a_dry_run_misses_texts_that_do_not_exist(tmp_path, caplog):
    words = ["--text_dataset", str(tmp_path / "nowhere"), "--cached_dataset", str(tmp_path / "cache"), "--dry_run"]
    with pytest.raises(SystemExit):
        MultimodalStage.main(words)
    assert "nowhere does not exist" in caplog.text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--include_modes audio", "must name text"),
        ("--include_modes txt", "did you mean 'text'"),
        ("--tokenizer bpe", "--tokenizer has no effect with text_dataset=''"),
        ("--text_dataset x --tokenizer_vocab_size 300", "--tokenizer_vocab_size has no effect with tokenizer='bytes'"),
        ("--validation_fraction 0.1", "--validation_fraction has no effect with text_dataset=''"),
        ("--max_broken_fraction 0.1", "--max_broken_fraction has no effect with text_dataset=''"),
        (
            "--text_dataset x --validation_dataset y --validation_fraction 0.1",
            "--validation_fraction has no effect with validation_dataset='y'",
        ),
        ("--sample_tokens 4 --n_samples 0", "--sample_tokens has no effect"),
        ("--sequence_length 1", "--sequence_length=1 must be > 1"),
        ("--seed 4294967296", "--seed=4294967296 must be < 4294967296"),
        (
            "--recurrent_steps_per_rank --use_deepspeed --deepspeed_config ds_config_zero-3.json",
            "use stage 2 or below",
        ),
        ("--recurrent_curiculum 1", "did you mean '--recurrent_curriculum'"),
        ("--lora_rank 4", "--lora_rank=4 needs trained weights to adapt; give --init_from"),
        ("--lora_rank 4 --init_from x --use_deepspeed", "adapters are trained without DeepSpeed; start several"),
        ("--lora_rank -1", "--lora_rank=-1 must be >= 0"),
        ("--lora_alpha 4", "--lora_alpha has no effect with lora_rank=0"),
        ("--lora_modules qkv_proj", "--lora_modules has no effect with lora_rank=0"),
    ],
)
def test_wrong_flags_say_what_to_do(words, message, capsys):
    with pytest.raises(SystemExit) as end:
        MultimodalStage.main(["--run_name", "x", *words.split()])
    assert end.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--recurrent_curriculum 0.3", "--recurrent_curriculum has no effect: --config tiny has no recurrent core"),
        ("--eval_thinking_steps 2", "--eval_thinking_steps has no effect"),
        ("--sequence_length 4096", "exceeds max_position_embeddings=2048"),
        ("--cached_dataset nowhere", "nowhere does not exist; name texts with --text_dataset"),
        ("--batch_size 5000", "make no optimizer step of 5000"),
    ],
)
def test_what_does_not_fit_is_refused(words, message, train_text):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train_text(SMALL_TEXT, "refused", 1, *words.split())
