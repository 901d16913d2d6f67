"""HuggingFace's own tools: what works with a Llama of the same size works with our models, or is refused by name."""

import copy

import numpy as np
import peft
import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    pipeline,
)

from dataset_loading.text.tokenizers import byte_tokenizer, train_bpe
from model.causal import MegaTransformerForCausalLM
from model.kv_cache import CACHE_NAME
from utils.configuration import MegaTransformerConfig

V = 259
SIZES = {"hidden_size": 32, "vocab_size": V, "initializer_range": 0.2, "max_position_embeddings": 128}
OURS = {
    "flat": {"n_layers": 2},
    "recurrent": {
        "n_layers": 0, "n_prelude_layers": 1, "n_recurrent_layers": 1, "n_coda_layers": 1,
        "recurrent_mean_thinking_steps": 3, "recurrent_max_thinking_steps": 4, "recurrent_backprop_steps": 2,
        "recurrent_steps_distribution": "fixed",
    },
}  # fmt: skip
IDS = torch.randint(2, V, (2, 6), generator=torch.Generator().manual_seed(1))
CAUSAL = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]


def llama(is_tied=False):
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "intermediate_size": 128}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(**SIZES, **heads, **tokens, tie_word_embeddings=is_tied)).eval()


def ours(kind, is_tied=False, **fields):
    settings = {**SIZES, "n_heads": 4, "n_query_groups": 2, **OURS[kind], "tie_word_embeddings": is_tied, **fields}
    return MegaTransformerForCausalLM(MegaTransformerConfig(**settings)).eval()


@pytest.fixture(params=["llama", *OURS])
def build(request):
    def build_model(**fields):
        torch.manual_seed(0)
        return llama(**fields) if request.param == "llama" else ours(request.param, **fields)

    return build_model


def loaded_again(model, folder):
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder)


def generate(model, ids=IDS, **settings):
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **settings}
    return model.generate(ids, **settings)


# ---- Generation.

MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 3},
    "static cache": {"cache_implementation": "static"},
    "guesses": {"prompt_lookup_num_tokens": 2},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_stop_strings(build, kind, mode):
    tokenizer = byte_tokenizer() if kind == "bytes" else train_bpe([], V)
    tokenizer.padding_side = "left"
    model = build()
    prompts = "hello" if mode == "guesses" else ["hello", "the cat"]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    # Only the letters of "abcabc..." are allowed.
    letters = tokenizer.convert_tokens_to_ids(list("abc"))
    allowed = {"prefix_allowed_tokens_fn": lambda batch, ids: [letters[ids.shape[0] % 3]]}
    settings = {"max_new_tokens": 9, "pad_token_id": 0, "do_sample": False, **allowed, **MODES[mode]}
    texts = tokenizer.batch_decode(
        model.generate(**inputs, **settings, stop_strings=["bca"], tokenizer=tokenizer), skip_special_tokens=True
    )
    assert len(texts) == (1 if mode == "guesses" else 4 if mode == "sampling" else 2)
    assert all(text.endswith("bca") for text in texts)
    assert not any(text.endswith("bcabc") for text in texts)


def test_pipeline(build):
    writer = pipeline("text-generation", model=build(), tokenizer=byte_tokenizer())
    (answer,) = writer("hello", max_new_tokens=4, do_sample=False)
    assert answer["generated_text"].startswith("hello")


@pytest.mark.parametrize("kind", OURS)
def test_what_generation_refuses(kind):
    model = ours(kind)
    with pytest.raises(ValueError, match=r"train mode.*model\.eval"):
        generate(model.train())
    model.eval()
    with pytest.raises(ValueError, match=r"assistant_early_exit=1.*assistant_model"):
        generate(model, IDS[:1], assistant_early_exit=1)
    with pytest.raises(ValueError, match=r"continuous batching.*use generate\(\)"):
        model.generate_batch([[5, 6]])
    with pytest.raises(ValueError, match="tuple; give a Cache"):
        model(IDS, past_key_values=((IDS, IDS),))


# ---- Embeddings.


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("size, multiple, expected", [(300, None, 300), (200, None, 200), (259, 64, 320)])
def test_resized_embeddings(build, is_tied, size, multiple, expected, tmp_path):
    model, ids = build(is_tied=is_tied), IDS % 150 + 2
    before = model(ids).logits
    model.resize_token_embeddings(size, pad_to_multiple_of=multiple)
    model.eval()
    tables = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert model.config.vocab_size == expected and {len(table) for table in tables} == {expected}
    assert (tables[0] is tables[1]) == is_tied
    output = model(ids, labels=ids)
    rows = min(expected, V)
    assert (output.logits[..., :rows] - before[..., :rows]).abs().max() <= 1e-4 and output.loss.isfinite()
    assert generate(model, ids).shape == (2, 14)
    assert torch.equal(loaded_again(model, tmp_path)(ids).logits, model(ids).logits)
    # A wrapper that initialises once more keeps the head of the old tokens.
    head = model.get_output_embeddings().weight.clone()
    model.post_init()
    assert torch.equal(model.get_output_embeddings().weight, head)


