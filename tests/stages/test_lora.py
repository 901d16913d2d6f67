"""Fine-tuning with low-rank adapters: only they train, every tool sees merged weights, resumed runs are exact."""

import json
import random
import re
from functools import partial
from pathlib import Path

import pytest
import torch

import evaluate
from dataset_loading.audio.latents import AudioLatentDataset, collate_audio_latents
from dataset_loading.collators import collate_captioned
from dataset_loading.image.latents import ImageLatentDataset
from dataset_loading.text.windows import TextDataset, prepare_text
from inference import export_model
from model.adapters.lora import BASE, FACTORS, add_adapters, is_of_adapter
from model.audio.diffusion import AudioDiffusion
from model.causal import MegaTransformerForCausalLM
from model.image.diffusion import ImageDiffusion
from model.multimodal import MegaTransformerMultimodal
from pretrain_audio_diffusion import AudioDiffusionStage
from pretrain_multimodal import MultimodalStage
from tests.helpers.audio_latent_cache import SMALL_SPEECH, make_speech
from tests.helpers.runs import Run, changed, edit_record, equal, largest_difference, run_stage
from tests.helpers.stream_caches import SMALL_STREAMS
from tests.helpers.text_cache import SMALL_CORE, SMALL_TEXT, WORDS, make_text
from utils.checkpoints import LORA, load_model
from utils.reporting.runs import Run as ReportedRun
from utils.training.multimodal import MultimodalTrainer
from utils.training.planning.memory import Engine, memory_of, n_bytes

RATE = ["--learning_rate", "1e-2"]
ADAPTED = ["--lora_rank", "4", *RATE]


@pytest.fixture(scope="module")
def text_cache(tmp_path_factory) -> Path:
    return make_text(tmp_path_factory.mktemp("texts") / "bytes")


@pytest.fixture
def train_text(text_cache, tmp_path, fresh_logging):
    """train_text("name", steps, *flags) -> Run."""
    return partial(run_stage, MultimodalStage, SMALL_TEXT, text_cache, tmp_path)


@pytest.fixture
def base(train_text) -> Run:
    return train_text("base", 3)


def from_base(base: Run) -> list[str]:
    return ["--init_from", str(base.folder.parent), *ADAPTED]


