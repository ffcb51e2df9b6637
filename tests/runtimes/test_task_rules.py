"""Tasks that a manifest may not have, and windows of a loop."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from msgspec import structs

from runtimes import task_rules
from runtimes.interpreter.loop import in_window
from runtimes.interpreter.request import Request
from runtimes.manifest import Component, Manifest, TensorSpec
from runtimes.programs.statements import Loop, Plan, Window
from runtimes.version_1.tasks import Feed, Preparation, Task
from tests import fakes

TOKENS = TensorSpec("float32", ("batch", 1, 4, 8))
ENCODER = Component(
    "looks",
    "image_encoder",
    {"image": TensorSpec("float32", ("batch", 3, 32, 32))},
    {"tokens": TOKENS, "nothing": TOKENS},
)
RUN = Preparation(
    "looks",
    {"image": Feed("image", resample="bilinear")},
    {"tokens": "seen"},
    ("positive",),
    others={"nothing": "seen"},
)


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """A valid one whose denoiser takes tokens of a picture."""
    made = Manifest.load(fakes.make_bundle(tmp_path / "bundle"))
    components = [
        structs.replace(each, inputs={**each.inputs, "seen": TOKENS})
        if each.role == "denoiser"
        else each
        for each in made.components
    ]
    return structs.replace(made, components=(*components, ENCODER))


def said(manifest: Manifest, run: Preparation) -> list[str]:
    task = Task("looking", {"image": "image"}, (run,))
    return list(task_rules.problems(structs.replace(manifest, tasks=(task,))))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"others": {"nothing": "elsewhere"}}, "`others` names what it does not give"),
        ({"others": {"tokens": "seen", "nothing": "seen"}}, "`others` feeds an input twice"),
        ({"others": {"unknown": "seen"}}, "has no output 'unknown'"),
        ({"branches": ()}, "`others` is for branches beside"),
    ],
)
def test_others(change: dict[str, Any], says: str, manifest: Manifest) -> None:
    names = [branch.name for branch in manifest.guidance.branches]
    whole = structs.replace(RUN, branches=tuple(names[-1:]))
    assert said(manifest, whole) == []
    assert any(says in each for each in said(manifest, structs.replace(whole, **change)))


@pytest.mark.parametrize(
    ("steps", "share"), [(100, 0.29), (100, 0.57), (10, 0.7), (4, 0.0), (4, 1.0), (7, 0.5)]
)
def test_a_share_of_the_steps_is_rounded_down(steps: int, share: float) -> None:
    """As ``int(num_inference_steps * adapter_conditioning_factor)``, rounding errors included,
    whatever number of evaluations there is."""
    request = cast(
        Request, SimpleNamespace(numbers={"share": (share,)}, number=lambda name: float(steps))
    )
    loop = cast(Loop, SimpleNamespace(plan=Plan()))
    evaluations = 2 * steps - 1
    kept = in_window(request, loop, Window(count="steps", stop="share"), evaluations)
    assert kept[:, 0].tolist() == [index < int(steps * share) for index in range(evaluations)]
