"""No reader's work grows faster than its input: steps are counted, and every list of the manifest
is found in its structures."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from runtimes import plan_json
from runtimes.errors import BundleError
from runtimes.manifest import MANIFEST, File, Manifest, Schedule
from runtimes.manifest_rules import is_inside, problems
from runtimes.plan import PlanTable
from runtimes.plan_schema import DTYPES
from tests.fakes import make_bundle
from tests.steps import steps_of

COUNT = 400
Way = tuple[str | int, ...]

# One of everything that the structures allow, so that every list has an entry to grow from.
TENSOR = {"dtype": "float32", "shape": ["batch", 3, "height", "width"]}
TASK = {
    "name": "image-to-image",
    "pictures": {"image": "image", "mask": "mask"},
    "preparations": [
        {
            "component": "image_encoder",
            "feeds": {"image": {"picture": "image", "mask": "mask"}},
            "gives": {"latents": "start"},
            "branches": ["positive"],
            "others": {"more": "extra"},
        }
    ],
    "inputs": {"extra": {"picture": "image"}},
    "defaults": {"size": [1.0]},
    "strength": 0.5,
    "blend": "mask",
}


def document(tmp_path: Path) -> dict[str, Any]:
    """Return a manifest's document with at least one entry in every list."""
    bundle = make_bundle(tmp_path / "bundle")
    made: dict[str, Any] = json.loads((bundle / MANIFEST).read_bytes())
    made["tasks"].append(copy.deepcopy(TASK))
    encoder = {"name": "image_encoder", "role": "image_encoder"}
    encoder |= {"inputs": {"image": TENSOR}, "outputs": {"latents": TENSOR, "more": TENSOR}}
    made["components"].append(encoder)
    made["arguments"].append({"name": "size", "default": [1.0, "height"], "limits": [0, 1]})
    made["vectors"].append({"input": "v", "arguments": ["size"], "window": ["size", "size"]})
    names = {"encoder_hidden_states": {"input_ids": 2}}
    made["embeddings"] = [{"name": "prompt_embeds", "inputs": names, "frame": [1, 1]}]
    made["guidance"] |= {"least": {"guidance_scale": 1}, "rescale": "guidance_scale"}
    made["left_out"] = [{"name": "watermark", "why": "it needs another package", "chosen": False}]
    made["latents"]["bins"] = [[1.0, 16, 16]]
    for task in made["tasks"]:
        task["branch_arguments"] = {"negative_size": ["size"]}
    made["created_by"]["libraries"] = {"numpy": "2"}
    made["source"]["scheduler_config"] = {"beta": 1}
    made["source"] |= {"without": ["x"], "ingredients": [{"kind": "a", "id": "b", "sha256": "c"}]}
    probe = {"scheduler": "s", "num_inference_steps": 1, "seed": 0, "height": 8, "width": 8}
    probe["arguments"] = {"prompt": "a"}
    file = made["schedules"][0]["file"]
    judged = probe | {"judge": "j", "prompts": ["a"], "right": 1}
    made["probes"] = {"files": {"loop": file}, "loop": probe, "key": "k", "judged": judged}
    for tokenizer in made["tokenizers"]:
        tokenizer["expansions"] = {"<a>": "b c"}
    for build in made["builds"]:
        score = {"judge": "j", "right": 1, "pictures": 1, "least": 1, "passed": True}
        check = {"subject": "s", "probe": "p", "relative_l2": 0, "max_abs": 0, "tolerance": 1}
        check["passed"] = True
        record = {"backend": "b", "version": "1", "device": "cpu", "checks": [check], "loop": None}
        build["verification"] = record | {"score": score}
        for artifact in build["artifacts"].values():
            artifact["kept"] = ["w"]
    msgspec.convert(made, Manifest)  # all of it has the types that the structures say
    return made


def collections(value: Any, way: Way = ()) -> Iterator[Way]:
    """Yield where lists and maps of free names are in a document; of a list, its first entry is
    looked into."""
    if isinstance(value, list):
        yield way
        if value:
            yield from collections(value[-1], (*way, len(value) - 1))
    elif isinstance(value, dict):
        yield way
        for name, inner in value.items():
            yield from collections(inner, (*way, name))


