"""evaluate.py on a small multimodal run: numbers against their definitions, controls, models beside it, refusals."""

import contextlib
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import evaluate
from dataset_loading.audio.latents import AudioLatentDataset
from dataset_loading.embedded.scenes import caption_factors, list_scenes
from dataset_loading.image.latents import ImageLatentDataset
from dataset_loading.multimodal import Item, join_items
from model.audio.diffusion import AudioDiffusion
from model.multimodal.layout import Part, audio_tokens
from pretrain_multimodal import MultimodalStage
from tests.helpers import stream_caches
from tests.helpers.image_diffusion_checkpoint import save_diffusion_checkpoint
from tests.helpers.image_vae_checkpoint import save_checkpoint
from tests.helpers.runs import changed
from tests.helpers.stream_caches import SMALL_RECURRENT, make_stream_caches
from tests.helpers.text_encoder_folder import save_clip, save_torchscript
from utils.checkpoints import STAGE, mark_complete, provenance, write_json
from utils.configuration import MegaTransformerConfig
from utils.evaluation.multimodal import beside
from utils.evaluation.multimodal.items import Direction, HeldOutItems, directions_of, others
from utils.evaluation.multimodal.judges import length_scores, text_scores
from utils.evaluation.multimodal.losses import TeacherForcing, stream_losses
from utils.generation.audio_diffusion import fit_to_audio_latents
from utils.generation.multimodal import MultimodalPipeline

FEW = ["audio_max_tokens=8", "image_n_sampling_steps=2", "audio_n_sampling_steps=2"]
DIRECTIONS = ["image-text", "text-image", "audio-text", "text-audio"]


def train(folder, name, common, caches, *overrides, steps=2, flags=()):
    at = common.index("--override") + 1
    words = [*common[:at], *FEW, *overrides, *common[at:], *caches, "--output_dir", str(folder), "--run_name", name]
    MultimodalStage.main(changed([*words, "--max_steps", str(steps), "--batch_size", "6"], *flags))
    return folder / "multimodal" / name


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """Caches of random latents with the captions of scenes: what they show cannot be read, but what reads it runs."""
    scenes = [scene.caption for scene in list_scenes()][::17]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream_caches, "text_of", lambda number: scenes[number])
        return make_stream_caches(tmp_path_factory.mktemp("caches"), 20)


@pytest.fixture(scope="module")
def run(caches, tmp_path_factory):
    core = ["recurrent_max_thinking_steps=4", "recurrent_mean_thinking_steps=3"]
    return train(tmp_path_factory.mktemp("runs"), "run", SMALL_RECURRENT, caches, *core)


def save_speech_checkpoint(run_dir, cache):
    """A small model of text to speech without training."""
    latents = AudioLatentDataset(cache, "train")
    small = {"widths": [16, 24], "n_blocks": [1, 1], "n_attentions": [0, 1], "head_width": 8, "text_width": 16}
    config = AudioDiffusion.from_preset("tiny", **small, conditioning_width=16, frame_width=16).config
    names: dict = {"speakers": [], "vae_speakers": [], "overrides": []}
    config = fit_to_audio_latents(config, latents.manifest["settings"], **names, folder=latents.folder)
    (checkpoint := run_dir / "checkpoint-1").mkdir(parents=True)
    AudioDiffusion(config).save_pretrained(checkpoint)
    data = {"folder": str(cache), "fingerprint": latents.fingerprint}
    record = {"stage": "audio_diffusion", "preset": "tiny", "arguments": {}, "data": data}
    write_json(checkpoint / STAGE, {**record, "latents": dict(latents.manifest["settings"]), **provenance()})
    mark_complete(checkpoint)
    return run_dir


@pytest.fixture(scope="module")
def report(run, caches, tmp_path_factory):
    folder = tmp_path_factory.mktemp("beside")
    save_diffusion_checkpoint(folder / "draws", Path(caches[1]))
    beside = [run, folder / "draws", save_speech_checkpoint(folder / "speaks", Path(caches[3]))]
    words = "--metrics losses texts probe reader round_trips --reader_steps 3 --n_copies 2 --contact_sheet 1"
    words += f" --batch_size 4 --features {save_clip(folder / 'clip')} --beside"
    return evaluate.main(["--checkpoint", str(run), *words.split(), *map(str, beside)])


