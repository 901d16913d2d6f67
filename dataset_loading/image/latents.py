"""The dataset of preprocessed latents and captions.  Z latent channels, y x latent rows and columns, T text tokens,
E width of frozen text embeddings."""

import logging
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from dataset_loading.image.buckets import BucketedDataset

logger = logging.getLogger(__name__)


class ImageLatentDataset(BucketedDataset):
    """Preprocessed latents: items with

    mean, std: of the posterior, (Z, y, x) float32, standardised with the VAE's latent statistics.
    flipped_mean, flipped_std: those of the mirrored image, where the folder was made with --horizontal_flip.
    tokens: the caption, (T,) int64, see `model.text.tokenizer`.
    text_states: the caption's frozen embeddings, (T', E) bfloat16, where it was made with --text_encoder.
    index: the index in `entries`.
    """

    stage = "image_diffusion"

    def tensor_kinds(self, entry):
        settings = self.manifest["settings"]
        names = ("mean", "std", *(("flipped_mean", "flipped_std") if settings["horizontal_flip"] else ()))
        texts = {"text_states": (torch.bfloat16, (None, settings["text_embedding_width"]))}
        return {
            **dict.fromkeys(names, (torch.float16, self.latent_shape_of(entry))),
            "tokens": (torch.int16, (None,)),
            **(texts if settings["text_embedding_width"] else {}),
        }

    def latent_shape_of(self, entry: Mapping[str, Any]) -> tuple[int, ...]:
        """(Z, y, x) of an entry's latents."""
        settings = self.manifest["settings"]
        Z, rows, columns = settings["latent_shape"]
        if not settings.get("aspect_buckets"):
            return Z, rows, columns
        width, height = self.size_of_entry(entry)
        return Z, height * rows // settings["image_size"], width * rows // settings["image_size"]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = super().__getitem__(index)
        # Stored as float16 to halve the folder; models compute in float32.
        latents = {name: sample[name].float() for name in sample if name.endswith(("mean", "std"))}
        return {**sample, **latents, "tokens": sample["tokens"].long()}

    def expect_captions(self) -> Self:
        """Check that there are captions to train on; a share of empty ones is a warning.

        Returns: this dataset.
        Raises: ValueError: every caption is empty.
        """
        n_empty = self.n_empty_captions()
        if n_empty == len(self.entries):
            raise ValueError(
                f"all {n_empty} captions of {self.folder / self.split} are empty, so that a model would learn nothing "
                f"of texts; name their column with --caption_column: {self.command()}"
            )
        if n_empty:
            logger.warning("%s: %d of %d captions are empty", self.folder, n_empty, len(self.entries))
        return self

    def expect(self, *, vae_checkpoint: str = "", **settings: Any) -> Self:
        """As `CachedDataset.expect`; `vae_checkpoint` is not compared, but named in the command that is shown."""
        self.vae_checkpoint = vae_checkpoint
        return super().expect(**settings)

    def remedy(self, name: str, value: Any) -> dict[str, Any]:
        """The flags that change a setting: those that name another model where the setting is the model's own."""
        settings, flags = self.manifest["settings"], super().remedy(name, value)
        output_dir = flags["output_dir"]
        # Latents (Z, y, x) of another size only: the same VAE, on images of another size.
        if name == "latent_shape" and settings[name][0] == value[0]:
            return super().remedy("image_size", settings["image_size"] // settings[name][1] * value[1])
        # Other channels, or other weights: another VAE.
        if name == "latent_shape":
            vae, output_dir = f"<a VAE with latent_channels={value[0]}>", f"{self.folder}_z{value[0]}"
            return {"vae_checkpoint": self.vae_checkpoint or vae, "output_dir": output_dir}
        if name == "vae_fingerprint":
            vae = f"<the VAE with fingerprint {value}>"
            return {"vae_checkpoint": self.vae_checkpoint or vae, "output_dir": output_dir}
        if name in ("text_encoder_fingerprint", "text_embedding_width"):
            encoder = f"<an encoder with {name}={value}>" if value else ""
            return {"text_encoder": encoder, "output_dir": output_dir}
        return flags
