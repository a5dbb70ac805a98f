"""Schedulers by common short names, mapped to diffusers classes and settings.

| epsilon and v bases (SD 1.5, SDXL)                          | flow matching bases (FLUX, SD3, …)   |
| euler, euler-a, heun, dpm2, dpm2-a, dpm++2m, dpm++2m-sde,   | flow-euler, flow-heun, flow-dpm++2m, |
| dpm++2s, ddim, ddpm, pndm, unipc, deis, lcm; suffix -karras | flow-unipc                           |

The base's scheduler provides the shared settings (betas, prediction type, shift). A name determines the class
and the other settings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from veneer.errors import ConfigError, nearest
from veneer.models.loading import errors_only

if TYPE_CHECKING:
    from veneer.models.image.base import ImageBase

_KARRAS = {"use_karras_sigmas": True}
_MULTISTEP: dict[str, Any] = {"algorithm_type": "dpmsolver++", "solver_order": 2, "use_karras_sigmas": False}
_FLOW: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}

NAMES: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("EulerDiscreteScheduler", {"use_karras_sigmas": False}),
    "euler-karras": ("EulerDiscreteScheduler", _KARRAS),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {"use_karras_sigmas": False}),
    "dpm2": ("KDPM2DiscreteScheduler", {"use_karras_sigmas": False}),
    "dpm2-a": ("KDPM2AncestralDiscreteScheduler", {"use_karras_sigmas": False}),
    "dpm++2m": ("DPMSolverMultistepScheduler", _MULTISTEP),
    "dpm++2m-karras": ("DPMSolverMultistepScheduler", _MULTISTEP | _KARRAS),
    "dpm++2m-sde": ("DPMSolverMultistepScheduler", _MULTISTEP | {"algorithm_type": "sde-dpmsolver++"}),
    "dpm++2m-sde-karras": ("DPMSolverMultistepScheduler", _MULTISTEP | {"algorithm_type": "sde-dpmsolver++"} | _KARRAS),
    "dpm++2s": ("DPMSolverSinglestepScheduler", {"use_karras_sigmas": False}),
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "unipc": ("UniPCMultistepScheduler", {"use_karras_sigmas": False}),
    "unipc-karras": ("UniPCMultistepScheduler", _KARRAS),
    "deis": ("DEISMultistepScheduler", {"use_karras_sigmas": False}),
    "lcm": ("LCMScheduler", {}),
    "flow-euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "flow-heun": ("FlowMatchHeunDiscreteScheduler", {}),
    "flow-dpm++2m": ("DPMSolverMultistepScheduler", _MULTISTEP | _FLOW),
    "flow-unipc": ("UniPCMultistepScheduler", _FLOW),
}
"""Name -> (diffusers class, settings)."""


def scheduler_names(base: ImageBase) -> list[str]:
    """Return the names of the schedulers that can sample from this base.

    The pipelines of FLUX, Qwen-Image and Z-Image shift the schedule depending on the picture size. Some
    scheduler classes do not support this shift."""
    flow = base.prediction == "flow"
    names = [name for name in NAMES if name.startswith("flow-") == flow and name not in base.row.unsupported_schedulers]
    if base.row.shifted:
        names.remove("flow-heun")
        if not base.parts["scheduler"].config.get("use_dynamic_shifting"):
            names.remove("flow-dpm++2m")
    return names


def scheduler_name(base: ImageBase) -> str:
    """Return the short name of the base's scheduler, or else its class name."""
    scheduler = base.parts["scheduler"]
    for name in scheduler_names(base):
        kind, settings = NAMES[name]
        if kind == type(scheduler).__name__ and all(scheduler.config.get(k) == v for k, v in settings.items()):
            return name
    return type(scheduler).__name__


def make_scheduler(base: ImageBase, name: str | None = None) -> Any:
    """Return a new scheduler for one run; by default, one like the base's scheduler.

    On a flow matching base, the prefix `flow-` can be omitted: `euler` means `flow-euler`. Raises ConfigError
    for an unknown name, and for a scheduler that cannot sample from this base."""
    import diffusers

    scheduler = base.parts["scheduler"]
    if name is None or name == scheduler_name(base):
        with errors_only():
            return type(scheduler).from_config(scheduler.config)
    fits = scheduler_names(base)
    full_name = f"flow-{name}" if f"flow-{name}" in fits else name
    if full_name not in fits:
        suggestion = nearest(name, fits)
        why = f" for {base.short_name}, which predicts {base.prediction}" if name in NAMES else ""
        hint = f"did you mean {suggestion[0]}? " if suggestion and name not in NAMES else ""
        fix = f"{hint}known: {', '.join(fits)}"
        raise ConfigError(f"there is no scheduler {name!r}{why}", fix=fix)
    kind, settings = NAMES[full_name]
    shared = {k: v for k, v in scheduler.config.items() if not k.startswith("_")}
    if base.prediction != "flow":
        shared["prediction_type"] = {"epsilon": "epsilon", "v": "v_prediction"}[base.prediction]
    elif "shift" in shared and kind not in ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"):
        shared["flow_shift"] = shared["shift"]
    with errors_only():
        return getattr(diffusers, kind).from_config({**shared, **settings})
