"""The diffusion process as diffusers' schedulers have it: content of scheduler_config.json from the fields of
`ProcessConfig`, and back.

| schedule                      | class in diffusers              | times of the network     |
|-------------------------------|---------------------------------|--------------------------|
| linear, scaled_linear, cosine | DDIMScheduler                   | index of the beta, 0-999 |
| rectified_flow                | FlowMatchEulerDiscreteScheduler | 1000 t                   |

edm has no equal there: diffusers' EDM schedulers feed the network ln(sigma) / 4.
"""

import logging
from typing import Any

from model.diffusion_process import ProcessConfig

logger = logging.getLogger(__name__)

FLOW = "FlowMatchEulerDiscreteScheduler"
# Our names -> diffusers', with what else differs from the defaults there.
BETAS = {
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}


def scheduler_of(config: ProcessConfig) -> tuple[str, dict[str, Any]]:
    """The name of a scheduler's class in diffusers, and its keywords.

    Raises: ValueError: diffusers has no such process; names the field.
    """
    if config.schedule == "rectified_flow":
        if config.prediction != "velocity":
            raise ValueError(
                f"prediction={config.prediction!r} with schedule='rectified_flow' has no equal in diffusers, whose "
                f"{FLOW} takes prediction='velocity'"
            )
        return FLOW, {"shift": config.time_shift}
    if config.schedule not in BETAS:
        raise ValueError(
            f"schedule={config.schedule!r} has no equal in diffusers; it has rectified_flow, {', '.join(BETAS)}"
        )
    if config.time_shift != 1:
        logger.warning(
            "time_shift=%s: with schedule=%r diffusers samples at equal steps of time instead; the model is the same",
            *(config.time_shift, config.schedule),
        )
    return "DDIMScheduler", {
        **BETAS[config.schedule],
        "prediction_type": PREDICTIONS[config.prediction],
        "rescale_betas_zero_snr": config.zero_terminal_snr,
        "clip_sample": False,  # Latents are not bounded.
        "timestep_spacing": "trailing",  # The first step is at the end of the schedule.
    }


def process_of(scheduler: dict[str, Any]) -> dict[str, Any]:
    """Fields of `ProcessConfig` from the content of scheduler_config.json; any scheduler of the same process will do.

    Raises: ValueError: `ProcessConfig` has no such process; names the field.
    """
    if scheduler.get("_class_name", "").startswith("FlowMatch"):
        return {"schedule": "rectified_flow", "prediction": "velocity", "time_shift": scheduler.get("shift", 1.0)}
    # The schedule of betas by its name and ends; diffusers' defaults are those of "linear".
    ends = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
    beta_fields = {name: scheduler.get(name, default) for name, default in ends.items()}
    schedule = next((name for name, betas in BETAS.items() if {**beta_fields, **betas} == beta_fields), None)
    steps, kind = scheduler.get("num_train_timesteps", 1000), scheduler.get("prediction_type", "epsilon")
    prediction = {theirs: ours for ours, theirs in PREDICTIONS.items()}.get(kind)
    if schedule is None or prediction is None or steps != 1000 or scheduler.get("trained_betas") is not None:
        wrong = {**beta_fields, "num_train_timesteps": steps, "prediction_type": kind}
        raise ValueError(
            f"{', '.join(f'{name}={value!r}' for name, value in wrong.items())} is no process that can be trained "
            f"here; there are {list(BETAS.values())} of 1000 steps with {list(PREDICTIONS.values())}"
        )
    zero_terminal_snr = scheduler.get("rescale_betas_zero_snr", False)
    return {"schedule": schedule, "prediction": prediction, "zero_terminal_snr": zero_terminal_snr}
