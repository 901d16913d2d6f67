"""The recurrent VAE: its flags, and its trainer with a number of decoder steps per optimizer step, losses on the
images in between, and evaluation at several depths."""

import dataclasses
import math

import torch
from torch import Tensor

from model.image.recurrent_vae import RecurrentVAEOutput
from utils.metrics.images import psnr
from utils.options import above_one, option
from utils.seeds import generators
from utils.training.image_vae import ImageAutoencoderArguments, ImageVAEGANTrainer

EVALUATED_STEPS = (1, 2, 4, 8, 16)


@dataclasses.dataclass
class RecurrentVAEArguments(ImageAutoencoderArguments):
    """Flags of the recurrent VAE-GAN stage."""

    # Decoder steps of an optimizer step: sampled from a truncated log-normal Poisson distribution.
    mean_decoder_steps: float = option(6.0, "mean number of decoder steps in training, before truncation", ge=1)
    decoder_steps_sigma: float = option(0.5, "std of the logarithm of the Poisson rate; 0: plain Poisson", ge=0)
    min_decoder_steps: int = option(2, "minimum number of decoder steps in training", gt=0)
    max_decoder_steps: int = option(12, "maximum number of decoder steps in training", gt=0)
    n_backprop_steps: int = option(4, "last decoder steps that are backpropagated; earlier ones build no graph", gt=0)

    # Losses on the images of the backpropagated steps before the last one. The last image has all other losses.
    intermediate_weight: float = option(
        0.1,
        "weight of the mean absolute error of intermediate images",
        ge=0,
        only_with=("n_backprop_steps", above_one),
    )
    distillation_weight: float = option(
        0.1,
        "weight of the distance of intermediate images to the last one",
        ge=0,
        only_with=("n_backprop_steps", above_one),
    )

    def validate_decoder_steps(self):
        if not self.min_decoder_steps <= self.mean_decoder_steps <= self.max_decoder_steps:
            raise ValueError(
                f"--mean_decoder_steps={self.mean_decoder_steps} must lie between "
                f"--min_decoder_steps={self.min_decoder_steps} and --max_decoder_steps={self.max_decoder_steps}"
            )
        if self.n_backprop_steps > self.max_decoder_steps:
            raise ValueError(
                f"--n_backprop_steps={self.n_backprop_steps} must be <= --max_decoder_steps={self.max_decoder_steps}"
            )


def draw_n_steps(seed: int, step: int, mean: float, sigma: float, minimum: int, maximum: int) -> int:
    """Decoder steps of one optimizer step, from a truncated log-normal Poisson distribution (arXiv 2502.05171, 3.3).

    tau ~ N(log(mean) - sigma^2 / 2, sigma), n ~ Poisson(exp(tau)), drawn anew until minimum <= n <= maximum.
    The number depends on (seed, step) alone: it is the same on all processes, for all micro-batches, and when resumed.

    Args:
        mean: of the distribution before truncation.
        sigma: spread of the logarithm of the Poisson rate; 0: plain Poisson.
    Raises:
        ValueError: not 1 <= minimum <= mean <= maximum.
    """
    if not 1 <= minimum <= mean <= maximum:
        raise ValueError(f"steps must satisfy 1 <= minimum={minimum} <= mean={mean} <= maximum={maximum}")
    (generator,) = generators(seed, step, torch.zeros(1, dtype=torch.int64), stream="decoder_steps")
    while True:
        n = int(generator.poisson(math.exp(generator.normal(math.log(mean) - sigma**2 / 2, sigma))))
        if minimum <= n <= maximum:
            return n


def intermediate_terms(output: RecurrentVAEOutput, real: Tensor) -> dict[str, Tensor]:
    """Losses on the images between: `intermediate`, mean absolute error to the real image; `distillation`, mean
    absolute difference to the last image, through which no gradient goes. None where there are no such images."""
    if not len(output.intermediates):
        return {}
    images, last = output.intermediates.float(), output.reconstruction.detach().float()
    return {"intermediate": (images - real).abs().mean(), "distillation": (images - last).abs().mean()}


class RecurrentVAEGANTrainer(ImageVAEGANTrainer):
    """Trains a `RecurrentVAE`: the terms of `ImageVAEGANTrainer` on the last image, the only one that the adversary
    sees, and `intermediate_terms` on the images of the steps before it that have a graph."""

    def n_steps(self) -> int:
        """Decoder steps of the present optimizer step."""
        args = self.stage_arguments
        return draw_n_steps(
            self.args.seed,
            self.state.global_step,
            args.mean_decoder_steps,
            args.decoder_steps_sigma,
            args.min_decoder_steps,
            args.max_decoder_steps,
        )

    def generate(self, model, inputs):
        image = inputs["image"]
        noise = self.sample_noise(inputs, "posterior", self.model.latent_shape(image.shape[-1]))
        n_steps = self.n_steps()
        output = model(
            image=image, noise=noise, n_steps=n_steps, n_backprop_steps=self.stage_arguments.n_backprop_steps
        )
        self.record({"decoder_steps": torch.tensor(float(n_steps))})
        return output.reconstruction, image, output

    def other_terms(self, output, real):
        args = self.stage_arguments
        terms = intermediate_terms(output, real)
        weights = {"intermediate": args.intermediate_weight, "distillation": args.distillation_weight}
        weighted = {name: weights[name] * term for name, term in terms.items() if weights[name]}
        return {**super().other_terms(output, real), **weighted}

    def evaluation_terms(self, model, inputs):
        image = inputs["image"]
        terms = super().evaluation_terms(model, inputs)
        output = model(image=image, n_steps=EVALUATED_STEPS[-1])
        images = [*output.intermediates, output.reconstruction]
        return {**terms, **{f"psnr_{k}_steps": psnr(images[k - 1].float(), image) for k in EVALUATED_STEPS}}
