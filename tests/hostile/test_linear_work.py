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

from latentc.runtimes.bundle.manifest import MANIFEST, Manifest
from latentc.runtimes.bundle.rules import is_inside, problems
from latentc.runtimes.bundle.structures import File, Schedule
from latentc.runtimes.errors import BundleError
from latentc.runtimes.sampling import plan_json
from latentc.runtimes.sampling.plan import PlanTable
from latentc.runtimes.sampling.plan_schema import DTYPES, LEARNED
from tests.support.fakes import make_bundle
from tests.support.steps import steps_of

COUNT = 400
STATES = "encoder_hidden_states"
Way = tuple[str | int, ...]

# One of everything that the structures allow, so that every list has an entry to grow from.
LATENTS = {"dtype": "float32", "shape": ["batch", 4, "height", "width"]}
IMAGE = {"dtype": "float32", "shape": ["batch", 3, "2*height", "2*width"]}
SIDE = {"unit": 2, "default": 8, "multiple": 2, "least": 2, "most": 64}
SIDE |= {"of": {"image": "image", "times": 2}, "together": ["height", "width"]}
WINDOW = {"count": "floor", "start": "start", "stop": "stop"}
SHAPE = [4, "height", "width"]
PROGRAM: dict[str, Any] = {
    "name": "inpainting",
    "stands_for": "FakeInpaintPipeline",
    "symbols": {name: {**SIDE, "argument": name} for name in ("height", "width")},
    "arguments": [
        {"kind": "text", "name": "prompt"},
        {"kind": "text", "name": "negative_prompt", "default": ""},
        {"kind": "mask", "name": "mask_image"},
        {"kind": "image", "name": "image", "latents": "image_latents"},
        {"kind": "numbers", "name": "scale", "default": [3.0]},
        {"kind": "numbers", "name": "strength", "default": [0.5]},
        {"kind": "numbers", "name": "every", "default": [1], "least": 1, "whole": True},
        {"kind": "numbers", "name": "start", "default": [0.0]},
        {"kind": "numbers", "name": "stop", "default": [1.0]},
        {"kind": "numbers", "name": "num_inference_steps", "default": [4], "most": 1000},
        {"kind": "numbers", "name": "size", "count": 3, "default": ["height", "width", 0.0]},
    ],
    "steps": [
        {"do": "tokens", "gives": "_ids", "tokenizer": "tokenizer", "text": "prompt"},
        {"do": "run", "component": "text_encoder", "feeds": {"input_ids": "_ids"},
         "gives": {"encoder_hidden_states": "prompt_embeds"}, "group": "prompt"},
        {"do": "tokens", "gives": "_no_ids", "tokenizer": "tokenizer", "text": "negative_prompt"},
        {"do": "run", "component": "text_encoder", "feeds": {"input_ids": "_no_ids"},
         "gives": {"encoder_hidden_states": "negative_prompt_embeds"}, "group": "negative"},
        {"do": "numbers", "gives": "_size", "of": ["size"]},
        {"do": "pixels", "gives": "_pixels", "of": "image", "shape": [3, "2*height", "2*width"],
         "fill_where": "mask_image"},
        {"do": "pixels", "gives": "_mask", "of": "mask_image", "shape": [1, "height", "width"]},
        {"do": "noise", "gives": "_image_noise", "shape": SHAPE, "rows": ["image"]},
        {"do": "run", "component": "image_encoder",
         "feeds": {"image": "_pixels", "noise": "_image_noise"},
         "gives": {"latents": "image_latents"}},
        {"do": "noise", "gives": "latents", "shape": SHAPE},
        {"do": "zeros", "gives": "_zeros", "shape": [6, 2]},
        {"do": "join", "gives": "_joined", "of": ["prompt_embeds", "_zeros"], "axis": 1},
        {"do": "cut", "gives": ["_part"], "of": "_joined", "axis": 1, "sizes": [6]},
        {"do": "choose", "gives": "_chosen", "when": [{"given": ["negative_prompt"]}],
         "then": "negative_prompt_embeds", "otherwise": "_part"},
        {"do": "noise", "gives": "duet_latents", "shape": SHAPE},
        {"do": "noise", "gives": "strip_latents", "shape": [2, 12]},
        {"do": "loop", "denoiser": "duet", "plan": {}, "branches": [{"name": "both", "feeds": {}}],
         "state": {"name": "duet_image", "noise": "duet_latents"},
         "other_states": [{"name": "strip", "noise": "strip_latents", "input": "strip",
                           "prediction": "strip_prediction"}],
         "switches": [{"component": "late", "during": {"count": "timestep", "stop": 500}}]},
        {"do": "loop", "denoiser": "denoiser", "plan": {}, "part": {"strength": "strength"},
         "state": {"name": "denoised", "noise": "latents", "clean": "image_latents",
                   "clean_when": [{"argument": "strength", "below": 1}],
                   "keep": {"value": "image_latents", "where": "_mask", "noise": "latents"}},
         "feeds": {"time_ids": {"value": "_size", "during": WINDOW}},
         "branches": [
             {"name": "positive", "feeds": {"encoder_hidden_states": "prompt_embeds"}},
             {"name": "negative", "feeds": {"encoder_hidden_states": "_chosen"},
              "when": [{"argument": "scale", "above": 1}], "during": WINDOW,
              "push": [{"branch": "positive", "by": "scale", "less": 1, "during": WINDOW}]}],
         "combine": {"component": "limited", "feeds": {"own": "positive", "made": "guided"}},
         "cache": {"component": "shallow", "keeps": ["deep"], "every": "every"}},
        {"do": "run", "component": "decoder", "feeds": {"latents": "denoised"},
         "gives": {"image": "_image"}, "tiles": True},
        {"do": "emit", "kind": "images", "of": "_image"},
    ],
    "bins": {"argument": "binning", "sizes": [[1.0, 16, 16]]},
}  # fmt: skip


