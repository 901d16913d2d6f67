"""Features of images by a network that the user gives, so that distances compare with those of papers.

A file is a network in TorchScript, such as the Inception network of StyleGAN2-ADA, EDM and clean-fid
(`inception-2015-12-05.pt`, whose Frechet distance is FID); a folder is a CLIP or DINOv2 model of transformers.

B images, Y X rows and columns, D features.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer

from dataset_loading.files import digest_file
from dataset_loading.image.pixels import to_uint8
from model.layers import FrozenModule
from utils.metrics.feature_sets import N_NEIGHBOURS, frechet_of_features
from utils.metrics.images import KernelDistance

FOLDERS = ("clip", "dinov2", "dinov2_with_registers")  # Values of model_type in config.json.
PREPROCESSING = ("preprocessor_config.json", "processor_config.json")
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt")
PREFIX = "features_"
REMEDY = (
    "give --features the TorchScript file inception-2015-12-05.pt, or a folder of transformers with a CLIP or DINOv2 "
    "model (config.json, preprocessor_config.json, model.safetensors)"
)
FEATURE_DEFINITIONS = {
    "features_frechet": "Frechet distance of features of the network of --features (entry features: files, SHA-256), "
    "from images of 8 bits and by the network's own preprocessing. FID with inception-2015-12-05.pt, FD-DINOv2 with "
    "DINOv2. Biased upwards below 2 images per feature; papers use 50,000.",
    "features_kid": "Squared maximum mean discrepancy of the same features with the kernel (x.y / D + 1)^3, as "
    "U-statistic; KID with inception-2015-12-05.pt. features_kid_error: its jackknife standard error.",
    "clip_score": "max(100 cos, 0) of the embeddings of image and caption by the CLIP model of --features, mean over "
    "images (Hessel et al. 2021, arXiv 2104.08718, with weight 100).",
}


class GivenFeatures(FrozenModule):
    """Features of a network in a file or folder. A subclass sets `network` and `kind` and defines `extract`.

    Args: path: of the file or folder.
    Attributes: files: names of the files that were read -> SHA-256.
    """

    kind: str

    def __init__(self, path: Path, files: Sequence[Path]):
        super().__init__()
        self.path, self.width = path, 0
        self.files = {file.name: digest_file(file).hex() for file in files}

    def extract(self, pixels: Tensor) -> Tensor:
        """(B, 3, Y, X) uint8 -> (B, D)."""
        raise NotImplementedError

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """Args: image: (B, 3, Y, X) in [-1, 1].
        Returns: (B, D) fp32 on the CPU.
        Raises: ValueError: the network does not take images of this size, or its output are no features."""
        size = "x".join(map(str, image.shape[1:]))
        try:
            features = self.extract(to_uint8(image))
        except (RuntimeError, TypeError) as error:
            reason = str(error).strip().splitlines()[-1][:160]
            raise ValueError(
                f"--features={self.path}: the network does not take 8-bit images of {size} ({reason}); give one that "
                "resizes its input, as inception-2015-12-05.pt does"
            ) from error
        shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        if not isinstance(features, Tensor) or features.ndim < 2 or features[0].numel() != features.shape[1]:
            raise ValueError(
                f"--features={self.path}: the output for images of {size} is {shape}, not (B, D); {REMEDY}"
            )
        features = features.flatten(1).float().cpu()
        if not features.isfinite().all():
            raise ValueError(f"--features={self.path}: features are not finite; the weights are broken: {REMEDY}")
        self.width = features.shape[1]
        return features

    def clip_score(self, features: Tensor, captions: Sequence[str]) -> float | None:
        """See FEATURE_DEFINITIONS; None without a text encoder. Args: features: (N, D). captions: N texts."""
        return None

    def describe(self) -> dict[str, Any]:
        """For metrics.json."""
        return {"path": str(self.path), "kind": self.kind, "width": self.width, "sha256": self.files}


class TorchScriptFeatures(GivenFeatures):
    """A network in TorchScript, which takes 8-bit images; with `return_features=True` where it has this argument."""

    kind = "TorchScript"

    def __init__(self, path: Path):
        super().__init__(path, [path])
        try:
            self.network = torch.jit.load(str(path), map_location="cpu")
        except RuntimeError as error:
            raise ValueError(
                f"--features={path} is no TorchScript file, but perhaps only weights; {REMEDY}"
            ) from error
        names = [argument.name for argument in self.network.forward.schema.arguments]
        self.options = {"return_features": True} if "return_features" in names else {}
        self.freeze()

    def extract(self, pixels: Tensor) -> Tensor:
        return self.network(pixels, **self.options)


class FolderFeatures(GivenFeatures):
    """A CLIP or DINOv2 model of transformers: CLIP's projected embedding, DINOv2's normalised class token."""

    def __init__(self, path: Path):
        try:
            self.kind = AutoConfig.from_pretrained(path, local_files_only=True).model_type
        except (OSError, ValueError) as error:
            raise ValueError(f"--features={path} has no readable config.json of transformers; {REMEDY}") from error
        if self.kind not in FOLDERS:
            raise ValueError(f"--features={path} has model_type={self.kind!r}, known: {', '.join(FOLDERS)}; {REMEDY}")
        weights = sorted(file for file in path.iterdir() if file.suffix in (".safetensors", ".bin"))
        preprocessing = [path / name for name in PREPROCESSING if (path / name).is_file()]
        if not preprocessing:  # The library would guess.
            raise ValueError(
                f"--features={path} has no {PREPROCESSING[0]}, which says how images are resized; {REMEDY}"
            )
        super().__init__(path, [path / "config.json", *preprocessing, *weights])
        self.network, self.processor = self.load(path)
        self.tokenizer: Any = None
        self.freeze()

    def load(self, path: Path) -> tuple[nn.Module, Any]:
        """The model, and the preprocessing of its images."""
        try:
            processor = AutoImageProcessor.from_pretrained(path, local_files_only=True)
            network, report = AutoModel.from_pretrained(
                path, local_files_only=True, dtype=torch.float32, output_loading_info=True
            )
        except Exception as error:  # What the library raises on damaged files depends on their bytes.
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(f"--features={path} cannot be loaded ({reason}); {REMEDY}") from error
        # Weights that a file lacks would be random.
        if report["missing_keys"]:
            raise ValueError(f"--features={path}: the weights lack {sorted(report['missing_keys'])[0]}; {REMEDY}")
        return network, processor

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def extract(self, pixels: Tensor) -> Tensor:
        values = self.processor(images=list(pixels.cpu()), return_tensors="pt")["pixel_values"].to(self.device)
        if self.kind != "clip":
            return self.network(pixel_values=values).pooler_output
        return self.network.visual_projection(self.network.vision_model(pixel_values=values).pooler_output)

    @torch.no_grad()
    def clip_score(self, features: Tensor, captions: Sequence[str]) -> float | None:
        if self.kind != "clip":
            return None
        cosine = torch.cosine_similarity(features, self.embed(captions))
        return (100 * cosine).clamp_min(0).mean().item()

    def embed(self, captions: Sequence[str]) -> Tensor:
        """Embeddings of texts, (N, D) on the CPU. Raises: ValueError: the folder has no tokenizer."""
        if not any((self.path / name).is_file() for name in VOCABULARIES):  # The library would make an empty one.
            raise ValueError(
                f"--features={self.path} has no tokenizer, which the CLIP score needs; copy {VOCABULARIES[0]} there"
            )
        self.tokenizer = self.tokenizer or AutoTokenizer.from_pretrained(self.path, local_files_only=True)
        embeddings = []
        for start in range(0, len(captions), 64):
            batch = self.tokenizer(
                list(captions[start : start + 64]),
                padding=True,
                truncation=True,
                max_length=self.network.config.text_config.max_position_embeddings,
                return_tensors="pt",
            ).to(self.device)
            output = self.network.text_model(**batch).pooler_output
            embeddings.append(self.network.text_projection(output).float().cpu())
        return torch.cat(embeddings)


def open_features(path: str) -> GivenFeatures:
    """The network of --features.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: it is of another kind, or damaged.
    """
    place = Path(path)
    if not place.exists():
        raise FileNotFoundError(f"--features={path} does not exist; {REMEDY}")
    return FolderFeatures(place) if place.is_dir() else TorchScriptFeatures(place)


def given_scores(generated: Tensor, target: Tensor) -> dict[str, float | None]:
    """`features_frechet`, `features_kid` and its error of two sets of features (N, D); None below 4 images."""
    names = ("frechet", "kid", "kid_error")
    if len(target) <= N_NEIGHBOURS:
        return {f"{PREFIX}{name}": None for name in names}
    kernel = KernelDistance()
    kernel.update(generated, target)
    values = (frechet_of_features(generated, target), *kernel.compute())
    return {f"{PREFIX}{name}": value for name, value in zip(names, values)}
