"""This module declares once each argument of a search for the fastest settings.

As in `latentc.runtimes.calls.call_arguments`, little is imported and annotations are no texts.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, TypedDict

from latentc.runtimes.options import Option, like
from latentc.runtimes.presets.load_arguments import LoadArguments

if TYPE_CHECKING:
    from latentc.runtimes.backends.backend import Backend
else:
    Backend = Any  # its module imports numpy

Tell: TypeAlias = Callable[[str, float], None]


class TuneArguments(TypedDict, total=False):
    """The arguments of `latentc.runtimes.tuning.tune.tune`, the bundle aside."""

    backend: Annotated[
        str | Backend | None,
        like(
            LoadArguments,
            "backend",
            help="Only this engine (see: latentc backends).",
            usual="all that are installed",
            details="Slow ones such as `coreml-reference` are tried only if named.",
        ),
    ]
    device: Annotated[str | None, like(LoadArguments, "device")]
    seconds: Annotated[
        float,
        Option(
            "Stop trying after so long; what was found by then counts.",
            default=600,
            above=0,
            metavar="N",
            see="presets.md",
        ),
    ]
    steps: Annotated[
        int | None,
        Option(
            "Inference steps of the images that are compared.",
            usual="the bundle's, or what time allows",
            metavar="N",
        ),
    ]
    prompts: Annotated[
        str | Sequence[str],
        Option(
            "What to draw.",
            default=(),
            usual="the prompts of the bundle's probes",
            flags=("--prompt",),
            metavar="TEXT",
        ),
    ]
    tell: Annotated[
        Tell | None,
        Option(
            "Called with what is being tried, and how many seconds were spent.",
            hidden="the command draws a bar",
        ),
    ]