def test_every_direction_has_its_rows_and_controls(report, run):
    assert report["data"]["is_the_runs_own"] is True and report["data"]["n_samples"] == 5
    assert report["stage"] == "multimodal" and list(report["scores"]) == DIRECTIONS
    # Items 3, 7, ..., 19 are held out; all have image and audio.
    assert report["n_items"] == dict.fromkeys(DIRECTIONS, 5)
    for name, rows in report["scores"].items():
        assert {"model", "shuffled", "multimodal run"} <= set(rows), name
        # The same model beside itself gives the same numbers.
        assert rows["multimodal run"] == {key: rows["model"][key] for key in rows["multimodal run"]}
    # Models of one task are read and, where they draw, judged by the probe.
    assert {"read_all", "probe_top1", "kid"} <= set(report["scores"]["text-image"]["image_diffusion draws"])
    assert {"read_all", "length_ratio"} <= set(report["scores"]["text-audio"]["audio_diffusion speaks"])
    assert "image_diffusion draws" not in report["scores"]["text-audio"]
    texts, images, sounds = (report["scores"][name] for name in ("image-text", "text-image", "text-audio"))
    assert {"exact", "words", "object", "ground", "place", "all"} == set(texts["model"])
    assert {"wer", "cer"} < set(report["scores"]["audio-text"]["model"])
    assert {"read_object", "read_all", "probe_words", "kid", "kid_error", "features_kid"} <= set(images["model"])
    scored = {name for name, row in images.items() if 0 <= row.get("clip_score", -1) <= 100}
    assert report["features"]["kind"] == "clip" and {"vae", "model", "shuffled"} <= scored
    assert "kid" not in images["shuffled"] and images["vae"]["read_all"] == pytest.approx(
        report["readers"]["image"]["held_out"]["all"]
    )
    # Five items have five distinct texts; the readers know factors, which are no retrieval.
    assert images["chance"] == {"probe_top1": 0.2, "probe_words": 0.5} and "chance" not in sounds
    assert {"read_place", "length_error", "length_ratio"} <= set(sounds["model"])
    assert sounds["model"]["length_error"] == 8 or sounds["model"]["length_ratio"] > 0
    trips = {"text-image-text", "image-text-image", "text-audio-text", "audio-text-audio"}
    assert set(report["round_trips"]) == trips
    assert "exact" in report["round_trips"]["text-audio-text"]["shuffled"]
    written = json.loads((run / "metrics.json").read_text())
    assert written["scores"]["text-audio"]["model"] == sounds["model"]


def test_losses_are_those_of_the_training_stage(report, run, caches):
    (checkpoint,) = run.glob("checkpoint-*")
    logged = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"][-1]
    entries = ImageLatentDataset(caches[1], "validation").entries
    pipeline = MultimodalPipeline.load(run)
    n_targets = sum(len(pipeline.text_part(entry["caption"]).ids) + 1 for entry in entries)
    n_bytes = sum(len(entry["caption"].encode()) for entry in entries)
    losses = report["losses"]
    for name in ("image-text", "audio-text"):
        nats = losses[name]["bits_per_byte"] * math.log(2) * n_bytes / n_targets
        assert nats == pytest.approx(logged[f"eval_{name}_nats"], rel=1e-4)
        assert losses[name]["token_accuracy"] == pytest.approx(logged[f"eval_{name}_accuracy"], abs=1e-6)
        assert losses[name]["other_bits_per_byte"] == pytest.approx(losses[name]["bits_per_byte"], rel=0.1)
    # The noise is another one than in training.
    for name in ("image", "audio"):
        row = losses[f"text-{name}"]
        assert row["error_t0.9"] == pytest.approx(logged[f"eval_{name}_t0.9"], rel=0.2)
        assert row["ratio_t0.9"] == pytest.approx(row["other_error_t0.9"] / row["error_t0.9"])


@torch.no_grad()
def test_losses_of_streams_do_not_depend_on_those_beside_them(run):
    pipeline = MultimodalPipeline.load(run)
    generator = torch.Generator().manual_seed(1)
    clips = [audio_tokens(torch.randn(length, 5, generator=generator), 4) for length in (9, 21, 12)]
    rows = [[pipeline.text_part("a large fox on red"), Part("audio", latents=clip)] for clip in clips]
    together = stream_losses(pipeline.model, rows, time=0.5, seeds=[1, 2, 3])
    alone = [stream_losses(pipeline.model, [row], time=0.5, seeds=[seed]) for row, seed in zip(rows, (1, 2, 3))]
    assert together.tokens == sum(losses.tokens for losses in alone) == 3 + 6 + 3
    assert together.errors == pytest.approx(sum(losses.errors for losses in alone), rel=1e-5)
    # The untrained flow predicts zeros, almost: the error is the mean square of noise - latents.
    assert together.errors / together.tokens == pytest.approx(2, rel=0.2)


