"""This module declares once each argument of writing a bundle's sampling plans out."""

from collections.abc import Sequence
from typing import Annotated, TypedDict

from latentc.runtimes.options import Option
from latentc.runtimes.sampling.step_limits import MAX_STEPS


class PlansArguments(TypedDict, total=False):
    """The arguments of `latentc.runtimes.sampling.plan_json.write_plans`, the places aside."""

    schedulers: Annotated[
        str | Sequence[str],
        Option("Only this one.", default=(), usual="all", flags=("--scheduler",), metavar="NAME"),
    ]
    steps: Annotated[
        int | Sequence[int],
        Option(
            "Only this step count.", default=(), usual="all", least=1, most=MAX_STEPS, metavar="N"
        ),
    ]
