"""Windows of a loop."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

from latentc.runtimes.calls.request import Request
from latentc.runtimes.interpreter.loop import in_window
from latentc.runtimes.programs.statements import Loop, Plan, Window


@pytest.mark.parametrize(
    ("steps", "share"), [(100, 0.29), (100, 0.57), (10, 0.7), (4, 0.0), (4, 1.0), (7, 0.5)]
)
def test_a_share_of_the_steps_is_rounded_down(steps: int, share: float) -> None:
    """A share counts as ``int(num_inference_steps * adapter_conditioning_factor)`` does.

    Rounding errors are included, whatever number of evaluations there is.
    """
    request = cast(
        Request, SimpleNamespace(numbers={"share": (share,)}, number=lambda name: float(steps))
    )
    loop = cast(Loop, SimpleNamespace(plan=Plan()))
    evaluations = 2 * steps - 1
    kept = in_window(request, loop, Window(count="steps", stop="share"), evaluations)
    assert kept[:, 0].tolist() == [index < int(steps * share) for index in range(evaluations)]
