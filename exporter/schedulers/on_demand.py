"""One more step count of a bundle's scheduler, when a call asks for it.

`latentc.runtimes.pipeline.plans` names this module and imports it by that name, where it can.
"""

from __future__ import annotations

from pathlib import Path

from latentc.exporter.schedulers.plans import add_to_bundle, traced_for
from latentc.runtimes.bundle.files import Bundle
from latentc.runtimes.bundle.manifest import Manifest
from latentc.runtimes.bundle.structures import Schedule
from latentc.runtimes.errors import BundleError, DiskFull, InputError
from latentc.runtimes.sampling.plan import PlanTable
from latentc.runtimes.sampling.plan_archive import read_plans
from latentc.runtimes.storage.outputs import check_folder


def add_plan(bundle: Path, schedule: Schedule, steps: int) -> tuple[PlanTable, bool]:
    """Trace the plans of a bundle's scheduler for one step count, and keep them in the bundle where
    it can be written.

    Returns the plans, and whether they are kept.

    Raises:
        ExportError: the scheduler refuses so many steps, or cannot be traced.
        InputError: it is for another kind of model.
        BundleError: there is no such bundle any more.
    """
    try:
        check_folder(bundle)
        check_folder(bundle / Path(schedule.file.path).parent)
        manifest = add_to_bundle(bundle, schedulers=[schedule.name], steps=[steps])
        added = manifest.schedule(schedule.name)
        return read_plans(Bundle(bundle, manifest).path(added.file), added, steps), True
    # The call does not need them to be kept. What the scheduler refuses is not traced again.
    except (InputError, BundleError, DiskFull, OSError):
        return traced_for(Manifest.load(bundle), schedule, steps), False
