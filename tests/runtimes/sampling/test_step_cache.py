"""These tests check which evaluations run the whole denoiser, and what its shallow part gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from latentc.runtimes.arrays import Array
from latentc.runtimes.backends.session import Feeds, Session
from latentc.runtimes.bundle.files import Bundle
from latentc.runtimes.bundle.manifest import MANIFEST
from latentc.runtimes.bundle.structures import TensorSpec
from latentc.runtimes.errors import BundleError
from latentc.runtimes.sampling.packing import Packing
from latentc.runtimes.sampling.step_cache import StepCache, kinds
from tests.support.fakes import make_bundle

SAMPLE = TensorSpec("float32", ("batch", 1, 2, 2))
TIME = TensorSpec("float32", (1,))


class Recording(Session):
    """Predicts its number of calls; the whole one's features are ten times that."""

    def __init__(self, whole: bool) -> None:
        deep = {"deep": SAMPLE}
        inputs = {"sample": SAMPLE, "timestep": TIME} | ({} if whole else deep)
        super().__init__(inputs, {"prediction": SAMPLE} | (deep if whole else {}))
        self.seen: list[tuple[int, float]] = []

    def _run(self, feeds: Feeds) -> dict[str, Array]:
        deep = feeds["deep"].flat[0] if "deep" in feeds else 0.0
        self.seen.append((int(feeds["timestep"][0]), float(deep)))
        like = np.ones_like(feeds["sample"])
        made = {"prediction": like * len(self.seen), "deep": like * 10 * len(self.seen)}
        return {name: made[name] for name in self.outputs}


def run(interval: int, rows: list[int]) -> tuple[list[Any], list[Any]]:
    whole, shallow = Recording(True), Recording(False)
    each = lambda _: dict.fromkeys(rows, whole), dict.fromkeys(rows, shallow)
    evaluations = kinds([count == 2 for count in rows], interval)
    packing = Packing(("sample",), ("prediction",), ((1, 2, 2),))
    predict = StepCache(*each, cached=["deep"], evaluations=evaluations, packing=packing)
    for index, count in enumerate(rows):
        made = predict(np.zeros((count, 1, 2, 2), np.float32), np.array([index], np.float32))
        assert made.shape == (count, 1, 2, 2)
    return whole.seen, shallow.seen


def test_every_third_evaluation_is_whole() -> None:
    whole, shallow = run(3, [2] * 7)
    assert [index for index, _ in whole] == [0, 3, 6]
    assert shallow == [(1, 10.0), (2, 10.0), (4, 20.0), (5, 20.0)]


def test_off() -> None:
    whole, shallow = run(1, [2] * 3)
    assert (len(whole), shallow) == (3, [])


@pytest.mark.parametrize("stop", [0, 3, 4, 7, 12])
@pytest.mark.parametrize("interval", [2, 3, 5])
def test_a_shallow_evaluation_has_fresh_features_of_its_own_rows(interval: int, stop: int) -> None:
    made = kinds([index < stop for index in range(12)], interval)
    for index, (guided, whole) in enumerate(made):
        last = max((i for i in range(index + 1) if made[i][1]), default=None)
        assert last is not None
        assert index - last < interval
        assert made[last][0] == guided or whole


def test_features_of_other_rows_are_not_used() -> None:
    whole, shallow = run(3, [2, 2, 1, 1, 1, 1])
    assert [index for index, _ in whole] == [0, 2, 5]
    assert shallow == [(1, 10.0), (3, 20.0), (4, 20.0)]


SHALLOW: dict[str, Any] = {
    "name": "part",
    "role": "shallow",
    "inputs": {
        "sample": {"dtype": "float32", "shape": ["batch", 4, "height", "width"]},
        "timestep": {"dtype": "float32", "shape": [1]},
        "deep": {"dtype": "float32", "shape": ["batch", 4, "height", "width"]},
    },
    "outputs": {"prediction": {"dtype": "float32", "shape": ["batch", 4, "height", "width"]}},
}


TIMES = SHALLOW["inputs"]["timestep"]


def without(name: str) -> dict[str, Any]:
    return {**SHALLOW, "inputs": {n: s for n, s in SHALLOW["inputs"].items() if n != name}}


CACHE = {"component": "part", "keeps": ["deep"], "every": "cache_interval"}
EVERY = {"kind": "numbers", "name": "cache_interval", "default": [1], "least": 1, "whole": True}


def with_parts(folder: Path, parts: list[Any], gives: bool, cache: dict[str, Any]) -> Path:
    """Write a bundle with these parts, whose loop has this cache."""
    bundle = make_bundle(folder)
    document = msgspec.json.decode((bundle / MANIFEST).read_bytes())
    denoiser = next(each for each in document["components"] if each["role"] == "denoiser")
    if gives:
        denoiser["outputs"]["deep"] = SHALLOW["inputs"]["deep"]
    document["components"] += parts
    for build in document["builds"]:
        for part in parts:
            build["artifacts"][part["name"]] = build["artifacts"]["denoiser"]
    (program,) = document["programs"]
    program["arguments"].append(EVERY)
    next(step for step in program["steps"] if step["do"] == "loop")["cache"] = cache
    (bundle / MANIFEST).write_bytes(msgspec.json.encode(document))
    return bundle


def test_a_shallow_part_that_fits(tmp_path: Path) -> None:
    Bundle.open(with_parts(tmp_path / "bundle", [SHALLOW], True, CACHE))


@pytest.mark.parametrize(
    ("parts", "gives", "message"),
    [
        ([], True, "no component 'part'"),
        (
            [{**SHALLOW, "inputs": SHALLOW["inputs"] | {"other": TIMES}}],
            True,
            "takes 'other', which the denoiser neither takes nor gives",
        ),
        ([SHALLOW], False, "takes 'deep', which the denoiser neither takes nor gives"),
        ([without("deep")], True, r"does not take all of \['deep'\]"),
        ([without("deep")], False, r"does not take all of \['deep'\]"),
        ([without("timestep")], True, "needs the inputs 'sample' and 'timestep'"),
        ([without("sample")], True, "needs the inputs 'sample' and 'timestep'"),
        ([{**SHALLOW, "outputs": {}}], True, "does not give 'prediction' as the denoiser does"),
        ([SHALLOW, {**SHALLOW, "name": "other"}], True, "no program uses 'other'"),
    ],
)
def test_a_shallow_part_that_does_not_fit(
    tmp_path: Path, parts: list[Any], gives: bool, message: str
) -> None:
    with pytest.raises(BundleError, match=message):
        Bundle.open(with_parts(tmp_path / "bundle", parts, gives, CACHE))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keeps": []}, "takes 'deep', which the denoiser neither takes nor gives"),
        ({"keeps": ["deep", "more"]}, r"does not take all of \['deep', 'more'\]"),
        ({"every": "nothing"}, "no argument 'nothing'"),
        ({"every": "prompt"}, "'prompt' is no number"),
    ],
)
def test_a_cache_that_cannot_be(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        Bundle.open(with_parts(tmp_path / "bundle", [SHALLOW], True, CACHE | change))