def place_of(do: str) -> int:
    """Return the place of the last statement of a kind."""
    return max(place for place, step in enumerate(PROGRAM["steps"]) if step["do"] == do)


def document(tmp_path: Path) -> dict[str, Any]:
    """Return the document of a good manifest with at least one entry in every list."""
    bundle = make_bundle(tmp_path / "bundle")
    made: dict[str, Any] = json.loads((bundle / MANIFEST).read_bytes())
    made["programs"].append(copy.deepcopy(PROGRAM))
    denoiser = next(each for each in made["components"] if each["name"] == "denoiser")
    denoiser["outputs"]["deep"] = LATENTS
    steps = {"sample": LATENTS, "timestep": {"dtype": "float32", "shape": [1]}, "deep": LATENTS}
    shallow = {"name": "shallow", "role": "shallow", "inputs": steps}
    encoder = {"name": "image_encoder", "role": "image_encoder", "outputs": {"latents": LATENTS}}
    strip = {"dtype": "float32", "shape": ["batch", 2, 12]}
    duet = {
        "role": "denoiser",
        "inputs": {**steps, "strip": strip},
        "outputs": {"prediction": LATENTS, "strip_prediction": strip},
    }
    del duet["inputs"]["deep"]
    limited = {"role": "decoder", "inputs": {"own": LATENTS, "made": LATENTS}}
    made["components"] += [
        {"name": "duet", **duet},
        {"name": "late", **duet},
        {"name": "limited", **limited, "outputs": {"prediction": LATENTS}},
        shallow | {"outputs": {"prediction": LATENTS}},
        encoder | {"inputs": {"image": IMAGE, "noise": LATENTS}},
    ]
    made["left_out"] = [{"name": "watermark", "why": "it needs another package", "chosen": False}]
    made["created_by"]["libraries"] = {"numpy": "2"}
    made["source"]["scheduler_config"] = {"beta": 1}
    made["schedules"][-1]["config"] = {"beta": 1}
    made["source"]["base_model"] = ["somebody/base"]
    made["source"] |= {"without": ["x"], "ingredients": [{"kind": "a", "id": "b", "sha256": "c"}]}
    made["optional"] = {"notes": {"by": ["somebody"]}}
    probe = {"scheduler": "s", "num_inference_steps": 1, "seed": 0, "height": 8, "width": 8}
    probe["arguments"] = {"prompt": "a"}
    file = made["schedules"][0]["file"]
    judged = probe | {"judge": "j", "prompts": ["a"], "right": 1}
    made["probes"] = {"files": {"loop": file}, "loop": probe, "key": "k", "judged": judged}
    call = {"prompts": 1, "images": 1, "seeds": [1], "given": 0, "tolerance": 1, "relative_l2": 0}
    record = {"program": PROGRAM["name"], "pipeline_class": "A", "calls": [call]}
    made["programs_checked"] = [record]
    for tokenizer in made["tokenizers"]:
        tokenizer["expansions"] = {"<a>": "b c"}
    for build in made["builds"]:
        score = {"judge": "j", "right": 1, "pictures": 1, "least": 1, "passed": True}
        check = {"subject": "s", "probe": "p", "relative_l2": 0, "max_abs": 0, "tolerance": 1}
        check["passed"] = True
        record = {"backend": "b", "version": "1", "device": "cpu", "checks": [check], "loop": None}
        build["verification"] = record | {"score": score}
        for name in ("shallow", "image_encoder", "duet", "late", "limited"):
            build["artifacts"][name] = dict(build["artifacts"]["denoiser"])
        for artifact in build["artifacts"].values():
            artifact["kept"] = ["w"]
    Manifest.decode(json.dumps(made).encode())
    made["needs"] = ["video"]  # only a later reader takes a document that needs something
    return made


