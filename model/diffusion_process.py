"""The noising process of diffusion models: x_t = alpha(t) x0 + sigma(t) noise for continuous t in [0, 1].  B batch.

t = 0 is data (alpha 1, sigma 0, exactly), t = 1 is noise. Data are standardised: zero mean, unit variance per channel.

| schedule       | alpha(t), sigma(t)                                                   | predictions          |
|----------------|----------------------------------------------------------------------|----------------------|
| rectified_flow | 1 - t, t (arXiv 2209.03003)                                          | velocity, x0         |
| linear         | variance preserving, 1000 betas 1e-4 .. 0.02 (arXiv 2006.11239)      | epsilon, v, x0       |
| scaled_linear  | the same with sqrt(beta) linear, 0.00085 .. 0.012 (arXiv 2112.10752) | epsilon, v, x0       |
| cosine         | squared cosine, betas capped at 0.999 (arXiv 2102.09672, eq. 17)     | epsilon, v, x0       |
| edm            | 1, 80 t^7 (arXiv 2206.00364, table 1 and eq. 5)                      | epsilon, v, x0       |

Schedules of 1000 betas hold alpha after step i at t = i / 1000 and are linear in alpha between.

The noise ratio k = sigma / alpha is what all schedules share: x_t / alpha has the same distribution for equal k.
"""

import math
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from model.layers import widen
from utils.flags.choices import Prediction, Schedule, Spacing, TimeSampling, Weighting
from utils.options import option
from utils.strict_config import StrictConfig

N_BETAS = 1000  # steps of a discretised schedule, as in DDPM (arXiv 2006.11239)
EDM_SIGMA_MIN, EDM_SIGMA_MAX, EDM_RHO = 0.002, 80.0, 7.0  # arXiv 2206.00364, table 1
EDM_LOWEST_TIME = (EDM_SIGMA_MIN / EDM_SIGMA_MAX) ** (1 / EDM_RHO)  # t at which sigma is EDM_SIGMA_MIN
# Values of sigma / alpha that place the times of sampling, see `sampling_times`.
START_RATIO, RATIO_SCALE, LAST_RATIO = 160.0, 5.0, 1.05


