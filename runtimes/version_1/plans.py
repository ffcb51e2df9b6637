"""Tables of sampling plans as bundles of format 1 hold them: one array a member of a .npz file."""

from __future__ import annotations

import os
from pathlib import Path

from runtimes.errors import BundleError
from runtimes.npz import read_arrays
from runtimes.parsing import parser
from runtimes.plan import PlanTable
from runtimes.plan_schema import DTYPES


@parser(BundleError, "path", "a table of sampling plans of format 1")
def read_plans(path: str | os.PathLike[str]) -> PlanTable:
    """Return the table of a file ``schedules/<name>.npz``, checked as today's tables are.

    Its arrays have the names, dtypes and shapes of `PlanTable`.

    Raises:
        BundleError: says what was expected and what was found.
    """
    arrays = read_arrays(path, DTYPES)
    try:
        return PlanTable(**arrays)
    except BundleError as error:
        raise BundleError(f"{Path(path).name}: {error}") from error
