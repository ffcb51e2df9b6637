"""Short names for diffusers' schedulers, with everything that the name promises spelled out.

What a name does not settle (betas, prediction type, timestep spacing …) comes from the config
of the pipeline's own scheduler.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from latentc.runtimes.errors import InputError
from latentc.runtimes.unknown_names import suggestion


@dataclass(frozen=True)
class NamedScheduler:
    """A diffusers class and the config entries that are set over the pipeline's own."""

    class_name: str
    overrides: Mapping[str, Any]


_PLAIN = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
}
_KARRAS = {**_PLAIN, "use_karras_sigmas": True}


def _dpm(algorithm: str, order: int, sigmas: Mapping[str, Any] = _PLAIN) -> dict[str, Any]:
    # A variance that the pipeline's own scheduler reads from the model these have no use for.
    fixed = {"variance_type": None}
    return {**sigmas, **fixed, "algorithm_type": algorithm, "solver_order": order}


_UNIPC = {"solver_order": 2, "solver_type": "bh2", "predict_x0": True}
_MULTISTEP, _SINGLESTEP = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"

SCHEDULERS: Mapping[str, NamedScheduler] = MappingProxyType(
    {
        "ddim": NamedScheduler("DDIMScheduler", {}),
        "pndm": NamedScheduler("PNDMScheduler", {}),
        "euler": NamedScheduler("EulerDiscreteScheduler", _PLAIN),
        "euler_a": NamedScheduler("EulerAncestralDiscreteScheduler", {}),
        "dpmpp_2m": NamedScheduler(_MULTISTEP, _dpm("dpmsolver++", 2)),
        "dpmpp_2m_karras": NamedScheduler(_MULTISTEP, _dpm("dpmsolver++", 2, _KARRAS)),
        "unipc": NamedScheduler("UniPCMultistepScheduler", {**_PLAIN, **_UNIPC}),
        "lms": NamedScheduler("LMSDiscreteScheduler", _PLAIN),
        "heun": NamedScheduler("HeunDiscreteScheduler", _PLAIN),
        "ddpm": NamedScheduler("DDPMScheduler", {}),
        "lcm": NamedScheduler("LCMScheduler", {}),
        # not traced by default
        "euler_karras": NamedScheduler("EulerDiscreteScheduler", _KARRAS),
        "lms_karras": NamedScheduler("LMSDiscreteScheduler", _KARRAS),
        "heun_karras": NamedScheduler("HeunDiscreteScheduler", _KARRAS),
        "unipc_karras": NamedScheduler("UniPCMultistepScheduler", {**_KARRAS, **_UNIPC}),
        "dpmpp_3m": NamedScheduler(_MULTISTEP, _dpm("dpmsolver++", 3)),
        "dpmpp_2m_sde": NamedScheduler(_MULTISTEP, _dpm("sde-dpmsolver++", 2)),
        "dpmpp_2m_sde_karras": NamedScheduler(_MULTISTEP, _dpm("sde-dpmsolver++", 2, _KARRAS)),
        "dpmpp_2s": NamedScheduler(_SINGLESTEP, _dpm("dpmsolver++", 2)),
        "dpmpp_2s_karras": NamedScheduler(_SINGLESTEP, _dpm("dpmsolver++", 2, _KARRAS)),
        "deis": NamedScheduler("DEISMultistepScheduler", _dpm("deis", 2)),
        "kdpm2": NamedScheduler("KDPM2DiscreteScheduler", _PLAIN),
        "kdpm2_a": NamedScheduler("KDPM2AncestralDiscreteScheduler", _PLAIN),
        "sa_solver": NamedScheduler(
            "SASolverScheduler",
            {**_PLAIN, "variance_type": None, "algorithm_type": "data_prediction"},
        ),
        "tcd": NamedScheduler("TCDScheduler", {}),
        "edm_euler": NamedScheduler("EDMEulerScheduler", {}),
        "edm_dpmpp_2m": NamedScheduler(
            "EDMDPMSolverMultistepScheduler",
            {"algorithm_type": "dpmsolver++", "solver_order": 2},
        ),
        "flow_euler": NamedScheduler("FlowMatchEulerDiscreteScheduler", _PLAIN),
        "flow_heun": NamedScheduler("FlowMatchHeunDiscreteScheduler", {}),
        "ipndm": NamedScheduler("IPNDMScheduler", {}),
    }
)

DEFAULT_SCHEDULERS = (
    "ddim",
    "pndm",
    "euler",
    "euler_a",
    "dpmpp_2m",
    "dpmpp_2m_karras",
    "unipc",
    "lms",
    "heun",
    "ddpm",
    "lcm",
)


def unknown_scheduler(name: str) -> InputError:
    """Return the error about a name that is neither one of `SCHEDULERS` nor a class."""
    listed = f"{', '.join(SCHEDULERS)}, or the name of a diffusers scheduler class"
    return InputError(
        f"unknown scheduler {name!r}; {suggestion(name, SCHEDULERS, 'known', listed=listed)}"
    )


def flow_matching(class_name: str, config: Mapping[str, Any]) -> bool:
    """Return whether a scheduler goes the straight ways of flow matching, between noise and image.

    One that does not makes nothing of what such a model predicts, and the other way round.
    """
    flows = config.get("prediction_type") == "flow_prediction" or config.get("use_flow_sigmas")
    return class_name.startswith("FlowMatch") or bool(flows)
