import io

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers.runs import largest_difference


@pytest.fixture
def events(train):
    """Five steps, evaluated after the third and at the end."""
    run = train("images", 5, "--eval_steps", "3", "--n_logged_samples", "2", "--gan_start_step", "1")
    folder = run.folder.parent
    assert {path.name.partition(".out")[0] for path in folder.iterdir()} == {"checkpoint-5", "events"}
    return EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()


def test_a_run_logs_every_term_image_and_histogram(events):
    tags = events.Tags()
    numbers = {"train/loss", "train/grad_norm", "train/learning_rate", "loss/l1", "loss/kl", "latents/dead_channels"}
    adversary = {"discriminator", "logits_real", "logits_fake", "accuracy_real", "accuracy_fake", "r1"}
    assert numbers | {f"gan/{name}" for name in adversary} | {"eval/psnr"} <= set(tags["scalars"])
    assert [event.step for event in events.Scalars("eval/psnr")] == [3, 5]
    assert {f"latents/mean_{channel:02}" for channel in range(16)} | {"latents/posterior_std"} == set(
        tags["histograms"]
    )

    images = events.Images("images/reconstruction")
    assert [event.step for event in images] == [0, 3, 5]
    first, *_, last = (np.asarray(Image.open(io.BytesIO(event.encoded_image_string))) for event in images)
    inputs, reconstructions = slice(9, 137), slice(143, 271)  # columns
    assert np.array_equal(first[24:152, inputs], last[24:152, inputs])
    assert not np.array_equal(first[24:152, reconstructions], last[24:152, reconstructions])
    assert [event.step for event in events.Images("images/latent_channels")] == [0, 3, 5]


def test_images_do_not_change_the_training(train):
    few, many = (train(f"images_{n}", 2, "--n_logged_samples", str(n), "--eval_steps", "1") for n in (1, 6))
    assert largest_difference(few.weights(), many.weights()) == 0
    assert few.losses == many.losses


def test_the_perceptual_distance_acts_from_its_step_on(train, capsys):
    words = ["--perceptual_weight", "0.5", "--perceptual_start_step", "3", "--save_steps", "3", "--gan_weight", "0"]
    late = train("late", 4, *words)
    assert ["loss/perceptual" in line for line in late.history if "loss/l1" in line] == [False] * 3 + [True]
    with pytest.raises(ValueError, match=r"--perceptual_start_step=4 is not reached in 4 steps"):
        train("refused", 4, "--perceptual_weight", "0.5", "--perceptual_start_step", "4", "--gan_weight", "0")
    with pytest.raises(SystemExit):
        train("empty", 4, *words, "--l1_weight", "0")
    assert "--perceptual_start_step=3 leaves the steps before it without" in capsys.readouterr().err
