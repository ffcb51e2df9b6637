"""This module declares once each argument of adding sampling plans to a bundle."""

from collections.abc import Callable, Sequence
from typing import Annotated, TypedDict

from latentc.exporter.progress import Event
from latentc.runtimes.options import Option
from latentc.runtimes.sampling.step_limits import MAX_TRACED


class _Wanted(TypedDict):
    schedulers: Annotated[
        str | Sequence[str],
        Option("Short name or diffusers class.", flags=("--scheduler",), metavar="NAME"),
    ]


class ScheduleArguments(_Wanted, total=False):
    """The arguments of `latentc.exporter.schedulers.plans.add_to_bundle`, the bundle aside; those
    that an export has as well, it takes from here."""

    steps: Annotated[
        int | Sequence[int] | None,
        Option(
            "Step count to make plans for.",
            usual="1-60, 1-100 of the pipeline's own scheduler",
            least=1,
            most=MAX_TRACED,
            metavar="N",
        ),
    ]
    report: Annotated[
        Callable[[Event], None] | None,
        Option(
            "Called at the begin and the end of each stage, with `subject`, `stage`, `seconds` "
            "(`None` at the begin) and `size` in bytes.",
            hidden="the command draws the stages",
        ),
    ]
