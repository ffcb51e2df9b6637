"""Tasks that a manifest may not have, and what their branches and vectors become."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from msgspec import structs

from runtimes import task_rules
from runtimes.conditioning import windowed
from runtimes.manifest import Argument, Branch, Component, Manifest, TensorSpec, VectorInput
from runtimes.preparation import Pictured, Prepared
from runtimes.request import Request
from runtimes.tasks import Feed, Preparation, Task
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


def test_rows_of_branches() -> None:
    values, others = np.full((2, 3), 5.0), np.full((2, 3), 7.0)
    branches = [Branch("negative", "negative_", "empty", 1.0), Branch("positive", "", "empty", 0.0)]
    prepared = Prepared(
        conditioning={
            "all": Pictured(values),
            "zeros": Pictured(values, ("positive",)),
            "others": Pictured(values, ("positive",), others),
        }
    )
    rows = {name: each[:, 0].tolist() for name, each in prepared.rows(branches).items()}
    assert rows == {"all": [5] * 4, "zeros": [0, 0, 5, 5], "others": [7, 7, 5, 5]}


@pytest.mark.parametrize(
    ("steps", "share"), [(100, 0.29), (100, 0.57), (10, 0.7), (4, 0.0), (4, 1.0), (7, 0.5)]
)
def test_a_share_of_the_steps_is_rounded_down(steps: int, share: float) -> None:
    """As ``int(num_inference_steps * adapter_conditioning_factor)``, rounding errors included,
    whatever number of evaluations there is."""
    vector = VectorInput("scale", ("scale",), until="share")
    arguments = (Argument("scale", (1.0, 1.0)), Argument("share", (1.0,)))
    manifest = cast(Manifest, SimpleNamespace(vectors=(vector,), arguments=arguments))
    request = cast(
        Request,
        SimpleNamespace(task=Task("any"), numbers={"share": (share,)}, num_inference_steps=steps),
    )
    evaluations = 2 * steps - 1
    made = windowed(manifest, request, {"scale": np.array([[2.0, 3.0]])}, evaluations)
    kept = [index for index, each in enumerate(made) if each["scale"].tolist() == [[2.0, 3.0]]]
    assert kept == [index for index in range(evaluations) if index < int(steps * share)]
    assert all(not each["scale"].any() for index, each in enumerate(made) if index not in kept)
