"""The multimodal stage on text, images and audio: exactness under accumulation and resume, refusals, losses."""

import json
import re
import shutil
import subprocess
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from dataset_loading.multimodal import parse_task
from model.audio.vae import AudioVAE, AudioVAEConfig
from model.multimodal import MegaTransformerMultimodal
from model.multimodal.generation import Sampling
from model.multimodal.layout import Part
from pretrain_multimodal import MultimodalStage
from tests.helpers.runs import Run, changed, equal, largest_difference, relative_distance
from tests.helpers.stream_caches import SMALL_RECURRENT, SMALL_STREAMS, save_vaes
from tests.helpers.two_processes import LIMIT, ROOT, TWO_PROCESSES, deepspeed_launcher, environment
from tests.helpers.vocoder_checkpoint import save_stage_checkpoint
from utils.checkpoints import load_model
from utils.command_line import parse_arguments
from utils.configuration import MegaTransformerConfig
from utils.generation.audio_diffusion import AudioPipeline
from utils.training.arguments.multimodal import MultimodalArguments
from utils.training.multimodal import MultimodalTrainer
from utils.training.streams.stage import channel_scales, check_flex_attention, check_speakers
from utils.training.streams.trainer import MultimodalStreamTrainer, compared_rows

MODELS = pytest.mark.parametrize("common", [SMALL_STREAMS, SMALL_RECURRENT], ids=["flat", "recurrent"])


@MODELS
def test_accumulation_equals_one_batch(common, train):
    dropout = changed(
        common, *common[common.index("--override") : common.index("--override") + 6], "hidden_dropout=0.2"
    )
    whole = train(dropout, "whole", 3, "--batch_size", "6", "--no_use_ema")
    parts = train(dropout, "parts", 3, "--batch_size", "1", "--gradient_accumulation_steps", "6", "--no_use_ema")
    assert parts.losses == pytest.approx(whole.losses, rel=1e-5)
    for name in (
        "grad_norm",
        "loss/text",
        "loss/begin",
        "loss/audio_length",
        "loss/image",
        "loss/audio",
        "targets_per_step",
    ):
        assert parts.logged(name) == pytest.approx(whole.logged(name), rel=1e-4), name
    assert relative_distance(whole.weights(), parts.weights()) <= 1e-5
    # Each loss of an untrained model is there: flows of unit variance have 2, or less where channels weigh less.
    assert 0.5 < whole.logged("loss/image")[0] < 4 and 0.5 < whole.logged("loss/audio")[0] < 4
    assert 5 < whole.logged("loss/text")[0] < 7


def test_resumed_equals_straight_through(train, tmp_path):
    common = SMALL_RECURRENT
    flags = ["--batch_size", "6", "--save_steps", "2", "--eval_steps", "2"]
    straight = train(common, "straight", 4, *flags)
    half = tmp_path / "multimodal" / "half"
    (tmp_path / "multimodal" / "straight").rename(half)
    kept = half.with_name("kept")
    (half / "checkpoint-4").rename(kept)
    straight.folder = kept
    resumed = train(common, "half", 4, *flags, "--resume_from_checkpoint")
    for name in ("model", "ema"):
        assert largest_difference(straight.weights(name), resumed.weights(name)) == 0
    first, second = (torch.load(run.folder / "optimizer.pt", weights_only=True) for run in (straight, resumed))
    assert equal(first, second) and straight.losses == resumed.losses
    assert straight.logged("eval_loss") == resumed.logged("eval_loss")


