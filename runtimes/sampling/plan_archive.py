"""A scheduler's sampling plans in a bundle: one document, or an archive with one a step count.

A call follows the plans of one step count. Of an archive it reads these and no others, however many
there are.
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

from latentc.runtimes.bundle.structures import Schedule
from latentc.runtimes.errors import BundleError
from latentc.runtimes.sampling.plan import PlanTable, join
from latentc.runtimes.storage.files import LARGEST_DOCUMENT, open_regular
from latentc.runtimes.storage.parsing import parser, parsing

_DATE = (1980, 1, 1, 0, 0, 0)  # a ZIP member needs one; a fixed one makes equal tables equal files
_MOST_JOINED = 2**26  # numbers of all plans of a schedule in one table
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def write_archive(table: PlanTable, path: str | os.PathLike[str]) -> None:
    """Write a table as an archive; equal tables give equal files.

    Raises:
        BundleError: the plans of one step count are larger than what `read_plans` reads.
        OSError: it cannot be written.
    """
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for count in table.step_counts:
            data = table.of(count).encoded()
            if len(data) > LARGEST_DOCUMENT:
                raise BundleError(
                    f"{Path(path).name}: {len(data):,} bytes of sampling plans for {count} steps, "
                    f"expected at most {LARGEST_DOCUMENT:,}; take fewer steps"
                )
            member = zipfile.ZipInfo(_member(count), _DATE)
            member.compress_type = zipfile.ZIP_DEFLATED
            member.create_system = 3  # the same bytes on Windows
            archive.writestr(member, data, compresslevel=9)


def read_plans(path: str | os.PathLike[str], schedule: Schedule, steps: int) -> PlanTable:
    """Return the checked plans of a schedule, those for `steps` steps at least.

    Args:
        path: of the schedule's file.
        steps: one of the step counts of the schedule.

    Raises:
        BundleError: says what was expected and what was found.
    """
    if schedule.archive:
        return _from_archive(path, schedule.steps, (steps,))[0]
    return PlanTable.load(path, schedule.steps)


def read_all_plans(path: str | os.PathLike[str], schedule: Schedule) -> PlanTable:
    """Return all plans of a schedule; arguments and errors are those of `read_plans`."""
    if not schedule.archive:
        return PlanTable.load(path, schedule.steps)
    tables = _from_archive(path, schedule.steps, schedule.steps)
    with parsing(path, BundleError, "an archive of sampling plans"):
        rows = sum(len(table.state) for table in tables)
        evaluations = sum(len(table.timesteps) for table in tables)
        slots = max(table.state.shape[1] for table in tables)
        window = max(table.window for table in tables)
        if rows * slots**2 + evaluations * (window + 1) > _MOST_JOINED:
            raise ValueError("its tables are too large together, since each gets the largest form")
        return join(tables)


@parser(BundleError, "path", "an archive of sampling plans")
def _from_archive(
    path: str | os.PathLike[str], listed: tuple[int, ...], wanted: tuple[int, ...]
) -> list[PlanTable]:
    """Return the plans of the wanted step counts.

    Args:
        listed: the step counts that the manifest says the archive has.
    """
    label = Path(path).name
    with open_regular(path, LARGEST_DOCUMENT) as file, zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        if len(names) != len(listed) or set(names) != set(map(_member, listed)):
            found = f"found {len(names)} members, such as {sorted(names)[:3]}"
            raise BundleError(
                f"{label}: expected plans of the steps {list(listed)}, {found}; export it again"
            )
        members = [archive.getinfo(_member(steps)) for steps in wanted]
        size = sum(member.file_size for member in members)
        if size > LARGEST_DOCUMENT:
            raise BundleError(
                f"{label}: unpacks to {size:,} bytes, expected at most {LARGEST_DOCUMENT:,}"
            )
        return [
            PlanTable.decoded(_unpacked(archive, member), f"{label}: {member.filename}", (steps,))
            for member, steps in zip(members, wanted, strict=True)
        ]


def _unpacked(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    """Return the bytes of a member, no more than it declares: asked for all, the library unpacks
    all of it before it cuts."""
    if member.compress_type not in _METHODS:
        raise BundleError(f"{member.filename} is neither stored nor deflated")
    with archive.open(member) as stream:
        return stream.read(member.file_size)


def _member(steps: int) -> str:
    return f"{steps}.json"
