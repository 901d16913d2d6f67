r"""Turn captioned images into a VAE's latents and token ids; the next stage is pretrain_image_diffusion.py.

    python preprocess_image_diffusion_dataset.py --dataset_name my_images --vae_checkpoint runs/image_vae/demo
    python preprocess_image_diffusion_dataset.py --dataset_name my_images --vae_checkpoint runs/image_vae/demo \
        --image_size 128 --horizontal_flip --text_encoder google/t5-v1_1-base

A file holds {"mean", "std": (Z, y, x) float16, "tokens": (T,) int16}: the posterior of the latents, standardised, and
the caption's bytes. With --horizontal_flip also "flipped_mean" and "flipped_std" of the mirrored image; with
--text_encoder also "text_states": (T', E) bfloat16, the last hidden states of the caption's own tokens.
"""

from utils.command_line import check_flags
from utils.preprocessing.arguments import ImageDiffusionPreprocessArguments, arguments_or_merge

if __name__ == "__main__":
    # --help and wrong flags end here, before imports that take seconds.
    check_flags(arguments_or_merge(ImageDiffusionPreprocessArguments), __doc__)

from typing import Any

import torch
from PIL import Image

from dataset_loading.image.pixels import IMAGE_SUFFIXES, to_float, to_tensor
from model.text.tokenizer import encode_caption
from utils.checkpoints import lasting_name, resolve_checkpoint
from utils.devices import compute_device
from utils.generation.latents import load_vae, pin_vae, standardized_posterior, vae_fingerprint, warn_of_other_vae
from utils.generation.text_encoder import caption_states, lost_by_cut, open_text_encoder, text_encoder_fingerprint
from utils.preprocessing.batched import BatchedPreprocess
from utils.preprocessing.image import IMAGE_SETTINGS, BucketedSizes, decode_source_image
from utils.preprocessing.samples import Example


class ImageDiffusionPreprocess(BatchedPreprocess):
    name = "image_diffusion"
    arguments_class = ImageDiffusionPreprocessArguments
    media = "image"
    suffixes = IMAGE_SUFFIXES
    models = ("vae", "text_encoder")
    encodes_captions = True

    def __init__(self, args: ImageDiffusionPreprocessArguments):
        super().__init__(args)
        self.checkpoint = resolve_checkpoint(args.vae_checkpoint)
        self.vae, self.vae_fingerprint = load_vae(self.checkpoint, args.vae_config), vae_fingerprint(self.checkpoint)
        warn_of_other_vae(self.folder, self.vae_fingerprint)
        self.text_encoder = open_text_encoder(args.text_encoder) if args.text_encoder else None
        self.image_size = args.image_size or self.vae.config.image_size
        self.sizes = BucketedSizes(args, self.image_size).expect_divisible(self.vae.config.compression)

    def settings(self) -> dict[str, Any]:
        text = self.text_encoder
        return {
            **{name: getattr(self.args, name) for name in (*IMAGE_SETTINGS, "horizontal_flip", "max_tokens", "bf16")},
            **self.sizes.settings(),
            "latent_shape": list(self.vae.latent_shape(self.image_size)),
            "vae_fingerprint": self.vae_fingerprint,
            "text_encoder_fingerprint": text_encoder_fingerprint(text) if text else "",
            "text_embedding_width": text.width if text else 0,
        }

    def information(self) -> dict[str, Any]:
        return {name: lasting_name(getattr(self.args, name)) for name in ("vae_checkpoint", "text_encoder")}

    def work(self, tasks):
        pin_vae(self.checkpoint, self.folder)  # A copy, as the VAE's own run may delete the checkpoint.
        return super().work(tasks)

    def decode(self, media: dict[str, Any] | None) -> Image.Image:
        return decode_source_image(media, self.args, enough=3 * self.sizes.longest)

    def encode(self, example: Example, generator: torch.Generator) -> dict[str, torch.Tensor]:
        tokens = torch.tensor(encode_caption(example.caption, self.args.max_tokens), dtype=torch.int16)
        return {"image": to_tensor(self.sizes.fit(example.data)), "tokens": tokens}

    def encode_batch(self, examples: list[Example]) -> list[dict[str, torch.Tensor]]:
        return self.sizes.encode_each(examples, self.encode_images, self.args.batch_size)

    @torch.inference_mode()
    def encode_images(self, examples: list[Example], images: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        """The tensors to write for examples of one size; images: theirs (B, 3, Y, X) uint8, and more that fill B."""
        vae = self.vae.to(compute_device())
        images = to_float(images.to(vae.device))
        with torch.autocast(vae.device.type, torch.bfloat16, enabled=self.args.bf16):
            columns: dict[str, Any] = dict(zip(("mean", "std"), standardized_posterior(vae, images)))  # (B, Z, y, x)
            if self.args.horizontal_flip:
                columns |= zip(("flipped_mean", "flipped_std"), standardized_posterior(vae, images.flip(-1)))
            columns = {name: column.half().cpu() for name, column in columns.items()}
            columns["tokens"] = [example.data["tokens"] for example in examples]
            if self.text_encoder:
                self.text_encoder.model.to(vae.device)
                texts = [example.caption for example in examples]
                columns["text_states"] = caption_states(self.text_encoder, texts, self.args.max_tokens)
        return [dict(zip(columns, row)) for row in zip(*columns.values())]  # Without the rows that filled the batch.

    def lost_text(self, entry: dict[str, Any]) -> str:
        return lost_by_cut(entry["caption"], self.args.max_tokens, self.text_encoder)

    def measure(self, tensors: dict[str, torch.Tensor]) -> dict[str, int | float]:
        bucket = self.sizes.measure(tensors["mean"], self.vae.config.compression)
        return {**dict.fromkeys(("length", "tokens"), len(tensors["tokens"])), **bucket}


if __name__ == "__main__":
    ImageDiffusionPreprocess.main()