def test_one_item_has_no_other_condition(run):
    pipeline = MultimodalPipeline.load(run)
    forcing = TeacherForcing(pipeline.model, batch_size=2, autocast=contextlib.nullcontext, seed=0)
    clip = Part("audio", latents=torch.randn(3, 20, generator=torch.Generator().manual_seed(1)))
    parts = {"text": [pipeline.text_part("a large fox on red")] * 2, "audio": [clip] * 2}
    one = {name: rows[:1] for name, rows in parts.items()}
    with torch.no_grad():
        for direction in (Direction("text", "audio"), Direction("audio", "text")):
            both = forcing.scores(direction, parts, keys=["a", "b"], n_bytes=36)
            alone = forcing.scores(direction, one, keys=["a"], n_bytes=18)
            left_out = {name for name in both if name.startswith(("other_", "ratio_"))}
            assert left_out and set(both) - set(alone) == left_out


def test_a_multimodal_run_beside_has_options_of_its_modalities_and_its_own_tokens(monkeypatch):
    given = {}
    stub = SimpleNamespace(texts=lambda prompts, keys: [])
    monkeypatch.setattr(beside, "AnswerGenerator", lambda pipeline, **options: given.update(options) or stub)
    model = object.__new__(beside.Beside)
    model.stage, sampling = "multimodal", {"n_steps": {"image": 3, "audio": 4}, "sampler": {"audio": "heun"}}
    model.generator = SimpleNamespace(batch_size=2, sampling=sampling, max_new_tokens=99, seed=0, bf16=False)
    pipeline = SimpleNamespace(
        model=SimpleNamespace(config=MegaTransformerConfig(modalities=["text", "image"])),
        text_part=lambda text: Part("text", ids=text.split()),
    )
    items = SimpleNamespace(items=[Item("a", "a red bear"), Item("b", "a bear")], part=lambda *_: None)
    model.outputs(Direction("image", "text"), items, items.items, pipeline=pipeline, keys=["a", "b"])
    assert given["sampling"] == {"n_steps": {"image": 3}, "sampler": {}} and given["max_new_tokens"] == 3 + 8


def test_files_and_tensorboard(report, run):
    sheet = Image.open(run / "contact_sheet_text-image.png")
    assert sheet.width > sheet.height  # A real and two generated images.
    assert (run / "contact_sheet_text-audio.png").exists()
    assert len(list((run / "sounds").glob("text-audio_*.wav"))) == 3
    assert {file.name for file in (run / "readers").iterdir()} == {"image.safetensors", "audio.safetensors"}
    events = EventAccumulator(str(run)).Reload()
    scalars = {tag.split("/", 1)[1] for tag in events.Tags()["scalars"] if tag.startswith("evaluation_")}
    assert {"text-image/read_all", "text-image/read_all_shuffled", "text-audio/ratio_t0.9"} <= scalars
    assert len(report["texts"]["image-text"]) == 5 and report["texts"]["image-text"][0]["text"].startswith("a ")


def test_depths_and_exits_of_a_recurrent_core(run, tmp_path):
    words = "--metrics losses texts --thinking_steps 2 3 --exit_thresholds 1e9 --exit_criterion latent_difference"
    report = evaluate.main(
        ["--checkpoint", str(run), *words.split(), "--max_samples", "2", "--output_dir", str(tmp_path)]
    )
    assert [point["at"] for point in report["thinking_steps"]] == [2, 3]
    first, second = (point["directions"] for point in report["thinking_steps"])
    assert second["text-image"]["steps"] == {"text": 3, "image": 3} and first["audio-text"]["steps"]["audio"] == 2
    assert "exact" in first["image-text"] and "ratio_t0.9" in second["text-audio"]
    assert report["losses"]["text-audio"] == {
        name: second["text-audio"][name] for name in report["losses"]["text-audio"]
    }
    # Every token leaves at the first occasion, after its second step.
    exits = report["exits"][0]["directions"]["text-audio"]
    assert exits["steps"] == {"text": 2, "audio": 2} and exits["error_t0.5"] == first["text-audio"]["error_t0.5"]