def test_a_smaller_table_keeps_the_special_tokens_and_the_loss_in_chunks():
    model = ours("flat", loss_chunk_size=5, eos_token_id=2)
    with pytest.raises(ValueError, match="eos_token_id=2 must be < vocab_size=2"):
        model.resize_token_embeddings(2)
    model.resize_token_embeddings(300)
    assert model(IDS, labels=IDS).logits is None and model.lm_head.chunk_size == 5
    model.set_output_embeddings(torch.nn.Linear(32, 300, bias=True))  # no head of ours
    assert model(IDS, labels=IDS).logits.shape == (2, 6, 300)


# ---- Trainer.


def trainer(model, folder, *, batch_size=4, n_micro_batches=1, **kwargs):
    rows = torch.randint(2, V, (16, 10), generator=torch.Generator().manual_seed(2)).tolist()
    ignored = [i % 7 if i not in (2, 3) else 10 for i in range(16)]  # two samples without a target
    data = Dataset.from_list(
        [{"input_ids": row, "labels": [-100] * n + row[n:]} for row, n in zip(rows, ignored)],
    )
    settings = {key: kwargs.pop(key) for key in list(kwargs) if key in ("label_smoothing_factor",)}
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=n_micro_batches,
        per_device_eval_batch_size=4,
        max_steps=2,
        learning_rate=1e-2,
        optim="sgd",
        logging_steps=1,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        **settings,
    )
    return Trainer(model, arguments, train_dataset=data, eval_dataset=data.select(range(6)), **kwargs)


def test_accumulated_micro_batches_equal_the_batch(build, tmp_path):
    losses, weights = [], []
    for batch_size, n_micro_batches in ((8, 1), (2, 4)):
        run = trainer(build(), tmp_path, batch_size=batch_size, n_micro_batches=n_micro_batches)
        run.train()
        losses.append([row["loss"] for row in run.state.log_history if "loss" in row])
        weights.append(torch.cat([parameter.detach().flatten() for parameter in run.model.parameters()]))
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    assert (weights[1] - weights[0]).abs().max() <= 1e-5


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_metrics_see_logits_alone(build, smoothing, tmp_path):
    def accuracy(prediction):
        assert prediction.predictions.shape == (6, 10) and prediction.label_ids.shape == (6, 10)
        return {"hits": int((prediction.predictions[:, :-1] == prediction.label_ids[:, 1:]).sum())}

    functions = {"compute_metrics": accuracy, "preprocess_logits_for_metrics": lambda logits, _: logits.argmax(-1)}
    run = trainer(build(), tmp_path, label_smoothing_factor=smoothing, **functions)
    metrics = run.evaluate()
    assert "eval_hits" in metrics
    # The loss by its definition: the smoothed one is shifted like the other.
    batches = [run.eval_dataset.select(range(4))[:], run.eval_dataset.select((4, 5))[:]]
    losses = []
    for batch in batches:
        labels = torch.tensor(batch["labels"])[:, 1:]
        with torch.no_grad():
            logs = run.model(torch.tensor(batch["input_ids"])).logits[:, :-1].log_softmax(-1)[labels != -100]
        target = labels[labels != -100]
        nats = -logs.gather(1, target[:, None])[:, 0]
        losses.append(((1 - smoothing) * nats - smoothing * logs.mean(-1)).mean().item())
    assert metrics["eval_loss"] == pytest.approx((4 * losses[0] + 2 * losses[1]) / 6, rel=1e-4)


def test_metrics_with_a_loss_in_chunks(tmp_path):
    run = trainer(ours("recurrent", loss_chunk_size=5), tmp_path, compute_metrics=lambda p: {"n": p.predictions.size})
    assert run.evaluate()["eval_n"] == 6 * 10 * V
    assert np.shape(run.predict(run.eval_dataset).predictions) == (6, 10, V)


