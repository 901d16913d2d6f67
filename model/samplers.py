"""Samplers of diffusion models: functions of (denoiser, x, process, times) from noise to data.  B batch.

A denoiser gives the expected data x0 for x_t (B, ...) at times t (B,). Every step from t to s moves along
x_s = (sigma_s / sigma_t) x_t + (alpha_s - alpha_t sigma_s / sigma_t) x0, which divides by sigma alone: a start in pure
noise (alpha = 0) is legal, and the last step, to t = 0, returns the last estimate of x0 itself.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from model.diffusion_process import DiffusionProcess
from model.layers import to_device
from utils.flags.choices import SamplerKind

Denoiser = Callable[[Tensor, Tensor], Tensor]
Generators = Sequence[torch.Generator]
OnEstimate = Callable[[int, Tensor], None]


def normal_noise(
    shape: Sequence[int],
    generators: Generators,
    device: torch.device | str | None = None,
    *,
    lengths: Sequence[int] | None = None,
) -> Tensor:
    """Unit noise (B, *shape) fp32, row b from generators[b] alone, sampled on the generator's device.

    Args: lengths: how much of each row's first axis is no padding, which gets 0; default: all of it.
    """
    if lengths is None:
        rows = [torch.randn(*shape, generator=generator, device=generator.device) for generator in generators]
        return moved(torch.stack(rows), device)
    pairs = zip(lengths, generators, strict=True)
    rows = [normal_noise((length, *shape[1:]), [generator])[0] for length, generator in pairs]
    padded = pad_sequence([torch.zeros(*shape, device=generators[0].device), *rows], batch_first=True)
    return moved(padded[1:], device)


def moved(noise: Tensor, device: torch.device | str | None) -> Tensor:
    """The noise on the device, None: where it is."""
    return noise if device is None else to_device(noise, device)


def initial_noise(
    shape: Sequence[int],
    generators: Generators,
    process: DiffusionProcess,
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """What sampling starts from, (B, *shape) fp32: unit noise times sigma(1), row b from generators[b] alone."""
    sigma = process.alpha_sigma(torch.ones(1, dtype=torch.float64))[1].item()
    return sigma * normal_noise(shape, generators, device)


class _Steps:
    """The numbers of a sampling run as Python floats, and times (n + 1, B) as the denoiser takes them."""

    def __init__(self, x: Tensor, process: DiffusionProcess, times: Tensor):
        times = times.cpu()  # Read here; those of the denoiser go to its device.
        if times.dim() != 1 or len(times) < 2 or bool((times[1:] >= times[:-1]).any()) or times[-1] != 0:
            raise ValueError("times must fall strictly and end at 0; use DiffusionProcess.sampling_times")
        # On the CPU in fp64, once for the whole run.
        alpha, sigma = process.alpha_sigma(times.double())
        self.alpha, self.sigma = alpha.tolist(), sigma.tolist()
        self.times = to_device(times.to(x.dtype), x.device)[:, None].expand(-1, len(x))  # (n + 1, B)
        self.n_steps = len(times) - 1

    def log_ratio(self, i: int) -> float:
        """ln(alpha / sigma) at times[i], with the infinities of pure noise and of data."""
        if self.alpha[i] == 0:
            return -math.inf
        return math.inf if self.sigma[i] == 0 else math.log(self.alpha[i] / self.sigma[i])

    def coefficients(self, i: int) -> tuple[float, float]:
        """Factors of x_t and x0 in the step from times[i] to times[i + 1]."""
        ratio = self.sigma[i + 1] / self.sigma[i]
        return ratio, self.alpha[i + 1] - self.alpha[i] * ratio


def ddim(
    denoiser: Denoiser,
    x: Tensor,
    process: DiffusionProcess,
    *,
    times: Tensor,
    generators: Generators | None = None,
    eta: float = 0.0,
    lengths: Sequence[int] | None = None,
) -> Tensor:
    """DDIM (arXiv 2010.02502, eq. 12): x0 (B, ...) from x (B, ...) at times[0].

    Args:
        eta: noise put back, 0 none (the probability-flow ODE), 1 the ancestral step of DDPM; needs `generators`.
        lengths: of padded samples, see `normal_noise`.
    """
    if eta > 0 and generators is None:
        raise ValueError(f"a stochastic sampler (eta={eta}) needs generators, one torch.Generator per sample")
    if generators is not None and len(generators) != len(x):
        raise ValueError(f"generators has {len(generators)} entries for {len(x)} samples; give one per sample")
    steps = _Steps(x, process, times)
    for i in range(steps.n_steps):
        alpha, alpha_next, sigma, sigma_next = *steps.alpha[i : i + 2], *steps.sigma[i : i + 2]
        # Std of x_s given x_t and x0: sigma_s / sigma_t times that of x_t given x_s.
        # For alpha^2 + sigma^2 = 1 this is eq. 16.
        std = eta * sigma_next / sigma * math.sqrt(max(sigma**2 - (alpha * sigma_next / alpha_next) ** 2, 0.0))
        # The rest of the variance sigma_s^2 is noise that x_t has already.
        ratio = math.sqrt(max(sigma_next**2 - std**2, 0.0)) / sigma
        # Mean of x_s given x_t and x0, then fresh noise.
        x0 = denoiser(x, steps.times[i])
        x = ratio * x + (alpha_next - alpha * ratio) * x0
        if std > 0 and generators is not None:
            x = x + std * normal_noise(x.shape[1:], generators, x.device, lengths=lengths)
    return x


def ddpm(
    denoiser: Denoiser,
    x: Tensor,
    process: DiffusionProcess,
    *,
    times: Tensor,
    generators: Generators | None = None,
    lengths: Sequence[int] | None = None,
) -> Tensor:
    """Ancestral sampling (arXiv 2006.11239, eq. 7, the smaller variance): x0 (B, ...) from x (B, ...) at times[0]."""
    return ddim(denoiser, x, process, times=times, generators=generators, eta=1.0, lengths=lengths)


def euler(
    denoiser: Denoiser, x: Tensor, process: DiffusionProcess, *, times: Tensor, generators: Generators | None = None
) -> Tensor:
    """Euler's method on the probability-flow ODE: x0 (B, ...) from x (B, ...) at times[0]."""
    steps = _Steps(x, process, times)
    for i in range(steps.n_steps):
        # Euler's step of x / alpha over sigma / alpha, exact as long as x0 does not change.
        of_x, of_x0 = steps.coefficients(i)
        x = of_x * x + of_x0 * denoiser(x, steps.times[i])
    return x


