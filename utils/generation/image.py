"""Reconstruction of images with an image VAE, for the inference script and the page.

B batch, C channels, Y X rows and columns, Z latent channels, y x latent rows and columns.
"""

import dataclasses

import torch
from PIL import Image
from torch import Tensor

from dataset_loading.image.pixels import to_float, to_tensor
from model.image.recurrent_vae import RecurrentVAE
from model.image.vae import ImageVAE
from utils.devices import compute_device
from utils.drawing.images import pad_to_multiple, resize_shorter_side
from utils.generation.arguments.image import ReconstructionArguments
from utils.generation.files import check_size
from utils.generation.latents import load_vae
from utils.metrics.images import psnr


@dataclasses.dataclass
class ReconstructedImage:
    """An image and what a VAE makes of it.

    Attributes:
        image: the input as the model sees it, without padding, (3, Y, X) in [-1, 1].
        reconstruction: from the posterior mean, (3, Y, X) in [-1, 1].
        mean: posterior mean, (Z, y, x).
        psnr_db: of the reconstruction.
    """

    image: Tensor
    reconstruction: Tensor
    mean: Tensor
    psnr_db: float


class ImageReconstructor:
    """Reconstructs images by the flags of `inference/reconstruct_image.py`.

    Args: vae: in eval mode, on any device, see `load_image_vae`.
    Raises: ValueError: `--decoder_steps` for a VAE whose decoder has none.
    """

    def __init__(self, vae: ImageVAE | RecurrentVAE, args: ReconstructionArguments):
        self.vae = vae
        self.length = vae.config.image_size if args.image_size < 0 else args.image_size
        self.max_pixels, self.options = args.max_pixels, {}
        if args.decoder_steps:
            if not isinstance(vae, RecurrentVAE):
                raise ValueError(
                    f"--decoder_steps {args.decoder_steps} has no effect: {args.checkpoint} has no recurrent decoder"
                )
            self.options = {"n_steps": args.decoder_steps}

    @torch.no_grad()
    def reconstruct(self, source: Image.Image) -> ReconstructedImage:
        """Resize and pad an image for the model, and crop its reconstruction.

        Args: source: 8-bit RGB.
        Raises: ValueError: more than `--max_pixels` after resizing.
        """
        check_size(source.size, self.length, self.max_pixels)
        resized = resize_shorter_side(source, self.length) if self.length else source
        image = to_float(to_tensor(resized))[None].to(self.vae.device)  # (1, 3, Y, X)
        output = self.vae(image=pad_to_multiple(image, self.vae.config.compression), **self.options)
        reconstruction = output.reconstruction[..., : image.shape[2], : image.shape[3]].clamp(-1, 1)
        return ReconstructedImage(image[0], reconstruction[0], output.mean[0], psnr(reconstruction, image).item())


def load_image_vae(args: ReconstructionArguments) -> ImageVAE | RecurrentVAE:
    """The VAE of `--checkpoint`, on the GPU if there is one; raises as `load_vae`."""
    return load_vae(args.checkpoint, needs_statistics=False).to(compute_device())
