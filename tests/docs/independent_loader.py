"""A reader of bundles written from docs/bundle-format.md alone; it imports nothing of latentc.

It proves the document: if its images are latentc's own, the document says all that a stranger
needs. Section numbers are the document's.
"""

from __future__ import annotations

import html
import io
import math
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tests.docs.independent_manifest import (
    DOCUMENT,
    checked,
    read_inside,
    read_json,
    read_manifest,
    refusing,
)
from tests.docs.independent_program import (
    GIVEN,
    MADE,
    PROMPT,
    Node,
    Refused,
    bind,
    dimension,
    expect,
    fed,
    gives,
    loops_of,
    needs,
    states_of,
    types_of,
)

__all__ = ["Bundle", "Refused", "checked"]

Array = np.ndarray[Any, Any]
Graph = Callable[[Mapping[str, Array]], dict[str, Array]]
ROWS = ("state", "prediction", "clean", "noise", "clean_from")
LEARNED = ("log_low", "log_high")
EVALUATIONS = ("timesteps", "input_scale", "noise_draws", "add_noise", "known", *LEARNED)
ELEMENTS: Mapping[str, set[type]] = {
    "integer": {int},
    "number": {int, float},
    "number or null": {int, float, type(None)},
}
_MEMBER = re.compile(r"^\| `(\w+)` \| ([a-z ]+) \| `\[(.*)\]` \|", re.MULTILINE)
MEMBERS = {n: (kind, form.split(", ")) for n, kind, form in _MEMBER.findall(DOCUMENT.read_text())}


def read_npz(path: Path) -> dict[str, Array]:
    """Return the arrays of an archive of .npy files (section 12)."""
    with zipfile.ZipFile(path) as archive:
        expect(sum(each.file_size for each in archive.infolist()) < 64 << 20, "unpacks to too much")
    with np.load(path, allow_pickle=False) as arrays:
        return {**arrays}


# Section 9: sampling plans


@refusing
def read_plans(root: Path, schedule: Node, steps: int) -> dict[str, Array]:
    """Return the plans of a schedule, those for so many steps at least (section 9.2)."""
    data, counts = read_inside(root, checked(root, schedule["file"]), 64 << 20), {steps}
    expect(steps in schedule["steps"], f"no plan for {steps} steps")
    if schedule["archive"]:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = sorted(archive.namelist())
            expect(names == sorted(f"{n}.json" for n in schedule["steps"]), f"members {names}")
            member = archive.getinfo(f"{steps}.json")
            expect(member.compress_type in (0, 8) and member.file_size <= 64 << 20, "too much")
            data = archive.read(member)
    else:
        counts = {*schedule["steps"]}
    table = table_of(data)
    expect({*table["steps"]} == counts, "steps differ from the manifest's")
    return table


@refusing
def table_of(data: bytes) -> dict[str, Array]:
    """Return a table of plans that keeps the rules (section 9.2)."""
    document = read_json(data)
    if not {*LEARNED} & document.keys():
        document = {**document, **dict.fromkeys(LEARNED, [None] * len(document["timesteps"]))}
    expect(document.keys() == MEMBERS.keys(), f"members {sorted(document)}")
    t: dict[str, Array] = {}
    sizes = {"2": 2, "3": 3}
    for name, (elements, shape) in MEMBERS.items():
        array = np.array(document[name], object)
        right = array.size and {*map(type, array.flat)} <= ELEMENTS[elements]
        expect(right and array.ndim == len(shape), f"{name}: bad elements or shape")
        t[name] = array.astype(np.int64 if elements == "integer" else np.float64)
        for symbol, found in zip(shape, array.shape, strict=True):
            size, more = symbol.removesuffix("+1"), int(symbol.endswith("+1"))
            expect(found == sizes.setdefault(size, found - more) + more, f"{name}: {array.shape}")
    for name, kept in _rules(t, sizes["P"], sizes["R"], sizes["K"]).items():
        expect(kept, f"{name} breaks a rule")
    return t


def _rules(t: Mapping[str, Array], plans: int, rows: int, slots: int) -> dict[str, Any]:
    shifts, lengths, missing = np.unique(t["shift"]), np.diff(t["offsets"]), np.isnan
    each, (kind, limit, ratio), draws = plans // len(shifts), t["clip"], t["noise_draws"]
    expect(t["rows"].min() >= 0 and t["rows"].max() < rows, "rows beyond the table")
    uses = (t["noise"] != 0).any(axis=1)[t["rows"]].any(axis=1)
    low, high = (missing(t[name]) for name in LEARNED)
    pairs = [missing(t[name]) for name in ("add_noise", "known")]
    forms = (t["steps"], lengths, draws, low, *pairs)
    sheets = [values.reshape(len(shifts), -1) for values in forms]
    return {
        "shift": len(shifts) <= 64 and np.array_equal(np.repeat(shifts, each), t["shift"]),
        "another shift": all((sheet == sheet[0]).all() for sheet in sheets),
        "steps": t["steps"].min() >= 1 and t["steps"].max() <= 10000,
        "order of steps": (np.diff(t["steps"][:each]) > 0).all(),
        "offsets": not t["offsets"][0] and t["offsets"][-1] == len(draws) and lengths.min() > 0,
        "state": slots <= 64 and slots**2 * lengths.max() <= 2**24,
        "noise_draws": {*draws.tolist()} <= {0, 1} and draws[uses].all(),
        "add_noise, known": not any((pair.sum(axis=1) == 1).any() for pair in pairs),
        "log_low": (low == high).all() and draws[~low].all(),
        "clip": kind in (0, 1, 2) and (kind != 1 or limit > 0) and (kind or not t["clean"].any()),
        "clip, dynamic": kind != 2 or (limit >= 1 and 0 <= ratio <= 1),
    }