def heun(
    denoiser: Denoiser, x: Tensor, process: DiffusionProcess, *, times: Tensor, generators: Generators | None = None
) -> Tensor:
    """Heun's method on the probability-flow ODE, two evaluations per step but one in the last.

    The ODE is solved for y = x / (alpha + sigma) over tau = sigma / (alpha + sigma): rectified flow, whatever the
    schedule. Its slope (y - x0) / tau is finite also at pure noise, and at 10 steps the error is half of that in
    x / alpha over sigma / alpha (arXiv 2206.00364, alg. 1).
    """
    steps = _Steps(x, process, times)
    # y = x / scale as a function of tau, which is 1 at pure noise and 0 at data.
    scale = [a + s for a, s in zip(steps.alpha, steps.sigma)]
    tau = [s / c for s, c in zip(steps.sigma, scale)]
    y = x / scale[0]
    for i in range(steps.n_steps):
        # Euler's guess at the next time, whose slope is averaged with that of this time.
        x0 = denoiser(x, steps.times[i])
        if i == steps.n_steps - 1:
            return x0  # tau = 0: y = x0
        slope = (y - x0) / tau[i]
        step = tau[i + 1] - tau[i]
        guess = y + step * slope
        x0 = denoiser(scale[i + 1] * guess, steps.times[i + 1])
        # The mean of both slopes.
        y = y + 0.5 * step * (slope + (guess - x0) / tau[i + 1])
        x = scale[i + 1] * y
    return x


def dpmpp_2m(
    denoiser: Denoiser, x: Tensor, process: DiffusionProcess, *, times: Tensor, generators: Generators | None = None
) -> Tensor:
    """DPM-Solver++(2M) (arXiv 2211.01095, alg. 2): x0 (B, ...) from x (B, ...) at times[0]."""
    steps = _Steps(x, process, times)
    log_ratio = [steps.log_ratio(i) for i in range(steps.n_steps + 1)]  # lambda of the paper
    last = x
    for i in range(steps.n_steps):
        of_x, of_x0 = steps.coefficients(i)
        x0 = estimate = denoiser(x, steps.times[i])  # one evaluation per step
        step, last_step = log_ratio[i + 1] - log_ratio[i], log_ratio[i] - log_ratio[max(i - 1, 0)]
        # Second order: extrapolate x0 over ln(alpha / sigma); first order where a step is infinite or the first.
        if 0 < last_step < math.inf and step < math.inf:
            # (1 + 1 / (2 r)) x0 - 1 / (2 r) last, r = last_step / step.
            estimate = torch.lerp(last, x0, 1 + step / (2 * last_step))
        x, last = of_x * x + of_x0 * estimate, x0
    return x


SAMPLERS: dict[SamplerKind, Callable[..., Tensor]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "dpmpp_2m": dpmpp_2m,
    "euler": euler,
    "heun": heun,
}