def grown(made: dict[str, Any], way: Way, count: int, unique: bool) -> bytes | None:
    """Return the document with `count` entries more in one place, None where it has no entry, or
    is no map of free names."""
    made = copy.deepcopy(made)
    place: Any = made
    for name in way:
        place = place[name]
    if not place:
        return None
    if isinstance(place, list):
        place += [_renamed(place[-1], n) if unique else place[-1] for n in range(count)]
    else:
        key = next(reversed(place))
        place |= {f"{key}_{n}": _renamed(place[key], n) for n in range(count)}
    return json.dumps(made).encode()


def _renamed(value: Any, number: int) -> Any:
    """A copy with a name of its own."""
    if isinstance(value, str):
        return f"{value}_{number}"
    if isinstance(value, dict):
        own = {"name", "input", "path"}
        return {k: _renamed(v, number) if k in own else v for k, v in value.items()}
    return value


def steps_to_decode(data: bytes) -> int:
    """Return the steps of the reader, whether it takes the document or not."""

    def work() -> None:
        try:
            Manifest.decode(data)
        except BundleError:
            return

    return steps_of(work)


def steps_of_all_rules(data: bytes) -> int:
    """Return the steps of all rules, as if none of them ended the reading."""
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except msgspec.DecodeError:
        return 0

    def work() -> None:
        try:
            for _ in problems(manifest):
                pass
        except (KeyError, IndexError, ValueError, TypeError):
            return  # later rules count on earlier ones

    return steps_of(work)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return document(tmp_path_factory.mktemp("linear"))


@pytest.mark.fault("1.6", "work that grows with the square of a list in the manifest")
@pytest.mark.parametrize("unique", [True, False], ids=["unique", "equal"])
def test_every_list_of_the_manifest(whole: dict[str, Any], unique: bool) -> None:
    """Twice the entries take at most 2.2 times the steps."""
    seen = 0
    for way in collections(whole):
        once, twice = (grown(whole, way, n, unique) for n in (COUNT, 2 * COUNT))
        if once is None or twice is None:
            continue
        seen += 1
        for steps in (steps_to_decode, steps_of_all_rules):
            least, most = steps(once), steps(twice)
            assert most <= 2.2 * least + 20, (way, steps.__name__, least, most)
    assert seen > 60


# Lists that a rule may look through one for the other.
PAIRS: list[tuple[Way, Way]] = [
    (("arguments",), ("vectors",)),
    (("arguments",), ("tasks",)),
    (("components",), ("tasks",)),
    (("components",), ("tokenizers",)),
    (("tokenizers",), ("embeddings",)),
    (("schedules",), ("builds",)),
    (("guidance", "branches"), ("tasks", 1, "branch_arguments")),
    (("guidance", "branches"), ("arguments",)),
    (("tasks", 1, "pictures"), ("tasks", 1, "preparations")),
    (("tasks", 1, "inputs"), ("components", 1, "inputs")),
]


@pytest.mark.fault("1.6", "second look: work that grows with the product of two lists")
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_two_lists_of_the_manifest(whole: dict[str, Any], pair: tuple[Way, Way]) -> None:
    """Twice the entries in both take at most 2.2 times the steps."""

    def both(count: int) -> bytes:
        data = grown(whole, pair[0], count, unique=True)
        assert data is not None
        more = grown(json.loads(data), pair[1], count, unique=True)
        assert more is not None
        return more

    once, twice = both(100), both(200)
    for steps in (steps_to_decode, steps_of_all_rules):
        least, most = steps(once), steps(twice)
        assert most <= 2.2 * least + 20, (steps.__name__, least, most)


def lists_of(kind: Any, name: str, found: set[str], seen: set[Any]) -> None:
    """Add the fields of a structure that are lists or maps, and those of structures in it."""
    inner = msgspec.inspect.type_info(kind) if not isinstance(kind, msgspec.inspect.Type) else kind
    match inner:
        case msgspec.inspect.StructType():
            if inner.cls in seen:
                return
            seen.add(inner.cls)
            for field in inner.fields:
                lists_of(field.type, field.encode_name, found, seen)
        case msgspec.inspect.VarTupleType() | msgspec.inspect.ListType():
            found.add(name)
            lists_of(inner.item_type, name, found, seen)
        case msgspec.inspect.DictType():
            found.add(name)
            lists_of(inner.value_type, name, found, seen)
        case msgspec.inspect.UnionType():
            for each in inner.types:
                lists_of(each, name, found, seen)


