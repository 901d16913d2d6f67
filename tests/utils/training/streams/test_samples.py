"""Samples of a multimodal run in TensorBoard: what there is to see and hear, and that training does not notice."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from model.multimodal import MegaTransformerMultimodal
from model.multimodal.layout import Part, Stream, build_stream
from pretrain_multimodal import MultimodalStage
from tests.helpers.runs import Run, changed, largest_difference
from tests.helpers.stream_caches import SMALL_RECURRENT, make_stream_caches
from utils.checkpoints import load_model
from utils.drawing.masks import COLORS, mask_image
from utils.training.streams.samples import token_kinds

EXITS = ["recurrent_exit_criterion=latent_difference", "recurrent_exit_criteria_threshold=1e9"]
TASKS = ["text-image", "audio-text", "text-audio-text", "text"]


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    folder = tmp_path_factory.mktemp("logged")
    caches = make_stream_caches(folder / "caches")

    def call(name, steps, *flags) -> Run:
        common, few = (
            SMALL_RECURRENT,
            [*EXITS, "audio_max_tokens=8", "image_n_sampling_steps=2", "audio_n_sampling_steps=2"],
        )
        at = common.index("--override") + 1
        words = [*common[:at], *few, *common[at:], *caches, "--output_dir", str(folder), "--run_name", name]
        words = changed([*words, "--max_steps", str(steps), "--batch_size", "6", "--tasks", *TASKS], *flags)
        MultimodalStage.main(words)
        return Run(folder / "multimodal" / name, steps)

    return call


@pytest.fixture(scope="module")
def shown_run(train):
    return train("shown", 2, "--eval_steps", "1", "--n_logged_samples", "2")


def test_every_task_has_its_samples(shown_run):
    events = EventAccumulator(str(shown_run.folder.parent), {"images": 0, "audio": 0}).Reload()
    tags = events.Tags()
    assert {f"samples/{task}/01/text_summary" for task in TASKS} <= set(tags["tensors"])
    assert {"images/text-image", "images/text-audio-text_mel", "images/mask"} <= set(tags["images"])
    assert not any("audio-text/" in tag for tag in tags["audio"] if "text-audio-text" not in tag)

    def shown(task):
        return events.Tensors(f"samples/{task}/00/text_summary")[-1].tensor_proto.string_val[0].decode()

    # The prompt of each task, and the texts that it asks for.
    assert "**prompt**\n\n    a " in shown("text-image") and "**generated**" not in shown("text-image")
    assert "**prompt**\n\n    audio of 0" in shown("audio-text") and "**true**\n\n    a " in shown("audio-text")
    assert "**generated**" in shown("text-audio-text") and "**prompt**" not in shown("text")
    # Pictures and players: generated ones at each of two evaluations, real ones and the mask once.
    assert len(events.Images("images/text-image")) == 2 and len(events.Images("images/mask")) == 1
    assert len(events.Audio("sounds/text-audio-text/01_3_generated")) == 2
    assert len(events.Audio("sounds/text-audio-text/01_1_real")) == 1
    image = Image.open(io.BytesIO(events.Images("images/text-image")[-1].encoded_image_string))
    assert image.width > image.height and len(np.unique(np.asarray(image))) > 20


def test_mean_steps_of_each_modality_are_logged(shown_run):
    events = EventAccumulator(str(shown_run.folder.parent)).Reload()
    # Every token leaves at the first occasion, after its second step.
    for name in ("text", "image", "audio"):
        assert [event.value for event in events.Scalars(f"thinking_steps/{name}")] == [2, 2]


@pytest.mark.slow
def test_training_does_not_notice(shown_run, train):
    plain = train("plain", 2)
    for name in ("model", "ema"):
        assert largest_difference(shown_run.weights(name), plain.weights(name)) == 0
    assert not EventAccumulator(str(plain.folder.parent)).Reload().Tags()["images"]


def test_flags_without_effect_are_refused(capsys):
    for words, message in (
        ("--include_modes text --n_logged_samples 2", "--n_logged_samples has no effect"),
        ("--include_modes text image --vocoder_checkpoint x", "--vocoder_checkpoint has no effect"),
        ("--include_modes text audio --n_logged_samples 0 --vocoder_checkpoint x", "n_logged_samples=0"),
    ):
        with pytest.raises(SystemExit) as end:
            MultimodalStage.main(["--run_name", "x", *words.split()])
        assert end.value.code == 2 and message in capsys.readouterr().err


def test_a_mask_shows_what_is_seen_in_the_colour_of_its_kind(shown_run):
    stream = Stream(ids=[1, 2, 3], positions=[0, 1, 2], span=[-1, 0, 0], copy=[0, 1, 0])
    assert token_kinds(stream) == [0, 2, 1]
    mask = torch.tensor([[True, False, False], [True, True, False], [True, False, True]])
    pixels = np.asarray(mask_image(mask, [0, 2, 1]).resize((5, 5), Image.Resampling.NEAREST))
    seen = (pixels[2:, 2:] == np.array(COLORS)[[0, 2, 1]]).all(-1)
    assert (seen == mask.numpy()).all()
    assert (pixels[0, 2:] == np.array(COLORS)[[0, 2, 1]]).all() and (pixels[2:, 0] == pixels[0, 2:]).all()
    config = load_model(MegaTransformerMultimodal, shown_run.folder).config
    kinds = token_kinds(
        build_stream(config, [Part("text", ids=[5]), Part("image", n_tokens=4), Part("text", ids=[5])])
    )
    assert kinds == [0] * 3 + [2] * 4 + [1] * 4 + [0] * 3