def plan_of(t: Mapping[str, Array], steps: int, start: int = 0, shift: float = 0) -> dict[str, Any]:
    """Return what a run takes, by evaluation; of several shifts the polynomial (section 9.3)."""
    nodes, sheets = np.unique(t["shift"]), []
    expect(len(nodes) == 1 or nodes[0] <= shift <= nodes[-1], "no plans for this size")
    for node in nodes:
        found = np.flatnonzero((t["steps"] == steps) & (t["shift"] == node))
        expect(len(found), f"no plan for {steps} steps")
        at = np.arange(t["offsets"][found[0]] + start, t["offsets"][found[0] + 1])
        row = t["rows"][at, np.minimum(np.arange(len(at)), t["rows"].shape[1] - 1)]
        sheet = {name: t[name][row] for name in ROWS} | {name: t[name][at] for name in EVALUATIONS}
        sheets.append(sheet | {"init_noise_scale": t["init_noise_scale"][found[0]]})
    weights = [math.prod((shift - o) / (n - o) for o in nodes if o != n) for n in nodes]
    mixed = {n: np.tensordot(weights, [sheet[n] for sheet in sheets], 1) for n in sheets[0]}
    return {**mixed, "clip": t["clip"], "start": start}


def starts(plan: Node) -> list[int]:
    """Return the evaluations of a whole plan that a run may start at."""
    return [0, *(int(i) for i in np.flatnonzero(~np.isnan(plan["add_noise"][:, 0])) if i)]


def first_sample(plan: Node, noise: Array, clean: Array | None = None) -> Array:
    """Return S[0] at the start of a run."""
    if clean is None:
        return np.asarray(np.float32(plan["init_noise_scale"]) * noise)
    a, b = plan["add_noise"][0].astype(np.float32)
    expect(not np.isnan(a), "no start from a clean sample")
    return np.asarray(a * clean + b * noise)


def run_plan(
    plan: Node,
    sample: Array,
    predict: Callable[[Array, Any, int], Array],
    draw: Callable[[], Array],
    after: Callable[[Array, int], Array] = lambda sample, index: sample,
    limit: Callable[..., Array] | None = None,
    variance: Callable[[], Array] | None = None,
) -> Array:
    """Return the final sample (section 9.1); `predict` gets sample, timestep and evaluation,
    `variance` gives what the denoiser said besides in the last one."""
    expect(variance or np.isnan(plan["log_low"]).all(), "nothing says the variance")
    limit = limit or clip
    slots = [sample, *[np.zeros_like(sample)] * (plan["state"].shape[1] - 1)]
    for i, timestep in enumerate(plan["timesteps"].astype(np.float32)):
        state, prediction, clean, noise, (a, b) = (plan[n][i].astype(np.float32) for n in ROWS)
        e = predict(np.float32(plan["input_scale"][i]) * slots[0], timestep, i)
        v = limit(a * slots[0] + b * e, *plan["clip"]) if clean.any() else 0
        z = draw() if plan["noise_draws"][i] > 0.5 else 0
        low, high = (plan[name][i].astype(np.float32) for name in LEARNED)
        if variance and not np.isnan(low):
            w = (variance() + 1) / 2
            z = z * np.exp((w * high + (1 - w) * low) / 2)
        made = [prediction[k] * e + clean[k] * v + noise[k] * z for k in range(len(slots))]
        old = [sum(c * s for c, s in zip(row, slots, strict=True) if c) for row in state]
        slots = [np.asarray(m + o) for m, o in zip(made, old, strict=True)]
        slots[0] = after(slots[0], i)
    return slots[0]


def clip(c: Array, kind: float, limit: float, ratio: float) -> Array:
    """Return the predicted clean sample within its limits (section 9.4)."""
    if kind == 1:
        return np.clip(c, np.float32(-limit), np.float32(limit))
    q = np.quantile(np.abs(c.reshape(len(c), -1)), ratio, axis=1).clip(1, limit)
    q = q.astype(np.float32).reshape(-1, *[1] * (c.ndim - 1))
    return np.asarray(np.clip(c, -q, q) / q)


# Section 10: noise


class Generator:
    """MT19937, which numpy seeds in the same way, and the two recipes for normal values."""

    def __init__(self, seed: int) -> None:
        expect(-(2**63) <= seed < 2**64, "seed out of range")
        self._state = np.random.RandomState(seed & 0xFFFFFFFF)
        self._cached: list[float] = []

    def words(self, count: int) -> Any:
        """Return the next words."""
        return self._state.randint(0, 2**32, count, np.uint32)

    def draw(self, shape: Sequence[int]) -> Array:
        """Return normal values."""
        size = math.prod(shape)
        if size < 16:
            return np.array([self._small() for _ in range(size)], np.float32).reshape(shape)
        words = self.words(size)
        values = np.append(_normal(words[: size - size % 16]), np.zeros(size % 16, np.float32))
        if size % 16:
            values[-16:] = _normal(self.words(16))
        return values.reshape(shape)

    def _small(self) -> float:
        if not self._cached:
            h1, l1, h2, l2 = map(int, self.words(4))
            u1, u2 = (((h << 32) + low) % 2**53 * 2.0**-53 for h, low in ((h1, l1), (h2, l2)))
            r = math.sqrt(-2 * math.log(1 - u2))
            self._cached = [r * math.sin(2 * math.pi * u1), r * math.cos(2 * math.pi * u1)]
        return self._cached.pop()


def _normal(words: Array) -> Array:
    """Return a normal value for each word of full blocks."""
    u = (words % 2**24).astype(np.float32).reshape(-1, 2, 8) * np.float32(2.0**-24)
    r = np.sqrt(np.float32(-2) * np.log(np.float32(1) - u[:, 0]))
    theta = np.float32(2 * math.pi) * u[:, 1]
    return np.stack([r * np.cos(theta), r * np.sin(theta)], axis=1).ravel()