# ---- Masks and other arguments.


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64, torch.float32])
def test_masks_of_tokens_and_ready_masks(build, dtype):
    model = build()
    expected = model(IDS).logits
    tokens = torch.ones_like(IDS).to(dtype)
    tokens[0, :2] = 0
    padded = model(IDS, attention_mask=tokens).logits
    assert (padded[:1, 2:] - model(IDS[:1, 2:]).logits).abs().max() <= 1e-4
    ready = CAUSAL.to(dtype) if dtype != torch.float32 else torch.zeros(1, 1, 6, 6).masked_fill(~CAUSAL, -torch.inf)
    if dtype in (torch.bool, torch.float32):
        assert (model(IDS, attention_mask=ready).logits - expected).abs().max() <= 1e-5
        assert (model(IDS, attention_mask=ready.expand(2, 4, 6, 6)).logits - expected).abs().max() <= 1e-5
    else:
        with pytest.raises((ValueError, RuntimeError), match="dtype"):
            model(IDS, attention_mask=ready)


@pytest.mark.parametrize("kind", OURS)
def test_masks_that_do_not_fit_are_refused(kind):
    model, ones = ours(kind), torch.ones_like(IDS)
    for mask in (CAUSAL.long(), CAUSAL.byte()):
        with pytest.raises(ValueError, match=r"attention_mask.*dtype torch\.u?int\d+.*mask\.bool"):
            model(IDS, attention_mask=mask)
    misfits = [CAUSAL[:, 0], ones[0], ones[:, 1:], torch.cat([ones, ones], 1), CAUSAL[..., 1:], CAUSAL[:, :, 1:]]
    for mask in (*misfits, ones[:1].expand(3, 6)):
        with pytest.raises(ValueError, match=r"attention_mask has shape .*give \(2, 6\)"):
            model(IDS, attention_mask=mask)
    with pytest.raises(ValueError, match="attention_mask has negative values"):
        model(IDS, attention_mask=ones * -1e9)
    with pytest.raises(ValueError, match="position_ids has shape"):
        model(IDS, position_ids=IDS[:, 1:])
    with pytest.raises(ValueError, match="labels has shape"):
        model(IDS, labels=IDS[:, 1:])


@torch.no_grad()
def test_outputs_and_caches(build):
    model = build()
    whole = model(IDS)
    plain = model(IDS, return_dict=False)
    assert isinstance(plain, tuple) and torch.equal(plain[0], whole.logits)
    assert isinstance(model.model(IDS, return_dict=False), tuple)
    assert model(IDS, use_cache=False).past_key_values is None
    first = model(IDS[:, :4], past_key_values=DynamicCache())
    rest = model(IDS[:, 4:], past_key_values=first.past_key_values).logits
    assert (rest - whole.logits[:, 4:]).abs().max() <= 1e-4
    hidden = model(IDS, output_hidden_states=True).hidden_states
    assert (model.lm_head(hidden[-1]) - whole.logits).abs().max() <= 1e-5
    for keep, part in ((2, slice(-2, None)), (torch.tensor([1, 3]), torch.tensor([1, 3]))):
        assert (model(IDS, logits_to_keep=keep).logits - whole.logits[:, part]).abs().max() <= 1e-5
    assert model(IDS, labels=IDS, num_items_in_batch=20).loss * 2 == pytest.approx(
        model(IDS, labels=IDS).loss.item(), rel=1e-5
    )


def test_frozen_models_with_checkpointing(build):
    model = build().requires_grad_(False).train()
    model.lm_head.requires_grad_(True)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model(IDS, labels=IDS).loss.backward()
    assert model.lm_head.weight.grad.abs().sum() > 0


# ---- Configuration.


def test_attributes_set_by_hand_are_kept(build, tmp_path):
    model, values = build(), {"use_cache": False, "pad_token_id": 5, "output_hidden_states": True, "note": "mine"}
    for name, value in values.items():
        setattr(model.config, name, value)
    model.generation_config.max_new_tokens = 3
    loaded = loaded_again(model, tmp_path)
    copies = [copy.deepcopy(model.config), loaded.config, type(model.config).from_dict(model.config.to_dict())]
    if isinstance(model.config, MegaTransformerConfig):
        copies.append(model.config.replace(hidden_dropout=0.1))
    for config in copies:
        assert {name: getattr(config, name) for name in values} == values
    assert values.items() <= model.config.to_dict().items() and values.items() <= model.config.to_diff_dict().items()
    assert loaded.generate(IDS).shape == (2, 9) and loaded(IDS).past_key_values is None


