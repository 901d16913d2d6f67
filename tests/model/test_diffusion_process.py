"""The noising process against closed forms, diffusers' tables, and its own inverse."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

from model.diffusion_process import DiffusionProcess

COMBINATIONS = [
    ("rectified_flow", "velocity", False),
    ("rectified_flow", "x0", False),
    *[(s, p, False) for s in ("linear", "scaled_linear", "cosine", "edm") for p in ("epsilon", "v", "x0")],
    *[(s, p, True) for s in ("linear", "scaled_linear", "cosine") for p in ("v", "x0")],
]
DIFFUSERS_BETAS = {
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}


def grid(n: int = 257) -> torch.Tensor:
    return torch.linspace(0, 1, n, dtype=torch.float64)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("schedule", list(DIFFUSERS_BETAS))
def test_tables_are_those_of_diffusers(schedule, zero_terminal_snr):
    betas = DDIMScheduler(**DIFFUSERS_BETAS[schedule]).betas.double()
    if zero_terminal_snr:
        betas = rescale_zero_terminal_snr(betas)
    t = (torch.arange(1000, dtype=torch.float64) + 1) / 1000
    alpha, sigma = DiffusionProcess(schedule, "v", zero_terminal_snr).alpha_sigma(t)
    torch.testing.assert_close(alpha, torch.cumprod(1 - betas, 0).sqrt(), atol=2e-5, rtol=0)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(t), atol=1e-12, rtol=0)


@pytest.mark.parametrize("schedule", list(DIFFUSERS_BETAS))
def test_zero_terminal_snr_is_exact(schedule):
    plain, rescaled = (DiffusionProcess(schedule, "v", zero) for zero in (False, True))
    ends = torch.tensor([0.001, 1.0], dtype=torch.float64)
    assert rescaled.alpha_sigma(ends)[0][1] == 0 and rescaled.alpha_sigma(ends)[1][1] == 1
    assert rescaled.alpha_sigma(ends)[0][0] == pytest.approx(plain.alpha_sigma(ends)[0][0].item(), abs=1e-15)
    assert plain.alpha_sigma(ends)[0][1] > 0


@pytest.mark.parametrize("schedule, prediction, zero", COMBINATIONS)
def test_schedules_run_from_data_to_noise(schedule, prediction, zero):
    process = DiffusionProcess(schedule, prediction, zero)
    for t in (grid(4001), grid(4001).float()):
        alpha, sigma = process.alpha_sigma(t)
        assert (alpha[0], sigma[0]) == (1, 0) and alpha.dtype == t.dtype
        assert (alpha.diff() <= 0).all() and (sigma.diff()[1:] >= 0).all()
        assert (alpha - alpha.roll(1))[1:].abs().max() < 0.01
        ratio = sigma / alpha  # rises from 0, to infinity where alpha ends at 0
        assert ratio[0] == 0 and (ratio[1:].diff() > 0).all()


@pytest.mark.parametrize("schedule, prediction, zero", COMBINATIONS)
def test_time_at_ratio_inverts_the_schedule(schedule, prediction, zero):
    process = DiffusionProcess(schedule, prediction, zero)
    alpha, sigma = process.alpha_sigma(grid()[1:-1])
    times = process.time_at_ratio((sigma / alpha).numpy())
    np.testing.assert_allclose(times, grid()[1:-1].numpy(), atol=1e-9)


@pytest.mark.parametrize("schedule, prediction, zero", COMBINATIONS)
def test_to_x0_undoes_target(schedule, prediction, zero):
    process = DiffusionProcess(schedule, prediction, zero)
    generator = torch.Generator().manual_seed(0)
    t = torch.cat([torch.tensor([0.0, 1.0, 1e-4]), torch.rand(61, generator=generator)])
    x0, noise = torch.randn(2, 64, 3, 2, 2, generator=generator)
    for kind, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
        data, unit, times = x0.to(kind), noise.to(kind), t.to(kind)
        x_t = process.add_noise(data, unit, times)
        found = process.to_x0(process.target(data, unit, times), x_t, times)
        # Rounding of x_t is divided by alpha (epsilon), and multiplied by at most sigma elsewhere.
        alpha, sigma = process.alpha_sigma(times)
        amplification = sigma / alpha if prediction == "epsilon" else torch.ones_like(alpha)
        error = (found - data).abs().amax((1, 2, 3))
        assert found.isfinite().all() and (error <= tolerance * (3 + 3 * amplification)).all()


def test_targets_are_their_definitions():
    x0, noise = torch.tensor([[2.0]]), torch.tensor([[-1.0]])
    t = torch.tensor([0.4])
    assert DiffusionProcess().target(x0, noise, t) == -3
    assert DiffusionProcess("cosine", "epsilon").target(x0, noise, t) == -1
    alpha, sigma = DiffusionProcess("cosine", "v").alpha_sigma(t)
    assert DiffusionProcess("cosine", "v").target(x0, noise, t) == pytest.approx((-alpha - 2 * sigma).item())


def test_edm_is_the_papers_preconditioning():
    """D(x) = c_skip x + c_out F(c_in x; c_noise) of arXiv 2206.00364, table 1, sigma_data 1, with F = -output."""
    process = DiffusionProcess("edm", "v")
    t, x, output = grid()[60:], torch.randn(197, 5).double(), torch.randn(197, 5).double()
    sigma = process.alpha_sigma(t)[1][:, None]
    c_skip, c_out, c_in = 1 / (sigma**2 + 1), sigma / (1 + sigma**2).sqrt(), 1 / (1 + sigma**2).sqrt()
    torch.testing.assert_close(process.to_x0(output, x, t), c_skip * x - c_out * output, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(process.network_input(x, t), c_in * x, atol=1e-12, rtol=1e-12)
    # The time fed is linear in c_noise = ln(sigma) / 4.
    slope = process.network_time(t).double().diff() / (sigma[:, 0].log() / 4).diff()
    torch.testing.assert_close(slope, slope.mean().expand_as(slope), atol=0, rtol=2e-3)


@pytest.mark.parametrize("schedule, prediction, zero", COMBINATIONS)
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_closed_forms(schedule, prediction, zero, gamma):
    process = DiffusionProcess(schedule, prediction, zero)
    weight = process.loss_weight(grid(), "min_snr", gamma)
    assert weight.isfinite().all() and process.loss_weight(grid().float(), "min_snr", gamma).isfinite().all()
    alpha, sigma = process.alpha_sigma(grid()[1:-1])
    snr = (alpha / sigma) ** 2
    least = snr.clamp(max=gamma)
    closed = {
        "epsilon": least / snr,
        "v": least / (snr + 1),
        "x0": least,
        "velocity": least / (1 + snr.sqrt()) ** 2,
    }[prediction]
    torch.testing.assert_close(weight[1:-1], closed, atol=1e-12, rtol=1e-12)
    # At the ends, S = inf and (with no data left) S = 0.
    assert weight[0] == (gamma if prediction == "x0" else 0)
    if zero or schedule == "rectified_flow":
        assert weight[-1] == 0
    assert (process.loss_weight(grid(), "none") == 1).all()


@pytest.mark.parametrize("schedule, prediction, zero", COMBINATIONS)
def test_min_snr_weighs_the_error_of_x0_alike(schedule, prediction, zero):
    """Whatever is predicted, weight x squared error of the output is min(S, g) x squared error of x0."""
    process = DiffusionProcess(schedule, prediction, zero)
    t = grid()[20:-20]
    x_t, output = torch.randn(2, len(t), 3, dtype=torch.float64)
    error = process.to_x0(output + 0.1, x_t, t) - process.to_x0(output, x_t, t)
    alpha, sigma = process.alpha_sigma(t)
    expected = ((alpha / sigma) ** 2).clamp(max=5)[:, None] * error**2
    found = process.loss_weight(t, "min_snr", 5.0)[:, None] * 0.1**2 * torch.ones_like(error)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-6)


def test_logit_normal_times_have_the_stated_distribution():
    uniforms = (torch.arange(20000) + 0.5) / 20000
    logits = torch.logit(DiffusionProcess().training_times(uniforms, "logit_normal", mean=-0.3, std=1.4).double())
    assert logits.mean().item() == pytest.approx(-0.3, abs=1e-3) and logits.std().item() == pytest.approx(
        1.4, abs=5e-3
    )
    edm = DiffusionProcess("edm", "v")
    log_sigma = edm.alpha_sigma(edm.training_times(uniforms, "logit_normal", mean=-0.3, std=1.4))[1].double().log()
    held = logits.clamp(math.log(0.002), math.log(80))
    torch.testing.assert_close(log_sigma, held, atol=2e-4, rtol=0)


def test_training_times_stay_legal_and_shift():
    uniforms = torch.tensor([0.0, 0.25, 0.5, 1 - 2**-24])
    for schedule, prediction, zero in COMBINATIONS:
        for sampling in ("uniform", "logit_normal"):
            t = DiffusionProcess(schedule, prediction, zero).training_times(uniforms, sampling, std=3.0)
            assert t.dtype == torch.float32 and ((t >= 0) & (t <= 1)).all()
    shifted = DiffusionProcess(time_shift=3.0).training_times(uniforms, "uniform")
    torch.testing.assert_close(shifted, 3 * uniforms / (1 + 2 * uniforms))
    # In rectified flow a shift multiplies sigma / alpha.
    t = DiffusionProcess(time_shift=3.0).training_times(uniforms, "logit_normal")
    plain = DiffusionProcess().training_times(uniforms, "logit_normal", mean=math.log(3))
    torch.testing.assert_close(t, plain)


@pytest.mark.parametrize("n_steps", [1, 2, 3, 20, 200])
@pytest.mark.parametrize("spacing", ["default", "karras", "uniform"])
def test_sampling_times_fall_to_zero(spacing, n_steps):
    for schedule, prediction, zero in COMBINATIONS:
        process = DiffusionProcess(schedule, prediction, zero)
        t = process.sampling_times(n_steps, spacing)
        assert t.shape == (n_steps + 1,) and (t.diff() < 0).all() and t[-1] == 0
        assert t[0] == 1 or (schedule == "cosine" and not zero and t[0] > 0.99)


def test_network_time_counts_the_steps_of_a_schedule_of_betas():
    steps = torch.arange(1000)
    torch.testing.assert_close(DiffusionProcess("linear", "v").network_time((steps + 1) / 1000), steps.float())
    assert DiffusionProcess().network_time(torch.tensor([0.25])) == 250
    edm = DiffusionProcess("edm", "v").network_time(torch.tensor([0.0, 1.0]))
    assert edm.tolist() == [0, 1000]


def test_a_process_built_under_the_meta_device_works():
    with torch.device("meta"):
        process = DiffusionProcess("cosine", "v")
    assert process.alpha_sigma(torch.tensor([0.5], device="cpu"))[0].item() == pytest.approx(0.7025, abs=1e-3)
    with torch.device("meta"):
        assert process.sampling_times(3).device.type == "cpu"


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"schedule": "sigmoid"}, "schedule='sigmoid' is unknown"),
        ({"prediction": "score"}, "prediction='score' is unknown"),
        ({"schedule": "cosine"}, "prediction='velocity' does not go with schedule='cosine'"),
        ({"prediction": "epsilon"}, "does not go with schedule='rectified_flow'"),
        ({"prediction": "v"}, "does not go with schedule='rectified_flow'"),
        ({"zero_terminal_snr": True}, "no effect with schedule='rectified_flow'"),
        ({"schedule": "edm", "prediction": "v", "zero_terminal_snr": True}, "no effect with schedule='edm'"),
        (
            {"schedule": "linear", "prediction": "epsilon", "zero_terminal_snr": True},
            "cannot be used with prediction='epsi",
        ),
        ({"time_shift": 0.0}, "time_shift=0.0 must be a positive number"),
        ({"schedule": "edm", "prediction": "v", "time_shift": 2.0}, "time_shift=2.0 does not go with schedule='edm'"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DiffusionProcess(**settings)


def test_bad_arguments_are_refused():
    process, t = DiffusionProcess(), torch.rand(3)
    with pytest.raises(ValueError, match="weighting='snr' is unknown"):
        process.loss_weight(t, "snr")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="gamma=0 of the min_snr weighting"):
        process.loss_weight(t, "min_snr", 0)
    with pytest.raises(ValueError, match=r"std=0\.0 of logit-normal times"):
        process.training_times(t, "logit_normal", std=0.0)
    with pytest.raises(ValueError, match="n_steps=0 must be at least 1"):
        process.sampling_times(0)
    with pytest.raises(ValueError, match="spacing='log' is unknown"):
        process.sampling_times(4, "log")  # pyright: ignore[reportArgumentType]
