"""A reader of bundles written from docs/bundle-format.md alone; it imports nothing of latentc.

It is here to prove the document: if its pictures are those of latentc's own runtime, then the
document says all that a stranger needs. Section numbers in the comments are the document's.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.docs.independent_manifest import (
    Refused,
    check_tokenizer,
    expect,
    read_inside,
    read_manifest,
    refusing,
)

__all__ = ["Bundle", "Refused"]

Array = np.ndarray[Any, Any]
Graph = Callable[[Mapping[str, Array]], dict[str, Array]]
# (path of the entry, component of the manifest) -> something to call with named inputs
Engine = Callable[[Path, dict[str, Any]], Graph]


# Section 4: files and paths


def checked(root: Path, file: Mapping[str, Any]) -> Path:
    """The file's path, after all four checks."""
    text = file["path"]
    parts = text.split("/")
    expect(not any(part in ("", ".", "..") for part in parts), f"bad path {text!r}")
    expect(not any(sign in text for sign in "\\:\0"), f"bad path {text!r}")
    path = Path(os.path.realpath(root / text))
    data = read_inside(root, root / text, file["size"])
    expect(len(data) == file["size"], f"{text}: size {len(data)}")
    expect(hashlib.sha256(data).hexdigest() == file["sha256"], f"{text}: another hash")
    return path


# Section 9.2: the table of sampling plans

_LARGEST_TABLE = 64 << 20  # bytes
INTEGER, NUMBER, NULLABLE = "integer", "number", "number or null"
ELEMENTS = {
    **dict.fromkeys(("steps", "offsets", "rows", "noise_draws"), INTEGER),
    **dict.fromkeys(("timesteps", "input_scale", "state", "prediction", "clean"), NUMBER),
    **dict.fromkeys(("noise", "clean_from", "init_noise_scale", "clip", "shift"), NUMBER),
    **dict.fromkeys(("add_noise", "known"), NULLABLE),
}
_TYPES = {INTEGER: {int}, NUMBER: {int, float}, NULLABLE: {int, float, type(None)}}


def read_npz(path: Path) -> dict[str, Array]:
    """All members of an archive of .npy files."""
    expect(zipfile.is_zipfile(path), "no archive")
    with zipfile.ZipFile(path) as archive:
        expect(sum(i.file_size for i in archive.infolist()) < 64 << 20, "unpacks to too much")
        found = {}
        for name in archive.namelist():
            with archive.open(name) as member:
                found[name.removesuffix(".npy")] = np.lib.format.read_array(
                    member, allow_pickle=False
                )
        return found


def _column(name: str, values: Any) -> Array:
    """The array of a member; null becomes NaN."""
    expect(isinstance(values, list), f"{name} is no array")
    shape, level = [len(values)], values
    while level and isinstance(level[0], list):
        expect(all(isinstance(each, list) for each in level), f"{name}: not all are arrays")
        expect(len({len(each) for each in level}) == 1, f"{name}: arrays of several lengths")
        shape.append(len(level[0]))
        level = [value for each in level for value in each]
    found = {type(value) for value in level}
    expect(found and found <= _TYPES[ELEMENTS[name]], f"{name}: {found}")
    return np.array(level, np.int64 if ELEMENTS[name] == INTEGER else np.float64).reshape(shape)


def _no_number(text: str) -> float:
    raise Refused(f"{text} is no JSON")


