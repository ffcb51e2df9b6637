"""This module declares once each argument of a check of a whole bundle.

As in `latentc.runtimes.calls.call_arguments`, little is imported and annotations are no texts.
"""

from collections.abc import Callable
from typing import Annotated, TypeAlias, TypedDict

from latentc.runtimes.options import Option, like
from latentc.runtimes.presets.load_arguments import LoadArguments

Report: TypeAlias = Callable[[str], None]


class VerifyArguments(TypedDict, total=False):
    """The arguments of `latentc.runtimes.verification.whole_bundle.verify`, the bundle aside."""

    backend: Annotated[
        str | None,
        like(
            LoadArguments,
            "backend",
            help="Only this engine (see: latentc backends).",
            usual="all that are installed",
            details="",
        ),
    ]
    device: Annotated[
        str | None,
        like(
            LoadArguments,
            "device",
            help='With a backend: by its own name, such as "cpu" (see: latentc backends).',
        ),
    ]
    build: Annotated[str | None, like(LoadArguments, "build", usual="all")]
    files_only: Annotated[bool, Option("Compare sizes and hashes, run nothing.", default=False)]
    report: Annotated[
        Report | None,
        Option(
            "Called with a line about what was or is being checked, and what cannot be.",
            hidden="the command prints the lines",
        ),
    ]
