r"""Turn images into square uint8 tensors; the next stage is pretrain_image_vae.py.

    python preprocess_image_vae_dataset.py --dataset_name my_images --image_size 128
    python preprocess_image_vae_dataset.py --dataset_name my_images --output_dir cached_datasets/augmented \
        --num_augmented_copies 2 --random_resized_crop --horizontal_flip --color_jitter --rotation

A file holds {"image": (3, S, S) uint8}; the manifest holds the captions. Augmentations given without a value take a
usual one.
"""

from utils.command_line import check_flags
from utils.preprocessing.arguments import ImageVAEPreprocessArguments, arguments_or_merge

if __name__ == "__main__":
    # --help and wrong flags end here, before imports that take seconds.
    check_flags(arguments_or_merge(ImageVAEPreprocessArguments), __doc__)

from typing import Any

import torch
from PIL import Image

from dataset_loading.image.pixels import IMAGE_SUFFIXES, Augmentation, fit_image, to_tensor
from utils.preprocessing.arguments import AUGMENTATIONS
from utils.preprocessing.driver import Preprocess
from utils.preprocessing.image import IMAGE_SETTINGS, decode_source_image
from utils.preprocessing.samples import Example


class ImageVAEPreprocess(Preprocess):
    name = "image_vae"  # written to cached_datasets/image_vae
    arguments_class = ImageVAEPreprocessArguments
    media = "image"
    suffixes = IMAGE_SUFFIXES

    def __init__(self, args: ImageVAEPreprocessArguments):
        super().__init__(args)
        self.augmentation = Augmentation(**{name: getattr(args, name) for name in AUGMENTATIONS})

    def settings(self) -> dict[str, Any]:
        # All that shapes the tensors; a folder of other settings is refused.
        names = ("image_size", *IMAGE_SETTINGS, *AUGMENTATIONS)
        return {name: getattr(self.args, name) for name in names}

    def decode(self, media: dict[str, Any] | None) -> Image.Image:
        enough = round(3 * self.args.image_size / self.args.random_resized_crop**0.5)  # 3 for 1, as in `resample`.
        return decode_source_image(media, self.args, enough)

    def encode(self, example: Example, generator: torch.Generator) -> dict[str, torch.Tensor]:
        # Geometry in the original size, so that nothing is resized twice; colours in the final size, which is faster.
        args, image = self.args, example.data
        if example.copy:
            image = self.augmentation.change_geometry(image, generator)
        # Every copy becomes square, the augmented ones between two changes.
        image = fit_image(image, args.image_size, args.resize_mode, background_color=args.background_color)
        if example.copy:
            image = self.augmentation.change_pixels(image, generator)
        return {"image": to_tensor(image)}

    def measure(self, tensors: dict[str, torch.Tensor]) -> dict[str, int | float]:
        return {"length": tensors["image"].shape[-1], "pixels": tensors["image"][0].numel()}


if __name__ == "__main__":
    ImageVAEPreprocess.main()