def test_a_checkpoint_generates_and_holds_what_it_needs(train, stream_caches):
    run = train(SMALL_STREAMS, "record", 2, "--batch_size", "6", "--eval_steps", "1")
    record = json.loads((run.folder / "stage.json").read_text())
    assert record["latents"]["image"]["latent_shape"] == [16, 4, 4] and record["stage"] == "multimodal"
    for name in ("image", "audio"):
        assert list((run.folder.parent / name / "vae").glob("checkpoint-*/COMPLETE.json"))
    model = load_model(MegaTransformerMultimodal, run.folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(run.folder)
    config = model.config
    assert config.null_token_id == len(tokenizer) and config.audio_length_token_id == len(tokenizer) + 5
    assert config.vocab_size == len(tokenizer) + 5 + 96 and config.image_n_tokens == 4
    prompt = [Part("text", ids=tokenizer.encode("a red bear", add_special_tokens=False))]
    answer = model.generate(
        [prompt], Sampling("image", ["image"], n_steps={"image": 2}), generators=[torch.Generator()]
    )
    assert answer[0][0].latents.shape == (4, 64) and answer[0][0].latents.isfinite().all()
    # Metrics of every task, at every evaluation.
    names = (
        "image-text_nats",
        "audio-text_accuracy",
        "begin_nats",
        "audio_length_nats",
        "audio_t0.9",
        "condition_ratio_image",
    )
    for name in names:
        assert len(run.logged(f"eval_{name}")) == 2, name
    assert run.logged("eval_condition_ratio_audio")[0] == pytest.approx(1, abs=0.05)


def test_condition_dropout_replaces_the_text_before_a_span(train, monkeypatch):
    seen = []
    original = MultimodalStreamTrainer.build_streams

    def spy(self, batch, *, dropped=None, text="text"):
        streams = original(self, batch, dropped=dropped, text=text)
        if dropped is not None:
            kinds = [self.train_dataset.tasks[number].name for number in batch["task"].tolist()]
            seen.extend(zip(kinds, dropped, [stream.ids for stream in streams], strict=True))
        return streams

    monkeypatch.setattr(MultimodalStreamTrainer, "build_streams", spy)
    words = SMALL_STREAMS[SMALL_STREAMS.index("--override") : SMALL_STREAMS.index("--override") + 6]
    flags = [*words, "image_condition_dropout=0.5", "audio_condition_dropout=0", "audio_guidance_scale=1"]
    run = train(SMALL_STREAMS, "dropped", 4, "--batch_size", "12", *flags)
    null = load_model(MegaTransformerMultimodal, run.folder).config.null_token_id
    assert {kind for kind, is_dropped, _ in seen if is_dropped} == {"text-image"}
    images = [is_dropped for kind, is_dropped, _ in seen if kind == "text-image"]
    assert 0.2 < sum(images) / len(images) < 0.8
    for _, is_dropped, ids in seen:
        assert (null in ids) == is_dropped and (not is_dropped or ids[1:3] == [null, null + 1])


def test_two_modalities_and_interleaved_streams(stream_caches, tmp_path, fresh_logging):
    words = [
        *SMALL_STREAMS,
        *stream_caches[:2],
        "--output_dir",
        str(tmp_path),
        "--run_name",
        "two",
        "--max_steps",
        "2",
    ]
    chosen = ["--include_modes", "text", "image", "--tasks", "text-image-text:2", "text", "--batch_size", "6"]
    MultimodalStage.main(changed(words, *chosen))
    run = Run(tmp_path / "multimodal" / "two", 2)
    config = load_model(MegaTransformerMultimodal, run.folder).config
    assert config.modalities == ["text", "image"] and config.audio_begin_token_id is None
    assert not run.logged("loss/audio") and run.logged("loss/image")[0] > 0


def test_a_dry_run_counts_and_writes_nothing(stream_caches, tmp_path, capsys):
    MultimodalStage.main([*SMALL_STREAMS, *stream_caches, "--output_dir", str(tmp_path), "--dry_run"])
    shown = capsys.readouterr().out
    # 12 images in 1 + 3 rows, 11 clips in 1 + 4.
    for part in ("modalities = ['text', 'image', 'audio']", "samples: train 103, validation 16", "parameters: "):
        assert part in shown
    assert not list(tmp_path.iterdir())


def test_what_one_cache_holds_out_is_not_trained_on(stream_caches, tmp_path, capsys, caplog):
    # The clip of item 4 is held out, its image is not.
    folder = Path(shutil.copytree(stream_caches[stream_caches.index("--audio_latents") + 1], tmp_path / "audio"))
    manifest = json.loads((folder / "manifest.json").read_text())
    training, validation = manifest["entries"]["train"], manifest["entries"]["validation"]
    entry = next(entry for entry in training if entry["source"].startswith("004"))
    validation.append(training.pop(training.index(entry)))
    (folder / f"train/{entry['key']}.pt").rename(folder / f"validation/{entry['key']}.pt")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    words = changed([*SMALL_STREAMS, *stream_caches], "--audio_latents", str(folder))
    MultimodalStage.main([*words, "--output_dir", str(tmp_path / "runs"), "--dry_run"])
    assert "1 items are kept out of training" in caplog.text and "004" in caplog.text
    # 11 images in 1 + 3 rows, 10 clips in 1 + 4; 4 and 5 held-out ones in two directions.
    assert "samples: train 94, validation 18" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--include_modes image audio", "must name text"),
        ("--include_modes text text", "each mode once"),
        ("--include_modes text video", "include_modes.*'video'"),
        ("--cached_dataset x --batch_tokens 90", "--batch_tokens=90 is below --sequence_length=256"),
        ("--include_modes text image", "--audio_latents has no effect with include_modes="),
        ("--tasks text-video", "'video' is no modality"),
        ("--cached_dataset x", "x does not exist; name texts with --text_dataset"),
        ("--sequence_length 8", "--sequence_length has no effect with.*it needs --text_dataset"),
        ("--n_samples 2", "--n_samples has no effect with --include_modes.*needs only text"),
        ("--cached_dataset x --tasks text-image", "--tasks text-image has no rows for the texts in x; add text:1"),
        ("--tasks text-image text-image:2", "--tasks names text-image twice"),
        ("--batch_tokens 64 --batch_size 4", "--batch_size has no effect with batch_tokens=64"),
        ("--batch_tokens 4", r"0 training samples cannot be dealt out to 1 micro-batches.*of 4 tokens"),
        ("--freeze trunck", "--freeze 'trunck' names no part of this model.*did you mean 'trunk'"),
        ("--freeze trunk text image audio", "freezes the whole model"),
        ("--learning_rates trunk", "--learning_rates trunk: '' must be a number above 0"),
        ("--learning_rates trunk:-1", "'-1' must be a number above 0"),
        ("--learning_rates decoders.image:2 image:3", "decoders.image:2 has no effect: later entries"),
        ("--freeze image --learning_rates image:2", "image:2 has no effect: --freeze excludes image"),
        ("--override vocab_size=9000", "--override vocab_size=9000 does not fit.*vocab_size="),
        ("--override image_size=64", "image_size=64 does not fit.*image_size=32"),
        ("--image_latents nowhere", "nowhere does not exist"),
        ("--image_vae_config large", "trained with preset 'tiny', not 'large'"),
        ("--config tiny", "unknown preset 'tiny'.*multimodal-tiny"),
        ("--caption_tokenizer bytes", "--caption_vocab_size has no effect with caption_tokenizer='bytes'"),
    ],
)
def test_what_does_not_fit_is_refused(words, message, train, capsys):
    with pytest.raises((ValueError, OSError, SystemExit)) as error:
        train(SMALL_STREAMS, "refused", 1, *words.split())
    assert re.search(message, f"{error.value} {capsys.readouterr().err}", flags=re.S)


