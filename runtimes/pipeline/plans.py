"""The sampling plans of an opened bundle, read for one scheduler and one step count at a time.

A step count that the bundle has no plans for is traced where the exporter is installed, and kept:
in the bundle, or in the cache folder where the bundle cannot be written.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol, TypeAlias

from latentc.runtimes.bundle.files import Bundle
from latentc.runtimes.bundle.manifest import Manifest
from latentc.runtimes.bundle.quantities import ranges
from latentc.runtimes.bundle.structures import Schedule
from latentc.runtimes.errors import BundleError, InputError, LatentcError, PlanNotFound, first_line
from latentc.runtimes.plugins import BrokenPlugin, resolve
from latentc.runtimes.sampling.plan import PlanTable
from latentc.runtimes.sampling.plan_archive import read_plans
from latentc.runtimes.sampling.step_limits import MAX_TRACED
from latentc.runtimes.storage import files
from latentc.runtimes.storage.folders import cache_folder

# What traces plans, a `Tracer` of the package above this one; it needs PyTorch, and is imported
# where a plan is missing.
TRACER = "latentc.exporter.schedulers.on_demand:add_plan"
_ALL = 0  # in the place of a step count
_ROUNDING = 1e-12  # of a product, by the order of its factors

Tell: TypeAlias = Callable[[str], object]


class Tracer(Protocol):
    """A `Tracer` traces the plans of a scheduler of a bundle for one step count."""

    def __call__(self, bundle: Path, schedule: Schedule, steps: int) -> tuple[PlanTable, bool]:
        """Return the plans, and whether they are kept in the bundle now.

        Raises:
            LatentcError: there are none, such as of a step count that the scheduler refuses.
        """
        ...


class Plans:
    """The plans of a bundle; calls from several threads share what was read."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._tables: dict[tuple[str, int], PlanTable] = {}
        self._reading = threading.Lock()

    def table(self, name: str, steps: int, tell: Tell | None = None) -> PlanTable:
        """Return the plans of a schedule of the bundle, those for `steps` steps at least.

        Args:
            tell: told in a line where plans have to be traced, which takes seconds.

        Raises:
            PlanNotFound: there are none for so many steps, and none can be traced.
            BundleError: they are damaged.
        """
        listed = self._bundle.manifest.schedule(name)
        # One document has the plans of all the step counts that are listed.
        one_document = steps in listed.steps and not listed.archive
        key = (name, _ALL if one_document else steps)
        if key not in self._tables:  # calls whose plans are there do not wait for those of others
            with self._reading:
                if key not in self._tables:
                    self._tables[key] = self._read(name, steps, tell)
        return self._tables[key]

    def require(self, name: str, steps: int, tell: Tell | None = None) -> None:
        """Check that there are such plans, or trace them; arguments and errors are those of
        `table`."""
        if steps not in self._bundle.manifest.schedule(name).steps:
            self.table(name, steps, tell)

    def shift(self, name: str, table: PlanTable, height: int, width: int) -> float | None:
        """Return the shift of a schedule's plans for latents of a size; None where they have none.

        Raises:
            InputError: the image is larger than those that there are plans for.
        """
        manifest = self._bundle.manifest
        shift = manifest.schedule(name).shift
        if shift is None:
            return None
        of_size = shift.of(height, width)
        smallest, largest = table.shifts[0], table.shifts[-1]
        slack = _ROUNDING * max(abs(smallest), abs(largest), 1.0)
        if smallest == largest or smallest - slack <= of_size <= largest + slack:
            return min(max(of_size, smallest), largest)
        factor = manifest.latents.factor
        end = largest if of_size > largest else smallest
        pixels = factor**2 * (end - shift.intercept) / shift.slope
        raise InputError(
            f"height {height * factor} and width {width * factor}: the plans of scheduler "
            f"{name!r} are for images of up to {pixels / 1e6:.1f} megapixels"
        )

    def _read(self, name: str, steps: int, tell: Tell | None) -> PlanTable:
        listed = self._bundle.manifest.schedule(name)
        if steps in listed.steps:
            try:
                return read_plans(self._bundle.path(listed.file), listed, steps)
            except BundleError:
                added = self._added_since(listed)
                if added is None or steps not in added.steps:
                    raise
                return read_plans(self._bundle.path(added.file), added, steps)
        added = self._added_since(listed)
        if added is not None and steps in added.steps:
            return read_plans(self._bundle.path(added.file), added, steps)
        return self._kept(listed, steps) or self._traced(listed, steps, tell)

    def _added_since(self, listed: Schedule) -> Schedule | None:
        """Return what the bundle says of a schedule by now; None where that is the same, or the
        bundle has another model."""
        with suppress(BundleError, StopIteration):
            now = Manifest.load(self._bundle.root)
            schedule = now.schedule(listed.name)
            same = now.source.fingerprint == self._bundle.manifest.source.fingerprint
            return schedule if same and schedule.file != listed.file else None
        return None

    def _kept(self, listed: Schedule, steps: int) -> PlanTable | None:
        """Return what an earlier call traced and kept in the cache folder."""
        path = self._place(listed, steps)
        with suppress(BundleError, OSError):  # what cannot be read is traced again
            return PlanTable.load(path, (steps,)) if path.is_file() else None
        return None

    def _place(self, listed: Schedule, steps: int) -> Path:
        """Return where the plans of a schedule are kept that its bundle cannot take: a place of
        their own for whatever else a bundle says, so that none gets those of another."""
        said = f"{listed.name} {steps} ".encode() + self._bundle.manifest.checked()
        return cache_folder() / "plans" / f"{hashlib.sha256(said).hexdigest()[:32]}.json"

    def _traced(self, listed: Schedule, steps: int, tell: Tell | None) -> PlanTable:
        if not 1 <= steps <= MAX_TRACED:
            raise PlanNotFound(
                f"scheduler {listed.name!r}: no sampling plan for {steps} steps; plans are made "
                f"for 1 to {MAX_TRACED:,}"
            )
        if listed.name in self._bundle.manifest.fixed_schedules and listed.config is None:
            raise PlanNotFound(
                f"scheduler {listed.name!r}: no sampling plan for {steps} steps; there are plans "
                f"for {ranges(listed.steps)}: export again with --steps {steps} for another"
            )
        try:
            tracer: Tracer = resolve(TRACER)
        except BrokenPlugin as error:
            raise self._missing(listed, steps) from error
        if tell is not None:
            tell(f"tracing {listed.name!r} for {steps} steps, of which the bundle has no plan …")
        try:
            table, kept = tracer(self._bundle.root, listed, steps)
        except LatentcError as error:
            raise PlanNotFound(
                f"scheduler {listed.name!r}: no sampling plan for {steps} steps, and none can be "
                f"made: {first_line(error)}"
            ) from error
        if not kept:
            with suppress(OSError):  # then the next process traces it again
                path = self._place(listed, steps)
                path.parent.mkdir(parents=True, exist_ok=True)
                files.write(path, table.encoded())
        return table

    def _missing(self, listed: Schedule, steps: int) -> PlanNotFound:
        """Return the error about plans that the bundle lacks and that cannot be traced here."""
        return PlanNotFound(
            f"scheduler {listed.name!r}: no sampling plan for {steps} steps; there are plans for "
            f"{ranges(listed.steps)}; add one with: latentc schedule {self._bundle.root} "
            f"--scheduler {listed.name} --steps {steps}"
        )
