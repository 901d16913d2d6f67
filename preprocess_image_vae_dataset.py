r"""Turn images into uint8 tensors, squares or aspect-ratio buckets; the next stage is pretrain_image_vae.py.

    python preprocess_image_vae_dataset.py --dataset_name my_images --image_size 128
    python preprocess_image_vae_dataset.py --dataset_name my_images --output_dir cached_datasets/augmented \
        --num_augmented_copies 2 --random_resized_crop --horizontal_flip --color_jitter --rotation
    python preprocess_image_vae_dataset.py --dataset_name my_photos --image_size 256 --aspect_buckets 1:1 3:2 2:3

A file holds {"image": (3, Y, X) uint8}; the manifest holds the captions and the buckets.
Augmentations given without a value take a usual one.
"""

from utils.command_line import check_flags
from utils.preprocessing.arguments import ImageVAEPreprocessArguments, arguments_or_merge

if __name__ == "__main__":
    # --help and wrong flags end here, before imports that take seconds.
    check_flags(arguments_or_merge(ImageVAEPreprocessArguments), __doc__)

from typing import Any

import torch
from PIL import Image

from dataset_loading.image.pixels import IMAGE_SUFFIXES, Augmentation, to_tensor
from utils.preprocessing.arguments import AUGMENTATIONS
from utils.preprocessing.driver import Preprocess
from utils.preprocessing.image import IMAGE_SETTINGS, BucketedSizes, decode_source_image
from utils.preprocessing.samples import Example


class ImageVAEPreprocess(Preprocess):
    name = "image_vae"  # written to cached_datasets/image_vae
    arguments_class = ImageVAEPreprocessArguments
    media = "image"
    suffixes = IMAGE_SUFFIXES

    def __init__(self, args: ImageVAEPreprocessArguments):
        super().__init__(args)
        self.augmentation = Augmentation(**{name: getattr(args, name) for name in AUGMENTATIONS})
        self.sizes = BucketedSizes(args, args.image_size)

    def settings(self) -> dict[str, Any]:
        # All that shapes the tensors; a folder of other settings is refused.
        names = (*IMAGE_SETTINGS, *AUGMENTATIONS)
        return {**self.sizes.settings(), **{name: getattr(self.args, name) for name in names}}

    def decode(self, media: dict[str, Any] | None) -> Image.Image:
        enough = round(3 * self.sizes.longest / self.args.random_resized_crop**0.5)  # 3 for 1, as in `resample`.
        return decode_source_image(media, self.args, enough)

    def encode(self, example: Example, generator: torch.Generator) -> dict[str, torch.Tensor]:
        # Geometry in the original size, so that nothing is resized twice; colours in the final size, which is faster.
        image = example.data
        if example.copy:
            image = self.augmentation.change_geometry(image, generator)
        # Every copy gets its size, the augmented ones between two changes.
        image = self.sizes.fit(image)
        if example.copy:
            image = self.augmentation.change_pixels(image, generator)
        return {"image": to_tensor(image)}

    def measure(self, tensors: dict[str, torch.Tensor]) -> dict[str, int | float]:
        height, width = tensors["image"].shape[-2:]
        return {"length": width, "pixels": height * width, **self.sizes.measure(tensors["image"])}


if __name__ == "__main__":
    ImageVAEPreprocess.main()