@refusing
def read_table(path: Path) -> dict[str, Array]:
    """A table of sampling plans that keeps the rules."""
    expect(path.stat().st_size <= _LARGEST_TABLE, "a table of more than 64 MiB")
    document = json.loads(path.read_bytes().decode("utf-8"), parse_constant=_no_number)
    expect(isinstance(document, dict), "no object")
    expect(document.keys() == ELEMENTS.keys(), f"members {sorted(document)}")
    t = {name: _column(name, document[name]) for name in ELEMENTS}
    p, e, r, k = len(t["steps"]), len(t["timesteps"]), *t["state"].shape[:2]
    window = t["rows"].shape[1] - 1
    shapes = {
        "steps": (p,), "offsets": (p + 1,), "timesteps": (e,), "input_scale": (e,),
        "noise_draws": (e,), "rows": (e, window + 1), "state": (r, k, k), "prediction": (r, k),
        "clean": (r, k), "noise": (r, k), "clean_from": (r, 2), "init_noise_scale": (p,),
        "add_noise": (e, 2), "known": (e, 2), "clip": (3,), "shift": (p,),
    }  # fmt: skip
    expect({name: t[name].shape for name in t} == shapes, "shapes do not fit")
    expect(k <= 64, "more than 64 slots")
    shifts = np.unique(t["shift"])
    expect(len(shifts) <= 64 and p % len(shifts) == 0, "shifts without plans")
    each = p // len(shifts)
    expect(np.array_equal(np.repeat(shifts, each), t["shift"]), "shifts do not increase")
    expect(np.all(np.diff(t["steps"][:each].astype(int)) > 0), "steps do not increase")
    expect(t["steps"].min() >= 1 and t["steps"].max() <= 10000, "steps out of range")
    lengths = np.diff(t["offsets"])
    for values in (t["steps"], lengths, t["noise_draws"], np.isnan(t["add_noise"])):
        sheets = values.reshape(len(shifts), -1)
        expect(np.all(sheets == sheets[0]), "plans of another form for another shift")
    expect(np.all(np.diff(t["offsets"].astype(int)) > 0), "offsets do not increase")
    expect(t["offsets"][0] == 0 and t["offsets"][-1] == e, "offsets out of range")
    expect(t["rows"].min() >= 0 and t["rows"].max() < r, "rows out of range")
    expect(t["noise_draws"].max() <= 1, "noise_draws out of range")
    for name in set(t) - {"add_noise", "known"}:
        expect(np.isfinite(t[name]).all(), f"{name} is not finite")
    for name in ("add_noise", "known"):
        nan = np.isnan(t[name])
        expect(np.all(nan | np.isfinite(t[name])), f"{name} is not finite")
        expect(np.all(nan[:, 0] == nan[:, 1]), f"{name} has half a pair")
    kind, limit, ratio = t["clip"]
    expect(kind in (0, 1, 2), "unknown kind of clip")
    expect(kind != 0 or not t["clean"].any(), "clips without a kind")
    expect(kind != 1 or limit > 0, "clip limit")
    expect(kind != 2 or (limit >= 1 and 0 <= ratio <= 1), "clip limit or ratio")
    uses = (t["noise"] != 0).any(axis=1)[t["rows"]].any(axis=1)
    expect(np.all(t["noise_draws"][uses] == 1), "noise without a draw")
    return t


# Section 10: noise


class Generator:
    """MT19937 and the two recipes for normal values."""

    def __init__(self, seed: int) -> None:
        expect(-(2**63) <= seed < 2**64, "seed out of range")
        self.state = [seed & 0xFFFFFFFF]
        for i in range(1, 624):
            previous = self.state[-1]
            self.state.append((1812433253 * (previous ^ (previous >> 30)) + i) & 0xFFFFFFFF)
        self.index = 624
        self.cached: float | None = None

    def word(self) -> int:
        if self.index == 624:
            s = self.state
            for i in range(624):
                y = (s[i] & 0x80000000) | (s[(i + 1) % 624] & 0x7FFFFFFF)
                s[i] = s[(i + 397) % 624] ^ (y >> 1) ^ (0x9908B0DF if y & 1 else 0)
            self.index = 0
        y = self.state[self.index]
        self.index += 1
        y ^= y >> 11
        y ^= (y << 7) & 0x9D2C5680
        y ^= (y << 15) & 0xEFC60000
        return y ^ (y >> 18)

    def draw(self, shape: Sequence[int]) -> Array:
        size = math.prod(shape)
        if size < 16:
            values = np.array([self._small() for _ in range(size)], np.float32)
            return values.reshape(shape)
        uniform = self._uniform(size)
        values = np.empty(size, np.float32)
        for start in range(0, size - 15, 16):
            values[start : start + 16] = _block(uniform[start : start + 16])
        if size % 16:
            values[-16:] = _block(self._uniform(16))
        return values.reshape(shape)

    def _uniform(self, size: int) -> Array:
        words = np.array([self.word() % 2**24 for _ in range(size)], np.float32)
        return words * np.float32(2.0**-24)

    def _small(self) -> float:
        if self.cached is not None:
            value, self.cached = self.cached, None
            return value
        h1, l1, h2, l2 = (self.word() for _ in range(4))
        u1 = ((h1 * 2**32 + l1) % 2**53) * 2.0**-53
        u2 = ((h2 * 2**32 + l2) % 2**53) * 2.0**-53
        theta, r = 2 * math.pi * u1, math.sqrt(-2 * math.log(1 - u2))
        self.cached = r * math.sin(theta)
        return r * math.cos(theta)