def test_aliases(build):
    config = build().config
    names = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "hidden_size": 32, "vocab_size": V}
    assert names.items() <= config.to_dict().items()
    assert config.to_dict()["num_hidden_layers"] == config.num_hidden_layers
    config.num_key_value_heads = 1
    assert config.num_key_value_heads == 1 and copy.deepcopy(config).to_dict()["num_key_value_heads"] == 1
    given = type(config)(hidden_size=48, num_attention_heads=6, num_key_value_heads=3, num_hidden_layers=4)
    assert (given.num_attention_heads, given.num_key_value_heads, given.head_dim) == (6, 3, 8)
    assert given.num_hidden_layers == 4


def test_wrong_configurations_are_refused(tmp_path):
    config = ours("flat").config
    with pytest.raises(ValueError, match="num_key_value_heads=1 contradicts n_query_groups=2"):
        MegaTransformerConfig(n_query_groups=2, num_key_value_heads=1)
    with pytest.raises(ValueError, match=r"has no field 'use_cahce'; did you mean 'use_cache'"):
        MegaTransformerConfig(use_cahce=False)
    with pytest.raises(ValueError, match=r"num_hidden_layers=3 cannot be set.*n_recurrent_layers"):
        ours("recurrent").config.num_hidden_layers = 3
    config.vocab_size = -1
    with pytest.raises(ValueError, match="vocab_size=-1 must be > 0"):
        config.save_pretrained(tmp_path)


def test_auto_classes(build, tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, device_map="cpu")
    assert type(half) is type(model) and half(IDS).logits.dtype == torch.bfloat16
    assert torch.equal(AutoModel.from_pretrained(tmp_path)(IDS)[0], model.model(IDS)[0])
    with pytest.raises((ValueError, ImportError), match=r"(?i)flash"):
        model.set_attn_implementation("flash_attention_2")


# ---- PEFT.


def adapter(name, model):
    projections = ["q_proj", "v_proj"] if isinstance(model, LlamaForCausalLM) else ["qkv_proj"]
    lora = {"r": 2, "lora_alpha": 8, "init_lora_weights": False}
    kinds = {
        "lora": lambda: peft.LoraConfig(task_type="CAUSAL_LM", target_modules=projections, **lora),
        "lora of the head": lambda: peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"], **lora),
        "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "p-tuning": lambda: peft.PromptEncoderConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=16
        ),
    }
    return peft.get_peft_model(model, kinds[name]())


@pytest.mark.parametrize("name", ["lora", "lora of the head", "prefix", "prompt", "p-tuning"])
def test_adapters(build, name):
    if CACHE_NAME == "cache" and "lora" not in name:
        pytest.skip("PEFT 0.21 injects its prompts as past_key_values, which newer transformers call cache; Llama too")
    plain, model = build(), adapter(name, build()).train()
    mask = torch.ones_like(IDS)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model(input_ids=IDS, attention_mask=mask, labels=IDS).loss.backward()
    assert trained and all(parameter.grad.abs().sum() > 0 for parameter in trained)
    torch.optim.SGD(trained, lr=0.1).step()
    model.eval()
    inputs = {"input_ids": IDS, "attention_mask": mask}
    with torch.no_grad():
        logits = model(**inputs).logits[:, -6:]
        assert (logits - plain(IDS).logits).abs().max() > 1e-3
        # Greedy decoding by its definition.
        expected = IDS
        for _ in range(4):
            following = model(input_ids=expected, attention_mask=torch.ones_like(expected)).logits[:, -1:].argmax(-1)
            expected = torch.cat([expected, following], dim=1)
    generated = model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(generated, expected)
    if "lora" in name:
        assert (model.merge_and_unload()(IDS).logits - logits).abs().max() <= 1e-4


@pytest.mark.parametrize("kind", OURS)
def test_a_prefix_with_gradient_checkpointing_is_refused(kind):
    model = adapter("prefix", ours(kind)).train()
    model.base_model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=r"past_key_values.*gradient_checkpointing_disable"):
        model(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS)


# ---- Export.


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids, attention_mask=attention_mask, use_cache=False).logits


@pytest.mark.slow
@torch.no_grad()
def test_exported_graphs_serve_other_lengths_and_batches(build):
    model, sizes = build(), {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    shapes = {"input_ids": sizes, "attention_mask": sizes}
    graph = torch.export.export(Logits(model), (IDS, torch.ones_like(IDS)), dynamic_shapes=shapes).module()
    for B, L in ((3, 9), (4, 70)):
        ids = torch.randint(2, V, (B, L))
        mask = (torch.arange(L) >= torch.arange(B)[:, None]).long()
        error = (graph(ids, mask) - model(ids, attention_mask=mask).logits).abs()
        assert error[mask.bool()].max() <= 1e-4