def n_evaluations(name: SamplerKind, n_steps: int) -> int:
    """How often sampler `name` calls its denoiser in n_steps steps."""
    return 2 * n_steps - 1 if name == "heun" else n_steps  # Heun's last step needs one


def watched(denoiser: Denoiser, on_estimate: OnEstimate) -> Denoiser:
    """The same denoiser, which shows each of its estimates of x0 (B, ...) with their number so far, from 1."""
    numbers = itertools.count(1)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        x0 = denoiser(x, t)
        on_estimate(next(numbers), x0)
        return x0

    return denoise


def sample(
    name: SamplerKind,
    denoiser: Denoiser,
    x: Tensor,
    *,
    process: DiffusionProcess,
    times: Tensor,
    generators: Generators | None = None,
    lengths: Sequence[int] | None = None,
    on_estimate: OnEstimate | None = None,
) -> Tensor:
    """x0 (B, ...) by the sampler `name` from x (B, ...), see `initial_noise`, at times[0].

    Args:
        times: (n_steps + 1,), falling strictly to 0, as `process.sampling_times` gives them.
        generators: one per sample, for the stochastic samplers.
        lengths: of padded samples, whose fresh noise then does not depend on the padding; default: none is padded.
        on_estimate: called after each of the `n_evaluations` of the denoiser with their number so far and the estimate
            of x0 (B, ...); it changes no number, and what it raises ends the sampling.
    Raises: ValueError for an unknown name, and for ddpm without generators.
    """
    if name not in SAMPLERS:
        raise ValueError(f"sampler={name!r} is unknown; choose from {', '.join(SAMPLERS)}")
    denoiser = denoiser if on_estimate is None else watched(denoiser, on_estimate)
    padded = {"lengths": lengths} if name == "ddpm" and lengths is not None else {}  # The others add no noise.
    return SAMPLERS[name](denoiser, x, process, times=times, generators=generators, **padded)


def rescale_guidance(guided: Tensor, conditional: Tensor, rescale: float) -> Tensor:
    """`guided` (B, ...) brought towards the std of `conditional`, by the share `rescale` in [0, 1].

    arXiv 2305.08891, section 3.4, eq. 15 and 16; one std per sample.
    """
    dims = tuple(range(1, guided.dim()))
    # Eq. 15 is guided * factor, eq. 16 its mixture with guided.
    factor = conditional.std(dims, keepdim=True) / guided.std(dims, keepdim=True)
    return guided * (rescale * factor + (1 - rescale))


def guided_denoiser(
    process: DiffusionProcess,
    network: Callable[[Tensor, Tensor, Any], Tensor],
    condition: Any,
    *,
    null_condition: Any,
    scale: float,
    interval: tuple[float, float] = (0.0, 1.0),
    rescale: float = 0.0,
) -> Denoiser:
    """A denoiser with classifier-free guidance: x0(null) + scale (x0(condition) - x0(null)).

    Args:
        network: (network input (B, ...), network time (B,), condition of B rows) -> prediction (B, ...).
        condition, null_condition: of B rows each; `condition.cat(null_condition)` is one of 2 B rows, for the one
            batched forward. null_condition may be None where scale is 1.
        interval: times [low, high] in which guidance acts (arXiv 2404.07724); elsewhere, and with scale 1 everywhere,
            the network runs on the condition alone.
        rescale: share in [0, 1] of arXiv 2305.08891, section 3.4, applied to x0 whatever the network predicts.
    """
    low, high = interval
    if not 0 <= low < high <= 1:
        raise ValueError(f"guidance interval=({low}, {high}) must satisfy 0 <= low < high <= 1")
    if not 0 <= rescale <= 1:
        raise ValueError(f"guidance rescale={rescale} must be in [0, 1]")
    # Conditions (2 B rows) are joined once for all steps.
    both = None if scale == 1 else condition.cat(null_condition)

    def predict(x: Tensor, t: Tensor, rows: Any) -> Tensor:
        return process.to_x0(network(process.network_input(x, t), process.network_time(t), rows), x, t)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        # Rows outside the interval of guidance get scale 1, and a batch of such rows needs no second pass.
        if both is None:
            return predict(x, t, condition)
        if (low, high) == (0.0, 1.0):
            weight: Tensor | float = scale
        else:
            inside = (t >= low) & (t <= high)
            if not inside.any():
                return predict(x, t, condition)
            weight = torch.where(inside, scale, 1.0).to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))  # (B, 1, ..)
        # Both conditions in one batch of 2 B rows.
        conditional, null = predict(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        guided = null + weight * (conditional - null)
        return rescale_guidance(guided, conditional, rescale) if rescale > 0 else guided

    return denoise