def _block(u: Array) -> Array:
    r = np.sqrt(np.float32(-2) * np.log(np.float32(1) - u[:8]))
    theta = np.float32(2 * math.pi) * u[8:]
    return np.concatenate([r * np.cos(theta), r * np.sin(theta)])


def noise_source(seeds: Sequence[int], shape: Sequence[int]) -> Callable[[], Array]:
    """Draws for the whole batch: one generator, or one per picture."""
    generators = [Generator(seed) for seed in seeds]
    if len(generators) == 1:
        return lambda: generators[0].draw(shape)
    return lambda: np.concatenate([g.draw((1, *shape[1:])) for g in generators])


# Section 9.3: plans that depend on the size


def at_shift(t: Mapping[str, Array], shift: float) -> dict[str, Array]:
    """The table of one shift: the polynomial through those that there are."""
    nodes = np.unique(t["shift"])
    if len(nodes) == 1:
        return dict(t)
    expect(nodes[0] <= shift <= nodes[-1], "the plans are not for this size")
    weights = [
        np.prod([(shift - other) / (node - other) for other in nodes if other != node])
        for node in nodes
    ]

    def mixed(values: Array) -> Array:
        return np.tensordot(weights, values.reshape(len(nodes), -1, *values.shape[1:]), 1)

    rows = t["rows"]
    named = ("state", "prediction", "clean", "noise", "clean_from")
    count = rows.size // len(nodes)
    single = {name: mixed(t[name][rows]) for name in named}
    plans, first = len(t["steps"]) // len(nodes), len(rows) // len(nodes)
    return {
        **{name: mixed(t[name]) for name in ("timesteps", "input_scale", "init_noise_scale")},
        **{name: each.reshape(count, *each.shape[2:]) for name, each in single.items()},
        "rows": np.arange(count).reshape(first, -1),
        "add_noise": mixed(t["add_noise"]),
        "noise_draws": t["noise_draws"][:first],
        "steps": t["steps"][:plans],
        "offsets": t["offsets"][: plans + 1],
        "clip": t["clip"],
        "shift": np.full(plans, shift),
    }


# Sections 9.1, 9.3 and 9.4: the recurrence


