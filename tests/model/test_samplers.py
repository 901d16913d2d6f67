"""Samplers on mixtures of Gaussians with exact scores, against diffusers and fine solutions of the same ODE."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor

from model.diffusion_process import DiffusionProcess
from model.samplers import (
    SAMPLERS,
    ddim,
    ddpm,
    guided_denoiser,
    initial_noise,
    n_evaluations,
    rescale_guidance,
    sample,
)

PROCESSES = {
    "rectified_flow": DiffusionProcess(),
    "scaled_linear": DiffusionProcess("scaled_linear", "epsilon"),
    "linear": DiffusionProcess("linear", "v"),
    "cosine": DiffusionProcess("cosine", "v"),
    "zero_terminal_snr": DiffusionProcess("cosine", "v", zero_terminal_snr=True),
    "edm": DiffusionProcess("edm", "v"),
}
SCALED_LINEAR = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


class Mixture:
    """6 Gaussians in 16 dimensions, of mean 0 and unit variance in all, in fp64."""

    def __init__(self, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        mean = torch.randn(6, 16, generator=generator, dtype=torch.float64)
        std = 0.1 + 0.3 * torch.rand(6, generator=generator, dtype=torch.float64)
        self.weight = torch.softmax(0.5 * torch.randn(6, generator=generator, dtype=torch.float64), 0)
        mean = mean - self.weight @ mean
        scale = (self.weight @ (mean**2 + std[:, None] ** 2)).mean().sqrt()
        self.mean, self.std = mean / scale, std / scale

    def expected_x0(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """E[x0 | x_t = x], closed form: posterior means of the modes, weighted by their responsibilities."""
        alpha, sigma = alpha.reshape(-1, 1), sigma.reshape(-1, 1)
        variance = alpha**2 * self.std**2 + sigma**2
        offset = x[:, None] - alpha[..., None] * self.mean
        log_weight = self.weight.log() - offset.square().sum(-1) / (2 * variance) - 8 * variance.log()
        modes = self.mean + (alpha * self.std**2 / variance)[..., None] * offset
        return (torch.softmax(log_weight, 1)[..., None] * modes).sum(1)

    def denoiser(self, process: DiffusionProcess):
        return lambda x, t: self.expected_x0(x, *process.alpha_sigma(t))


def generators(n: int, first: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first + i) for i in range(n)]


def start(process: DiffusionProcess, n: int = 48) -> Tensor:
    return initial_noise((16,), generators(n), process).double()


def relative_error(x: Tensor, reference: Tensor, kind: str = "rms") -> float:
    error = (x - reference).square().mean(1).sqrt() / reference.square().mean().sqrt()
    return (error.square().mean().sqrt() if kind == "rms" else error.median()).item()


def solutions(name: str, process: DiffusionProcess, mixture: Mixture, evaluations: tuple[int, ...]) -> list[Tensor]:
    """x0 by sampler `name` with these numbers of evaluations, from `start`."""
    steps = [n // 2 if name == "heun" else n for n in evaluations]
    x = start(process)
    return [
        sample(name, mixture.denoiser(process), x, process=process, times=process.sampling_times(n)) for n in steps
    ]


def fine_solution(process: DiffusionProcess, mixture: Mixture) -> Tensor:
    return solutions("heun", process, mixture, (2400,))[0]


def test_reference_solution_is_that_of_rk4():
    """The reference of these tests against Runge-Kutta 4 on dx/dk = (x - x0) / k for k = sigma, alpha = 1."""
    process, mixture = PROCESSES["edm"], Mixture()
    x = start(process, 8)
    reference = SAMPLERS["heun"](mixture.denoiser(process), x, process, times=process.sampling_times(1200))
    one = torch.ones(1, dtype=torch.float64)

    def slope(x: Tensor, log_k: float) -> Tensor:
        return x - mixture.expected_x0(x, one, one * math.exp(log_k))

    log_ks = torch.linspace(math.log(80), math.log(1e-4), 1001, dtype=torch.float64).tolist()
    for here, there in zip(log_ks[:-1], log_ks[1:]):
        step, middle = there - here, (here + there) / 2
        a = slope(x, here)
        b = slope(x + step / 2 * a, middle)
        c = slope(x + step / 2 * b, middle)
        d = slope(x + step * c, there)
        x = x + step / 6 * (a + 2 * b + 2 * c + d)
    assert relative_error(reference, x) < 1e-5


@pytest.mark.parametrize("schedule", ["rectified_flow", "scaled_linear", "cosine"])
def test_accuracy_and_order_of_default_times(schedule):
    process, mixture = PROCESSES[schedule], Mixture()
    reference = fine_solution(process, mixture)
    limits = {"dpmpp_2m": (0.006, 1.7, 1.9), "heun": (0.021, 1.7, 1.9), "euler": (0.3, 0.95, 0.95)}
    for name, (limit, order, late_order) in limits.items():
        found = solutions(name, process, mixture, (20, 80, 160, 320))
        rms = [relative_error(x, reference) for x in found]
        assert rms[0] <= limit, name
        assert math.log2(rms[0] / rms[2]) / 3 >= order, name
        # Of the asymptotic order, free of the few starts that lie between two modes: the median over starts.
        medians = [relative_error(x, reference, "median") for x in found]
        assert math.log2(medians[1] / medians[3]) / 2 >= late_order, name


def test_euler_is_ddim_without_noise():
    for process in PROCESSES.values():
        euler, ddim = (solutions(name, process, Mixture(), (20,))[0] for name in ("euler", "ddim"))
        torch.testing.assert_close(euler, ddim, atol=1e-10, rtol=0)


def test_twenty_steps_are_as_good_as_diffusers_best_spacing():
    """DPMSolverMultistepScheduler from the same start: 0.06 with its default spacing, 0.005 with Karras spacing."""
    process, mixture = PROCESSES["scaled_linear"], Mixture()
    x = start(process)
    reference = fine_solution(process, mixture)
    found = {}
    for karras in (False, True):
        scheduler = DPMSolverMultistepScheduler(
            **SCALED_LINEAR, prediction_type="sample", use_karras_sigmas=karras, timestep_spacing="linspace"
        )
        scheduler.set_timesteps(20)
        theirs = x
        for i, t in enumerate(scheduler.timesteps):
            sigma = scheduler.sigmas[i].double()
            alpha = 1 / (1 + sigma**2).sqrt()
            theirs = scheduler.step(mixture.expected_x0(theirs, alpha, sigma * alpha), t, theirs).prev_sample
        found[karras] = relative_error(theirs, reference)
    ours = relative_error(solutions("dpmpp_2m", process, mixture, (20,))[0], reference)
    assert found[False] > 0.04 and found[True] < 0.01
    assert ours < 1.5 * found[True] and ours < found[False] / 6
    # With karras times, the same steps are taken, and so the same image comes out.
    times = process.sampling_times(20, "karras")
    assert (
        relative_error(sample("dpmpp_2m", mixture.denoiser(process), x, process=process, times=times), theirs) < 1e-3
    )


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_step_is_that_of_diffusers(eta):
    process, x = PROCESSES["scaled_linear"], torch.randn(3, 4, dtype=torch.float64)
    x0 = torch.randn(3, 4, dtype=torch.float64)
    theirs = DDIMScheduler(**SCALED_LINEAR, prediction_type="sample", clip_sample=False, timestep_spacing="trailing")
    theirs.set_timesteps(4)
    noise = torch.stack([torch.randn(4, generator=g) for g in generators(3)]).double()
    expected = theirs.step(x0, 999, x, eta=eta, variance_noise=noise).prev_sample
    # Times of the indices 999 and 749; the denoiser shows what the second step is given.
    seen = []
    times = torch.tensor([1.0, 0.75, 0.0])
    ddim(lambda x, t: seen.append(x) or x0, x, process, times=times, generators=generators(3), eta=eta)
    torch.testing.assert_close(seen[1], expected, atol=2e-5, rtol=0)


def test_ddpm_step_is_that_of_diffusers():
    process, x = PROCESSES["scaled_linear"], torch.randn(1, 4, dtype=torch.float64)
    x0 = torch.randn(1, 4, dtype=torch.float64)
    theirs = DDPMScheduler(**SCALED_LINEAR, prediction_type="sample", clip_sample=False)
    expected = theirs.step(x0, 500, x, generator=torch.Generator().manual_seed(0)).prev_sample
    noise = torch.randn(1, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # The noise drawn is another (fp64): taken out of theirs, the means and the scale of the noise must agree.
    seen = []
    times = torch.tensor([0.501, 0.5, 0.0])
    ddpm(lambda x, t: seen.append(x) or x0, x, process, times=times, generators=generators(1))
    ours = torch.randn(4, generator=torch.Generator().manual_seed(0)).double()
    std = math.sqrt(theirs._get_variance(500).item())
    torch.testing.assert_close(seen[1] - std * ours, expected - std * noise, atol=5e-5, rtol=0)


@pytest.mark.parametrize("name", list(SAMPLERS))
@pytest.mark.parametrize("schedule", list(PROCESSES))
@pytest.mark.parametrize("spacing", ["default", "karras", "uniform"])
def test_nothing_breaks_from_one_step_to_many(name, schedule, spacing):
    """In fp32 a Gaussian N(0.5, 0.25) is drawn from noise with finite numbers, and its moments are met."""
    process = PROCESSES[schedule]
    x = initial_noise((64,), generators(8), process)

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (c[:, None] for c in process.alpha_sigma(t))
        return 0.5 + alpha * 0.25 / (alpha**2 * 0.25 + sigma**2) * (x - alpha * 0.5)

    for n_steps in (1, 2, 3, 20, 200) if spacing == "default" else (1, 2, 20):
        times, rows = process.sampling_times(n_steps, spacing), generators(8, first=50)
        found = sample(name, denoiser, x, process=process, times=times, generators=rows)
        assert found.isfinite().all() and found.dtype == torch.float32
    if spacing != "default":
        return
    assert abs(found.mean().item() - 0.5) < 0.1 and abs(found.std().item() - 0.5) < 0.06


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_perfect_denoiser_is_returned_exactly(name):
    x0 = torch.randn(2, 5)
    for process in PROCESSES.values():
        calls = []
        x = initial_noise((5,), generators(2), process)
        times = process.sampling_times(7)
        rows = generators(2)
        found = sample(
            name, lambda x, t, calls=calls: calls.append(t) or x0, x, process=process, times=times, generators=rows
        )
        assert torch.equal(found, x0)
        assert len(calls) == n_evaluations(name, 7) and all(t.shape == (2,) and (t > 0).all() for t in calls)


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_image_belongs_to_its_seed_not_to_its_batch(name):
    process, mixture = PROCESSES["rectified_flow"], Mixture()

    def draw(seeds: list[int]) -> Tensor:
        rows = [torch.Generator().manual_seed(s) for s in seeds]
        x = initial_noise((16,), rows, process).double()
        times = process.sampling_times(6)
        return sample(name, mixture.denoiser(process), x, process=process, times=times, generators=rows)

    together = draw([3, 1, 4, 1])
    torch.testing.assert_close(together[1], together[3], atol=1e-12, rtol=0)
    torch.testing.assert_close(draw([4])[0], together[2], atol=1e-12, rtol=0)
    assert (together[0] - together[1]).abs().max() > 0.1


def test_initial_noise_has_the_scale_of_pure_noise():
    assert initial_noise((500,), generators(4), PROCESSES["rectified_flow"]).std().item() == pytest.approx(1, abs=0.05)
    assert initial_noise((500,), generators(4), PROCESSES["edm"]).std().item() == pytest.approx(80, abs=4)


class Rows:
    """A condition: one number per sample."""

    def __init__(self, values: Tensor):
        self.values = values

    def cat(self, other: "Rows") -> "Rows":
        return Rows(torch.cat([self.values, other.values]))


def network(x: Tensor, time: Tensor, condition: Rows) -> Tensor:
    network.rows.append(len(x))
    return (x * condition.values[:, None]).tanh() + time[:, None] / 1000


@pytest.mark.parametrize("schedule", list(PROCESSES))
def test_guidance_is_its_formula_in_one_forward(schedule):
    process = PROCESSES[schedule]
    condition, null = Rows(torch.tensor([1.0, 2.0, 3.0])), Rows(torch.zeros(3))
    x, t = torch.randn(3, 5), torch.tensor([0.9, 0.5, 0.5])
    network.rows = []

    def alone(rows: Rows) -> Tensor:
        return process.to_x0(network(process.network_input(x, t), process.network_time(t), rows), x, t)

    expected = alone(null) + 3.0 * (alone(condition) - alone(null))
    network.rows = []
    found = guided_denoiser(process, network, condition, null_condition=null, scale=3.0)(x, t)
    assert network.rows == [6]
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
    # Guidance on x0 is guidance on the network's output: x0 is linear in it.
    time = process.network_time(t)
    outputs = [network(process.network_input(x, t), time, rows) for rows in (condition, null)]
    mixed = process.to_x0(outputs[1] + 3.0 * (outputs[0] - outputs[1]), x, t)
    torch.testing.assert_close(found, mixed, atol=2e-4, rtol=1e-4)
    # Scale 1 asks for nothing but the condition.
    network.rows = []
    torch.testing.assert_close(
        guided_denoiser(process, network, condition, null_condition=None, scale=1.0)(x, t), alone(condition)
    )
    assert network.rows[0] == 3


def test_guidance_keeps_to_its_interval():
    process = PROCESSES["rectified_flow"]
    condition, null = Rows(torch.ones(2)), Rows(torch.zeros(2))
    within = guided_denoiser(process, network, condition, null_condition=null, scale=4.0, interval=(0.2, 0.6))
    plain, full = (
        guided_denoiser(process, network, condition, null_condition=null, scale=scale) for scale in (1.0, 4.0)
    )
    x = torch.randn(2, 5)
    for value, n_rows, same in ((0.7, 2, plain), (0.1, 2, plain), (0.4, 4, full)):
        t = torch.full((2,), value)
        network.rows = []
        found = within(x, t)
        assert network.rows == [n_rows]
        torch.testing.assert_close(found, same(x, t))
    mixed = torch.tensor([0.4, 0.7])
    torch.testing.assert_close(within(x, mixed), torch.stack([full(x, mixed)[0], plain(x, mixed)[1]]))


def test_rescale_is_that_of_diffusers():
    guided, conditional = 3 * torch.randn(2, 4, 3, 8, 8)
    found = rescale_guidance(guided, conditional, 0.7)
    torch.testing.assert_close(found, rescale_noise_cfg(guided, conditional, 0.7))
    process, condition, null = PROCESSES["cosine"], Rows(torch.ones(2)), Rows(torch.zeros(2))
    x, t = torch.randn(2, 5), torch.full((2,), 0.5)
    plain, full, rescaled = (
        guided_denoiser(process, network, condition, null_condition=null, scale=scale, rescale=rescale)(x, t)
        for scale, rescale in ((1.0, 0.0), (6.0, 0.0), (6.0, 1.0))
    )
    torch.testing.assert_close(rescaled.std(1), plain.std(1))
    assert not torch.allclose(full.std(1), plain.std(1))


def test_bad_settings_are_refused():
    process, x = PROCESSES["rectified_flow"], torch.randn(2, 5)
    times, rows = process.sampling_times(3), Rows(torch.ones(2))
    with pytest.raises(ValueError, match="sampler='plms' is unknown; choose from ddpm, ddim"):
        sample("plms", lambda x, t: x, x, process=process, times=times)
    with pytest.raises(ValueError, match="needs generators, one torch"):
        sample("ddpm", lambda x, t: x, x, process=process, times=times)
    with pytest.raises(ValueError, match="generators has 3 entries for 2 samples"):
        sample("ddpm", lambda x, t: x, x, process=process, times=times, generators=generators(3))
    for bad in (times.flip(0), times[:-1], times[-1:]):
        with pytest.raises(ValueError, match="times must fall strictly and end at 0"):
            sample("euler", lambda x, t: x, x, process=process, times=bad)
    with pytest.raises(ValueError, match=r"interval=\(0.6, 0.2\) must satisfy"):
        guided_denoiser(process, network, rows, null_condition=rows, scale=2.0, interval=(0.6, 0.2))
    with pytest.raises(ValueError, match=r"rescale=1\.5 must be in \[0, 1\]"):
        guided_denoiser(process, network, rows, null_condition=rows, scale=2.0, rescale=1.5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_estimates_are_shown_in_order_and_change_nothing(name):
    process, mixture, shown = PROCESSES["cosine"], Mixture(), []
    times = process.sampling_times(5)
    options = {"process": process, "times": times}
    noise = initial_noise((16,), generators(3), process).double()
    denoiser = mixture.denoiser(process)
    silent = sample(name, denoiser, noise, generators=generators(3, 9), **options)
    watched = sample(
        name, denoiser, noise, generators=generators(3, 9), on_estimate=lambda *seen: shown.append(seen), **options
    )
    assert torch.equal(silent, watched) and torch.equal(shown[-1][1], silent)
    assert [number for number, _ in shown] == list(range(1, n_evaluations(name, 5) + 1))

    def stop(number, x0):
        raise KeyError(number)

    with pytest.raises(KeyError, match="1"):
        sample(name, denoiser, noise, generators=generators(3, 9), on_estimate=stop, **options)
