"""Reconstruct images with an image VAE: a PNG for each image, and a sheet of input | reconstruction | difference.

    python inference/reconstruct_image.py --checkpoint runs/image_vae/demo --input photo.jpg drawings/

The shorter side is resized to --image_size (default: that of the model's training images; 0: no resizing). Sides that
are not a multiple of the compression are padded for the model, and the reconstruction is cropped.
"""

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.command_line import check_flags
from utils.generation.arguments.image import ReconstructionArguments

if __name__ == "__main__":
    # --help and wrong flags end here, before imports that take seconds.
    check_flags(ReconstructionArguments, __doc__)

from dataset_loading.image.pixels import IMAGE_SUFFIXES, decode_image
from utils.command_line import explained_errors, parse_arguments
from utils.drawing.images import TRIPLE, Group, draw_sheet, save_image, shrunk, triple
from utils.generation.files import Failures, claim_folder, find_inputs, write_settings
from utils.generation.image import ImageReconstructor, load_image_vae

MAX_SHOWN = 64  # images that are shown on the sheet


def reconstruct(args: ReconstructionArguments) -> None:
    """Reconstruct all images. Raises: ValueError: at the end, where some gave no result."""
    files = find_inputs(args.input, IMAGE_SUFFIXES)
    reconstructor = ImageReconstructor(load_image_vae(args), args)
    folder, failures, groups, records = claim_folder(args.output_dir, args), Failures(), [], []
    for name, file in files.items():
        with failures.around(file):
            source = decode_image({"path": str(file), "bytes": None}, args.background_color)
            result = reconstructor.reconstruct(source)
            # The sheet, the file and the PSNR of this image.
            images, value = triple(result.reconstruction, result.image), result.psnr_db
            caption = f"{value:.1f} dB  {name}"
            groups += [Group(list(map(shrunk, images)), caption)] if len(groups) < MAX_SHOWN else []
            output = folder / f"{name}_reconstruction.png"
            save_image(images[1], output)
            records.append({"input": str(file), "file": output.name, "psnr_db": value})
            width, height = images[1].size
            print(f"{output}  {width}x{height} pixels, PSNR {value:.2f} dB")
    # The sheet of the first images, and the settings.
    if groups:
        title = f"the first {len(groups)} of {len(files)} images" if len(records) > MAX_SHOWN else ""
        save_image(draw_sheet(groups, TRIPLE, n_across=None, title=title), folder / "sheet.png")
        print(folder / "sheet.png")
    write_settings(folder, args, files=records)
    failures.check(len(files))


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s")
    with explained_errors(logging.getLogger("reconstruct_image")):
        reconstruct(parse_arguments(ReconstructionArguments, None, __doc__ or ""))