def run_plan(
    t: Mapping[str, Array],
    steps: int,
    predict: Callable[[Array, Array], Array],
    draw: Callable[[], Array],
    start: int = 0,
    clean_sample: Array | None = None,
    initial_noise: Array | None = None,
) -> Array:
    """The final sample; `predict` gives the guided prediction."""
    expect(steps in t["steps"], f"no plan for {steps} steps")
    p = t["steps"].tolist().index(steps)
    offset, end = int(t["offsets"][p]), int(t["offsets"][p + 1])
    window = t["rows"].shape[1] - 1
    noise = draw() if initial_noise is None else initial_noise
    if clean_sample is None:
        expect(start == 0, "a late start needs a clean sample")
        first = np.float32(t["init_noise_scale"][p]) * noise
    else:
        a, b = t["add_noise"][offset + start]
        expect(not np.isnan(a), f"no start at {start}")
        first = np.float32(a) * clean_sample + np.float32(b) * noise
    slots = [first, *[np.zeros_like(first) for _ in range(t["state"].shape[1] - 1)]]
    for i in range(end - offset - start):
        at = offset + start + i
        row = t["rows"][at, min(i, window)]
        state, prediction, clean, on_noise, (from_sample, from_e) = (
            t[name][row].astype(np.float32)
            for name in ("state", "prediction", "clean", "noise", "clean_from")
        )
        timestep = t["timesteps"][at : at + 1].astype(np.float32)
        e = predict(np.float32(t["input_scale"][at]) * slots[0], timestep)
        v = clip(from_sample * slots[0] + from_e * e, t["clip"]) if clean.any() else 0
        n = draw() if t["noise_draws"][at] else 0
        slots = [
            sum(c * slot for c, slot in zip(state[k], slots, strict=True) if c)
            + (prediction[k] * e + clean[k] * v + on_noise[k] * n)
            for k in range(len(slots))
        ]
    return slots[0]


def clip(c: Array, setting: Array) -> Array:
    kind, limit, ratio = setting
    if kind == 1:
        return np.clip(c, np.float32(-limit), np.float32(limit))
    rows = []
    for picture in c:
        a = np.sort(np.abs(picture).ravel())
        h = ratio * (a.size - 1)
        low, high = a[math.floor(h)], a[math.ceil(h)]
        q = np.float32(min(max(low + (h - math.floor(h)) * (high - low), 1.0), limit))
        rows.append(np.clip(picture, -q, q) / q)
    return np.stack(rows)


# Sections 3, 7, 8 and 11: the bundle and a call


def rescaled(made: Array, like: Array, amount: float) -> Array:
    """The guided prediction with the deviation of a branch, picture by picture."""
    factors = [1 + amount * (np.std(b) / np.std(a) - 1) for a, b in zip(made, like, strict=True)]
    return made * np.array(factors, np.float32)[:, None, None, None]


def resized(image: Array, sides: tuple[int, int]) -> Array:
    """Images [N, C, rows, columns] in another size (section 11)."""
    if image.shape[2:] == sides:
        return image
    factor = max(side / old for side, old in zip(sides, image.shape[2:], strict=True))
    for axis, side in enumerate(sides, 2):
        old = image.shape[axis]
        count = max(side, int(old * factor))
        places = (np.arange(count) + 0.5) * old / count - 0.5
        first = (count - side) // 2
        rows = [np.interp(places, np.arange(old), unit) for unit in np.eye(old)]
        weights = np.stack(rows)[:, first : first + side].astype(np.float32)
        image = np.moveaxis(np.tensordot(image, weights, (axis, 0)), -1, axis)
    return image


