"""Captioned scenes that need no download: one pictogram, placed on a coloured ground, with a caption of its parts.

    python -m dataset_loading.embedded.scenes data/scenes --image_size 64

makes an imagefolder like `dataset_loading.embedded.openmoji`, from 24 of its pictograms, 8 grounds and 3 places: "a
large panda on red", "a small panda at the left on red". One ground of each object is kept out of `train/`: each
caption in `test/` asks for a combination that training has never shown, of parts that it has.
"""

import hashlib
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageColor

from dataset_loading.embedded.openmoji import (
    IMAGE_SIZE,
    build_once,
    licence_text,
    package_name,
    rasterise,
    run_command,
    write_splits,
)

# fmt: off
OBJECTS = {
    "panda": "1F43C", "pig": "1F437", "fox": "1F98A", "frog": "1F438", "penguin": "1F427", "fish": "1F41F",
    "turtle": "1F422", "butterfly": "1F98B", "apple": "1F34E", "banana": "1F34C", "strawberry": "1F353",
    "watermelon": "1F349", "cherries": "1F352", "carrot": "1F955", "cactus": "1F335", "fir tree": "1F332",
    "mushroom": "1F344", "cloud": "2601", "car": "1F697", "house": "1F3E0", "balloon": "1F388",
    "umbrella": "2602", "heart": "2764", "star": "2B50",
}
GROUNDS = {
    "white": "#ffffff", "red": "#e8837e", "orange": "#f2b16b", "yellow": "#f5e58a", "green": "#9fce8f",
    "blue": "#8dbfe8", "purple": "#b99ad6", "gray": "#b4b4b4",
}
# fmt: on
# Side of the pictogram's square and centre, as shares of the image; pictograms have a wide margin.
PLACES = {
    "a large {} on {}": (1.2, 0.5),
    "a small {} at the left on {}": (0.76, 0.29),
    "a small {} at the right on {}": (0.76, 0.71),
}
PLACE_NAMES = ("large", "left", "right")  # In the order of PLACES.
N_DRAWINGS = 4  # Of each object, ground and place, every one turned, moved and sized a little differently.
OVERSAMPLING = 4


def build_scenes(folder: str | Path, image_size: int = 128) -> dict[str, int]:
    """Write the set, or find that it is there already.

    Args:
        folder: the new folder; it appears when it is complete.
        image_size: side of the square images in pixels.
    Returns: images per split.
    Raises: ValueError: the folder exists and is something else, or a set of another size.
    """

    def write(temporary: Path) -> dict[str, int]:
        rows: dict[str, list[tuple[str, ...]]] = {"train": [], "test": []}
        for scene in list_scenes():
            rows[scene.split].append((f"{scene.name}.png", scene.caption))
        return write_splits(temporary, rows, partial(draw_scene, image_size=image_size))

    settings = {"package": package_name(), "image_size": image_size, "scenes": 2}
    return build_once(Path(folder), settings, licence=licence_text(image_size), write=write)


class Scene(NamedTuple):
    """A scene before it is drawn; `name` describes it and ends with the number of the drawing."""

    split: str
    name: str
    caption: str


def list_scenes() -> Iterator[Scene]:
    """All scenes, the drawings of the same caption one after the other."""
    for thing in OBJECTS:
        for ground in GROUNDS:
            split = "test" if is_held_out(thing, ground) else "train"
            for number, place in enumerate(PLACES):
                for drawing in range(N_DRAWINGS):
                    name = f"{thing.replace(' ', '-')}_{ground}_{number}_{drawing}"
                    yield Scene(split, name, place.format(thing, ground))


def is_held_out(thing: str, ground: str) -> bool:
    """Whether the pair belongs to `test/`: for each object one ground."""
    # Steps of 3, which has no divisor in common with the 8 grounds, spread the held-out ones over all of them.
    return list(GROUNDS)[list(OBJECTS).index(thing) * 3 % len(GROUNDS)] == ground


def caption_factors(caption: str) -> dict[str, str] | None:
    """`object`, `ground` and `place` of a caption, None where it is no caption of the set."""
    return all_factors().get(caption.strip())


@cache
def all_factors() -> dict[str, dict[str, str]]:
    """The factors of each caption of the set."""
    return {
        template.format(thing, ground): {"object": thing, "ground": ground, "place": place}
        for template, place in zip(PLACES, PLACE_NAMES, strict=True)
        for thing in OBJECTS
        for ground in GROUNDS
    }


def draw_scene(target: Path, image_size: int) -> None:
    """Draw the scene that the file is named after; the same name gives the same image."""
    thing, ground, number, _ = target.stem.split("_")
    scale, center = list(PLACES.values())[int(number)]
    # Small random changes of angle, size and position, seeded by the name.
    random = np.random.default_rng(int.from_bytes(hashlib.sha1(target.stem.encode()).digest()[:8], "big"))
    turn, size, right, down = random.uniform(-1, 1, 4)
    # Drawn four times larger than it is written, so that the edges are smooth.
    whole = image_size * OVERSAMPLING
    side = round(whole * scale * (1 + 0.03 * size))
    pictogram = rasterise(OBJECTS[thing.replace("-", " ")], side).convert("RGBA")
    drawing = pictogram.rotate(4 * turn, Image.Resampling.BICUBIC)
    layer = Image.new("RGBA", (whole, whole))
    layer.paste(
        drawing, tuple(round(whole * (at + 0.015 * move)) - side // 2 for at, move in ((center, right), (0.5, down)))
    )
    # Pictogram over ground, then down to the final size.
    canvas = Image.new("RGBA", (whole, whole), ImageColor.getrgb(GROUNDS[ground]))
    scene = Image.alpha_composite(canvas, layer).convert("RGB")
    scene.resize((image_size, image_size), Image.Resampling.LANCZOS).save(target)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    run_command(argv, build_scenes, description=__doc__ or "", numbers={"image_size": IMAGE_SIZE})


if __name__ == "__main__":
    main()