def plain_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The frozen weights of an adapted model under the names of the plain one."""
    return {name.replace(BASE, "."): value for name, value in weights.items() if not is_of_adapter(name)}


def adapted_model(model_class: type, run: Run, kind: str):
    """The model of a run as it is trained, its adapters in place, with the weights of one kind."""
    model = model_class(model_class.config_class.from_pretrained(run.folder))
    adapters = json.loads((run.folder / LORA).read_text())
    add_adapters(model, **adapters)
    state = {**run.weights(), **(run.weights("ema") if kind == "ema" else {})}
    missing = model.load_state_dict(state, strict=False).missing_keys
    assert set(missing) <= model.all_tied_weights_keys.keys()
    return model.eval()


@pytest.mark.parametrize("common", [SMALL_TEXT, SMALL_CORE], ids=["flat", "recurrent"])
def test_only_adapters_train_and_merged_weights_predict_the_same(common, text_cache, tmp_path, fresh_logging):
    train = partial(run_stage, MultimodalStage, common, text_cache, tmp_path)
    base = train("base", 2)
    run = train("tuned", 4, *from_base(base), "--weight_decay", "0.1")
    # The base is that of the averaged weights, bit for bit; all factors have moved.
    weights, start = run.weights(), base.weights("ema")
    assert equal(plain_names(weights), start)
    factors = {name: value for name, value in weights.items() if is_of_adapter(name)}
    assert len(factors) >= 8 and all(value.any() for value in factors.values())
    assert run.weights("ema").keys() == factors.keys()
    assert json.loads((run.folder / LORA).read_text()) == {"rank": 4, "alpha": 8.0}
    # What tools load predicts what the trained model does.
    ids = torch.stack([TextDataset(text_cache, "train", 32)[i]["input_ids"] for i in range(4)])
    for kind in ("raw", "ema"):
        merged = load_model(MegaTransformerForCausalLM, run.folder, kind)
        adapted = adapted_model(MegaTransformerForCausalLM, run, kind)
        assert merged.state_dict().keys() == load_model(MegaTransformerForCausalLM, base.folder).state_dict().keys()
        torch.manual_seed(0)
        expected = adapted(input_ids=ids).logits
        torch.manual_seed(0)
        assert (merged(input_ids=ids).logits - expected).abs().max() <= 1e-5
        assert (
            expected - load_model(MegaTransformerForCausalLM, base.folder)(input_ids=ids).logits
        ).abs().max() > 1e-2


def test_resumed_equals_straight_through(base, train_text, tmp_path):
    flags = [*from_base(base), "--save_steps", "2"]
    straight = train_text("straight", 4, *flags)
    half = tmp_path / "multimodal" / "half"
    half.mkdir()
    (straight.folder.parent / "checkpoint-2").rename(half / "checkpoint-2")
    # The rank is that of the checkpoint; another one is refused.
    resumed = train_text("half", 4, "--resume_from_checkpoint", "--save_steps", "2", *RATE)
    for name in ("model", "ema"):
        assert equal(straight.weights(name), resumed.weights(name))
    states = [torch.load(run.folder / "optimizer.pt", weights_only=True)["state"] for run in (straight, resumed)]
    assert equal(*states) and len(states[0]) == len(straight.weights("ema"))
    assert straight.losses == resumed.losses
    for words in (["--lora_rank", "8"], ["--lora_alpha", "1"], ["--lora_modules", "qkv_proj"]):
        with pytest.raises(ValueError, match=rf"was trained with {words[0]}.*cannot change within a run"):
            train_text("half", 4, "--resume_from_checkpoint", *RATE, *words)


def test_what_training_reports_is_what_the_checkpoint_scores(base, train_text):
    for flags in ([], ["--no_use_ema"]):
        run = train_text(f"scored{len(flags)}", 4, *from_base(base), *flags)
        report = evaluate.main(["--checkpoint", str(run.folder)])
        assert report["scores"]["model"]["bits_per_byte"] == pytest.approx(
            run.logged("eval_bits_per_byte")[-1], rel=1e-5
        )
        assert run.logged("eval_bits_per_byte")[-1] < base.logged("eval_bits_per_byte")[-1]


def test_an_export_and_the_next_run_have_merged_weights(base, train_text, tmp_path):
    run = train_text("tuned", 3, *from_base(base))
    export_model.main(["--checkpoint", str(run.folder), "--output", str(tmp_path / "exported")])
    merged = load_model(MegaTransformerForCausalLM, run.folder).state_dict()
    for model in (
        MegaTransformerForCausalLM.from_pretrained(tmp_path / "exported"),
        load_model(MegaTransformerForCausalLM, tmp_path / "exported"),
    ):
        assert equal(dict(model.state_dict()), dict(merged))
    # Adapters on top of adapters.
    again = train_text("again", 2, "--init_from", str(run.folder), "--lora_rank", "2", "--lora_modules", "o_proj")
    assert equal(plain_names(again.weights()), {name: merged[name] for name in plain_names(again.weights())})
    assert sum(map(is_of_adapter, again.weights())) == 2 * 4  # tiny has four layers
    # The card of the checkpoint says what its files hold, and its line loads merged weights.
    card = (run.folder / "README.md").read_text()
    assert "`ema.safetensors` the moving average of the adapters" in card and "adapters merged" in card
    names = {}
    exec(card.split("```python\n")[1].partition("\n```")[0], names)
    assert equal(dict(names["model"].state_dict()), dict(merged))


@pytest.mark.parametrize("flag", ["--async_save", "--use_gradient_checkpointing"])
def test_what_saves_time_or_memory_changes_nothing(flag, base, train_text):
    plain, other = train_text("plain", 3, *from_base(base)), train_text("other", 3, *from_base(base), flag)
    for name in ("model", "ema"):
        assert largest_difference(plain.weights(name), other.weights(name)) <= (0 if flag == "--async_save" else 1e-6)


def test_gradient_filters_work_on_adapters(base, train_text):
    filtered = train_text("filtered", 3, *from_base(base), "--trainer", "grokfast_ema")
    assert equal(plain_names(filtered.weights()), base.weights("ema"))
    state = torch.load(filtered.folder / "optimizer.pt", weights_only=True)["state"]
    assert all("grokfast_ema" in values for values in state.values())


class NonFiniteTrainer(MultimodalTrainer):
    """The gradients of steps after the second are not finite."""

    def backward(self, loss):
        super().backward(loss * (float("nan") if self.state.global_step >= 2 else 1))


class NonFiniteStage(MultimodalStage):
    trainer_class = NonFiniteTrainer


def test_a_step_that_is_not_finite_changes_no_adapter(base, train_text, text_cache, tmp_path):
    run = run_stage(NonFiniteStage, SMALL_TEXT, text_cache, tmp_path, "skipping", 4, *from_base(base))
    assert json.loads((run.folder / "stage.json").read_text())["skipped_steps"]["total"] == 2
    finite = train_text("finite", 4, *from_base(base), "--save_steps", "2")
    before = Run(finite.folder.parent, 2)
    assert all(equal(run.weights(name), before.weights(name)) for name in ("model", "ema"))


def test_a_dry_run_counts_what_is_trained(base, text_cache, tmp_path, capsys, train_text):
    words = ["--cached_dataset", str(text_cache), "--output_dir", str(tmp_path), "--dry_run", "--max_steps", "7"]
    MultimodalStage.main(changed([*SMALL_TEXT, *words], *from_base(base)))
    shown = capsys.readouterr().out
    run = train_text("tuned", 1, *from_base(base))
    trained = sum(value.numel() for name, value in run.weights().items() if is_of_adapter(name))
    frozen = sum(value.numel() for value in base.weights().values())
    assert f"of the model: {trained:,} trained, {frozen:,} frozen" in shown
    assert f"parameters: model {trained + frozen:,}" in shown
    # Reports count the merged model.
    assert ReportedRun.read("multimodal", run.folder.parent).n_parameters() == frozen


@pytest.mark.parametrize("has_record", [True, False], ids=["recorded", "older"])
def test_a_checkpoint_of_all_weights_is_not_resumed_with_adapters(has_record, base, train_text):
    if not has_record:  # As before these flags existed.
        names = ("lora_rank", "lora_alpha", "lora_modules")
        file = base.folder / "stage.json"
        edit_record(file, lambda content: [content["arguments"].pop(name) for name in names])
    message = (
        f"{base.folder} was trained with --lora_rank 0, this run has 4: it cannot change within a run. Give the same "
        f"or leave it out, or start a new run from its weights with --init_from {base.folder} and another --run_name"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        train_text("base", 4, "--resume_from_checkpoint", "--lora_rank", "4", *RATE)
    flags = [*RATE, "--lr_scheduler_type", "constant"]
    assert len(train_text("base", 4, "--resume_from_checkpoint", *flags).losses) == 4


class WatchedStage(MultimodalStage):
    """Keeps its trainer."""

    def build_trainer(self, *args, **kwargs):
        WatchedStage.trainer = super().build_trainer(*args, **kwargs)
        return WatchedStage.trainer


@pytest.mark.parametrize("flags", [[], ["--no_use_ema"], ["--trainer", "grokfast_ema"]])
def test_a_run_holds_the_bytes_that_a_dry_run_counts(flags, base, text_cache, tmp_path, capsys):
    words = [*from_base(base), *flags]
    run_stage(WatchedStage, SMALL_TEXT, text_cache, tmp_path, "run", 2, *words)
    capsys.readouterr()
    where = ["--cached_dataset", str(text_cache), "--output_dir", str(tmp_path), "--run_name", "other"]
    MultimodalStage.main(changed([*SMALL_TEXT, *where, "--max_steps", "2", "--dry_run"], *words))
    shown = dict(re.findall(r"^  (.+): ([\d,.]+) MiB$", capsys.readouterr().out, re.MULTILINE))
    trainer = WatchedStage.trainer
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    states = trainer.optimizer.optimizer.state.values()
    held = {
        "weights": n_bytes(trainer.model),
        "gradients": sum(parameter.nbytes for parameter in trained),
        "Adam's two moments": sum(state[name].nbytes for state in states for name in ("exp_avg", "exp_avg_sq")),
    }
    averages = [state[name].nbytes for state in states for name in ("weight_ema", "grokfast_ema") if name in state]
    if averages:
        held["averages of weights and gradients"] = sum(averages)
    if trainer.ema_model is not None:  # A plain model, into which adapters are merged.
        assert not any(map(is_of_adapter, trainer.ema_model.state_dict()))
        held["copy with averaged weights, for evaluation"] = n_bytes(trainer.ema_model)
    assert shown == {name: f"{size / 2**20:,.1f}" for name, size in held.items()}
    parts = {"adversary": None, "criterion": None}
    assert memory_of(trainer.model, parts, trainer.stage_arguments, Engine()) == held


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--lora_modules qkv_prj", "'qkv_prj' names no linear layer of this model; did you mean 'qkv_proj'"),
        ("--lora_modules lm_head", r"lm_head shares its weight \(.*embed_tokens.weight.*name other layers"),
    ],
)
def test_layers_that_cannot_be_adapted_are_refused(words, message, base, train_text):
    with pytest.raises(ValueError, match=message):
        train_text("refused", 1, *from_base(base), *words.split())


def test_a_run_that_has_no_checkpoint_yet_has_nothing_to_adapt(train_text):
    with pytest.raises(ValueError, match="the run new has no checkpoint to resume; give --init_from"):
        train_text("new", 1, "--lora_rank", "4", "--resume_from_checkpoint", "latest")


# ---- Text to image.


def test_a_unet_is_adapted(train_diffusion, latent_cache):
    base = train_diffusion("base", 3, "--batch_size", "8")
    flags = [*from_base(base), "--batch_size", "8", "--save_steps", "2"]
    run = train_diffusion("tuned", 4, *flags)
    assert equal(plain_names(run.weights()), base.weights("ema"))
    assert sum(map(is_of_adapter, run.weights())) == len(run.weights("ema")) > 8
    # Predictions of merged and adapted weights.
    batch = collate_captioned([ImageLatentDataset(latent_cache, "train")[i] for i in range(4)])
    inputs = {"tokens": batch["tokens"], "mask": batch["mask"], "time": torch.linspace(0.1, 0.9, 4)}
    for kind in ("raw", "ema"):
        merged, adapted = load_model(ImageDiffusion, run.folder, kind), adapted_model(ImageDiffusion, run, kind)
        outputs = [model(latents=batch["mean"], **inputs).prediction for model in (merged, adapted)]
        assert (outputs[0] - outputs[1]).abs().max() <= 1e-5
    # Exact resume.
    half = run.folder.parents[1] / "half"
    half.mkdir()
    (run.folder.parent / "checkpoint-2").rename(half / "checkpoint-2")
    resumed = train_diffusion("half", 4, *flags[2:], "--resume_from_checkpoint")
    assert all(equal(run.weights(name), resumed.weights(name)) for name in ("model", "ema"))


# ---- Text to speech.


def test_a_text_to_speech_model_is_adapted(tmp_path, fresh_logging):
    latents = make_speech(tmp_path / "speech")
    train = partial(run_stage, AudioDiffusionStage, [*SMALL_SPEECH, *RATE], latents, tmp_path)
    base = train("base", 3)
    flags = ["--init_from", str(base.folder.parent), "--lora_rank", "4", "--save_steps", "2"]
    run = train("tuned", 4, *flags)
    # The text encoder, durations and convolutions are those of the base.
    assert equal(plain_names(run.weights()), base.weights("ema"))
    factors = {name: value for name, value in run.weights().items() if is_of_adapter(name)}
    assert run.weights("ema").keys() == factors.keys() and all(value.any() for value in factors.values())
    # Predictions of merged and adapted weights, with and without text.
    clips = collate_audio_latents([AudioLatentDataset(latents, "train")[i] for i in range(4)])
    names = ("n_latent_frames", "tokens", "n_tokens", "durations", "speakers")
    inputs = {name: clips[name] for name in names} | {"drop": torch.tensor([True, False, False, False])}
    for kind in ("raw", "ema"):
        merged, adapted = load_model(AudioDiffusion, run.folder, kind), adapted_model(AudioDiffusion, run, kind)
        noisy = {"latents": clips["latents"], "time": torch.linspace(0.1, 0.9, 4)}
        with torch.no_grad():
            outputs = [model(**noisy, **inputs).prediction for model in (merged, adapted)]
        assert (outputs[0] - outputs[1]).abs().max() <= 1e-5 * outputs[0].abs().max()
    # Exact resume.
    half = run.folder.parents[1] / "half"
    half.mkdir()
    (run.folder.parent / "checkpoint-2").rename(half / "checkpoint-2")
    resumed = train("half", 4, "--save_steps", "2", "--resume_from_checkpoint")
    assert all(equal(run.weights(name), resumed.weights(name)) for name in ("model", "ema"))


# ---- Streams of text and images.


def test_streams_are_adapted(train):
    base = train(SMALL_STREAMS, "base", 3, "--batch_size", "6")
    run = train(SMALL_STREAMS, "tuned", 3, "--batch_size", "6", *from_base(base), "--freeze", "audio")
    assert equal(plain_names(run.weights()), base.weights("ema"))
    # A frozen part's adapters are not trained either.
    moved = {name: value.any().item() for name, value in run.weights().items() if name.endswith(FACTORS[1])}
    assert {is_moved for name, is_moved in moved.items() if "audio" in name} == {False}
    assert {is_moved for name, is_moved in moved.items() if "audio" not in name} == {True}
    merged = load_model(MegaTransformerMultimodal, run.folder).state_dict()
    assert merged.keys() == load_model(MegaTransformerMultimodal, base.folder).state_dict().keys()


# ---- Does it learn?


@pytest.mark.slow
def test_adapters_learn_new_text_nearly_as_well_as_all_weights(tmp_path, fresh_logging):
    """Words in random order, then the same words in an order of their own."""
    draw, caches = random.Random(0), {}
    for name in ("random", "ordered"):
        (tmp_path / name).mkdir()
        for number in range(100):
            start, n = draw.randrange(len(WORDS)), 20
            words = (
                draw.choices(WORDS, k=n) if name == "random" else [WORDS[(start + i) % len(WORDS)] for i in range(n)]
            )
            (tmp_path / name / f"{number:03}.txt").write_text(f"{number} {' '.join(words)}\n", encoding="utf-8")
        cache = tmp_path / f"{name}_cache"
        caches[name] = prepare_text(str(tmp_path / name), cache, "bytes", validation_fraction=0.2)
    rate = ["--lr_scheduler_type", "constant_with_warmup", "--ema_decay", "0.9", "--learning_rate"]

    def train(text: str, name: str, steps: int, *flags: str) -> Run:
        return run_stage(MultimodalStage, SMALL_TEXT, caches[text], tmp_path, name, steps, *rate, *flags)

    base = train("random", "base", 120, "3e-3")
    start = ["--init_from", str(base.folder.parent)]
    before = evaluate.main(["--checkpoint", str(base.folder), "--cached_dataset", str(caches["ordered"])])
    bits = [before["scores"]["model"]["bits_per_byte"]]
    for name, words in {"full": ["3e-3"], "adapted": ["5e-3", "--lora_rank", "16"]}.items():
        bits.append(train("ordered", name, 40, *words, *start).logged("eval_bits_per_byte")[-1])
    assert bits[0] - bits[2] >= 0.7 * (bits[0] - bits[1]) > 0.3