def collections(value: Any, way: Way = ()) -> Iterator[Way]:
    """Yield where lists and maps of free names are in a document; of a list, the last entry of
    each kind is looked into."""
    if isinstance(value, list):
        yield way
        last = {_kind(entry): place for place, entry in enumerate(value)}
        for place in last.values():
            yield from collections(value[place], (*way, place))
    elif isinstance(value, dict):
        yield way
        for name, inner in value.items():
            yield from collections(inner, (*way, name))


def _kind(entry: Any) -> tuple[str, ...]:
    """Return what a statement does, and the members of an object that hold something."""
    if not isinstance(entry, dict):
        return ()
    members = (name for name, value in entry.items() if value not in ([], {}, None))
    return (entry.get("do") or entry.get("kind", ""), *members)


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
        own = {"name", "path", "gives", "argument", "program"}
        return {k: _renamed(v, number) if k in own else v for k, v in value.items()}
    return [_renamed(each, number) for each in value] if isinstance(value, list) else value


def steps_to_decode(data: bytes) -> int:
    """Return the steps of the reader, whether it takes the document or not."""
    document = json.loads(data)
    if document["needs"] == ["video"]:
        data = json.dumps({**document, "needs": []}).encode()

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
    assert seen > 150, seen


# Lists that a rule may look through one for the other.
STEPS: Way = ("programs", 1, "steps")
BRANCHES: Way = (*STEPS, place_of("loop"), "branches")
PAIRS: list[tuple[Way, Way]] = [
    (("programs",), ("components",)),
    (("programs", 1, "arguments"), STEPS),
    (("programs", 1, "symbols"), (*STEPS, place_of("noise"), "shape")),
    (("components",), STEPS),
    (("components",), ("tokenizers",)),
    (("tokenizers",), STEPS),
    (("schedules",), ("builds",)),
    (("builds",), ("components",)),
    (BRANCHES, (*STEPS, place_of("loop"), "feeds")),
    (BRANCHES, (*BRANCHES, 1, "push")),
    (BRANCHES, ("components", 1, "inputs")),
    ((*BRANCHES, 1, "when"), ("programs", 1, "arguments")),
    ((*STEPS, place_of("join"), "of"), (*STEPS, place_of("zeros"), "shape")),
    ((*STEPS, place_of("cut"), "gives"), (*STEPS, place_of("cut"), "sizes")),
    ((*STEPS, place_of("cut"), "gives"), ("components", 0, "outputs", STATES, "shape")),
    (("components", 0, "positions", STATES), ("components", 0, "inputs")),
    (("components", 0, "positions", STATES), ("components", 0, "outputs", STATES, "shape")),
    (("needs",), ("optional",)),
    (("programs",), ("programs_checked",)),
    (("programs_checked",), ("programs_checked", 0, "calls")),
    (("programs_checked", 0, "calls"), ("programs_checked", 0, "calls", 0, "seeds")),
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
    """Add the fields of a structure that are lists or maps, and those of structures in it; fields
    of statements and arguments are named after their kind."""
    inner = msgspec.inspect.type_info(kind) if not isinstance(kind, msgspec.inspect.Type) else kind
    match inner:
        case msgspec.inspect.StructType():
            if inner.cls in seen:
                return
            seen.add(inner.cls)
            prefix = f"{inner.tag} " if inner.tag else ""
            for field in inner.fields:
                lists_of(field.type, prefix + field.encode_name, found, seen)
        case msgspec.inspect.VarTupleType() | msgspec.inspect.ListType():
            found.add(name)
            lists_of(inner.item_type, name, found, seen)
        case msgspec.inspect.DictType():
            found.add(name)
            lists_of(inner.value_type, name, found, seen)
        case msgspec.inspect.UnionType():
            for each in inner.types:
                lists_of(each, name, found, seen)


def named(made: Any, way: Way) -> str:
    """Return the name of a list in a document as `lists_of` gives it."""
    place, name, value = made, "", made
    for key in way:
        place, value = value, value[key]
        if isinstance(key, str):
            tag = place.get("do") or ("arguments" in way and place.get("kind")) or ""
            name = f"{tag} {key}" if tag else key
    return name


def test_no_list_is_left_out(whole: dict[str, Any]) -> None:
    """Every list and map that the structures have is among those that are grown."""
    wanted: set[str] = set()
    lists_of(Manifest, "", wanted, set())
    tried = {named(whole, way) for way in collections(whole) if way and grown(whole, way, 1, True)}
    assert wanted <= tried, wanted - tried
    assert {"cut gives", "run gives", "numbers of", "join of", "numbers default"} <= wanted


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
        log_low=np.full(count, np.nan),
        log_high=np.full(count, np.nan),
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
    each = ("timesteps", "input_scale", "noise_draws", "rows", "add_noise", "known", *LEARNED)
    for name in each:
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


_SIDE: Way = ("programs", 1, "symbols", "height")


@pytest.mark.fault("1.6", "sizes that are impossible")
@pytest.mark.parametrize("number", [0, -1, 1 << 27, 10**30, 1.5])
@pytest.mark.parametrize(
    "way",
    [
        *((*_SIDE, member) for member in ("unit", "default", "multiple", "least", "most")),
        (*_SIDE, "of", "times"),
        *((*STEPS, place_of(do), "shape", 0) for do in ("noise", "pixels", "zeros")),
        (*STEPS, place_of("cut"), "sizes", 0),
        (*STEPS, place_of("join"), "axis"),
        ("programs", 1, "bins", "sizes", 0, 1),
        ("components", 1, "inputs", "sample", "shape", 1),
        ("tokenizers", 0, "max_length"),
        ("defaults", "num_inference_steps"),
    ],
    ids=str,
)
def test_impossible_sizes(whole: dict[str, Any], way: Way, number: float) -> None:
    made = copy.deepcopy(whole) | {"needs": []}
    Manifest.decode(json.dumps(made).encode())
    place: Any = made
    for key in way[:-1]:
        place = place[key]
    place[way[-1]] = number
    with pytest.raises(BundleError):
        Manifest.decode(json.dumps(made).encode())
