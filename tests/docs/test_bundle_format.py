"""docs/bundle-format.md says what the code does, and a reader written from it alone works."""

from __future__ import annotations

import ast
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from latentc.exporter.targets import TARGETS
from latentc.runtimes.bundle.files import Bundle
from latentc.runtimes.bundle.manifest import FORMAT_VERSION, Manifest, schema
from latentc.runtimes.bundle.precisions import PASSES, PRECISIONS
from latentc.runtimes.bundle.rules import DTYPES, is_dimension, is_inside
from latentc.runtimes.errors import BundleError
from latentc.runtimes.pipeline.loading import Loading
from latentc.runtimes.pipeline.pipeline import load, open_pipeline
from latentc.runtimes.programs.latents import Latents
from latentc.runtimes.sampling import noise
from latentc.runtimes.sampling.plan import PlanTable, join
from latentc.runtimes.sampling.plan_schema import DTYPES as ARRAYS
from latentc.runtimes.sampling.plan_schema import (
    LEARNED,
    MAX_SLOTS,
    MAX_STEPS,
    ClipKind,
    check_table,
)
from latentc.runtimes.sampling.sampler import Rescale, denoise
from latentc.runtimes.storage.files import LARGEST_DOCUMENT
from latentc.runtimes.verification.verify import relative_l2
from latentc.runtimes.version_1.fields import Branch, Guidance
from tests.conftest import KEPT, one_at_a_time
from tests.docs import independent_loader as reader
from tests.docs import independent_manifest, independent_program
from tests.docs.markdown import ROOT, section, table
from tests.support import fakes
from tests.support.combinations import kept
from tests.support.sample_images import mask, sample_image

DOCUMENT = ROOT / "docs" / "bundle-format.md"
TEXT = DOCUMENT.read_text("utf-8")
STRUCTURES = schema()["$defs"]