def test_no_list_is_left_out(whole: dict[str, Any]) -> None:
    """Every list and map that the structures have is among those that are grown."""
    wanted: set[str] = set()
    lists_of(Manifest, "", wanted, set())
    tried = {
        next(part for part in reversed(way) if isinstance(part, str))
        for way in collections(whole)
        if way and grown(whole, way, 1, True)
    }
    assert wanted <= tried, wanted - tried


def plans(count: int) -> PlanTable:
    """Return a table with plans of 1, 2 … `count` steps, each of one evaluation."""
    ones = np.ones(count)
    return PlanTable(
        steps=np.arange(1, count + 1, dtype=np.int32),
        offsets=np.arange(count + 1, dtype=np.int32),
        timesteps=ones,
        input_scale=ones.copy(),
        noise_draws=np.zeros(count, np.uint8),
        rows=np.zeros((count, 1), np.int32),
        state=np.ones((1, 1, 1)),
        prediction=np.ones((1, 1)),
        clean=np.zeros((1, 1)),
        noise=np.zeros((1, 1)),
        clean_from=np.zeros((1, 2)),
        init_noise_scale=ones.copy(),
        add_noise=np.zeros((count, 2)),
        known=np.zeros((count, 2)),
        clip=np.zeros(3),
        shift=np.zeros(count),
    )


@pytest.mark.fault("1.6", "work that grows with the square of a table of plans")
def test_tables_of_plans() -> None:
    def steps(count: int) -> int:
        table = plans(count)
        schedule = Schedule("s", "S", File("s.json", 1, "0" * 64), (1,), "k")
        return steps_of(lambda: plan_json.document(schedule, table))

    steps(1)  # numpy does some of its work once
    assert steps(2 * COUNT) <= 2.2 * steps(COUNT)


@pytest.mark.fault("1.6", "work that grows with the square of a table of plans")
def test_a_small_table_of_large_plans() -> None:
    """One row stands for every evaluation, and a plan holds it as often."""
    table = plans(1)
    evaluations, slots = 1 << 15, 64
    arrays: dict[str, Any] = {name: getattr(table, name) for name in DTYPES}
    for name in ("timesteps", "input_scale", "noise_draws", "rows", "add_noise", "known"):
        arrays[name] = np.repeat(arrays[name], evaluations, axis=0)
    arrays["offsets"] = np.array([0, evaluations], np.int32)
    arrays["state"] = np.ones((1, slots, slots))
    arrays |= {name: np.zeros((1, slots)) for name in ("prediction", "clean", "noise")}
    with pytest.raises(BundleError, match="a plan of more than 4096 evaluations for 64 slots"):
        PlanTable(**arrays)


@pytest.mark.fault("1.6", "paths that Windows takes for others or for devices")
@pytest.mark.parametrize(
    "path",
    [
        *("..", "a/../b", "/a", "C:\\a", "C:a", "a\\b", "a\0b", "", ".", "a//b", "a/", "./a", "a."),
        *("a /b", "nul", "a/CON", "Aux.txt", "com1.json", "x/lpt9", "a/b."),
    ],
)
def test_paths_that_are_refused(path: str) -> None:
    assert not is_inside(path)


def test_paths_that_are_taken() -> None:
    for path in ("console/auxiliary.txt", "a/b.c", "com10/x", "model.onnx.data", "né/ü"):
        assert is_inside(path), path


@pytest.mark.fault("1.6", "sizes that are impossible")
@pytest.mark.parametrize("number", [0, -1, 1 << 21, 10**30, 1.5])
@pytest.mark.parametrize("field", ["channels", "factor", "default_height", "maximum"])
def test_impossible_sizes(whole: dict[str, Any], field: str, number: float) -> None:
    made = copy.deepcopy(whole)
    made["latents"][field] = number
    with pytest.raises(BundleError):
        Manifest.decode(json.dumps(made).encode())
