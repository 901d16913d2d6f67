"""The recurrent VAE: its trainer with a number of decoder steps per optimizer step, losses on the
images in between, and evaluation at several depths."""

import torch
from torch import Tensor

from model.image.recurrent_vae import RecurrentVAEOutput
from model.thinking import lognormal_poisson
from utils.metrics.images import psnr
from utils.seeds import generators
from utils.training.image_vae import ImageVAEGANTrainer

EVALUATED_STEPS = (1, 2, 4, 8, 16)  # depths whose PSNR is logged


def draw_n_steps(seed: int, step: int, *, mean: float, sigma: float, minimum: int, maximum: int) -> int:
    """Decoder steps of one optimizer step, from a truncated log-normal Poisson distribution (arXiv 2502.05171, 3.3).

    tau ~ N(log(mean) - sigma^2 / 2, sigma), n ~ Poisson(exp(tau)), sampled again until minimum <= n <= maximum.
    The number depends on (seed, step) alone: it is the same on all processes, for all micro-batches, and when resumed.

    Args:
        mean: of the distribution before truncation.
        sigma: std of the logarithm of the Poisson rate; 0: plain Poisson.
    Raises:
        ValueError: not 1 <= minimum <= mean <= maximum.
    """
    if not 1 <= minimum <= mean <= maximum:
        raise ValueError(f"steps must satisfy 1 <= minimum={minimum} <= mean={mean} <= maximum={maximum}")
    (generator,) = generators(seed, step, torch.zeros(1, dtype=torch.int64), stream="decoder_steps")
    # Rejection: the next number of the same stream, until one is in range.
    while True:
        n = lognormal_poisson(generator, mean, sigma)
        if minimum <= n <= maximum:
            return n


def intermediate_error(output: RecurrentVAEOutput, target: Tensor) -> Tensor | None:
    """Mean absolute error of the intermediate images to the target; None where there are no such images."""
    if not len(output.intermediates):
        return None
    # (steps, B, C, Y, X) - (B, C, Y, X): all images have the same target.
    return (output.intermediates.float() - target).abs().mean()


def distillation_error(output: RecurrentVAEOutput, target: Tensor) -> Tensor | None:
    """Mean absolute difference of the intermediate images to the last image, through which no gradient goes; None
    where there are no such images."""
    if not len(output.intermediates):
        return None
    return (output.intermediates.float() - output.reconstruction.detach().float()).abs().mean()


class RecurrentVAEGANTrainer(ImageVAEGANTrainer):
    """Trains a `RecurrentVAE`, whose decoder gives an image x_k after each of its last `n_backprop_steps` steps; the
    deepest one is x_hat, the only one that the adversary sees.

        loss = the loss of `ImageVAEGANTrainer` at x_hat
             + intermediate_weight * mean_k |x_k - x| + distillation_weight * mean_k |x_k - stop_gradient(x_hat)|
    """

    TERMS = {**ImageVAEGANTrainer.TERMS, "intermediate": intermediate_error, "distillation": distillation_error}

    def n_steps(self) -> int:
        """Decoder steps of the present optimizer step."""
        args = self.stage_arguments
        return draw_n_steps(
            self.args.seed,
            self.state.global_step,
            mean=args.mean_decoder_steps,
            sigma=args.decoder_steps_sigma,
            minimum=args.min_decoder_steps,
            maximum=args.max_decoder_steps,
        )

    def decoder_options(self):
        # The same number for all micro-batches and processes of an optimizer step.
        n_steps = self.n_steps()
        self.record({"decoder_steps": torch.tensor(float(n_steps))})
        return {"n_steps": n_steps, "n_backprop_steps": self.stage_arguments.n_backprop_steps}

    def evaluation_terms(self, model, inputs):
        image = inputs["image"]
        terms = super().evaluation_terms(model, inputs)
        # A pass to the largest depth gives the images of all smaller ones.
        output = model(image=image, n_steps=EVALUATED_STEPS[-1])
        images = [*output.intermediates, output.reconstruction]  # Of step 1, 2, ...
        return {**terms, **{f"psnr_{k}_steps": psnr(images[k - 1].float(), image) for k in EVALUATED_STEPS}}
