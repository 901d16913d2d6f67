"""Captioned scenes that need no download: one pictogram, placed on a coloured ground, with a caption of its parts.

    python -m dataset_loading.scenes data/scenes --image_size 64

makes an imagefolder like `dataset_loading.embedded`, from 48 of its pictograms, 8 grounds and 3 places: "a large
panda on red", "a small panda at the left on red". A hash keeps an eighth of the pairs of object and ground out of
`train/`: each caption in `test/` asks for a combination that training has never shown, of parts that it has.
"""

import hashlib
import io
from functools import partial
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image, ImageColor

from dataset_loading.embedded import SVG_FOLDER, build_once, run_command, write_splits

# fmt: off
OBJECTS = {
    "frog": "1F438", "panda": "1F43C", "pig": "1F437", "penguin": "1F427", "fish": "1F41F", "octopus": "1F419",
    "ladybird": "1F41E", "turtle": "1F422", "owl": "1F989", "whale": "1F433", "fox": "1F98A",
    "butterfly": "1F98B", "apple": "1F34E", "banana": "1F34C", "strawberry": "1F353", "grapes": "1F347",
    "watermelon": "1F349", "pineapple": "1F34D", "cherries": "1F352", "lemon": "1F34B", "carrot": "1F955",
    "pizza": "1F355", "hamburger": "1F354", "doughnut": "1F369", "cake": "1F382", "sunflower": "1F33B",
    "tulip": "1F337", "cactus": "1F335", "palm tree": "1F334", "fir tree": "1F332", "mushroom": "1F344",
    "sun": "1F31E", "rainbow": "1F308", "cloud": "2601", "car": "1F697", "bus": "1F68C", "rocket": "1F680",
    "sailboat": "26F5", "house": "1F3E0", "umbrella": "2602", "balloon": "1F388", "crown": "1F451",
    "key": "1F511", "guitar": "1F3B8", "football": "26BD", "bell": "1F514", "heart": "2764", "star": "2B50",
}
GROUNDS = {
    "white": "#ffffff", "red": "#e8837e", "orange": "#f2b16b", "yellow": "#f5e58a", "green": "#9fce8f",
    "blue": "#8dbfe8", "purple": "#b99ad6", "gray": "#b4b4b4",
}
# fmt: on
# Side of the pictogram's square and centre, as shares of the picture; pictograms have a wide margin.
PLACES = {
    "a large {} on {}": (1.2, 0.5),
    "a small {} at the left on {}": (0.76, 0.29),
    "a small {} at the right on {}": (0.76, 0.71),
}
N_DRAWINGS = 2  # Of each object, ground and place, every one turned, moved and sized a little differently.
OVERSAMPLING = 4


def build_scenes(folder: str | Path, image_size: int = 128) -> dict[str, int]:
    """Write the set, or find that it is there already.

    Args:
        folder: the new folder; it appears when it is complete.
        image_size: side of the square pictures in pixels.
    Returns: pictures per split.
    Raises: ValueError: the folder exists and is something else, or a set of another size.
    """

    def write(temporary: Path) -> dict[str, int]:
        rows: dict[str, list[tuple[str, str]]] = {"train": [], "test": []}
        for thing in OBJECTS:
            for ground in GROUNDS:
                split = "test" if is_held_out(thing, ground) else "train"
                for number, place in enumerate(PLACES):
                    names = [f"{thing.replace(' ', '-')}_{ground}_{number}_{i}.png" for i in range(N_DRAWINGS)]
                    rows[split] += [(name, place.format(thing, ground)) for name in names]
        return write_splits(temporary, rows, partial(draw_scene, image_size=image_size))

    return build_once(Path(folder), {"image_size": image_size, "scenes": 1}, write)


def is_held_out(thing: str, ground: str) -> bool:
    """Whether the pair belongs to `test/`."""
    return int(hashlib.sha1(f"{thing} on {ground}".encode()).hexdigest(), 16) % 8 == 0


def draw_scene(target: Path, image_size: int) -> None:
    """Draw the scene that the file is named after; the same name gives the same picture."""
    thing, ground, number, _ = target.stem.split("_")
    scale, center = list(PLACES.values())[int(number)]
    random = np.random.default_rng(int.from_bytes(hashlib.sha1(target.stem.encode()).digest()[:8], "big"))
    turn, size, right, down = random.uniform(-1, 1, 4)
    whole = image_size * OVERSAMPLING
    side = round(whole * scale * (1 + 0.05 * size))
    svg = str(SVG_FOLDER / f"{OBJECTS[thing.replace('-', ' ')]}.svg")
    png = bytes(resvg_py.svg_to_bytes(svg_path=svg, width=side, height=side, skip_system_fonts=True))
    drawing = Image.open(io.BytesIO(png)).convert("RGBA").rotate(6 * turn, Image.Resampling.BICUBIC)
    layer = Image.new("RGBA", (whole, whole))
    layer.paste(
        drawing, tuple(round(whole * (at + 0.03 * move)) - side // 2 for at, move in ((center, right), (0.5, down)))
    )
    canvas = Image.new("RGBA", (whole, whole), ImageColor.getrgb(GROUNDS[ground]))
    scene = Image.alpha_composite(canvas, layer).convert("RGB")
    scene.resize((image_size, image_size), Image.Resampling.LANCZOS).save(target)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    run_command(argv, __doc__ or "", build_scenes, {})


if __name__ == "__main__":
    main()