def onnx_engine(path: Path, component: dict[str, Any]) -> Graph:
    """ONNX Runtime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = list(component["outputs"])
    taken = {given.name for given in session.get_inputs()}
    expect(taken == component["inputs"].keys(), f"{component['name']} takes {sorted(taken)}")
    return lambda feeds: dict(zip(names, session.run(names, dict(feeds)), strict=True))


def referred(entry: Path) -> list[Path]:
    """The files that an engine opens because of an ONNX graph."""
    from onnx import external_data_helper, load

    if entry.suffix != ".onnx":
        return []
    tensors = external_data_helper._get_all_tensors(load(entry, load_external_data=False))
    places = [each for tensor in tensors for each in tensor.external_data]
    return [entry.parent / each.value for each in places if each.key == "location"]


def holding(graph: Graph, component: dict[str, Any]) -> Graph:
    """A graph whose results are held against the manifest (section 5)."""

    def run(feeds: Mapping[str, Array]) -> dict[str, Array]:
        symbols: dict[str, int] = {}
        _cast(component["inputs"], feeds, symbols)
        found = graph(feeds)
        for name, value in found.items():
            wanted = component["outputs"][name]["dtype"]
            expect(value.dtype == wanted, f"{name}: dtype {value.dtype}, not {wanted}")
            expect(np.isfinite(value).all(), f"{name}: NaN or infinity")
        _cast(component["outputs"], found, symbols)
        return found

    return run


class Bundle:
    """A bundle with one of its builds loaded."""

    @refusing
    def __init__(self, root: Path, target: str = "onnx", engine: Engine = onnx_engine) -> None:
        from tokenizers import Tokenizer

        self.root = root
        self.manifest = read_manifest(root)
        build = next(b for b in self.manifest["builds"] if b["target"] == target)
        self.components = {c["name"]: c for c in self.manifest["components"]}
        self.graphs: dict[str, Graph] = {}
        for name, component in self.components.items():
            artifact = build["artifacts"][name]
            paths = {file["path"]: checked(root, file) for file in artifact["files"]}
            entry = paths[artifact["entry"]]
            expect(set(referred(entry)) <= {*paths.values()}, f"{name}: a file is not listed")
            self.graphs[name] = holding(engine(entry, component), component)
        self.tokenizers = {}
        for each in self.manifest["tokenizers"]:
            path = checked(root, each["file"])
            check_tokenizer(path, each["max_length"])
            self.tokenizers[each["input"]] = Tokenizer.from_file(str(path))
        self.encoders = [c for c in self.components.values() if c["role"] == "encoder"]
        self.denoiser = next(c for c in self.components.values() if c["role"] == "denoiser")
        self.decoder = next(c for c in self.components.values() if c["role"] == "decoder")
        shallow = [c for c in self.components.values() if c["role"] == "shallow"]
        self.cached = {name for c in shallow for name in c["inputs"]}

    @refusing
    def __call__(self, **call: Any) -> tuple[Array, Array]:
        """Latents and 8-bit pictures [N, height, width, C].

        call: the arguments of section 7; texts are lists of one text per picture. Of section 7.1,
        `pieces` is how many pieces a text may have at most, and encoded texts are arrays.
        """
        latents = self.manifest["latents"]
        unit = latents["factor"] * latents["multiple"]
        size = {side: call.get(side) or latents[f"default_{side}"] for side in ("height", "width")}
        bins, asked = latents.get("bins"), None
        binning = call.get("use_resolution_binning", bool(bins))
        expect(not binning or bins, "no bins")
        if binning:
            asked = size["height"], size["width"]
            expect(min(asked) >= 1 and max(asked) <= 65536, "bad size")
            ratio = asked[0] / asked[1]
            nearest = min(bins, key=lambda each: abs(each[0] - ratio))
            size = dict(zip(("height", "width"), map(int, nearest[1:]), strict=True))
        if latents.get("rounds"):
            size = {side: value // unit * unit for side, value in size.items()}
        least = latents["factor"] * latents.get("minimum", 1)
        fits = (value >= least and value % unit == 0 for value in size.values())
        expect(all(fits) and min(size.values()) > 0, "bad size")
        self._check_task(call)
        texts = [t["texts"] for t in self.manifest["tokenizers"]]
        texts += [[each["name"] for each in self.manifest.get("embeddings", [])]]
        given = [call[name] for names in texts for name in names if name in call]
        expect(given or not self.tokenizers, "no text")
        self._check_texts(call)
        count = len(given[0]) if given else call.get("batch_size", 1)
        branches, weights = self._branches(call)
        guidance = self.manifest["guidance"]
        name = guidance.get("rescale")
        amount = call.get(name, self._default(name, guidance["defaults"])) if name else 0.0
        expect(0 <= amount <= 1, "bad rescale")
        conditioning = self._conditioning(branches, call, size, count)
        seeds = call["seed"] if isinstance(call["seed"], list) else [call["seed"]]
        sides = [size[side] // latents["factor"] for side in ("height", "width")]
        shape = (count, latents["channels"], *sides)
        (output,) = set(self.denoiser["outputs"]) - self.cached

        def predict(sample: Array, timestep: Array) -> Array:
            feeds = {
                "sample": np.concatenate([sample] * len(branches)),
                "timestep": timestep,
                **conditioning,
            }
            parts = np.split(self.graphs[self.denoiser["name"]](feeds)[output], len(branches))
            made = sum(np.float32(w) * part for w, part in zip(weights, parts, strict=True))
            like = [branch["name"] for branch in branches].index(guidance["single"])
            return rescaled(made, parts[like], amount) if amount and len(parts) > 1 else made

        defaults = self.manifest["defaults"]
        wanted = call.get("scheduler") or defaults["scheduler"]
        schedule = next(s for s in self.manifest["schedules"] if s["name"] == wanted)
        table = read_table(checked(self.root, schedule["file"]))
        line = schedule.get("shift") or {"intercept": 0.0, "slope": 0.0}
        table = at_shift(table, line["intercept"] + line["slope"] * sides[0] * sides[1])
        expect(table["steps"].tolist() == schedule["steps"], "steps differ from the manifest's")
        steps = int(
            call.get("num_inference_steps") or self._default("num_inference_steps", defaults)
        )
        final = run_plan(table, steps, predict, noise_source(seeds, shape))
        image = self.graphs[self.decoder["name"]](
            _cast(self.decoder["inputs"], {"latents": final})
        )["image"]
        image = image if asked is None else resized(image, asked)
        levels = np.clip(image.astype(np.float32), 0, 1) * np.float32(255)
        return final, np.rint(levels).astype(np.uint8).transpose(0, 2, 3, 1)

    def _branches(self, call: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[float]]:
        guidance = self.manifest["guidance"]
        scales = guidance.get("defaults", {})
        scales = {name: call.get(name, self._default(name, scales)) for name in scales}
        switch = guidance.get("scale")
        texts = [t["texts"][-1] for t in self.manifest["tokenizers"]]
        texts += [each["name"] for each in self.manifest.get("embeddings", [])]
        needy = [b["prefix"] for b in guidance["branches"] if b["missing"] == "off"]
        lacking = any(not any(p + name in call for name in texts) for p in needy)
        if switch is not None and scales[switch] > 1 and not lacking:
            weights = [
                b["constant"] + sum(f * scales[name] for name, f in b.get("scales", {}).items())
                for b in guidance["branches"]
            ]
            return guidance["branches"], weights
        return [b for b in guidance["branches"] if b["name"] == guidance["single"]], [1.0]

    @property
    def _task(self) -> dict[str, Any]:
        """The task of calls without images."""
        task: dict[str, Any] = next(t for t in self.manifest["tasks"] if not t.get("pictures"))
        return task

    def _default(self, name: str, others: Mapping[str, Any]) -> Any:
        """The task's default of a scale or of the step count, else the one in `others`."""
        return self._task.get("defaults", {}).get(name, [others[name]])[0]

    def _counts(self, name: str, call: Mapping[str, Any]) -> bool:
        """Whether a branch's own argument counts (section 7, Vectors)."""
        known = self._task.get("branch_arguments")
        return known is None or (name in known and all(other in call for other in known[name]))

    def _check_task(self, call: Mapping[str, Any]) -> None:
        sides = [side for side in ("height", "width") if call.get(side)]
        expect(len(sides) != 1 or not self._task.get("sides_together"), "one side")
        prefixes = {b["prefix"] for b in self.manifest["guidance"]["branches"] if b["prefix"]}
        used = {name for v in self.manifest["vectors"] for name in v["arguments"]}
        for name in {prefix + name for prefix in prefixes for name in used} & call.keys():
            expect(self._counts(name, call), f"{name} would change nothing")

    def _check_texts(self, call: Mapping[str, Any]) -> None:
        main = {t["texts"][-1] for t in self.manifest["tokenizers"]}
        others = {name for t in self.manifest["tokenizers"] for name in t["texts"]} - main
        for branch in self.manifest["guidance"]["branches"]:
            p = branch["prefix"]
            alone = not any(p + name in call for name in main)
            given = any(p + name in call for name in others)
            wants = not p or branch["missing"] != "empty"
            expect(not (given and alone and wants), "texts without the main one")

    def _conditioning(
        self,
        branches: Sequence[dict[str, Any]],
        call: Mapping[str, Any],
        size: Mapping[str, int],
        count: int,
    ) -> dict[str, Array]:
        rows: dict[str, list[Array]] = {}
        pieces = max(
            (len(own) for b in branches for p in range(count) for own in self._ids(b, call, p)),
            default=1,
        )
        for branch in branches:
            for picture in range(count):
                for name, value in self._encoded(branch, call, picture, pieces).items():
                    rows.setdefault(name, []).append(value)
                for vector in self.manifest["vectors"]:
                    value = self._vector(vector, branch["prefix"], call, size)
                    rows.setdefault(vector["input"], []).append(value)
        joined = {name: np.concatenate(values) for name, values in rows.items()}
        return _cast(self.denoiser["inputs"], joined)

    def _written_out(self, name: str, text: str) -> str:
        """Words that stand for several, from left to right, the longest that fits."""
        (given,) = (t for t in self.manifest["tokenizers"] if t["input"] == name)
        stands_for = given.get("expansions", {})
        known = {*stands_for, *(word for each in stands_for.values() for word in each.split(" "))}
        made, at = "", 0
        while at < len(text):
            here = max((w for w in known if text.startswith(w, at)), key=len, default=text[at])
            made += stands_for.get(here, here)
            at += len(here)
        return made

    def _ids(
        self, branch: Mapping[str, Any], call: Mapping[str, Any], picture: int
    ) -> list[list[list[int]]]:
        """For each tokenizer the pieces of a branch's text; nothing where it is given encoded."""
        made: list[list[list[int]]] = []
        for tokenizer in self.manifest["tokenizers"] if not self._given(branch, call) else []:
            name = tokenizer["input"]
            text = self._text(tokenizer["texts"], branch["prefix"], call, picture)
            found = self.tokenizers[name].encode(self._written_out(name, text or ""))
            most = call.get("pieces", 1) if name in self._long() else 1
            made.append([each.ids for each in [found, *found.overflowing][:most]])
            lengths = {len(ids) for ids in made[-1]}
            expect(lengths == {tokenizer["max_length"]}, f"{lengths} ids")
            largest = max(max(ids) for ids in made[-1])
            most_ids = tokenizer.get("vocabulary") or 2**31
            expect(largest < most_ids, f"the tokenizer for {name} gives the id {largest}")
        return made

    def _given(self, branch: Mapping[str, Any], call: Mapping[str, Any]) -> dict[str, Array]:
        """A branch's encoded texts, by denoiser input (section 7.1)."""
        found: dict[str, Array] = {}
        given = []
        for each in self.manifest.get("embeddings", []):
            value = call.get(branch["prefix"] + each["name"])
            given.append(value is not None)
            if value is None:
                continue
            if each.get("frame"):
                found |= self._framed(each, value)
                continue
            start = 0
            for name in each["inputs"]:
                width = self.denoiser["inputs"][name]["shape"][-1]
                found[name] = value[..., start : start + width]
                start += width
            expect(start == value.shape[-1], "encoded texts of another width")
        expect(all(given) or not any(given), "only a part of the encoded texts")
        return found

    def _framed(self, embedding: Mapping[str, Any], value: Array) -> dict[str, Array]:
        expect(list(value.shape[1:]) == embedding["frame"], "encoded texts of another frame")
        rest, found, start = value.copy(), {}, 0
        for name in embedding["inputs"]:
            length, width = self.denoiser["inputs"][name]["shape"][1:]
            found[name] = value[:, start : start + length, :width]
            rest[:, start : start + length, :width] = 0
            start += length
        expect(not rest.any(), "numbers beside encoded texts")
        return found

    def _long(self) -> set[str]:
        """Encoder inputs that may have several pieces, and outputs that are sequences."""
        lengths = {t["input"]: t["max_length"] for t in self.manifest["tokenizers"]}
        made: set[str] = set()
        for encoder in self.encoders:
            sequences = {
                name: spec["shape"][1]
                for name, spec in encoder["outputs"].items()
                if name in self.denoiser["inputs"] and isinstance(spec["shape"][1], int)
                if isinstance(self.denoiser["inputs"][name]["shape"][1], str)
            }
            if sequences and set(sequences.values()) == {lengths[n] for n in encoder["inputs"]}:
                made |= {*encoder["inputs"], *sequences}
        return made

    def _encoded(
        self, branch: Mapping[str, Any], call: Mapping[str, Any], picture: int, pieces: int
    ) -> dict[str, Array]:
        given = self._given(branch, call)
        if given:
            return {name: value[picture : picture + 1] for name, value in given.items()}
        main = [branch["prefix"] + t["texts"][-1] for t in self.manifest["tokenizers"]]
        zero = branch["missing"] == "zeros" and not any(name in call for name in main)
        own = dict(zip(self.tokenizers, self._ids(branch, call, picture), strict=True))
        joined: dict[str, list[Array]] = {}
        for piece in range(pieces):
            ids = {
                name: np.array([own[name][piece] if piece < len(own[name]) else tokens])
                for name, tokens in ((n, t.encode("").ids) for n, t in self.tokenizers.items())
            }
            for encoder in self.encoders:
                for name, value in self.graphs[encoder["name"]](
                    _cast(encoder["inputs"], ids)
                ).items():
                    joined.setdefault(name, []).append(value)
        outputs = {
            name: np.concatenate(values, axis=1) if name in self._long() else values[0]
            for name, values in joined.items()
        }
        return {name: np.zeros_like(x) if zero else x for name, x in outputs.items()}

    @staticmethod
    def _text(
        names: Sequence[str], prefix: str, call: Mapping[str, Any], picture: int
    ) -> str | None:
        given = [call[prefix + name] for name in names if prefix + name in call]
        return str(given[0][picture]) if given else None

    def _vector(
        self,
        vector: Mapping[str, Any],
        prefix: str,
        call: Mapping[str, Any],
        size: Mapping[str, int],
    ) -> Array:
        defaults = {a["name"]: a["default"] for a in self.manifest["arguments"]}
        row: list[float] = []
        for name in vector["arguments"]:
            own = prefix + name in defaults and self._counts(prefix + name, call)
            named = prefix + name if own else name
            usual = self._task.get("defaults", {}).get(named, defaults[named])
            values = call.get(prefix + name, call.get(named, usual))
            row += [size[v] if isinstance(v, str) else v for v in values]
        return np.array([row], np.float32)


def _cast(
    specs: Mapping[str, Any], values: Mapping[str, Array], symbols: dict[str, int] | None = None
) -> dict[str, Array]:
    """What of `values` the specifications name, in their dtypes and shapes (section 5)."""
    symbols = {} if symbols is None else symbols
    made = {}
    for name, spec in specs.items():
        if name not in values:
            continue
        value = made[name] = values[name].astype(spec["dtype"])
        expect(value.ndim == len(spec["shape"]), f"{name}: shape {value.shape}")
        for dimension, found in zip(spec["shape"], value.shape, strict=True):
            if isinstance(dimension, str):
                match = re.fullmatch(r"(?:([1-9][0-9]{0,3})\*)?([a-z][a-z_]{0,31})", dimension)
                expect(match, f"{name}: dimension {dimension!r}")
                factor, symbol = int(match[1] or 1), match[2]
                fits = found % factor == 0
                dimension = symbols.setdefault(symbol, found // factor) * factor if fits else 0
            expect(dimension == found, f"{name}: shape {value.shape}")
    return made