def _betas(schedule: Schedule) -> np.ndarray:
    """Noise variances (1000,) fp64 of one discretised schedule."""
    if schedule == "linear":
        # arXiv 2006.11239, section 4.
        return np.linspace(1e-4, 0.02, N_BETAS)
    if schedule == "scaled_linear":
        # Latent diffusion: equal steps of sqrt(beta).
        return np.linspace(0.00085**0.5, 0.012**0.5, N_BETAS) ** 2
    # cosine (arXiv 2102.09672, eq. 17), with betas up to 0.999 as there.
    alpha_bar = np.cos((np.linspace(0.0, 1.0, N_BETAS + 1) + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


def _alpha_table(schedule: Schedule, zero_terminal_snr: bool) -> np.ndarray:
    """alpha at t = 0, 1/1000, .., 1, (1001,) fp64, falling from 1; rescaled as in arXiv 2305.08891, alg. 1."""
    alpha = np.sqrt(np.cumprod(1 - _betas(schedule)))  # sqrt(alpha_bar) of DDPM
    if zero_terminal_snr:
        # The last value becomes 0, the first one stays.
        alpha = (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
    return np.concatenate([[1.0], alpha])  # alpha = 1 exactly at t = 0


def _choice(name: str, value: str, kind: object) -> None:
    """Refuse a `value` that is not one of the strings of the Literal `kind`; ValueError."""
    if value not in get_args(kind):
        raise ValueError(f"{name}={value!r} is unknown; choose from {', '.join(get_args(kind))}")


def _like(t: Tensor, x: Tensor) -> Tensor:
    """Coefficients (B,) shaped to broadcast over x (B, ...)."""
    return t.reshape(-1, *[1] * (x.dim() - 1))


def _precise(x: Tensor) -> Tensor:
    """x in fp32, or in fp64 where it is so already."""
    return x if x.dtype == torch.float64 else x.float()


class DiffusionProcess:
    """Schedule, what the network predicts, and everything that follows from the two.

    Results are fp32 (fp64 for fp64 times). The object holds no parameters and no tensors of its own, so it needs
    neither a device nor a place in a checkpoint.
    """

    def __init__(
        self,
        schedule: Schedule = "rectified_flow",
        prediction: Prediction = "velocity",
        zero_terminal_snr: bool = False,
        *,
        time_shift: float = 1.0,
    ):
        """Args:
            schedule: alpha and sigma as functions of t, see the module's table.
            prediction: what the network's output means. velocity = noise - x0; v = alpha noise - sigma x0, with
                alpha and sigma divided by sqrt(alpha^2 + sigma^2); epsilon = noise.
            zero_terminal_snr: rescale a schedule of betas so that t = 1 is pure noise.
            time_shift: s > 0 in t -> s t / (1 + (s - 1) t) for training and sampling times; above 1 moves both to
                more noise, for large latents (arXiv 2403.03206, eq. 23).

        Raises: ValueError for unknown names and for combinations that cannot work.
        """
        _choice("schedule", schedule, Schedule)
        _choice("prediction", prediction, Prediction)
        self.schedule, self.prediction, self.zero_terminal_snr = schedule, prediction, zero_terminal_snr
        self.time_shift = time_shift
        # Refuse combinations that cannot work or would have no effect.
        flow = schedule == "rectified_flow"
        if flow != (prediction == "velocity") and prediction != "x0":
            raise ValueError(
                f"prediction={prediction!r} does not go with schedule={schedule!r}: rectified_flow takes velocity or "
                "x0, the other schedules take v, epsilon or x0"
            )
        if zero_terminal_snr and schedule in ("rectified_flow", "edm"):
            raise ValueError(
                f"zero_terminal_snr=True has no effect with schedule={schedule!r}: only linear, scaled_linear and "
                "cosine are rescaled (rectified_flow ends in pure noise anyway)"
            )
        if zero_terminal_snr and prediction == "epsilon":
            raise ValueError(
                "zero_terminal_snr=True cannot be used with prediction='epsilon': at t=1 the noise says nothing about "
                "the data; use prediction='v' or 'x0'"
            )
        if not (math.isfinite(time_shift) and time_shift > 0):
            raise ValueError(f"time_shift={time_shift} must be a positive number; 1 leaves times as they are")
        if schedule == "edm" and time_shift != 1:
            raise ValueError(f"time_shift={time_shift} does not go with schedule='edm'; move the mean of ln(sigma)")
        # A numpy array, since models are also built under torch.device("meta").
        tabulated = schedule in ("linear", "scaled_linear", "cosine")
        self._table = _alpha_table(schedule, zero_terminal_snr) if tabulated else np.empty(0)
        self._device_tables: dict[torch.device, Tensor] = {}  # copies of the table, one per device

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Share of data and of noise at times t, any shape, in [0, 1]; exactly (1, 0) at t = 0."""
        t = _precise(t)
        # Schedules with a formula.
        if self.schedule == "rectified_flow":
            return 1 - t, t
        if self.schedule == "edm":
            return torch.ones_like(t), EDM_SIGMA_MAX * t**EDM_RHO
        # Schedules of betas: alpha between two entries of the table, in fp64.
        table = self._device_tables.get(t.device)
        if table is None:
            table = self._device_tables[t.device] = widen(torch.from_numpy(self._table), t.device)
        position = widen(t) * N_BETAS
        left = position.floor().clamp(0, N_BETAS - 1)
        index = left.long()
        alpha = torch.lerp(table[index], table[index + 1], position - left)
        sigma = ((1 - alpha) * (1 + alpha)).clamp(min=0).sqrt()  # sqrt(1 - alpha^2), accurate near alpha = 1
        return alpha.to(t.dtype), sigma.to(t.dtype)

    def time_at_ratio(self, ratio: np.ndarray) -> np.ndarray:
        """Times t, fp64, at which sigma / alpha equals `ratio` (0 .. inf); the inverse of `alpha_sigma`."""
        with np.errstate(invalid="ignore"):
            if self.schedule == "rectified_flow":
                return np.where(np.isinf(ratio), 1.0, ratio / (1 + ratio))  # inf / inf is nan, and replaced
            if self.schedule == "edm":
                return (ratio / EDM_SIGMA_MAX) ** (1 / EDM_RHO)
        # alpha^2 + sigma^2 = 1: the ratio gives alpha, and the table its time (negated, to rise).
        alpha = 1 / np.sqrt(1 + ratio**2)
        return np.interp(-alpha, -self._table, np.linspace(0.0, 1.0, N_BETAS + 1))

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t (B, ...) from data and unit noise (B, ...) at times t (B,)."""
        alpha, sigma = self.alpha_sigma(t)
        return _like(alpha, x0) * _precise(x0) + _like(sigma, x0) * _precise(noise)

    def _unit_alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at t (B,) over sqrt(alpha^2 + sigma^2), and so a point of the unit circle."""
        alpha, sigma = self.alpha_sigma(t)
        if self.schedule in ("rectified_flow", "edm"):
            norm = torch.hypot(alpha, sigma)
            return alpha / norm, sigma / norm
        return alpha, sigma  # of unit norm already

    def network_input(self, x_t: Tensor, t: Tensor) -> Tensor:
        """x_t (B, ...) as the network is fed it: unchanged, for edm divided by sqrt(1 + sigma^2), its c_in."""
        if self.schedule != "edm":
            return x_t
        return _like(self._unit_alpha_sigma(t)[0], x_t) * _precise(x_t)

    def network_time(self, t: Tensor) -> Tensor:
        """What the network's time embedding is fed, (B,) fp32 in about [0, 1000].

        1000 t for rectified_flow; 1000 t - 1 for schedules of betas, the index of the beta, so that weights trained on
        integer steps mean the same here; for edm ln(sigma) (c_noise up to a linear map), 0 at 0.002 and 1000 at 80.
        """
        t = t.float()
        if self.schedule == "rectified_flow":
            return 1000 * t
        if self.schedule == "edm":
            # (ln sigma - ln sigma_min) / (ln sigma_max - ln sigma_min), ln sigma = ln sigma_max + rho ln t.
            log_ratio = math.log(EDM_SIGMA_MAX / EDM_SIGMA_MIN)
            return 1000 * (1 + EDM_RHO * t.log() / log_ratio).clamp(min=0)
        return 1000 * t - 1  # t = (i + 1) / 1000 lies after beta i

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network is to predict for data and unit noise (B, ...) at times t (B,).

        For edm, v is the preconditioned target of arXiv 2206.00364, eq. 8, with sigma_data = 1 and the sign flipped:
        (x0 - c_skip x_t) / c_out = (sigma x0 - noise) / sqrt(1 + sigma^2) = -v; uniform weight on v is its lambda.
        """
        x0, noise = _precise(x0), _precise(noise)
        if self.prediction == "velocity":
            return noise - x0  # d x_t / d t
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "x0":
            return x0
        # v (arXiv 2202.00512, section 4).
        alpha, sigma = self._unit_alpha_sigma(t)
        return _like(alpha, x0) * noise - _like(sigma, x0) * x0

    def to_x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The data (B, ...) that a network's output (B, ...) at x_t (B, ...), times t (B,), stands for."""
        prediction, x_t = _precise(prediction), _precise(x_t)
        if self.prediction == "x0":
            return prediction
        alpha, sigma = self.alpha_sigma(t)
        if self.prediction == "velocity":
            # x_t = x0 + t (noise - x0).
            return x_t - _like(sigma, x_t) * prediction
        if self.prediction == "epsilon":
            # x_t = alpha x0 + sigma noise.
            return (x_t - _like(sigma, x_t) * prediction) / _like(alpha, x_t)
        # v: x_t over its norm n and v are a rotation of x0 and noise: x0 = (alpha x_t / n - sigma v) / n.
        squared_norm = alpha**2 + sigma**2
        return _like(alpha / squared_norm, x_t) * x_t - _like(sigma / squared_norm.sqrt(), x_t) * prediction

    def loss_weight(self, t: Tensor, weighting: Weighting, gamma: float = 5.0) -> Tensor:
        """Weight (B,) of the squared error of the network's output at times t (B,); finite everywhere.

        min_snr is min(S, gamma) on the squared error of x0 (arXiv 2303.09556, eq. 6), S = alpha^2 / sigma^2, times the
        ratio of the squared error of x0 to that of the output:
        x0 min(S, g); epsilon min(S, g) / S; v min(S, g) / (S + 1); velocity sigma^2 min(S, g), which with
        sigma = 1 / (1 + sqrt(S)) is min(S, g) / (1 + sqrt(S))^2.
        """
        _choice("weighting", weighting, Weighting)
        t = _precise(t)
        if weighting == "none":
            return torch.ones_like(t)
        if not gamma > 0:
            raise ValueError(f"gamma={gamma} of the min_snr weighting must be above 0; 5 is usual")
        alpha, sigma = self.alpha_sigma(t)
        # S = 0 (alpha 0) and S = inf (sigma 0) come out right: x / 0 is inf, and the other bound is taken.
        if self.prediction == "epsilon":
            return (gamma * (sigma / alpha) ** 2).clamp(max=1)
        if self.prediction == "x0":
            return ((alpha / sigma) ** 2).clamp(max=gamma)
        if self.prediction == "v":
            alpha, sigma = self._unit_alpha_sigma(t)
        # v, where 1 / (S + 1) = sigma^2, and velocity, with weight sigma^2 min(S, gamma).
        return torch.minimum(alpha**2, gamma * sigma**2)

    def shift(self, t: Tensor) -> Tensor:
        """t -> s t / (1 + (s - 1) t), any shape, with s = time_shift; 0 and 1 stay."""
        return self.time_shift * t / (1 + (self.time_shift - 1) * t)

    def training_times(
        self, uniforms: Tensor, sampling: TimeSampling, *, mean: float = 0.0, std: float = 1.0
    ) -> Tensor:
        """Times (B,) fp32 to train at, from `uniforms` (B,) in [0, 1).

        logit_normal: logit(t) is normal with `mean` and `std` (arXiv 2403.03206, eq. 19). In rectified flow logit(t)
            is ln(sigma / alpha), so for edm ln(sigma) is drawn from the same normal, held within 0.002 .. 80; its
            paper's values for sigma_data = 1 are mean -1.2 + ln 2, std 1.2.
        uniform: t uniform, for edm from sigma = 0.002 on. Both are then shifted by time_shift.
        """
        _choice("sampling", sampling, TimeSampling)
        edm = self.schedule == "edm"
        lowest = EDM_LOWEST_TIME if edm else 0.0
        # In fp64, since u close to 0 or 1 decides about the tails.
        u = widen(uniforms)
        if sampling == "uniform":
            return self.shift(lowest + (1 - lowest) * u).float()
        if not std > 0:
            raise ValueError(f"std={std} of logit-normal times must be above 0")
        normal = mean + std * torch.special.ndtri(u.clamp(1e-7, 1 - 1e-7))  # clamped: infinite at 0 and 1
        if edm:
            # normal is ln(sigma), and t = (sigma / sigma_max)^(1 / rho).
            return ((normal - math.log(EDM_SIGMA_MAX)) / EDM_RHO).exp().clamp(lowest, 1.0).float()
        return self.shift(torch.sigmoid(normal)).float()

    def sampling_times(self, n_steps: int, spacing: Spacing = "default") -> Tensor:
        """Times (n_steps + 1,) fp32 on the CPU, falling strictly to 0; a sampler evaluates at all but the last.

        They start at t = 1, or where sigma / alpha is 160 if the schedule goes further without reaching pure noise:
        there the data's share is below 0.7 %, while an epsilon prediction's error grows with the ratio.

        default: with k = sigma / alpha, (k / (k + 5))^(1/3) falls in equal steps, but the first of half the size, to
            k = 1.05 / n_steps, then to 0. This is the map of arXiv 2206.00364, eq. 5, made finite at pure noise; half
            a step first because DPM-Solver++(2M) is of first order there. The last ratio shrinks with 1 / n_steps, and
            what is lost below it with its square, so second-order samplers keep their order. The numbers suit all
            schedules at 20 evaluations, on mixtures of Gaussians with exact scores.
        karras: k^(1/7) falls in equal steps to k(t = 0.001), for edm 0.002, then to 0; with pure noise, after one step
            from it. Better than default only for data with much fine detail and many steps.
        uniform: t falls in equal steps; for edm down to 0.002.
        Then shifted by time_shift.
        """
        _choice("spacing", spacing, Spacing)
        if n_steps < 1:
            raise ValueError(f"n_steps={n_steps} must be at least 1")
        # The ratio to start from; infinite where t = 1 is pure noise.
        end_ratio = self._ratio(1.0)
        start = end_ratio if math.isinf(end_ratio) else min(end_ratio, START_RATIO)
        edm = self.schedule == "edm"
        # Equal steps of t.
        if spacing == "uniform":
            if edm:
                return self._shifted(np.append(np.linspace(1.0, EDM_LOWEST_TIME, n_steps), 0.0))
            return self._shifted(np.linspace(self.time_at_ratio(np.array(start)), 0.0, n_steps + 1))
        # Equal steps of ratio^(1 / rho) (arXiv 2206.00364, eq. 5).
        if spacing == "karras":
            low = EDM_SIGMA_MIN if edm else self._ratio(1 / N_BETAS)
            root = np.linspace(min(start, START_RATIO) ** (1 / EDM_RHO), low ** (1 / EDM_RHO), n_steps)
            ratio = root**EDM_RHO
        else:
            # default: equal steps of u = (k / (k + 5))^(1/3), the first of half the size.
            share = 1.0 if math.isinf(start) else start / (start + RATIO_SCALE)
            low = LAST_RATIO / n_steps
            steps = np.maximum(np.arange(n_steps) - 0.5, 0.0) / max(n_steps - 1.5, 0.5)  # 0, 0.5, 1.5, .. / (n - 1.5)
            first, last = np.cbrt([share, low / (low + RATIO_SCALE)])
            with np.errstate(divide="ignore"):
                ratio = RATIO_SCALE / ((first + steps * (last - first)) ** -3 - 1)  # k = 5 / (u^-3 - 1)
        ratio[0] = start  # exact, also where it is infinite
        return self._shifted(np.append(self.time_at_ratio(ratio), 0.0))

    def _ratio(self, t: float) -> float:
        """sigma / alpha at one time."""
        alpha, sigma = self.alpha_sigma(torch.tensor(t, dtype=torch.float64, device="cpu"))
        return (sigma / alpha).item()

    def _shifted(self, t: np.ndarray) -> Tensor:
        """Shifted times as an fp32 tensor on the CPU."""
        return self.shift(torch.from_numpy(t)).float()


class ProcessConfig(StrictConfig):
    """The diffusion process's part of a configuration, field by field as in `DiffusionProcess`."""

    # Diffusion process.
    schedule: Schedule = option("rectified_flow", "how noise grows with time")
    prediction: Prediction = option("velocity", "what the network predicts")
    zero_terminal_snr: bool = option(False, "rescale the schedule so that time 1 is pure noise (arXiv 2305.08891)")
    time_shift: float = option(1.0, "shift s of the times, t -> s t / (1 + (s - 1) t); 1 leaves them", gt=0)

    def build_process(self) -> DiffusionProcess:
        """The process. Raises: ValueError: the fields do not go together."""
        return DiffusionProcess(self.schedule, self.prediction, self.zero_terminal_snr, time_shift=self.time_shift)

    def validate_process(self):
        self.build_process()
