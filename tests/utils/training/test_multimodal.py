"""The step of a text model against its definition, the draw of thinking steps, and what weight decay acts on."""

import numpy as np
import pytest
import torch

from model.causal import MegaTransformerForCausalLM
from pretrain_multimodal import MultimodalStage
from tests.helpers.runs import run_stage
from tests.helpers.text_cache import SMALL_CORE, SMALL_TEXT, make_text
from utils.metrics import text as text_metrics
from utils.metrics.text import compressed_bits_per_byte, ratios, token_counts, unigram_nats, window_sums
from utils.training.multimodal import MultimodalTrainer


@pytest.fixture(scope="module")
def text_cache(tmp_path_factory):
    return make_text(tmp_path_factory.mktemp("texts") / "bytes")


@pytest.mark.parametrize("common", [SMALL_TEXT, SMALL_CORE], ids=["flat", "recurrent"])
def test_the_gradient_is_that_of_the_mean_over_all_targets(common, text_cache, tmp_path, fresh_logging, monkeypatch):
    original, collected, seen = MultimodalTrainer.training_step, [], []

    def compare(self, model, inputs, num_items_in_batch=None):
        collected.append((inputs, self.thinking(inputs)))
        loss = original(self, model, inputs, num_items_in_batch)
        if len(collected) < 4:
            return loss
        nats, n_targets = 0.0, 0
        for batch, core in collected:
            logits = self.model(input_ids=batch["input_ids"], segment_ids=batch["segment_ids"], **core).logits
            for row, ids, segments in zip(logits.log_softmax(-1), batch["input_ids"], batch["segment_ids"]):
                for position in range(len(ids) - 1):
                    if segments[position] == segments[position + 1]:
                        nats, n_targets = nats - row[position, ids[position + 1]], n_targets + 1
        parameters = list(self.model.parameters())
        slow = torch.cat([each.flatten() for each in torch.autograd.grad(nats / n_targets, parameters)])
        fast = torch.cat([parameter.grad.flatten() for parameter in parameters])
        seen.append((slow - fast).norm().item() / slow.norm().item())
        collected.clear()
        return loss

    monkeypatch.setattr(MultimodalTrainer, "training_step", compare)
    flags = ["--batch_size", "2", "--gradient_accumulation_steps", "4", "--use_gradient_checkpointing"]
    run_stage(MultimodalStage, common, text_cache, tmp_path, "compared", 2, *flags)
    assert len(seen) == 2 and max(seen) < 1e-5


def trainer_at(
    step: int, seed: int = 1, per_rank: bool = False, curriculum: float = 0.0, **fields
) -> MultimodalTrainer:
    """A trainer that can draw thinking steps, and nothing else."""
    trainer = object.__new__(MultimodalTrainer)
    small = {"hidden_size": 64, "recurrent_mean_thinking_steps": 8, "recurrent_max_thinking_steps": 64}
    trainer.config = MegaTransformerForCausalLM.from_preset("recurrent-tiny", **{**small, **fields}).config
    trainer.args = type("Args", (), {"seed": seed})
    flags = {"recurrent_steps_per_rank": per_rank, "recurrent_curriculum": curriculum}
    trainer.stage_arguments = type("Flags", (), flags)
    trainer.state = type("State", (), {"global_step": step, "max_steps": 1000})
    trainer.stage_record = {"run_lengths": [[0, 1000]]}
    trainer.drawn_steps = []
    return trainer


def draws(trainer: MultimodalTrainer, steps: range) -> list[int]:
    found = []
    for step in steps:
        trainer.state.global_step = step
        found.append(trainer.draw_thinking_steps())
    return found


def test_thinking_steps_belong_to_seed_and_step(monkeypatch):
    first = draws(trainer_at(0), range(2000))
    assert first[500:520] == draws(trainer_at(0), range(500, 520))
    assert first != draws(trainer_at(0, seed=2), range(2000))
    # Log-normal Poisson of mean 8: 7 + 1, with sigma 0.5.
    assert np.mean(first) == pytest.approx(8, abs=0.4) and np.std(first) > 3
    monkeypatch.setattr("utils.training.multimodal.rank", lambda: 1)
    assert draws(trainer_at(0), range(2000)) == first
    assert draws(trainer_at(0, per_rank=True), range(2000)) != first