def test_carried_states_of_a_recurrent_core(run, tmp_path):
    words = "--metrics reader --reader_steps 3 --carried_steps 3 1 --max_samples 2 --n_steps 3"
    report = evaluate.main(["--checkpoint", str(run), *words.split(), "--output_dir", str(tmp_path)])
    own, one, three = report["carried_steps"]
    assert [own["at"], one["at"], three["at"]] == [None, 1, 3] and set(own["directions"]) == {
        "text-image",
        "text-audio",
    }
    scores = {name: value for name, value in own["directions"]["text-image"].items() if name != "seconds"}
    assert scores == report["scores"]["text-image"]["model"]
    assert all(row["seconds"] > 0 for point in (own, one, three) for row in point["directions"].values())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--cached_dataset x", "--cached_dataset has no effect.*--image_latents"),
        ("--thinking_steps 9", r"--thinking_steps=\[9\] exceed recurrent_max_thinking_steps=4"),
        ("--carried_steps 4", r"--carried_steps=\[4\] exceed the 3 thinking steps"),
        ("--carried_steps 1 --metrics losses", "--carried_steps has no effect with --metrics losses"),
        ("--exit_thresholds 0.1", "--exit_thresholds needs --exit_criterion"),
        ("--speed_tokens 4", "--speed_tokens: no effect.*'multimodal'"),
        ("--metrics pesq", r"--metrics=\['pesq'\].*must be one of 'losses'"),
        ("--metrics losses --waveforms x", "--waveforms has no effect with --metrics losses"),
        ("--image_latents nowhere", "nowhere does not exist"),
        ("--beside VAE", "a run of stage 'image_vae'"),
        ("--metrics losses --reader_steps 3", "--reader_steps has no effect"),
        ("--features NETWORK --metrics losses", "--features=.*network.pt has no effect without .*--metrics probe"),
    ],
)
def test_what_does_not_fit_is_refused(words, message, run, tmp_path, image_cache, capsys, caplog):
    words = words.replace("VAE", str(save_checkpoint(tmp_path / "image_vae" / "small", image_cache)))
    words = words.replace("NETWORK", str(save_torchscript(tmp_path / "network.pt")))
    with pytest.raises(SystemExit) as end:
        evaluate.main(["--checkpoint", str(run), *words.split()])
    assert end.value.code == 2
    assert re.search(message, capsys.readouterr().err + caplog.text, flags=re.S)


def test_scores_of_texts_and_lengths():
    texts = ["a large panda on red", "a small fir tree at the left on blue"]
    scores = text_scores(["A large panda on blue.", texts[1]], texts)
    assert scores["exact"] == 0.5 and scores["words"] == 13 / 14 and scores["wer"] == pytest.approx(1 / 14)
    assert [scores[name] for name in ("object", "ground", "place", "all")] == [1, 0.5, 1, 0.5]
    assert "all" not in text_scores(["a dog"], ["a cat"])
    lengths = length_scores([torch.zeros(4, 1), torch.zeros(8, 1)], [torch.zeros(6, 1), torch.zeros(9, 1)])
    assert lengths == {"length_error": 1.5, "length_ratio": 12 / 15}


def test_factors_of_scenes():
    assert caption_factors("a small fir tree at the left on blue") == {
        "object": "fir tree",
        "ground": "blue",
        "place": "left",
    }
    assert caption_factors("a huge panda on red") is None
    assert all(caption_factors(scene.caption) for scene in list_scenes())


def test_directions_and_other_items():
    record = {"arguments": {"tasks": ["text-image-text:2", "audio-image", "text", "text-image"]}, "latents": {}}
    expected = [Direction("text", "image"), Direction("audio", "image"), Direction(None, "text")]
    assert directions_of(record) == expected
    assert [direction.name for direction in directions_of({"arguments": {}, "latents": {"audio": {}}})] == [
        "audio-text",
        "text-audio",
    ]
    for n in (2, 5, 8):
        assert sorted(others(range(n))) == list(range(n)) and all(a != b for a, b in zip(others(range(n)), range(n)))


def test_one_item_of_each_text_which_has_the_most_modalities(caches):
    folders: dict = {"image": ImageLatentDataset(caches[1], "train"), "audio": AudioLatentDataset(caches[3], "train")}
    for cache in folders.values():
        for entry in cache.entries:
            entry["caption"] = entry["caption"].split(" on ")[0]
    items, everything = HeldOutItems(folders, MegaTransformerConfig()), join_items(folders)
    assert {item.text for item in items} == {item.text for item in everything}
    assert len(items) < len(everything)
    for item in items:
        same = [len(other.places) for other in everything if other.text == item.text]
        assert len(item.places) == max(same)


def test_clips_that_are_too_long_for_the_model_are_left_out(caches, caplog):
    folders: dict = {"image": ImageLatentDataset(caches[1], "train"), "audio": AudioLatentDataset(caches[3], "train")}
    lengths = {entry["caption"]: entry["length"] for entry in folders["audio"].entries}
    # 4 latent frames a token: 3 tokens are clips of up to 12 frames, of 9 to 13.
    config = MegaTransformerConfig(modalities=["text", "audio"], audio_max_tokens=3, audio_encoder_patch_size=4)
    kept = {item.text for item in HeldOutItems(folders, config) if "audio" in item.places}
    assert kept == {text for text, length in lengths.items() if length <= 12} != set(lengths)
    n_long = sum(length > 12 for length in lengths.values())
    assert caplog.text.count("longer than audio_max_tokens=3") == 1 and f"{n_long} clips in" in caplog.text
