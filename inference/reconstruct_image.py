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

import torch

from dataset_loading.image.pixels import IMAGE_SUFFIXES, decode_image, to_float, to_tensor
from utils.command_line import explained_errors, parse_arguments
from utils.devices import compute_device
from utils.drawing.images import TRIPLE, Group, draw_sheet, pad_to_multiple, resize_shorter_side, save_image, triple
from utils.generation.files import Failures, check_size, claim_folder, find_inputs, write_settings
from utils.generation.latents import load_vae
from utils.metrics.images import psnr

MAX_ROWS = 32  # images that are shown on the sheet


@torch.inference_mode()
def reconstruct(args: ReconstructionArguments) -> None:
    """Reconstruct all images. Raises: ValueError: at the end, where some gave no result."""
    # The inputs, the model, and the length of the shorter side.
    files = find_inputs(args.input, IMAGE_SUFFIXES)
    model = load_vae(args.checkpoint, needs_statistics=False).to(compute_device())
    length = model.config.image_size if args.image_size < 0 else args.image_size
    folder, failures, groups, records = claim_folder(args.output_dir, args), Failures(), [], []
    for name, file in files.items():
        with failures.around(file):
            source = decode_image({"path": str(file), "bytes": None}, args.background_color)
            check_size(source.size, length, args.max_pixels)
            # Resize, pad for the model: (1, 3, Y, X) -> (1, 3, Y', X'); crop the reconstruction.
            image = to_float(to_tensor(resize_shorter_side(source, length) if length else source))[None]
            image = image.to(model.device)
            reconstruction = model(image=pad_to_multiple(image, model.config.compression)).reconstruction
            reconstruction = reconstruction[..., : image.shape[2], : image.shape[3]].clamp(-1, 1)
            # The sheet, the file and the PSNR of this image.
            images, value = triple(reconstruction[0], image[0]), psnr(reconstruction, image).item()
            groups += [Group(images, f"{value:.1f} dB  {name}")] if len(groups) < MAX_ROWS else []
            output = folder / f"{name}_reconstruction.png"
            save_image(images[1], output)
            records.append({"input": str(file), "file": output.name, "psnr_db": value})
            print(f"{output}  {image.shape[3]}x{image.shape[2]} pixels, PSNR {value:.2f} dB")
    # The sheet of the first MAX_ROWS images, and the settings.
    if groups:
        save_image(draw_sheet(groups, TRIPLE), folder / "sheet.png")
        print(folder / "sheet.png")
    write_settings(folder, args, files=records)
    failures.check(len(files))


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s")
    with explained_errors(logging.getLogger("reconstruct_image")):
        reconstruct(parse_arguments(ReconstructionArguments, None, __doc__ or ""))