def plain(cell: str) -> str:
    """A table cell without links and code marks."""
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", cell).replace("`", "")


# The manifest


UNIONS = {"kind": "Argument", "do": "Statement"}
# Two structures have one name in the code; the document has a name for each.
NAMES = {
    "latentc.runtimes.bundle.structures.Loop": "LoopCheck",
    "latentc.runtimes.programs.statements.Loop": "Loop",
}


def name_of(reference: str) -> str:
    """A structure's name in the document."""
    return NAMES.get(reference.rpartition("/")[2], reference.rpartition("/")[2])


def type_name(node: dict[str, Any]) -> str:
    """A JSON Schema type as the document writes it."""
    if "$ref" in node:
        return name_of(node["$ref"])
    if "discriminator" in node:
        return UNIONS[node["discriminator"]["propertyName"]]
    if "anyOf" in node:
        return " or ".join(type_name(each) for each in node["anyOf"])
    if "enum" in node:
        return " or ".join(json.dumps(each) for each in node["enum"])
    parts = node.get("prefixItems", [])  # of a fixed number: all of one type
    inner = parts[0] if parts else node.get("items") or node.get("additionalProperties")
    if not inner:
        return str(node["type"])
    several = {"anyOf", "enum"} & inner.keys() and "discriminator" not in inner
    of = f"({type_name(inner)})" if several else type_name(inner)
    return f"{'array' if node['type'] == 'array' else 'map'} of {of}"


DOCUMENTED = independent_manifest.structures()


@pytest.mark.parametrize("name", sorted(STRUCTURES))
def test_every_field_is_documented_and_no_other(name: str) -> None:
    structure = STRUCTURES[name]
    expected = {
        field: (
            type_name(node),
            None if field in structure.get("required", []) else json.dumps(node["default"]),
        )
        for field, node in structure["properties"].items()
    }
    found = DOCUMENTED[name_of(name)]
    assert found == expected
    assert list(found) == list(expected), "the document keeps the order of the code"
    assert structure["additionalProperties"] is False, "unknown fields are refused"


def test_no_structure_is_made_up() -> None:
    assert sorted(DOCUMENTED) == sorted([*map(name_of, STRUCTURES), *UNIONS.values()])
    program = STRUCTURES["Program"]["properties"]
    for member, union in (("arguments", "Argument"), ("steps", "Statement")):
        parts = program[member]["items"]["anyOf"]
        assert DOCUMENTED[union] == {"|": (" or ".join(map(type_name, parts)), None)}


def test_version() -> None:
    assert f"# The bundle format, version {FORMAT_VERSION}\n" in TEXT
    assert f"`format_version` is {FORMAT_VERSION}." in TEXT


def test_element_types() -> None:
    (row,) = re.findall(r"^\| \*\*TensorSpec\*\* \| .* \| +\| (.*?);.*\|$", TEXT, re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", row)) == set(DTYPES)


DEVICES = {
    "con",
    "prn",
    "aux",
    "nul",
    *(f"{kind}{n}" for kind in ("com", "lpt") for n in range(10)),
}
PARTS = ["a", "b.c", "..", ".", "", "a:b", "c\\d", "...", "a.", "a ", "a.con", "coma", "com10"]
PATHS = st.text(alphabet="ab. /\\:\0", max_size=8) | st.lists(
    st.sampled_from([*PARTS, *sorted(DEVICES), "CON", "Aux.txt", "lpt3.a.b"]), max_size=4
).map("/".join)


@given(PATHS)
def test_the_rules_for_paths_are_those_of_the_code(path: str) -> None:
    parts = path.split("/")
    refused = any(part == "" or part[-1] in ". " for part in parts)
    refused |= any(part.partition(".")[0].lower() in DEVICES for part in parts)
    as_documented = not refused and not any(sign in path for sign in "\\:\0")
    assert is_inside(path) == as_documented


@given(
    st.from_regex(r"([0-9]{0,5}\*)?[a-zA-Z_]{0,3}([+-][0-9]{0,7})?", fullmatch=True)
    | st.text(alphabet="a_*18-+ \n", max_size=5)
    | st.integers(-1, 2**20 + 1)
    | st.integers(31, 34).map(lambda n: "a" * n)
)
def test_the_grammar_of_dimensions_is_that_of_the_code(dimension: int | str) -> None:
    if isinstance(dimension, int):
        as_documented = 1 <= dimension <= 2**20
    else:
        factor, star, rest = dimension.rpartition("*")
        symbol, sign, offset = re.fullmatch(r"([^+-]*)([+-]?)(.*)", rest, re.DOTALL).groups()
        as_documented = bool(re.fullmatch(r"[a-z][a-z_]{0,31}", symbol)) and (
            not star or bool(re.fullmatch(r"[1-9][0-9]{0,3}", factor))
        )
        as_documented &= not sign or bool(re.fullmatch(r"[1-9][0-9]{0,5}", offset))
    assert is_dimension(dimension) == as_documented


def change(document: dict[str, Any], where: str, value: Any) -> None:
    """Set a member by its path such as ``builds.0.name``; `...` removes it."""
    *parents, last = where.split(".")
    node: Any = document
    for key in parents:
        node = node[int(key) if isinstance(node, list) else key]
    if value is ...:
        del node[int(last) if isinstance(node, list) else last]
    else:
        node[int(last) if isinstance(node, list) else last] = value


LOOP = "programs.0.steps.7"
BROKEN: list[tuple[str, Any]] = [
    ("format_version", 3),
    ("format_version", "2"),
    ("needs", ["video"]),
    ("needs", "video"),
    ("optional", []),
    ("programs", ...),
    ("programs", []),
    ("programs", 5),
    ("surprise", 1),
    ("source.licence", "x" * 201),
    ("defaults.scheduler", "unknown"),
    ("tokenizers.0.max_length", 0),
    ("tokenizers.0.max_length", 5),
    ("tokenizers.0.before", [1, 1, 1, 1, 1, 1]),
    ("tokenizers.0.pad", 10),
    ("tokenizers.0.vocabulary", 0),
    ("tokenizers.0.vocabulary", 2**31 + 1),
    ("tokenizers.0.file.path", "../tokenizer.json"),
    ("tokenizers.0.file.size", -1),
    ("tokenizers.0.file.sha256", "A" * 64),
    ("components.0.role", "upscaler"),
    ("components.1.name", "text_encoder"),
    ("components.0.outputs.encoder_hidden_states.dtype", "float64"),
    ("components.0.outputs.encoder_hidden_states.shape", ["Batch"]),
    ("components.0.outputs", {}),
    ("components.0.positions", {"encoder_hidden_states": {"input_ids": 3}}),
    ("components.0.positions", {"encoder_hidden_states": {"input_ids": 2.0}}),
    ("components.0.positions", {"encoder_hidden_states": {"input_ids": 0}}),
    ("components.0.positions", {"encoder_hidden_states": {"input_ids_2": 2}}),
    ("components.1.inputs.timestep", ...),
    ("components.1.inputs.timestep.shape", [2]),
    ("components.1.inputs.timestep.dtype", "int64"),
    ("components.2.outputs", {"image": {"dtype": "float32", "shape": [1]}}),
    ("builds.0.artifacts.decoder", ...),
    ("builds.0.artifacts.decoder.entry", "elsewhere"),
    ("schedules.1.name", "plain"),
    ("programs.0.symbols.width", ...),
    ("programs.0.symbols.height.multiple", 0),
    ("programs.0.symbols.height.unit", 4.5),
    ("programs.0.symbols.height.default", 7),
    ("programs.0.symbols.height.most", 6),
    ("programs.0.symbols.height.of", {"image": "image"}),
    ("programs.0.symbols.height.together", ["depth"]),
    ("programs.0.bins", {"argument": "bins", "sizes": [[1.0, 16]]}),
    ("programs.0.bins", {"argument": "bins", "sizes": [[1.0, 16, 16.5]]}),
    ("programs.0.arguments.1.fallback", "unknown"),
    ("programs.0.arguments.1.optional", True),
    ("programs.0.arguments.1.kind", "sound"),
    ("programs.0.arguments.4.default", []),
    ("programs.0.arguments.4.default", [1.0, 2.0]),
    ("programs.0.arguments.7.most", None),
    ("programs.0.arguments.9.default", ["height", "depth"]),
    ("programs.0.arguments.12.fallback", "original_size"),
    ("programs.0.steps.0.do", "translate"),
    ("programs.0.steps.0.text", "guidance_scale"),
    ("programs.0.steps.0.tokenizer", "nobody"),
    ("programs.0.steps.0.gives", "prompt"),
    ("programs.0.steps.0.gives", "Ids"),
    ("programs.0.steps.1.component", "nobody"),
    ("programs.0.steps.1.feeds", {"input_ids": "denoised"}),
    ("programs.0.steps.1.feeds", {}),
    ("programs.0.steps.4.of", []),
    ("programs.0.steps.6.shape", [4, "height", "depth"]),
    ("programs.0.steps.6.shape", [4, "height-9", "width"]),
    ("programs.0.steps.6.rows", ["prompt"]),
    (f"{LOOP}.state.noise", "prompt_embeds"),
    (f"{LOOP}.state.input", "timestep"),
    (f"{LOOP}.state.prediction", "nothing"),
    (f"{LOOP}.state.clean_when", [{"given": ["prompt"]}]),
    (f"{LOOP}.branches.0.push", []),
    (f"{LOOP}.branches.0.push.0.branch", "negative"),
    (f"{LOOP}.branches.0.push.0.by", "original_size"),
    (f"{LOOP}.branches.0.name", "positive"),
    (f"{LOOP}.branches.0.feeds.time_ids", "_unknown"),
    (f"{LOOP}.branches.0.during", {"count": "floor", "start": 0.5, "stop": 0.5}),
    (f"{LOOP}.branches.0.during", {"count": "ceiling"}),
    (f"{LOOP}.branches.0.when", [{"argument": "guidance_scale"}]),
    (f"{LOOP}.branches.0.when", [{"given": ["_time_ids"]}]),
    (f"{LOOP}.branches.1.when", [{"given": ["prompt"]}]),
    (f"{LOOP}.feeds", {"time_ids": "_time_ids"}),
    (f"{LOOP}.part.strength", "guidance_scale"),
    (f"{LOOP}.rescale", "prompt"),
    ("programs.0.steps.9.of", "denoised"),
    ("programs.0.steps.9", ...),
    ("programs_checked", None),
    ("programs_checked.0.program", "nobody"),
    ("programs_checked.0.pipeline_class", ...),
    ("programs_checked.0.calls", []),
    ("programs_checked.0.calls.0.prompts", 0),
    ("programs_checked.0.calls.0.images", 65),
    ("programs_checked.0.calls.0.images", 1.5),
    ("programs_checked.0.calls.0.seeds", [1, 2]),
    ("programs_checked.0.calls.0.seeds", [2**53 + 1]),
    ("programs_checked.0.calls.0.given", -1),
    ("programs_checked.0.calls.0.tolerance", -1),
    ("programs_checked.0.calls.0.relative_l2", None),
    ("programs_checked.0.calls.0.relative_l2", -1),
    ("programs_checked.0.calls.0.refused", "no"),
    ("programs_checked.0.calls.1.refused", "x" * 301),
    ("programs_checked.0.calls.1.miniature", 1),
]


@pytest.mark.parametrize(("where", "value"), BROKEN, ids=[f"{w}={v!r}" for w, v in BROKEN])
def test_a_broken_rule_is_refused(where: str, value: Any, tmp_path: Path) -> None:
    bundle = fakes.make_bundle(tmp_path / "bundle")
    document = json.loads((bundle / "manifest.json").read_bytes())
    Manifest.decode(json.dumps(document).encode())
    independent_manifest.read_manifest(bundle)
    change(document, where, value)
    with pytest.raises(BundleError):
        Manifest.decode(json.dumps(document).encode())
    (bundle / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(reader.Refused):
        independent_manifest.read_manifest(bundle)


@pytest.mark.parametrize("text", [True, False])
def test_the_schema_accepts_a_manifest(text: bool, tmp_path: Path) -> None:
    bundle = fakes.make_bundle(tmp_path / "bundle", text=text)
    document = json.loads((bundle / "manifest.json").read_bytes())
    jsonschema.validate(document, schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**document, "surprise": 1}, schema())


def test_names_that_nobody_has_seen_are_accepted(tmp_path: Path) -> None:
    bundle = fakes.make_bundle(tmp_path / "bundle")
    document = json.loads((bundle / "manifest.json").read_bytes())
    change(document, "programs.0.name", "text-to-hologram")
    change(document, "programs_checked.0.program", "text-to-hologram")
    change(document, "builds.0.target", "engine-of-2040")
    change(document, "builds.0.precision", "fp3")
    assert Manifest.decode(json.dumps(document).encode()).builds[0].target == "engine-of-2040"


# Targets and limits


def test_targets() -> None:
    rows = {plain(row["Target"]): row for row in table(section(DOCUMENT, "6 Targets"), "Target")}
    assert set(rows) == set(TARGETS)
    for name, row in rows.items():
        source = (ROOT / f"{TARGETS[name].module.replace('.', '/')}.py").read_text("utf-8")
        assert f'MODEL = "{plain(row["Entry"])}"' in source


def test_entries_and_side_files(sd_bundle: Path) -> None:
    rows = {plain(row["Target"]): row for row in table(section(DOCUMENT, "6 Targets"), "Target")}
    for build in Manifest.load(sd_bundle).builds:
        row = rows[build.target]
        others = set(re.findall(r"`([^`]+)`", row["Other files"]))
        for artifact in build.artifacts.values():
            names = {Path(file.path).name for file in artifact.files}
            assert Path(artifact.entry).name == plain(row["Entry"])
            assert names == {plain(row["Entry"]), *others}


def test_limits_of_verification() -> None:
    rows = table(section(DOCUMENT, "12 Probes and verification"), "Precision")
    found = {
        plain(row["Precision"]): tuple(
            float(row[name].rstrip("%"))
            for name in ("Component", "Latents", "Image, of 255", "PSNR, dB", "Judge")
        )
        for row in rows
    }
    tolerances = {name: each.tolerance for name, each in PRECISIONS.items()}
    tolerances |= {f"+{name}": each.tolerance for name, each in PASSES.items() if each.tolerance}
    assert found == {
        name: (t.component, t.latents, t.image_difference, t.image_psnr, 100 * t.judged)
        for name, t in tolerances.items()
    }


def test_bounds_of_symbols() -> None:
    source = (ROOT / "exporter" / "capture" / "graphs.py").read_text("utf-8")
    batch, side = (
        re.search(rf"^{name} = (\d+)$", source, re.MULTILINE)[1]  # type: ignore[index]
        for name in ("MAX_BATCH", "MAX_LATENT")
    )
    text = " ".join(TEXT.split())
    assert f"up to {batch} for `batch` and {side} for `height` and `width`" in text


# Sampling plans

MEMBER_ROWS = table(section(DOCUMENT, "9.2 The file"), "Member")


def test_members_of_a_table_of_plans() -> None:
    documented = {plain(row["Member"]): plain(row["Elements"]) for row in MEMBER_ROWS}
    assert list(documented) == list(ARRAYS)
    assert documented == {name: elements for name, (elements, _) in reader.MEMBERS.items()}
    kinds = {name: "number" if "f" in dtype else "integer" for name, dtype in ARRAYS.items()}
    assert {name: kind.removesuffix(" or null") for name, kind in documented.items()} == kinds
    meaning = {plain(row["Member"]): row["Meaning"] for row in MEMBER_ROWS}
    assert f"within 1 and {MAX_STEPS}" in meaning["steps"]
    assert f"K at most {MAX_SLOTS}" in meaning["state"]
    assert f"at most {LARGEST_DOCUMENT >> 20} MiB" in " ".join(
        section(DOCUMENT, "9.2 The file").split()
    )


def test_shapes_of_a_plan() -> None:
    sizes = {"P": 2, "E": 5, "R": 3, "K": 4, "W": 1, "2": 2, "3": 3}
    arrays = {}
    for row in MEMBER_ROWS:
        shape = [
            sum(sizes.get(term, 1) for term in dimension.split("+"))
            for dimension in plain(row["Shape"]).strip("[]").split(", ")
        ]
        name = plain(row["Member"])
        arrays[name] = np.zeros(shape, ARRAYS[name])
    arrays["steps"][:] = [2, 3]
    arrays["offsets"][:] = [0, 2, 5]
    arrays["noise_draws"][:] = 1
    check_table(arrays)
    for name, array in arrays.items():
        with pytest.raises(BundleError):
            check_table({**arrays, name: np.concatenate([array, array[:1]])})
        with pytest.raises(BundleError):
            check_table({**arrays, name: array[np.newaxis]})


def test_null_stands_where_the_document_says(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    fakes.plan_table(noisy=True).save(path)
    good = json.loads(path.read_bytes())
    good |= dict.fromkeys(LEARNED, [None] * len(good["timesteps"]))
    for row in MEMBER_ROWS:
        name = plain(row["Member"])
        nulls = np.full(np.shape(good[name]), None).tolist()
        path.write_text(json.dumps({**good, name: nulls}))
        if "null" in row["Elements"]:
            assert np.isnan(getattr(PlanTable.load(path), name)).all()
            assert np.isnan(reader.table_of(path.read_bytes())[name]).all()
        else:
            with pytest.raises(BundleError, match=name):
                PlanTable.load(path)
            with pytest.raises(reader.Refused, match=name):
                reader.table_of(path.read_bytes())


def test_kinds_of_clipping() -> None:
    rows = table(section(DOCUMENT, "9.4 Clipping"), "Kind")
    found = {plain(row["Name"]): int(row["Kind"]) for row in rows}
    assert found == {kind.name: int(kind) for kind in ClipKind}


def random_table(rng: np.random.Generator, kind: ClipKind, window: int) -> PlanTable:
    """A table that uses everything that the format allows."""
    plans, slots, rows = [2, 5], 3, 9
    total = sum(plans)
    draws = rng.integers(0, 2, total).astype(np.uint8)
    add_noise = rng.normal(size=(total, 2))
    add_noise[rng.random(total) < 0.5] = np.nan
    known = rng.normal(size=(total, 2))
    known[rng.random(total) < 0.5] = np.nan
    low = np.where((draws == 1) & (rng.random(total) < 0.6), rng.uniform(-3, 0, total), np.nan)
    clean = rng.normal(size=(rows, slots)) * (rng.random((rows, slots)) < 0.4)
    on_noise = rng.normal(size=(rows, slots)) * (rng.random((rows, slots)) < 0.5)
    on_noise[rows // 2 :] = 0
    # The second half of the rows uses no noise: only those may serve where none is drawn.
    index = rng.integers(rows // 2, rows, (total, window + 1))
    index[draws == 1] = rng.integers(0, rows, (int(draws.sum()), window + 1))
    return PlanTable(
        steps=np.array(plans, np.int32),
        offsets=np.array([0, 2, total], np.int32),
        timesteps=rng.uniform(0, 1000, total),
        input_scale=rng.uniform(0.5, 1.5, total),
        noise_draws=draws,
        rows=index.astype(np.int32),
        state=rng.normal(size=(rows, slots, slots)) * (rng.random((rows, slots, slots)) < 0.6),
        prediction=rng.normal(size=(rows, slots)) * (rng.random((rows, slots)) < 0.7),
        clean=clean if kind else np.zeros((rows, slots)),
        noise=on_noise,
        clean_from=rng.normal(size=(rows, 2)),
        init_noise_scale=rng.uniform(0.5, 15, len(plans)),
        add_noise=add_noise,
        known=known,
        log_low=low,
        log_high=low + rng.uniform(0, 2, total),
        clip=np.array([kind, 1.5, 0.9]),
        shift=np.zeros(len(plans)),
    )


@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.parametrize("kind", list(ClipKind))
@pytest.mark.parametrize("seed", range(4))
def test_the_recurrence(kind: ClipKind, window: int, seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng([seed, kind, window])
    made = random_table(rng, kind, window)
    made.save(tmp_path / "table.json")
    arrays = reader.table_of((tmp_path / "table.json").read_bytes())
    shape = (2, 3, 4, 5)

    def predict(sample: Any, timestep: Any, index: int = 0) -> Any:
        return np.sin(sample) + np.float32(1e-3) * timestep

    clean_sample = rng.normal(size=shape).astype(np.float32)
    for steps in made.step_counts:
        for start in made.starts(steps):
            plan = made.plan(steps, start)
            for clean in (None, clean_sample):
                if (clean is None and start) or (clean is not None and plan.add_noise is None):
                    continue
                drawn = [rng.normal(size=shape).astype(np.float32) for _ in range(8)]
                ours, theirs = iter(drawn), iter(drawn)
                first = plan.initial_sample(next(ours), clean)
                said = rng.normal(size=shape).astype(np.float32)
                loop = denoise(
                    *(plan, first, predict, lambda it=ours: next(it)),
                    variance=lambda said=said: said,
                )
                expected = [step.latents for step in loop][-1]
                own = reader.plan_of(arrays, steps, start)
                sample = reader.first_sample(own, next(theirs), clean)
                found = reader.run_plan(
                    *(own, sample, predict, lambda it=theirs: next(it)),
                    variance=lambda said=said: said,
                )
                assert relative_l2(found, expected) < 1e-5
                assert len(list(ours)) == len(list(theirs)), "as many draws"


@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.parametrize("seed", range(2))
def test_plans_that_depend_on_the_size(window: int, seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng([seed, window])
    base = random_table(rng, ClipKind.RANGE, window)
    sheets = [
        replace(
            base,
            state=base.state * (1 + 0.1 * shift**2),
            timesteps=base.timesteps * (1 + 0.2 * shift),
            add_noise=base.add_noise * (1 - shift),
            known=base.known * (1 + 0.3 * shift),
            shift=np.full(len(base.steps), shift),
        )
        for shift in (0.25, 0.5, 1.5)
    ]
    made = join(sheets)
    made.save(tmp_path / "table.json")
    arrays = reader.table_of((tmp_path / "table.json").read_bytes())
    shape = (2, 3, 4, 5)

    def predict(sample: Any, timestep: Any, index: int = 0) -> Any:
        return np.sin(sample) + np.float32(1e-3) * timestep

    for shift in (0.25, 0.8, 1.5):
        for steps in made.step_counts:
            plan = made.plan(steps, 0, shift)
            index = base.step_counts.index(steps)
            alone = base.timesteps[base.offsets[index] : base.offsets[index + 1]]
            assert np.allclose(plan.timesteps, alone * (1 + 0.2 * shift))
            drawn = [rng.normal(size=shape).astype(np.float32) for _ in range(8)]
            ours, theirs = iter(drawn), iter(drawn)
            first = plan.initial_sample(next(ours))
            said = rng.normal(size=shape).astype(np.float32)
            variance = {"variance": lambda said=said: said}
            loop = denoise(plan, first, predict, lambda it=ours: next(it), **variance)
            expected = [step.latents for step in loop][-1]
            own = reader.plan_of(arrays, steps, 0, shift)
            sample = reader.first_sample(own, next(theirs))
            draws = partial(next, theirs)
            found = reader.run_plan(own, sample, predict, draws, **variance)
            assert relative_l2(found, expected) < 1e-5
    with pytest.raises(reader.Refused):
        reader.plan_of(arrays, 2, 0, 1.6)


# Noise


@pytest.mark.parametrize("seed", [0, 42, -3, 2**32 + 42, 2**64 - 1])
def test_noise(seed: int) -> None:
    ours, theirs = noise.Generator(seed), reader.Generator(seed)
    for size in (3, 16, 17, 1, 31, 2, 1000, 15, 7):
        expected, found = ours.randn(size), theirs.draw((size,))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_noise_vectors() -> None:
    rows = table(section(DOCUMENT, "10 Noise"), "Seed")
    assert rows
    for row in rows:
        sizes = [int(size) for size in re.findall(r"\d+", row["Draw"])]
        for make in (noise.Generator, reader.Generator):
            generator = make(int(row["Seed"]))
            draw = generator.randn if make is noise.Generator else generator.draw
            values = np.concatenate([draw((size,)) for size in sizes])
            first, last = (_numbers(row[name]) for name in ("First values", "Last values"))
            np.testing.assert_allclose(values[: len(first)], first, atol=2e-7)
            if "…" not in row["Last values"]:
                np.testing.assert_allclose(values[-len(last) :], last, atol=2e-7)
            else:
                np.testing.assert_allclose(values[[2, 3, 4, -1]], last, atol=2e-7)


def test_words() -> None:
    generator = reader.Generator(5489)
    words = [int(word) for word in generator.words(2)]
    assert "first two words are {} and {}.".format(*words) in " ".join(TEXT.split())


def _numbers(cell: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+\.\d+", cell.replace("−", "-"))]


# The independent reader


@pytest.mark.parametrize("module", [reader, independent_manifest, independent_program])
def test_the_reader_is_independent(module: ModuleType) -> None:
    tree = ast.parse(Path(str(module.__file__)).read_text("utf-8"))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            name = node.module or ""
            imported.add(name if name.startswith("tests.") else name.partition(".")[0])
    own = {"tests.docs.independent_manifest", "tests.docs.independent_program"}
    allowed = "__future__ collections functools hashlib html io json math numpy onnx onnxruntime os"
    assert imported <= {
        *allowed.split(),
        "pathlib",
        "re",
        "stat",
        "tokenizers",
        "typing",
        "zipfile",
        *own,
    }


def compare(bundle: Path, calls: list[dict[str, Any]], schedulers: list[str] | None = None) -> None:
    """Run the calls with latentc and with the reader."""
    other = reader.Bundle(bundle)
    with load(bundle, backend="onnxruntime") as pipe:
        for scheduler in schedulers or pipe.schedulers:
            for call in calls:
                settings = {"scheduler": scheduler, "num_inference_steps": 4, **call}
                latents, images = other(**settings)
                result = pipe(**settings)
                assert relative_l2(latents, result.latents) < 1e-5
                for image, expected in zip(images, result.images, strict=True):
                    difference = image.squeeze().astype(int) - np.asarray(expected).astype(int)
                    assert np.abs(difference).max() <= 1


def test_reader_and_runtime_make_the_same_images(sd_bundle: Path) -> None:
    compare(sd_bundle, [{"prompt": ["a red circle", "blue"], "seed": 5}])
    calls: list[dict[str, Any]] = [
        {"prompt": ["a red circle"], "seed": 5, "height": 20, "width": 28},
        {"prompt": ["a red circle", "blue"], "seed": [1, 2**40 + 3]},
        {"prompt": ["a", "b"], "negative_prompt": ["c", ""], "seed": 1, "guidance_scale": 3.5},
        {"prompt": ["a", "b"], "seed": 1, "guidance_scale": 5.0, "guidance_rescale": 0.7},
        {"prompt": ["very " * 100], "seed": -1, "guidance_scale": 1.0},
    ]
    with pytest.warns(UserWarning, match="truncated"):
        compare(sd_bundle, calls, ["ddim", "euler_a"])


def test_reader_and_runtime_agree_on_vectors_and_two_texts(sdxl_bundle: Path) -> None:
    calls: list[dict[str, Any]] = [
        {"prompt": ["a red"], "seed": 1},
        {"prompt": ["a"], "prompt_2": ["blue"], "negative_prompt": ["ugly"], "seed": 1},
        {
            "prompt": ["a"],
            "prompt_2": [""],
            "negative_prompt": [""],
            "negative_prompt_2": ["x"],
            "seed": 1,
        },
        {
            "prompt": ["a"],
            "seed": 2,
            "height": 48,
            "width": 32,
            "original_size": [64.0, 32.0],
            "crops_coords_top_left": [5.0, 6.0],
        },
        {
            "prompt": ["a"],
            "seed": 2,
            "crops_coords_top_left": [5.0, 6.0],
            "negative_original_size": [24.0, 16.0],
            "negative_target_size": [40.0, 8.0],
        },
    ]
    compare(sdxl_bundle, calls, ["euler"])


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_reader_and_runtime_agree_on_long_and_encoded_texts(
    name: str, exported: Callable[[str], Path]
) -> None:
    other, settings = reader.Bundle(exported(name)), {"num_inference_steps": 2, "seed": 3}
    texts = {"prompt": ["a red circle " * 30, "blue"], "negative_prompt": ["fog", "a " * 100]}
    with load(exported(name), backend="onnxruntime") as pipe:
        expected = pipe(**texts, max_embeddings_multiples=3, **settings).latents
        encoded = pipe.encode_prompt(**texts, max_embeddings_multiples=3)
        assert relative_l2(other(**texts, pieces=3, **settings)[0], expected) < 1e-5
        assert relative_l2(other(**encoded, **settings)[0], expected) < 1e-5
        own = {n: v for n, v in encoded.items() if not n.startswith("negative")}
        negative = {"negative_prompt": ["a " * 200] * 2}
        expected = pipe(**own, **negative, max_embeddings_multiples=3, **settings).latents
        assert relative_l2(other(**own, **negative, pieces=3, **settings)[0], expected) < 1e-5


def test_reader_and_runtime_agree_without_text(unconditional_bundle: Path) -> None:
    compare(unconditional_bundle, [{"seed": 3}, {"seed": [3, 4], "batch_size": 2}])


@pytest.fixture(scope="session")
def with_images(
    pipeline_folder: Callable[[str], Path],
    bundles: Callable[[str], Path],
    controlled: Callable[[str], Path],
) -> Callable[[str], Path]:
    """A function: name of a tiny pipeline → its bundle for calls with images."""
    from latentc.exporter.compiler.export import export

    @cache
    def make(name: str) -> Path:
        if name == "controlnet":
            return controlled("sd")
        folder, parts = KEPT / "bundles" / f"{name}-read", dict[str, Any]()
        if name == "sd":
            parts = {"tasks": ("image-to-image", "inpainting"), "passes": ("step-cache",)}
        with one_at_a_time(f"bundle-{name}-read"):
            export(
                pipeline_folder(name), folder, targets=("onnx",), schedulers=("ddim", "euler_a"),
                steps=(4, 10), overwrite=True, share_with=bundles(name), **parts,
            )  # fmt: skip
        return folder

    return make


def as_arrays(value: Any) -> Any:
    """Images as the document has them: float32 [n, channels, rows, columns]."""
    if isinstance(value, list) and isinstance(value[0], Image.Image):
        return np.concatenate([as_arrays(each) for each in value])
    if not isinstance(value, Image.Image):
        return value
    array = np.atleast_3d(np.asarray(value, np.float32) / 255).transpose(2, 0, 1)[np.newaxis]
    return array if array.shape[1] == 3 else (array >= 0.5).astype(np.float32)


IMAGE, OTHER, MASK = sample_image(48, 32), sample_image(48, 32, seed=3), mask(48, 32)
PART = {"image": IMAGE, "mask_image": MASK, "height": 32, "width": 48, "num_inference_steps": 10}
CALLS_WITH_IMAGES: dict[str, list[dict[str, Any]]] = {
    "sd": [
        {"cache_interval": 3, "guidance_start": 0.3, "num_inference_steps": 10},
        {"image": IMAGE, "strength": 0.5, "num_inference_steps": 10, "denoising_end": 0.8},
        {"image": [IMAGE, OTHER], "prompt": ["a", "b"], "num_images_per_prompt": 2},
        {"image": [IMAGE, OTHER], "prompt": ["a", "b"], "seed": [3, 4]},
        {**PART, "strength": 0.6},
        {**PART, "denoising_end": 0.5},
    ],
    "pix2pix": [
        {"image": IMAGE},
        {"image": IMAGE, "image_guidance_scale": 0.5},
        {"image": IMAGE, "image_guidance_scale": 2.5, "guidance_stop": 0.5},
    ],
    "upscaler": [{"image": sample_image(16, 12), "noise_level": 5}],
    "controlnet": [
        {"control_image": IMAGE, "controlnet_conditioning_scale": 0.7},
        {"control_image": IMAGE, "control_guidance_start": 0.2, "control_guidance_end": 0.7},
    ],
}


@pytest.mark.parametrize("name", kept(CALLS_WITH_IMAGES, "sd", "upscaler", "controlnet"))
def test_reader_and_runtime_agree_on_images(name: str, with_images: Callable[[str], Path]) -> None:
    other = reader.Bundle(with_images(name))
    with load(other.root, backend="onnxruntime") as pipe:
        for scheduler in ("ddim", "euler_a"):
            for call in CALLS_WITH_IMAGES[name]:
                settings = {"prompt": ["red"], "scheduler": scheduler, "num_inference_steps": 4}
                settings |= {"seed": 1, **call}
                result = pipe(**settings)
                latents, images = other(**{n: as_arrays(value) for n, value in settings.items()})
                assert relative_l2(latents, result.latents) < 1e-5
                for image, expected in zip(images, result.images, strict=True):
                    difference = image.squeeze().astype(int) - np.asarray(expected).astype(int)
                    assert np.abs(difference).max() <= 1


def test_reader_and_runtime_go_on_from_another_run(with_images: Callable[[str], Path]) -> None:
    """A run that ends early, and one that begins with its latents."""
    other, call = reader.Bundle(with_images("sd")), {"prompt": ["red"], "num_inference_steps": 10}
    with load(other.root, backend="onnxruntime") as pipe:
        first = pipe(**call, seed=1, denoising_end=0.6, output_type="latent").latents
        settings = {**call, "image": first, "denoising_start": 0.6, "scheduler": "euler_a"}
        expected = pipe(**settings, seed=2).latents
    assert relative_l2(other(**settings, seed=2)[0], expected) < 1e-5


@pytest.mark.parametrize("name", ["sd", "sdxl", "unconditional"])
def test_reader_repeats_the_probes(name: str, exported: Callable[[str], Path]) -> None:
    """The probes come from diffusers itself: the document alone makes its images."""
    other = reader.Bundle(exported(name))
    probes, limits = other.manifest["probes"], PRECISIONS["fp32"].tolerance
    for component, file in probes["files"].items():
        if component == "loop":
            continue
        arrays = reader.read_npz(reader.checked(other.root, file))
        for probe in {key.partition("/")[0] for key in arrays}:
            inputs = {
                key.removeprefix(f"{probe}/in/"): value
                for key, value in arrays.items()
                if key.startswith(f"{probe}/in/")
            }
            for output, value in other.graphs[component](inputs).items():
                assert relative_l2(value, arrays[f"{probe}/out/{output}"]) < limits.component
    loop = dict(probes["loop"])
    arguments = {
        key: [value] if isinstance(value, str) else value
        for key, value in loop.pop("arguments").items()
    }
    latents, images = other(**arguments, **loop)
    expected = reader.read_npz(reader.checked(other.root, probes["files"]["loop"]))
    assert relative_l2(latents, expected["latents"]) < limits.latents
    difference = images.astype(int) - expected["image"].astype(int)
    assert np.abs(difference).max() <= limits.image_difference


def test_rescaled_guidance() -> None:
    """The rescaling does as section 8 says, on images of different deviations."""
    parts = np.random.default_rng(0).standard_normal((2, 3, 4, 5, 6)).astype(np.float32)
    parts[0] *= np.array([1, 2, 3], np.float32)[:, None, None, None]
    made = -3.0 * parts[0] + 4.0 * parts[1]
    found = made.copy()
    Rescale(0.7, 1)(parts, found.reshape(-1), 3)
    assert relative_l2(found, reader.rescaled(made, parts[1], 0.7)) < 1e-6
    assert relative_l2(found, made) > 0.1


@pytest.mark.parametrize("missing", ["empty", "zeros"])
@pytest.mark.parametrize(
    "call",
    [
        {"prompt": ["a red circle", "blue"], "seed": 1},
        {"prompt": ["a", "b"], "prompt_2": ["", ""], "negative_prompt": ["", ""], "seed": 1},
        {"prompt_2": ["red", ""], "prompt": ["a", "b"], "seed": [5, 6], "crop": [7.0]},
        {"prompt": ["a"], "negative_crop": [9.0], "crop": [2.0], "seed": 1, "height": 8},
        {"prompt": ["a"], "guidance_scale": 1.0, "negative_prompt": ["b"], "seed": 1},
        {"prompt": ["a red circle", "b"], "seed": 1, "rescale": 0.4},
        {"prompt": ["a red circle"], "seed": 1, "rescale": 1.0, "guidance_scale": 1.0},
    ],
)
def test_texts_and_numbers(call: dict[str, Any], missing: Any, tmp_path: Path) -> None:
    """The rules of sections 7 and 8 on graphs that are small enough to need no engine."""
    negative, positive = (
        Branch("negative", "negative_", missing, 1.0, {"guidance_scale": -1.0}),
        Branch("positive", "", "empty", 0.0, {"guidance_scale": 1.0}),
    )
    defaults = {"guidance_scale": 3.0, "rescale": 0.0}
    guidance = Guidance((negative, positive), "positive", "guidance_scale", defaults, "rescale")
    bundle = fakes.make_bundle(tmp_path / "bundle", guidance=guidance)

    def engine(path: Path, component: dict[str, Any]) -> reader.Graph:
        return fakes.GRAPHS[json.loads(path.read_text())["graph"]]  # type: ignore[return-value]

    other = reader.Bundle(bundle, "fake", engine)
    opened = Bundle.open(bundle)
    loading = Loading.of(opened, opened.manifest.builds[0], fakes.FakeBackend())
    with open_pipeline(loading) as pipe:
        for scheduler in pipe.schedulers:
            result = pipe(**call, scheduler=scheduler, output_type="latent")
            latents, _ = other(**call, scheduler=scheduler)
            assert relative_l2(latents, result.latents) < 1e-5


@pytest.mark.fault("3.8", "sizes that images are made in, by the other reader")
@pytest.mark.parametrize(
    "call",
    [
        {"height": 20, "width": 30},
        {"height": 7},
        {},
        {"height": 20, "use_resolution_binning": False},
    ],
)
def test_sizes_of_a_list(call: dict[str, Any], tmp_path: Path) -> None:
    bins = ((0.5, 8, 16), (0.7, 12, 16), (1.0, 12, 12))
    spec = Latents(4, fakes.FACTOR, 2, 16, 16, bins=bins)
    bundle = fakes.make_bundle(tmp_path / "bundle", latents=spec)
    other = reader.Bundle(
        bundle, "fake", lambda path, _: fakes.GRAPHS[json.loads(path.read_text())["graph"]]
    )
    opened = Bundle.open(bundle)
    loading = Loading.of(opened, opened.manifest.builds[0], fakes.FakeBackend())
    with open_pipeline(loading) as pipe:
        result = pipe("red", **call, seed=1, output_type="pil")
    latents, images = other(prompt=["red"], **call, seed=1)
    assert relative_l2(latents, result.latents) < 1e-5
    (found,) = result.images
    assert found.size == (call.get("width", 16), call.get("height", 16))
    assert np.abs(np.asarray(found).astype(int) - images[0]).max() <= 1


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "altered": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\0"),
    "missing": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a link out": lambda path: (
        shutil.move(path, path.parents[3] / "outside"),
        path.symlink_to(path.parents[3] / "outside"),
    ),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_both_refuse_a_damaged_file(damage: str, tmp_path: Path) -> None:
    bundle = fakes.make_bundle(tmp_path / "bundle")
    DAMAGES[damage](bundle / "fake-fp32" / "denoiser" / "graph.json")
    with pytest.raises(reader.Refused):
        reader.Bundle(bundle, "fake", lambda path, component: lambda feeds: {})
    opened = Bundle.open(bundle)
    loading = Loading.of(opened, opened.manifest.builds[0], fakes.FakeBackend())
    with pytest.raises(BundleError):
        open_pipeline(loading)
