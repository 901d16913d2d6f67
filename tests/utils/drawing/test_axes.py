"""Axes of log-mels: labels stand where the filters and the frames are."""

import pytest
from PIL import Image

from model.audio.spectral import MEL_PRESETS, MelSettings, mel_filters
from utils.drawing.axes import LEFT, TICK, mel_row, with_axes
from utils.drawing.text import INK


@pytest.mark.parametrize("settings", [*MEL_PRESETS.values(), MelSettings(f_min=60, f_max=7600, n_mels=40)])
def test_frequencies_are_where_their_filters_respond_most(settings):
    # Above 1 kHz filters are wider than the bins of the transform.
    for frequency in (1000, 2500, 6000):
        bin_number = round(frequency / settings.sample_rate * settings.n_fft)
        response = mel_filters(settings)[:, bin_number] / mel_filters(settings).amax(1)
        nearest = bin_number * settings.sample_rate / settings.n_fft
        assert abs(mel_row(nearest, settings) - response.argmax().item()) <= 1
    assert mel_row(settings.f_min, settings) == -1 and mel_row(settings.f_max, settings) == settings.n_mels


@pytest.mark.parametrize(("n_frames", "seconds"), [(125, 0.2), (250, 0.5), (1250, 2)])
def test_seconds_are_marked_at_their_frames(n_frames, seconds):
    # 62.5 frames per second.
    image = with_axes(Image.new("RGB", (480, 80)), n_frames, MelSettings())
    marked = [x - LEFT for x in range(LEFT, image.width) if image.getpixel((x, 80 + TICK)) == INK]
    distance = 480 / (n_frames / 62.5) * seconds
    assert marked == [round(number * distance) for number in range(len(marked))]
    assert len(marked) == int(n_frames / 62.5 / seconds + 1e-6) + 1


def test_labels_of_frequencies_do_not_touch_and_a_frame_has_axes():
    for settings in MEL_PRESETS.values():
        image = with_axes(Image.new("RGB", (1, settings.n_mels)), 1, settings)
        rows = [y for y in range(settings.n_mels) if image.getpixel((LEFT - TICK, y)) == INK]
        assert len(rows) >= 3 and min(b - a for a, b in zip(rows, rows[1:])) >= 11
