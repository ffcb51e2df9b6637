"""Tables of sampling plans as bundles of format 1 hold them: one array a member of a .npz file."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from latentc.runtimes.errors import BundleError
from latentc.runtimes.sampling.plan import PlanTable
from latentc.runtimes.sampling.plan_schema import DTYPES, LEARNED
from latentc.runtimes.storage.npz import read_arrays
from latentc.runtimes.storage.parsing import parser


@parser(BundleError, "path", "a table of sampling plans of format 1")
def read_plans(path: str | os.PathLike[str]) -> PlanTable:
    """Return the table of a file ``schedules/<name>.npz``, checked as today's tables are.

    Its arrays have the names, dtypes and shapes of `PlanTable`, but for the limits of a learned
    variance, which no table of format 1 has.

    Raises:
        BundleError: says what was expected and what was found.
    """
    arrays = read_arrays(
        path, {name: dtype for name, dtype in DTYPES.items() if name not in LEARNED}
    )
    fixed = np.full(arrays["timesteps"].size, np.nan)
    try:
        return PlanTable(**arrays, **dict.fromkeys(LEARNED, fixed))
    except BundleError as error:
        raise BundleError(f"{Path(path).name}: {error}") from error
