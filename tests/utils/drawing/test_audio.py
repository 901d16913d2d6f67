"""Images of audio: positions and colours of what they show."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from model.audio.spectral import MelSettings
from utils.drawing.audio import (
    BLUE,
    MAX_WIDTH,
    ORANGE,
    SIGNED,
    WARM,
    colored,
    latent_image,
    mel_triple,
    phase_errors,
    phase_image,
    strip_sheet,
    waveform_image,
)
from utils.drawing.axes import BOTTOM, LEFT, RIGHT
from utils.drawing.images import Group

RED = (255, 0, 0)
MEL = MelSettings()


def test_low_rows_are_at_the_bottom_and_values_go_along_the_palette():
    image = colored(torch.tensor([[0.0, 5.0], [10.0, 99.0], [math.nan, -math.inf]]), 0, 10)
    assert image.size == (2, 3)
    assert image.getpixel((0, 2)) == WARM[0] and image.getpixel((0, 1)) == image.getpixel((1, 1)) == WARM[-1]
    assert image.getpixel((0, 0)) == image.getpixel((1, 0)) == WARM[0]  # not finite
    middle = (np.array(WARM[3]) + np.array(WARM[4])) / 2
    assert np.allclose(image.getpixel((1, 2)), middle, atol=1)


def test_brightness_of_the_warm_palette_rises():
    values = np.asarray(colored(torch.linspace(0, 1, 100)[None], 0, 1), dtype=float) @ [0.299, 0.587, 0.114]
    assert (np.diff(values[0]) >= -0.5).all() and values[0, -1] > 200 > 20 > values[0, 0]


def test_a_triple_shows_equal_mels_with_a_dark_difference():
    mel = torch.randn(80, 50, generator=torch.Generator().manual_seed(0)) - 5
    target, predicted, difference = mel_triple(mel, mel, MEL)
    assert np.array_equal(np.asarray(target), np.asarray(predicted))
    assert {difference.getpixel((x, y)) for x in range(LEFT, difference.width - RIGHT) for y in range(80)} == {WARM[0]}
    *_, brightest = mel_triple(mel + 9.0, mel, MEL)
    assert brightest.getpixel((LEFT + 3, 3)) == WARM[-1]


def test_clips_of_one_sheet_have_one_scale_of_time():
    mel = torch.zeros(80, 100)
    images = (mel_triple(mel[:, : n + 5], mel[:, :n], MEL, max_frames=400)[0] for n in (50, 100))
    short, long = (image.width - LEFT - RIGHT for image in images)
    assert 2 * short == long and 4 * long == MAX_WIDTH
    assert mel_triple(mel, mel[:, :1], MEL, max_frames=4000)[0].size == (LEFT + 1 + RIGHT, 80 + BOTTOM)


def test_a_sheet_holds_images_of_any_size_in_columns():
    groups = [
        Group([Image.new("RGB", size, RED) for size in sizes], "a caption far too long to fit " * 4)
        for sizes in ([(30, 40), (100, 20)], [(60, 10), (10, 10)])
    ]
    sheet = np.asarray(strip_sheet(groups, ("a", "b"), title="title"))
    red = (sheet == RED).all(2)
    assert red.sum() == 30 * 40 + 100 * 20 + 60 * 10 + 10 * 10
    assert red[:, 72:].any(0).argmax() == 0 and not red[:, 66:72].any()  # The second column begins behind the first.


def test_waveforms_are_drawn_at_one_scale():
    loud = torch.sin(torch.arange(4800) * 0.3)
    sheet = np.asarray(waveform_image({"real": loud, "generated": 0.5 * loud[:2400]}, 16000))
    real, generated = ((sheet == color).all(2) for color in (BLUE, ORANGE))
    assert real.any(1).sum() > 90 and 40 < generated.any(1).sum() < 56
    tall = generated.sum(0) > 5
    assert abs(tall.sum() - MAX_WIDTH / 2) <= 2
    assert waveform_image({"silent": torch.zeros(10), "broken": torch.full((10,), math.nan)}, 16000).width > 0


def test_phase_errors_of_a_known_rotation():
    target = torch.randn(8000, generator=torch.Generator().manual_seed(0))
    for generated, expected in ((target, 0), (-target, math.pi)):
        phase, frequency, weight = phase_errors(generated, target, n_fft=256, hop_length=64)
        assert torch.allclose(phase, torch.full_like(phase, expected), atol=1e-3) and frequency.max() < 1e-2
        assert weight.max() == 1 and phase.shape == (129, 125)
    image, means = phase_image(
        torch.randn(8000, generator=torch.Generator().manual_seed(1)), target, n_fft=256, hop_length=64
    )
    assert image.width > 240
    assert means["phase"] == pytest.approx(math.pi / 2, abs=0.1)
    assert 0.8 < means["frequency"] < 1.3  # Frames overlap, so that chance gives less.


def test_latents_are_normalised_per_row():
    latents = torch.randn(4, 30, generator=torch.Generator().manual_seed(0))
    scaled = latent_image(latents * torch.tensor([[1.0], [100], [0.01], [5]]) + 7)
    assert np.abs(np.asarray(scaled).astype(int) - np.asarray(latent_image(latents)).astype(int)).max() <= 1
    assert latent_image(torch.zeros(4, 30)).getpixel((5, 5)) == SIGNED[2]
    assert latent_image(torch.zeros(4, 10, 30)).height == 6 * 40
