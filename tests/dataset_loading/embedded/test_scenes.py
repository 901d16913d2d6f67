"""Scenes: every part is known from training, every combination in the test is new, and captions tell the truth."""

import csv

import numpy as np
import pytest
from PIL import Image, ImageColor

from dataset_loading.embedded.openmoji import svg_folder
from dataset_loading.embedded.scenes import GROUNDS, N_DRAWINGS, OBJECTS, PLACES, build_scenes, draw_scene, is_held_out


def test_every_object_is_in_the_package():
    assert len(OBJECTS) == 24 and len(GROUNDS) == 8
    assert [code for code in OBJECTS.values() if not (svg_folder() / f"{code}.svg").is_file()] == []


def test_held_out_pairs_are_of_known_parts():
    held_out = [(thing, ground) for thing in OBJECTS for ground in GROUNDS if is_held_out(thing, ground)]
    assert [thing for thing, _ in held_out] == list(OBJECTS)
    assert all(sum(other == ground for _, other in held_out) == 3 for ground in GROUNDS)


def ground_and_ink(image: np.ndarray) -> tuple[np.ndarray, float]:
    """The colour of the upper left corner, and the mean column of pixels that differ from it, in [0, 1]."""
    ground = image[0, 0].astype(int)
    differs = np.abs(image.astype(int) - ground).sum(-1) > 60
    return ground, float((differs.sum(0) * np.arange(len(image))).sum() / differs.sum() / len(image))


@pytest.mark.parametrize("thing", ["fir tree", "heart"])
def test_captions_tell_ground_and_place(thing, tmp_path):
    columns = []
    for number in range(len(PLACES)):
        file = tmp_path / f"{thing.replace(' ', '-')}_blue_{number}_0.png"
        draw_scene(file, 64)
        ground, column = ground_and_ink(np.asarray(Image.open(file)))
        assert np.abs(ground - ImageColor.getrgb(GROUNDS["blue"])).max() <= 2
        columns.append(column)
    middle, left, right = columns
    assert left < 0.42 < middle < 0.58 < right


def test_the_same_name_gives_the_same_image_and_another_number_another(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for i in range(N_DRAWINGS):
            draw_scene(tmp_path / folder / f"fir-tree_red_0_{i}.png", 32)
    first, again = ((tmp_path / folder / "fir-tree_red_0_0.png").read_bytes() for folder in "ab")
    assert first == again != (tmp_path / "a" / "fir-tree_red_0_1.png").read_bytes()


@pytest.mark.slow
def test_the_whole_set(tmp_path):
    counts = build_scenes(tmp_path / "scenes", 32)
    assert sum(counts.values()) == 24 * 8 * len(PLACES) * N_DRAWINGS
    captions = {}
    for split in counts:
        with open(tmp_path / "scenes" / split / "metadata.csv", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == counts[split] == len(list((tmp_path / "scenes" / split).glob("*.png")))
        captions[split] = {row["text"] for row in rows}
    assert not captions["train"] & captions["test"]
    with pytest.raises(ValueError, match="was made with"):
        build_scenes(tmp_path / "scenes", 48)