def test_micro_batches_of_a_step_are_counted_once():
    trainer = trainer_at(5)
    steps = {trainer.draw_thinking_steps() for _ in range(4)}
    assert [*steps] == trainer.drawn_steps


def test_the_curriculum_grows_linearly_from_one():
    trainer = trainer_at(0, curriculum=0.4)
    means = []
    for trainer.state.global_step in (0, 100, 200, 400, 999):
        means.append(trainer.mean_thinking_steps())
    assert means == [1, 2.75, 4.5, 8, 8]
    assert set(draws(trainer, range(1))) == {1}
    later = draws(trainer_at(0, curriculum=0.4), range(180, 220))
    assert 3.5 < np.mean(later) < 5.5


@pytest.mark.parametrize(
    "fields",
    [
        {"norm_type": "rmsnorm"},
        {"norm_type": "layernorm", "use_norm_bias": True, "use_attention_bias": True, "use_ffn_bias": True},
        {"use_post_attention_norm": True, "use_post_ffn_norm": True, "position_embedding": "learned"},
        {"recurrent_state_initialization": "learned", "recurrent_adapter_method": "gate"},
        {"tie_word_embeddings": False, "recurrent_adapter_method": "linear"},
    ],
)
def test_weight_decay_acts_on_matrices_alone(fields):
    model = MegaTransformerForCausalLM.from_preset("recurrent-tiny", hidden_size=64, **fields)
    decayed = set(MultimodalTrainer.get_decay_parameter_names(object.__new__(MultimodalTrainer), model))
    expected = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)} - (
        {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    )
    assert decayed == expected


def test_ratios_and_baselines():
    sums = {"nats": 20.0, "targets": 10.0, "bytes": 5.0, "hits": 4.0, "steps": 30.0}
    found = ratios(sums)
    assert found["loss"] == 2 and found["accuracy"] == 0.4 and found["thinking_steps"] == 3
    assert found["perplexity"] == pytest.approx(np.exp(2)) and found["bits_per_byte"] == pytest.approx(4 / np.log(2))
    nats = unigram_nats(torch.tensor([0, 2]), torch.tensor([1, 2]))
    assert nats == pytest.approx(-(np.log(1 / 4) + 2 * np.log(3 / 4)) / 3)
    packed = compressed_bits_per_byte(b"ab" * 5000)
    assert packed.keys() == {"gzip", "lzma"} and max(packed.values()) < 0.1


def test_counts_are_read_piece_by_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(text_metrics, "COUNTED_AT_ONCE", 7)
    tokens = np.random.default_rng(0).integers(0, 9, 40).astype(np.uint16)
    tokens.tofile(tmp_path / "train.bin")
    counts = token_counts(np.memmap(tmp_path / "train.bin", np.uint16, "r"), 12)
    assert counts.tolist() == np.bincount(tokens, minlength=12).tolist()


def test_passes_are_split_where_logits_would_be_too_many():
    assert text_metrics.windows_at_once(32000, 1024) == 2 and text_metrics.windows_at_once(100_000, 4096) == 1
    model = MegaTransformerForCausalLM.from_preset("recurrent-tiny", hidden_size=64).eval()
    ids, sizes = torch.randint(3, 258, (7, 16)), []
    model.register_forward_pre_hook(lambda _, __, given: sizes.append(len(given["labels"])), with_kwargs=True)
    inputs = {"input_ids": ids, "labels": ids, "segment_ids": torch.zeros_like(ids)}
    with torch.no_grad():
        whole, split = (window_sums(model, inputs, max_steps=16, at_once=n) for n in (0, 3))
    assert sizes == [7, 3, 3, 1] and whole.keys() == split.keys() >= {"hits", "step_counts"}
    for name, value in whole.items():
        torch.testing.assert_close(split[name], value)