# Sections 5 and 6: graphs


def onnx_engine(path: Path, component: Node) -> Graph:
    """Open a graph with ONNX Runtime on the CPU, which opens the files that it refers to."""
    import onnxruntime
    from onnx import external_data_helper, load

    tensors = external_data_helper._get_all_tensors(load(path, load_external_data=False))
    for each in (entry for tensor in tensors for entry in tensor.external_data):
        expect(each.key != "location" or path.parent / each.value in component["files"], "unlisted")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # small graphs gain nothing from more
    session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    names = list(component["outputs"])
    expect({i.name for i in session.get_inputs()} == component["inputs"].keys(), "other inputs")
    return lambda feeds: dict(zip(names, session.run(names, {**feeds}), strict=True))


def holding(graph: Graph, component: Node, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Run a graph whose inputs and outputs are held against the manifest (section 5)."""
    symbols: dict[str, int] = {}
    inputs, outputs = component["inputs"], component["outputs"]
    cast = {name: feeds[name].astype(spec["dtype"]) for name, spec in inputs.items()}
    for name, value in cast.items():
        bind(inputs[name]["shape"], value.shape, symbols)
    made = {name: np.asarray(value) for name, value in graph(cast).items()}
    for name, value in made.items():
        bind(outputs[name]["shape"], value.shape, symbols)
        expect(value.dtype == outputs[name]["dtype"], f"{name}: dtype {value.dtype}")
        expect(np.isfinite(value).all(), f"{name}: NaN or infinity")
    return made


def resized(image: Array, sides: Sequence[int]) -> Array:
    """Return images [N, C, rows, columns] in another size (section 11)."""
    factor = max(side / old for side, old in zip(sides, image.shape[2:], strict=True))
    for axis, side in enumerate(sides, 2):
        old = image.shape[axis]
        count = max(side, int(old * factor))
        places = (np.arange(count) + 0.5) * old / count - 0.5
        weights = np.stack([np.interp(places, np.arange(old), unit) for unit in np.eye(old)])
        first = (count - side) // 2
        part = weights[:, first : first + side].astype(np.float32)
        image = np.moveaxis(np.tensordot(image, part, (axis, 0)), -1, axis)
    return image


# Sections 7 and 8: calls


class Bundle:
    """A bundle with one of its builds loaded."""

    @refusing
    def __init__(self, root: Path, target: str = "onnx", engine: Any = onnx_engine) -> None:
        self.root, self.manifest = root, read_manifest(root)
        build = next(b for b in self.manifest["builds"] if b["target"] == target)
        self.tokenizers = {t["name"]: Tokenizer(root, t) for t in self.manifest["tokenizers"]}
        self.components = {c["name"]: c for c in self.manifest["components"]}
        self.graphs: dict[str, Graph] = {}
        for name, component in self.components.items():
            artifact = build["artifacts"][name]
            paths = {file["path"]: checked(root, file) for file in artifact["files"]}
            graph = engine(paths[artifact["entry"]], {**component, "files": [*paths.values()]})
            self.graphs[name] = partial(holding, graph, component)

    @refusing
    def __call__(self, **call: Any) -> tuple[Array, Array]:
        """Return latents and 8-bit images [N, rows, columns, C], see `results`."""
        return self.results(**call)[:2]

    @refusing
    def results(self, **call: Any) -> tuple[Array, Array, dict[str, Array]]:
        """Return latents, 8-bit images [N, rows, columns, C], or frames with an axis before, and
        arrays by their names.

        call: arguments of section 7; texts are lists, images arrays. `pieces` is how many rows of
            ids a text may have at most.
        """
        made = Call(self, {name: value for name, value in call.items() if value is not None})
        emits = [step for step in made.program["steps"] if step["do"] == "emit"]
        (shown,) = (emit["of"] for emit in emits if emit["kind"] != "arrays")
        made.run([emit["of"] for emit in emits])
        arrays = {emit["of"]: made.values[emit["of"]] for emit in emits if emit["of"] != shown}
        image = made.rows(shown, MADE)
        right = [*image.shape[-2:]] == [*made.sizes.values()][:2]
        expect(right and image.shape[-3] in (1, 3, 4), f"images {image.shape}")
        image = resized(image, made.asked) if made.asked else image
        levels = np.rint(np.clip(image.astype(np.float32), 0, 1) * np.float32(255))
        latents = made.values[made.loop["state"]["name"]]
        return latents, np.moveaxis(levels.astype(np.uint8), -3, -1), arrays


class Tokenizer:
    """A tokenizer.json, and what its texts become (section 7)."""

    def __init__(self, root: Path, spec: Node) -> None:
        import tokenizers

        path = checked(root, spec["file"])
        document, length, self.spec = read_json(path.read_bytes()), spec["max_length"], spec
        padding, cutting = document["padding"], document["truncation"]
        wanted = {"strategy": {"Fixed": length}, "pad_id": spec["pad"], "pad_to_multiple_of": None}
        expect({**padding, **wanted} == padding, "it pads otherwise")
        expect({**cutting, "max_length": length, "stride": 0} == cutting, "it cuts otherwise")
        normalizer = document["normalizer"] or {}
        rules = normalizer.get("normalizers", [normalizer])
        rules = [rule for rule in rules if rule.get("type") == "Replace"]
        lengths = [(len(r["content"]), len(r["pattern"].get("String", "")) or 1) for r in rules]
        expect(math.prod(max(1.0, new / old) for new, old in lengths) <= 64, "it lets a text grow")
        self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        known = {w for word, text in spec["expansions"].items() for w in (word, *text.split(" "))}
        self._words = re.compile("|".join(map(re.escape, sorted(known, key=len, reverse=True))))
        own = self._tokenizer.encode("a").ids
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        expect(own == self.rows("a", 1)[0], "it frames otherwise")

    def used(self, text: str) -> int:
        """Return how many ids the first row of a text has, filling aside."""
        frame = len(self.spec["before"]) + len(self.spec["after"])
        return int(min(len(self._ids(text)) + frame, self.spec["max_length"]))

    def _ids(self, text: str) -> list[int]:
        stands_for, spec = self.spec["expansions"], self.spec
        text = html.unescape(html.unescape(text)) if spec["unescape"] else text
        text = self._words.sub(lambda word: stands_for.get(word[0], word[0]), text)
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        expect(max(ids, default=0) < (spec["vocabulary"] or 2**31), "an id beyond the vocabulary")
        return ids

    def rows(self, text: str, most: int) -> list[list[int]]:
        """Return the rows of ids of a text."""
        ids, spec = self._ids(text), self.spec
        room = spec["max_length"] - len(spec["before"]) - len(spec["after"])
        parts = [ids[at : at + room] for at in range(0, max(len(ids), 1), room)][:most]
        framed = [[*spec["before"], *part, *spec["after"]] for part in parts]
        return [[*row, *[spec["pad"]] * (spec["max_length"] - len(row))] for row in framed]


class Call:
    """One call of a bundle: its arguments, and the values that its program makes."""

    def __init__(self, bundle: Bundle, given: dict[str, Any]) -> None:
        self.bundle, self.given = bundle, given
        kinds = {"image", "mask"}
        own = {
            program["name"]: {a["name"] for a in program["arguments"] if a["kind"] in kinds}
            for program in bundle.manifest["programs"]
        }
        images = given.keys() & set().union(*own.values())
        fitting = [p for p in bundle.manifest["programs"] if own[p["name"]] == images]
        expect(fitting, f"no program takes the images {images}")
        self.program, self.steps = fitting[0], fitting[0]["steps"]
        self.loop = loops_of(self.program)[-1]
        videos = any(step.get("kind") == "frames" for step in self.steps)
        self.several = f"num_{'videos' if videos else 'images'}_per_prompt"
        self.makers = {name: step for step in self.steps for name in gives(step)}
        arguments = {a["name"]: a for a in self.program["arguments"]}
        for name, argument in arguments.items():
            if argument.get("latents") and given[name].shape[1] != 3:
                given[argument["latents"]] = given[name]
        results = {step["of"] for step in self.steps if step["do"] == "emit"}
        public = {name for name in self.makers if name[0] != "_" and name not in results}
        self.values = {n: np.asarray(v, np.float32) for n, v in given.items() if n in public}
        self._kinds_and_lengths()
        self._texts([a for a in arguments.values() if a["kind"] == "text"])
        self._sizes()
        self._numbers([a for a in arguments.values() if a["kind"] == "numbers"])
        known = {*arguments, *self.sizes, *public, (self.program["bins"] or {}).get("argument")}
        known |= {"scheduler", "seed", self.several, "batch_size", "pieces"}
        expect(given.keys() <= known, f"unknown arguments {given.keys() - known}")
        seeds = given.get("seed", 0)
        seeds = seeds if isinstance(seeds, list) else [seeds]
        self.generators = [Generator(seed) for seed in seeds]

    def _kinds_and_lengths(self) -> None:
        """Find what values have rows for, and which of them cannot be of several rows of ids."""
        symbols = {name: each["default"] for name, each in self.program["symbols"].items()}
        types = types_of(self.program, self.bundle.manifest, symbols)
        self.kinds = {name: kind for name, (kind, _, _) in types.items()}
        self.fixed: set[str] = set()
        for step in reversed(self.steps):
            if step["do"] in ("run", "loop"):
                graph = self.bundle.components[step.get("component", step.get("denoiser"))]
                every = [step["feeds"], *(branch["feeds"] for branch in step.get("branches", []))]
                pairs = [pair for feeds in every for pair in fed(feeds).items()]
                shapes = [(graph["inputs"][name]["shape"], value) for name, value in pairs]
                self.fixed |= {v for s, v in shapes if len(s) < 3 or isinstance(s[1], int)}
            elif step.get("axis") == 1 or self.fixed & {*gives(step)}:
                self.fixed |= {*needs(step)}

    def _texts(self, arguments: Sequence[Node]) -> None:
        self.texts: dict[str, list[str]] = {}
        for each in arguments:
            text = self.given.get(each["name"])
            if text is not None and (text or each["fallback"] is None):
                self.texts[each["name"]] = [text] if isinstance(text, str) else text
            elif each["default"] is not None:
                self.texts[each["name"]] = [each["default"]]
            elif each["fallback"] in self.texts:
                self.texts[each["name"]] = self.texts[each["fallback"]]
        counts = [len(value) for n, value in self.values.items() if self.kinds[n] == PROMPT]
        counts += [len(text) for text in self.texts.values()]
        each = self.given.get(self.several, 1)
        if not self.given.keys() & self.texts.keys():
            made = [n for n in self.values if self.kinds[n] == MADE]
            counts += [
                -(-len(self.values[n]) // each) for n in made if self.makers[n]["do"] != "noise"
            ]
        rows = (a["name"] for a in self.program["arguments"] if a.get("rows"))
        counts += [len(self.given[n]) for n in rows if isinstance(self.given.get(n), list)]
        self.prompts = max([*counts, self.given.get("batch_size", 1)])
        self.made = self.prompts * each

    def _sizes(self) -> None:
        state, bins = self.loop["state"], self.program["bins"]
        binned = bool(bins and self.given.get(bins["argument"], bool(bins["sizes"])))
        given = [self.values[n] for n in (state["noise"], state["clean"]) if n in self.values]
        shape = given[0].shape[1:] if given and not binned else ()
        known = dict(zip(self.makers[state["noise"]]["shape"], shape, strict=False))
        self.sizes, self.asked, usual = {}, None, {}
        for place, (name, symbol) in enumerate(self.program["symbols"].items()):
            argument, unit, of = symbol["argument"], symbol["unit"], symbol["of"]
            step = unit * symbol["multiple"]
            usual[argument] = symbol["default"] * unit + symbol["offset"]
            if of and of["image"] in self.given:
                image = self.given[of["image"]]
                image = image[0] if isinstance(image, list) else image
                usual[argument] = max(image.shape[2 + place] * of["times"] // step, 1) * step
            own = known[name] * unit + symbol["offset"] if name in known else usual[argument]
            self.sizes[argument] = int(self.given.get(argument, own))
            alone = argument in self.given and not {*symbol["together"]} <= self.given.keys()
            expect(not alone, f"{argument} without {symbol['together']}")
        self.told = self.sizes
        if state["noise"] in self.values:
            self.told = {name: self.given.get(name, side) for name, side in usual.items()}
        if binned:
            height, width = self.asked = [*self.sizes.values()][:2]
            expect(bins["sizes"] and min(self.asked) > 0 and max(self.asked) <= 65536, "bad bins")
            nearest = min(bins["sizes"], key=lambda each: abs(each[0] - height / width))
            self.sizes |= zip(self.sizes, nearest[1:], strict=False)
        self.symbols: dict[str, int] = {}
        for name, symbol in self.program["symbols"].items():
            pixels = self.sizes[symbol["argument"]]
            step, offset = symbol["unit"] * symbol["multiple"], symbol["offset"]
            beyond = (pixels - offset) % step
            if symbol["rounds"]:
                pixels += step - beyond if symbol["nearest"] and 2 * beyond > step else -beyond
            self.sizes[symbol["argument"]] = pixels
            self.symbols[name] = side = (pixels - offset) // symbol["unit"]
            most = symbol["most"] or 2**20
            fits = symbol["least"] <= side <= most and (pixels - offset) % step == 0
            expect(fits and known.get(name, side) == side, f"{name}: bad size {pixels}")

    def _numbers(self, arguments: Sequence[Node]) -> None:
        self.numbers: dict[str, list[float]] = {}
        self.row_numbers: dict[str, list[float]] = {}
        for each in arguments:
            value = self.given.get(each["name"])
            if value is None and not each["optional"]:
                value = self.numbers[each["fallback"]] if each["fallback"] else each["default"]
            numbers = value if isinstance(value, list) else [] if value is None else [value]
            numbers = numbers * each["count"] if each["spread"] and len(numbers) == 1 else numbers
            found = [self.told[n] if isinstance(n, str) else n for n in numbers]
            least, above, most = (each[name] for name in ("least", "above", "most"))
            low = all((least is None or n >= least) and (above is None or n > above) for n in found)
            high = all(most is None or n <= most for n in found)
            whole = not each["whole"] or all(n == int(n) for n in found)
            right = len(found) == each["count"] or (each["optional"] and not found)
            if each["rows"]:
                right = len(found) in (1, self.prompts)
                self.row_numbers[each["name"]] = found * (self.prompts // max(len(found), 1))
            expect(low and high and whole and right, f"{each['name']}: bad numbers {found}")
            self.numbers[each["name"]] = found

    def holds(self, tests: Sequence[Node]) -> set[bool]:
        """Return whether all tests hold."""
        return {all(map(self._test, tests))}

    def _test(self, test: Node) -> bool:
        if test["given"]:
            return any(name in self.given for name in test["given"])
        (n,) = self.numbers[test["argument"]]
        signs = {"above": n.__gt__, "at_least": n.__ge__, "below": n.__lt__, "at_most": n.__le__}
        return all(test[name] is None or sign(test[name]) for name, sign in signs.items())

    def rows(self, name: str, kind: int, given: int = 1) -> Array:
        """Return a value with as many rows as a kind has (section 8.1)."""
        array, count = self.values[name], (1, self.prompts, given, self.made)[kind]
        expect(len(array) and count % len(array) == 0, f"{name}: {len(array)} rows for {count}")
        if self.kinds[name] == PROMPT:
            return np.repeat(array, count // len(array), axis=0)
        return np.tile(array, (count // len(array), *[1] * (array.ndim - 1)))

    def run(self, wanted: Sequence[str]) -> None:
        """Run what is needed, in the order of the program (section 8.2)."""
        todo = [*wanted, *(step["gives"] for step in self.steps if step.get("always"))]
        needed: set[str] = set()
        while todo:
            name = todo.pop()
            if name not in needed and name not in self.values:
                todo += needs(self.makers[name], self.holds)
            needed.add(name)
        live = [step for step in self.steps if {*gives(step)} & needed - self.values.keys()]
        read, most = self.bundle.tokenizers, self.given.get("pieces", 1)
        tokens = [step for step in live if step["do"] == "tokens"]
        rows = [read[s["tokenizer"]].rows(t, most) for s in tokens for t in self._framed(s)]
        self.pieces = max(map(len, rows), default=1)
        self.longest = self._longest(tokens)
        for step in live:
            getattr(self, f"_do_{step['do']}")(step)

    def _longest(self, tokens: Sequence[Node]) -> dict[str, int]:
        """Return by tokenizer how many ids the longest of the texts has, and those that given
        values were made of."""
        longest: dict[str, int] = {}
        for step in tokens:
            read = self.bundle.tokenizers[step["tokenizer"]]
            own = [read.used(text) for text in self._framed(step)]
            longest[step["tokenizer"]] = max(longest.get(step["tokenizer"], 0), *own)
        for run in (step for step in self.steps if step["do"] == "run"):
            makers = [self.makers[v] for v in run["feeds"].values() if v in self.makers]
            shapes = self.bundle.components[run["component"]]["outputs"]
            for output, name in run["gives"].items():
                for maker in makers if name in self.given else ():
                    if maker["do"] == "tokens" and maker["up_to"]:
                        more = -dimension(shapes[output]["shape"][1], {"tokens": 0})
                        asked = self.given[name].shape[1] + more
                        expect(asked >= longest.get(maker["tokenizer"], 0), f"{name} is too short")
                        longest[maker["tokenizer"]] = asked
        return longest

    def _framed(self, step: Node) -> list[str]:
        return [step["template"].replace("{}", text) for text in self.texts[step["text"]]]

    def _do_tokens(self, step: Node) -> None:
        texts, read = self._framed(step), self.bundle.tokenizers[step["tokenizer"]].rows
        empty = read(step["template"].replace("{}", ""), 1) * self.pieces
        rows = [[*read(text, self.pieces), *empty][: self.pieces] for text in texts]
        length = self.longest[step["tokenizer"]] if step["up_to"] else None
        made = np.array(rows)[..., :length]
        self.values[step["gives"]] = made.repeat(self.prompts // len(rows), axis=0)

    def _do_pixels(self, step: Node) -> None:
        size = [dimension(each, self.symbols) for each in step["shape"][1:]]
        image = self.given[step["of"]]
        image = self._sized(image if step["item"] is None else image[step["item"]], size)
        if step["fill_where"] is not None:
            where = self._sized(self.given[step["fill_where"]], size) > 0.5
            image = np.where(where, np.float32(step["fill"]), image)
        if step["for_prompts"] and len(image) > 1:
            expect(len(image) == self.prompts_given, "one image for each prompt")
            image = image.repeat(self.prompts // len(image), axis=0)
        self.values[step["gives"]] = image

    def _sized(self, image: Array, size: Sequence[int]) -> Array:
        if image.shape[1] == 3:
            return image if [*image.shape[2:]] == [*size] else resized(image, size)
        whole = [*self.sizes.values()][:2]  # of a mask every so many-th pixel in the call's size
        every, mask = whole[0] // size[0], self._sized(image.repeat(3, 1), whole)
        return (mask[:, :1, ::every, ::every] >= 0.5).astype(np.float32)

    def _do_numbers(self, step: Node) -> None:
        columns: list[list[float]] = []
        for part in step["of"]:
            if part in self.row_numbers:
                columns.append(self.row_numbers[part])
            else:
                columns += [[n] for n in (self.numbers[part] if isinstance(part, str) else [part])]
        every = np.broadcast_arrays(*(np.array(column, np.float32) for column in columns))
        self.values[step["gives"]] = np.stack(every, axis=1)

    def _do_noise(self, step: Node) -> None:
        images = [self.given[name] for name in step["rows"]]
        counts = [len(i) for each in images for i in (each if isinstance(each, list) else [each])]
        several = step["each_made"] and len(self.generators) > 1
        count = self.made if several else max(counts, default=self.made)
        shape = [dimension(each, self.symbols) for each in step["shape"]]
        self.values[step["gives"]] = self.draw([count, *shape])

    def draw(self, shape: Sequence[int]) -> Array:
        """Return one draw of rows from the call's generators (section 10)."""
        if len(self.generators) == 1:
            return self.generators[0].draw(shape)
        return np.concatenate([each.draw((1, *shape[1:])) for each in self.generators[: shape[0]]])

    def _do_zeros(self, step: Node) -> None:
        like = self.values.get(step["like"])
        shape = (1, *step["shape"]) if like is None else like.shape
        self.values[step["gives"]] = np.zeros(shape, np.float32)

    def _do_run(self, step: Node) -> None:
        component, names = self.bundle.components[step["component"]], step["feeds"]
        kind = self.kinds[next(iter(step["gives"].values()))]
        given = [len(self.values[v]) for v in names.values() if self.kinds[v] == GIVEN]
        feeds = {
            name: self.rows(value, kind, max(given, default=1)) for name, value in names.items()
        }
        ids = {n for n, v in names.items() if self.makers[v]["do"] == "tokens"}
        lengths = {component["inputs"][name]["shape"][1] for name in ids}
        forms = {v: component["outputs"][n]["shape"] for n, v in step["gives"].items()}
        forms = {v: form for v, form in forms.items() if len(form) > 1 and v not in self.fixed}
        long = {v for v, form in forms.items() if lengths == {form[1]}}
        graph = self.bundle.graphs[step["component"]]
        pieces = range(self.pieces if long else 1)
        made = [graph({n: v[:, i] if n in ids else v for n, v in feeds.items()}) for i in pieces]
        for output, name in step["gives"].items():
            parts = [each[output] for each in made]
            self.values[name] = np.concatenate(parts, axis=1) if name in long else parts[0]

    def _do_join(self, step: Node) -> None:
        arrays = [self.rows(name, self.kinds[step["gives"]]) for name in step["of"]]
        self.values[step["gives"]] = np.concatenate(arrays, axis=step["axis"])

    def _do_cut(self, step: Node) -> None:
        parts = np.split(self.values[step["of"]], np.cumsum(step["sizes"]), axis=step["axis"])
        expect(not parts.pop().any(), f"{step['of']}: numbers in what nothing takes")
        self.values |= zip(step["gives"], parts, strict=True)

    def _do_choose(self, step: Node) -> None:
        way = "then" if True in self.holds(step["when"]) else "otherwise"
        self.values[step["gives"]] = self.values[step[way]]
        self.kinds[step["gives"]] = self.kinds[step[way]]

    def _do_loop(self, loop: Node) -> None:
        plan, goes_on = self._plan(loop, self.given.get(loop["plan"]["scheduler"]))
        predict = Denoiser(self, loop, plan["timesteps"])
        first = [self._first(each, plan, goes_on) for each in states_of(loop)]
        afters = [self._kept(each, plan, goes_on) for each in states_of(loop)]
        if not loop["views"]:
            self._side_by_side(loop, plan, first, predict, afters)
            return
        (sample,), (after,) = first, afters
        views, shape = views_of(sample.shape[2:], **loop["views"]), sample.shape
        first = np.concatenate([sample[..., rows, columns] for rows, columns in views])

        def draws() -> Array:
            return np.concatenate([self.draw(sample[..., a, b].shape) for a, b in views])

        def of_views(parts: Array, timestep: Any, i: int) -> Array:
            every = np.split(parts, len(views))
            return np.concatenate([predict(part, timestep, i) for part in every])

        def together(parts: Array, i: int) -> Array:
            whole = after(mean_of(parts, views, shape), i)
            return np.concatenate([whole[..., rows, columns] for rows, columns in views])

        last = run_plan(plan, first, of_views, draws, together)
        self.values[loop["state"]["name"]] = mean_of(last, views, shape)

    def _first(self, state: Node, plan: Node, goes_on: bool) -> Array:
        """Return what a state begins with."""
        clean = state["clean"] and (goes_on or True in self.holds(state["clean_when"]))
        expect(not clean or state["noise"] not in self.given, "noise, and something clean")
        sample = self.rows(state["clean"], MADE) if clean else None
        if goes_on:
            return np.asarray(sample)
        return first_sample(plan, self.rows(state["noise"], MADE), sample)

    def _kept(self, state: Node, plan: Node, goes_on: bool) -> Callable[[Array, int], Array]:
        """Return what is done to a state after each evaluation."""
        keep = {n: self.rows(v, MADE) for n, v in (state["keep"] or {}).items() if not goes_on}

        def after(made: Array, i: int) -> Array:
            if not keep:
                return made
            a, b = plan["known"][i].astype(np.float32)
            expect(not np.isnan(a), "what is kept has no noise in this plan")
            known = a * keep["value"] + b * keep["noise"]
            return np.asarray(keep["where"] * made + (1 - keep["where"]) * known)

        return after

    def _side_by_side(
        self,
        loop: Node,
        plan: Node,
        first: Sequence[Array],
        predict: Denoiser,
        afters: Sequence[Callable[[Array, int], Array]],
    ) -> None:
        """Run a plan on all states, as columns of one sample."""
        ends = np.cumsum([array[0].size for array in first])[:-1]

        def parts(rows: Array) -> list[Array]:
            columns = zip(np.split(rows, ends, axis=1), first, strict=True)
            return [part.reshape(len(rows), *array.shape[1:]) for part, array in columns]

        def joined(arrays: Sequence[Array]) -> Array:
            return np.concatenate([array.reshape(len(array), -1) for array in arrays], axis=1)

        def after(sample: Array, i: int) -> Array:
            both = zip(afters, parts(sample), strict=True)
            return joined([kept(part, i) for kept, part in both])

        last = run_plan(
            plan,
            joined(first),
            lambda sample, timestep, i: joined(predict.of(parts(sample), timestep, i)),
            lambda: joined([self.draw(array.shape) for array in first]),
            after,
            lambda sample, *how: joined([clip(part, *how) for part in parts(sample)]),
            (lambda: joined([predict.variance])) if loop["state"]["variance"] else None,
        )
        self.values |= zip((s["name"] for s in states_of(loop)), parts(last), strict=True)

    def _plan(self, loop: Node, scheduler: str | None) -> tuple[dict[str, Any], bool]:
        """Return the part of the plan that is run, and whether it goes on from another run."""
        manifest, part = self.bundle.manifest, loop["part"]
        number = {name: own[0] for name, own in self.numbers.items() if own}
        wanted = loop["plan"]["fixed"] or scheduler or manifest["defaults"]["scheduler"]
        (schedule,) = (each for each in manifest["schedules"] if each["name"] == wanted)
        table = read_plans(self.bundle.root, schedule, int(number[loop["plan"]["steps"]]))
        line, (height, width) = schedule["shift"], [*self.symbols.values()][:2]
        shift = line["intercept"] + line["slope"] * height * width if line else 0.0
        n, train = int(number[loop["plan"]["steps"]]), schedule["num_train_timesteps"]
        whole = plan_of(table, n, 0, shift)
        may, begin, goes_on = starts(whole), 0, part["start"] in self.given
        if goes_on:
            below = whole["timesteps"] < round(train * (1 - number[part["start"]]))
            begin = max(each for each in may if each <= len(below) - below.sum())
        elif part["strength"]:
            share = min(n * number[part["strength"]], n)
            kept = int(share) if part["rounds"] == "down" else n - int(n - share)
            expect(kept, "the strength leaves no step")
            begin = (n - kept) * (min(np.diff(may)) if kept < n else 0)
        expect(begin in may, "no start there")
        plan = plan_of(table, n, begin, shift)
        if part["stop"] and number[part["stop"]] < 1:
            end = (plan["timesteps"] >= round(train * (1 - number[part["stop"]]))).sum()
            expect(end, "no step is left")
            plan |= {name: plan[name][:end] for name in (*ROWS, *EVALUATIONS)}
            plan["known"][-1] = 1, 0
        return plan, goes_on


class Denoiser:
    """The prediction of a loop's branches (section 8.4), for one evaluation after the other."""

    def __init__(self, call: Call, loop: Node, timesteps: Array) -> None:
        self.call, self.loop, self.count, self.times = call, loop, len(timesteps), timesteps
        self.branches = [b for b in loop["branches"] if True in call.holds(b["when"])]
        self.base = next(b for b in self.branches if not b["push"])
        self.features: dict[str, Array] = {}
        self.variance = np.zeros(())  # of the base in the last evaluation
        self.age, self.rows = 0, 0

    def within(self, window: Node, i: int) -> Array:
        """Return 1 for each column whose window an evaluation is in, else 0."""
        numbers, m = self.call.numbers, self.count
        ends = (window[name] for name in ("start", "stop"))
        a, b = (np.array(numbers[end] if isinstance(end, str) else [end]) for end in ends)
        if window["count"] == "timestep":
            return ((a <= self.times[i]) & (self.times[i] < b)).astype(np.float32)
        if window["count"] == "within":
            return ((a <= i / m) & ((i + 1) / m <= b)).astype(np.float32)
        whole = m if window["count"] == "floor" else numbers[self.loop["plan"]["steps"]][0]
        return ((np.floor(a * whole) <= i) & (i < np.floor(b * whole))).astype(np.float32)

    def __call__(self, sample: Array, timestep: Any, i: int) -> Array:
        return self.of([sample], timestep, i)[0]

    def of(self, samples: Sequence[Array], timestep: Any, i: int) -> list[Array]:
        """Return the predictions of all states."""
        windows = [b["during"] for b in self.branches if b["during"]]
        live = self.branches if all(self.within(w, i).all() for w in windows) else [self.base]
        pairs = [*zip(states_of(self.loop), samples, strict=True)]
        feeds = {s["input"]: np.concatenate([sample] * len(live)) for s, sample in pairs}
        for name in self.loop["feeds"] | live[0]["feeds"]:
            parts = [(self.loop["feeds"] | branch["feeds"])[name] for branch in live]
            feeds[name] = np.concatenate([self._fed(part, i) for part in parts])
        outputs = self._run(feeds, timestep, i)
        if self.loop["state"]["variance"]:
            place, said = live.index(self.base), outputs[self.loop["state"]["variance"]]
            self.variance = np.split(said, len(live))[place]
        return [self._guided(outputs[s["prediction"]], live, i) for s, _ in pairs]

    def _guided(self, prediction: Array, live: Sequence[Node], i: int) -> Array:
        """Return what the branches' predictions of a state make together."""
        made = np.split(prediction, len(live))
        by_name = {branch["name"]: part for branch, part in zip(live, made, strict=True)}
        weights = dict.fromkeys(by_name, 0.0) | {self.base["name"]: 1.0}
        for name, push in ((b["name"], push) for b in live for push in b["push"]):
            if push["during"] and not self.within(push["during"], i).all():
                continue
            scale = self.call.numbers[push["by"]][0] - push["less"]
            weights[push["branch"]] += scale
            weights[name] -= scale
        parts = [np.float32(weight) * by_name[name] for name, weight in weights.items()]
        found, base = np.sum(parts, axis=0), by_name[self.base["name"]]
        amount = self.call.numbers[self.loop["rescale"]][0] if self.loop["rescale"] else 0
        if len(live) == 1:
            return np.asarray(found)
        found = rescaled(found, base, amount) if amount else found
        combine, sources = self.loop["combine"], by_name | {"guided": np.asarray(found)}
        if not combine or not {*combine["feeds"].values()} <= sources.keys():
            return np.asarray(found)
        inputs = {name: sources[source] for name, source in combine["feeds"].items()}
        combined = self.call.bundle.graphs[combine["component"]](inputs)
        return combined[self.loop["state"]["prediction"]]

    def _fed(self, feed: Any, i: int) -> Array:
        if isinstance(feed, str):
            return self.call.rows(feed, MADE)
        return self.call.rows(feed["value"], MADE) * self.within(feed["during"], i)

    def _run(self, feeds: dict[str, Array], timestep: Any, i: int) -> dict[str, Array]:
        cache, bundle = self.loop["cache"], self.call.bundle
        switches = [s for s in self.loop["switches"] if self.within(s["during"], i).all()]
        name = switches[0]["component"] if switches else self.loop["denoiser"]
        rows = len(next(iter(feeds.values())))
        every = self.call.numbers[cache["every"]][0] if cache else 1
        whole = rows != self.rows or self.age >= every
        self.age, self.rows = 1 if whole else self.age + 1, rows
        component = bundle.components[name if whole else cache["component"]]
        count = rows if component["inputs"]["timestep"]["shape"] != [1] else 1
        feeds = feeds | {"timestep": np.full(count, timestep, np.float32)}
        made = bundle.graphs[component["name"]](feeds | (self.features if not whole else {}))
        if whole and cache:
            self.features = {each: made[each] for each in cache["keeps"]}
        return made


def views_of(sides: Sequence[int], size: int, stride: int) -> list[tuple[slice, slice]]:
    """Return the places of the views of a state (section 8.4), row by row."""
    starts = [range(0, max(side - size, 0) + 1, stride) for side in sides]
    return [(slice(y, y + size), slice(x, x + size)) for y in starts[0] for x in starts[1]]


def mean_of(parts: Array, views: Sequence[tuple[slice, slice]], shape: Sequence[int]) -> Array:
    """Return the state whose views these are, the mean where they overlap."""
    total, count = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    for (rows, columns), part in zip(views, np.split(parts, len(views)), strict=True):
        total[..., rows, columns] += part
        count[..., rows, columns] += 1
    return np.asarray(total / count)


def rescaled(made: Array, like: Array, amount: float) -> Array:
    """Return the prediction with the deviation of the base's, image by image."""
    factors = [1 + amount * (np.std(b) / np.std(a) - 1) for a, b in zip(made, like, strict=True)]
    return made * np.array(factors, np.float32).reshape(-1, *[1] * (made.ndim - 1))
