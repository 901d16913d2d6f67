"""Names that flags and configurations may take, of tables in `model/` and `dataset_loading/`. They are apart from
their tables, whose modules take seconds to import: `--help` and a mistyped flag need not wait for that."""

from typing import Literal

# Diffusion: `model/samplers.py`, `model/diffusion_process.py`.
SamplerKind = Literal["dpmpp_2m", "ddim", "ddpm", "euler", "heun"]
Schedule = Literal["rectified_flow", "cosine", "linear", "scaled_linear", "edm"]
Prediction = Literal["velocity", "v", "epsilon", "x0"]
Weighting = Literal["none", "min_snr"]
TimeSampling = Literal["logit_normal", "uniform"]
Spacing = Literal["default", "karras", "uniform"]

# Losses and adversaries: `model/criteria.py`, `model/image/`, `model/audio/`.
AdversarialKind = Literal["hinge", "non_saturating", "least_squares"]
PerceptualKind = Literal["efficientnet", "lpips_vgg"]
AugmentationKind = Literal["color", "translation", "cutout"]
DiscriminatorKind = Literal["patch", "multi_scale"]
MelDiscriminatorKind = Literal["patch_1d", "patch_2d"]
WaveformDiscriminatorKind = Literal["thin", "full"]

# Streams and texts: `model/multimodal/`, `model/text/phonemes.py`.
Modality = Literal["text", "image", "audio"]
SPANS: tuple[Modality, ...] = ("image", "audio")
Units = Literal["phonemes", "characters"]

# Data: `model/audio/spectral.py`, `dataset_loading/`.
MelPreset = Literal["16k", "22k", "24k", "44k", "48k"]
LoudnessMeasure = Literal["active", "bs1770"]
ResizeMode = Literal["crop", "pad", "squash"]
MAX_PIXELS = 100_000_000  # Of an image as it is decoded; with a transparent background it takes 12 bytes a pixel.

# Averaged weights, where a checkpoint has them, or those that were trained.
WeightsKind = Literal["ema", "raw"]