def test_another_vae_is_refused(train, tmp_path):
    image_vae, audio_vae = save_vaes(tmp_path / "others", value=0.2)
    for name, vae in (("image", image_vae), ("audio", audio_vae)):
        with pytest.raises(ValueError, match=f"the latents in .*{name} come from the VAE"):
            train(SMALL_STREAMS, "refused", 1, f"--{name}_vae_checkpoint", str(vae))


@pytest.mark.launch
@pytest.mark.parametrize(
    ("launcher", "flags"),
    [
        ("torchrun", ["--batch_tokens", "56", "--freeze", "model.embed_tokens"]),
        (
            "ds_config_zero-3.json",
            ["--batch_size", "1", "--freeze", "decoders.image", "--learning_rates", "trunk:0.5"],
        ),
        pytest.param("ds_config_zero-2.json", ["--batch_size", "1"], marks=pytest.mark.slow),
    ],
    ids=["torchrun_by_tokens", "zero_3", "zero_2"],
)
def test_two_processes_equal_one_also_where_one_lacks_a_modality(launcher, flags, stream_caches, tmp_path, train):
    """Batches of one or two rows: most of the time a process has no image, or no audio."""
    one = train(SMALL_RECURRENT, "one", 3, *flags, "--gradient_accumulation_steps", "4")
    words = [*SMALL_RECURRENT, *stream_caches, "--output_dir", str(tmp_path), "--run_name", "two", "--max_steps", "3"]
    words += [*flags, "--gradient_accumulation_steps", "2"]
    head = TWO_PROCESSES
    if launcher != "torchrun":
        head = deepspeed_launcher()
        words += ["--use_deepspeed", "--deepspeed_config", launcher]
    command = [*head, "pretrain_multimodal.py", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    two = Run(tmp_path / "multimodal" / "two", 3)
    assert two.losses == pytest.approx(one.losses, rel=1e-5)
    for name in ("grad_norm", "loss/image", "loss/audio", "eval_loss"):
        assert two.logged(name) == pytest.approx(one.logged(name), rel=1e-4), name
    assert relative_distance(one.weights("ema"), two.weights("ema")) <= 1e-5


@pytest.mark.parametrize(
    ("has_gpu", "fields", "message"),
    [
        (False, {}, "--flex_attention needs an NVIDIA GPU"),
        (True, {"attention_dropout": 0.1}, r"--flex_attention knows no attention_dropout=0\.1"),
        (True, {}, ""),
    ],
)
def test_flex_attention_is_refused_where_it_cannot_work(has_gpu, fields, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    args = parse_arguments(MultimodalArguments, [*SMALL_STREAMS, "--flex_attention"], "")
    refused = pytest.raises(ValueError, match=message) if message else nullcontext()
    with refused:
        check_flex_attention(args, MegaTransformerConfig(**fields))


def test_channels_of_a_vae_with_latent_rows_have_a_scale_per_row():
    vae = AudioVAE.from_preset("tiny-2d", width=16, n_encoder_blocks=1, n_decoder_blocks=1)
    std, rows = torch.arange(1.0, 9), vae.config.n_rows
    vae.set_latent_statistics(torch.zeros(8), std)
    scales = channel_scales(vae)
    # Channels of the cache are those of its latents (Z, rows, L), flattened.
    assert rows > 1 and torch.equal(scales, std[:, None].expand(8, rows).flatten())


def test_a_vae_that_needs_a_speaker_is_refused(tmp_path):
    sizes = {"n_mels": 40, "width": 16, "latent_channels": 5, "n_encoder_blocks": 1, "n_decoder_blocks": 1}
    vae = AudioVAE(AudioVAEConfig(**sizes, speakers=["anna"]))
    folder = save_stage_checkpoint(vae, "audio_vae", tmp_path / "voices")
    with pytest.raises(ValueError, match=r"the audio VAE at .*voices.* use latents of a VAE without --use_speakers"):
        check_speakers("audio", folder)
    check_speakers("audio", save_vaes(tmp_path)[1])
    with pytest.raises(ValueError, match="needs a speaker for each clip, one of anna"):
        AudioPipeline.decode(SimpleNamespace(vae=vae), torch.zeros(1, 3, 5), torch.tensor([6]))


def test_the_condition_ratio_counts_rows_with_another_text_before_the_span(caplog):
    tasks = [parse_task(name) for name in ("text-image", "image-text", "image", "audio-text-image")]
    inputs = {"task": torch.tensor([0, 0, 1, 2, 3]), "text": [[1], [2], [1], [1], [1]], "other_text": [[2]] * 5}
    compared = compared_rows(inputs, tasks, "image")
    assert compared.tolist() == [1, 0, 0, 0, 1] and not compared_rows(inputs, tasks, "audio").any()
    config = MegaTransformerConfig(modalities=["text", "image"])
    state, dataset = SimpleNamespace(global_step=1), SimpleNamespace(tasks=tasks)
    trainer = SimpleNamespace(config=config, names=["image"], state=state, eval_dataset=dataset)
    zeros = torch.zeros(5)
    terms = {f"{task.name}_{kind}": zeros for task in tasks for kind in ("nats", "targets")}
    terms |= {f"{kind}_targets": zeros for kind in ("begin", "length")} | {"n_bytes": zeros}
    terms |= {"image_t0.5": zeros + 1, "image_t0.9": torch.tensor([1.0, 5, 5, 5, 3]), "image_tokens": zeros + 1}
    terms["other_image_t0.9"] = torch.tensor([4.0, 5, 5, 5, 6])

    def summary(rows):
        return MultimodalStreamTrainer.evaluation_summary(trainer, {**terms, "image_compared": rows})

    assert summary(compared)["condition_ratio_image"] == 2.5
    without = summary(zeros)
    assert "condition_ratio_image" not in without and without["image_t0.9"] == pytest.approx(19 / 5)
    assert "hardly depends" not in caplog.text


def test_the_averaged_copy_attends_as_the_trained_model(monkeypatch):
    trainer = object.__new__(MultimodalStreamTrainer)
    trainer.model, trainer.ema_model = SimpleNamespace(uses_flex_attention=True), None
    copy = SimpleNamespace(uses_flex_attention=False)

    def build(self):
        self.ema_model = copy
        return copy

    monkeypatch.setattr(MultimodalTrainer, "evaluation_model", build)
    assert trainer.evaluation_model() is copy and copy.uses_flex_attention
