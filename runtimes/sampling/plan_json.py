"""Sampling plans written out, for programs that start from noise only.

Each plan stands there whole, as a list of evaluations: the indirections of a bundle's table (rows
that are shared, and those of a run that starts in the middle) are resolved for a run from noise.
docs/bundle-format.md specifies the document.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Unpack

from latentc.runtimes.bundle.files import Bundle
from latentc.runtimes.bundle.structures import Schedule
from latentc.runtimes.errors import InputError, PlanNotFound
from latentc.runtimes.options import complete, takes, tuple_of
from latentc.runtimes.sampling.plan import PlanTable, SamplingPlan
from latentc.runtimes.sampling.plan_archive import read_all_plans
from latentc.runtimes.sampling.plan_schema import LEARNED
from latentc.runtimes.sampling.plans_arguments import PlansArguments
from latentc.runtimes.unknown_names import suggestion

FORMAT_VERSION = 1


@takes(PlansArguments)
def write_plans(bundle: Bundle, folder: Path, **arguments: Unpack[PlansArguments]) -> list[Path]:
    """Write ``<name>.json`` for each scheduler of the bundle.

    Args:
        bundle: where the plans are.
        folder: where they are written to.
        {options}

    Raises:
        InputError: an argument that cannot be used; the bundle has no such scheduler.
        PlanNotFound: a scheduler has no plan of one of the step counts.
    """
    options = complete(PlansArguments, arguments)
    schedulers, steps = tuple_of(options["schedulers"]), tuple_of(options["steps"])
    known = {schedule.name: schedule for schedule in bundle.manifest.schedules}
    unknown = [name for name in schedulers if name not in known]
    if unknown:
        hint = suggestion(unknown[0], known, "it has")
        raise InputError(f"no scheduler {unknown[0]!r} in this bundle; {hint}")
    for name in schedulers or tuple(known):
        missing = set(steps) - set(known[name].steps)
        if missing:
            raise PlanNotFound(
                f"{name} has no plan for {min(missing)} steps; add one with: "
                f"latentc schedule {bundle.root} --scheduler {name} --steps {min(missing)}"
            )
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name in schedulers or tuple(known):
        table = read_all_plans(bundle.path(known[name].file), known[name])
        path = folder / f"{name}.json"
        latents = bundle.manifest.latents
        sides = (latents.default_height, latents.default_width)
        size = (sides[0] // latents.factor, sides[1] // latents.factor)
        made = document(known[name], table, steps, size)
        text = json.dumps(made, separators=(",", ":"))
        path.write_text(text + "\n", "utf-8")
        written.append(path)
    return written


def document(
    schedule: Schedule,
    table: PlanTable,
    steps: tuple[int, ...] = (),
    size: tuple[int, int] = (1, 1),
) -> dict[str, Any]:
    """Return one scheduler's plans as JSON-compatible values.

    `size` is the latents' height and width, for plans that depend on it.
    """
    shift = None if schedule.shift is None else schedule.shift.of(*size)
    plans = [table.plan(count, 0, shift) for count in steps or table.step_counts]
    clip = plans[0].clip
    return {
        "format_version": FORMAT_VERSION,
        "name": schedule.name,
        "class_name": schedule.class_name,
        "slots": plans[0].num_slots,
        "clip": {"kind": clip.kind.name.lower(), "limit": clip.limit, "ratio": clip.ratio},
        "plans": [_plan(plan) for plan in plans],
    }


def _plan(plan: SamplingPlan) -> dict[str, Any]:
    return {
        "steps": plan.num_inference_steps,
        "init_noise_scale": plan.init_noise_scale,
        "evaluations": [
            {
                "timestep": float(plan.timesteps[index]),
                "input_scale": float(plan.input_scale[index]),
                "noise_draw": bool(plan.noise_draws[index]),
                "state": plan.state[index].tolist(),
                "prediction": plan.prediction[index].tolist(),
                "clean": plan.clean[index].tolist(),
                "noise": plan.noise[index].tolist(),
                "clean_from": plan.clean_from[index].tolist(),
                **_learned(plan, index),
            }
            for index in range(plan.num_evaluations)
        ],
    }


def _learned(plan: SamplingPlan, index: int) -> dict[str, float]:
    """Return the limits of the variance of an evaluation's noise, where it is learnt."""
    limits = {name: float(getattr(plan, name)[index]) for name in LEARNED}
    return {} if math.isnan(limits["log_low"]) else limits
