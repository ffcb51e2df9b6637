"""The programs of the independent reader: what statements give and need, the types of values, and
the rules (sections 7 and 8 of docs/bundle-format.md). It imports nothing of latentc."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Node = Mapping[str, Any]  # a part of the manifest
Tests = Callable[[Sequence[Node]], set[bool]]  # whether tests hold: what may be
Type = tuple[int, bool, tuple[int, ...]]  # kind of rows, whether integers, shape of a row
CALL, PROMPT, GIVEN, MADE = range(4)  # kinds of rows (section 8.1)
_DIMENSION = re.compile(r"(?:([1-9]\d{0,3})\*)?([a-z][a-z0-9_]{0,31})([+-][1-9]\d{0,5})?")
_NAME = re.compile(r"_?[a-z][a-z0-9_]{0,63}")


class Refused(Exception):
    """The bundle or the call breaks a rule of the document."""


def expect(condition: Any, message: str) -> None:
    """Raise Refused unless `condition` holds."""
    if not condition:
        raise Refused(message)


def gives(step: Node) -> list[str]:
    """Return the names of what a statement makes."""
    if step["do"] in ("loop", "emit"):
        return [state["name"] for state in states_of(step)] if step["do"] == "loop" else []
    made = step["gives"]
    return [made] if isinstance(made, str) else [*(made.values() if step["do"] == "run" else made)]


def states_of(loop: Node) -> list[Node]:
    """Return the states of a loop."""
    return [loop["state"], *loop["other_states"]]


def fed(feeds: Node) -> dict[str, str]:
    """Return the values that feed inputs."""
    return {name: feed if isinstance(feed, str) else feed["value"] for name, feed in feeds.items()}


def named(row: Node) -> list[str]:
    """Return the arguments whose numbers stand in a row."""
    return [part for part in row["of"] if isinstance(part, str)]


def needs(step: Node, holds: Tests = lambda tests: {True, False}) -> list[str]:
    """Return the values that a statement needs (section 8.2)."""
    if step["do"] == "choose":
        ways = holds(step["when"])
        return [step[name] for name in ("then", "otherwise") if (name == "then") in ways]
    if step["do"] in ("join", "cut", "emit"):
        return [step["of"]] if isinstance(step["of"], str) else step["of"]
    if step["do"] != "loop":
        return [*step.get("feeds", {}).values()] + ([step["like"]] if step.get("like") else [])
    start = step["part"]["start"]
    goes_on = holds([{"given": [start]}]) if start else {False}
    begins = []
    for state in states_of(step):
        begins += [state["noise"]] if False in goes_on else []
        if state["clean"] and True in goes_on | holds(state["clean_when"]):
            begins.append(state["clean"])
        begins += [*(state["keep"] or {}).values()]
    live = [branch["feeds"] for branch in step["branches"] if True in holds(branch["when"])]
    every = [value for feeds in (step["feeds"], *live) for value in fed(feeds).values()]
    return [*begins, *every]


def dimension(size: int | str, symbols: Mapping[str, int]) -> int:
    """Return the number that a dimension is where the symbols have these values."""
    if isinstance(size, int):
        return size
    match = _DIMENSION.fullmatch(size)
    expect(match, f"bad dimension {size!r}")
    factor, symbol, more = match.groups() if match else ("", "", "")
    return int(factor or 1) * symbols[symbol] + int(more or 0)


def bind(form: Sequence[int | str], shape: Sequence[int], symbols: dict[str, int]) -> None:
    """Hold a shape against that of a tensor of a graph, whose symbols get their values."""
    expect(len(form) == len(shape), f"shape {[*shape]} for {form}")
    for size, found in zip(form, shape, strict=True):
        match = _DIMENSION.fullmatch(str(size))
        wanted = size
        if match:
            factor, more = int(match[1] or 1), int(match[3] or 0)
            wanted = factor * symbols.setdefault(match[2], (found - more) // factor) + more
            expect(symbols[match[2]] > 0, f"shape {[*shape]} for {form}")
        expect(wanted == found and found > 0, f"shape {[*shape]} for {form}")


def types_of(program: Node, document: Node, symbols: Mapping[str, int]) -> dict[str, Type]:
    """Return the types of all values where the symbols have these values."""
    types: dict[str, Type] = {}
    for step in program["steps"]:
        expect({*needs(step)} <= types.keys(), f"{step['do']}: a value that is not there before")
        made = _Typing(program, document, symbols, types).made(step)
        for name, (_, _, shape) in made.items():
            fits = all(size > 0 for size in shape) and math.prod(shape) <= 2**28 and len(shape) < 8
            expect(fits and name not in types, f"{name}: {shape}, or given twice")
        types |= made
    return types


class _Typing:
    def __init__(
        self, program: Node, document: Node, symbols: Mapping[str, int], types: Mapping[str, Type]
    ) -> None:
        self.arguments = {each["name"]: each for each in program["arguments"]}
        units = {n: (each["unit"], each["offset"]) for n, each in program["symbols"].items()}
        self.sides = [(*unit, name) for name, unit in units.items()][:2]
        self.graphs = {each["name"]: each for each in document["components"]}
        self.lengths = {each["name"]: each["max_length"] for each in document["tokenizers"]}
        sides = [*program["symbols"].values()][:2]
        # A side that is always the same need be a multiple of nothing.
        self.multiples = [
            each["default"] if each["least"] == each["most"] else each["multiple"] for each in sides
        ]
        self.symbols, self.types = symbols, types
        tokens = (step for step in program["steps"] if step["do"] == "tokens")
        self.shorter = {step["gives"] for step in tokens if step["up_to"] is not None}

    def made(self, step: Node) -> dict[str, Type]:
        """Return the types of what a statement gives."""
        used = [self.types[name] for name in needs(step)]
        met = {kind for kind, _, _ in used}
        rows = MADE if {PROMPT, GIVEN} <= met else max(met, default=CALL)
        if step["do"] in ("run", "loop", "emit", "cut"):
            return dict(getattr(self, f"_{step['do']}")(step, rows))
        shape = tuple(dimension(size, self.symbols) for size in step.get("shape", ()))
        integers = step["do"] == "tokens" or any(own for _, own, _ in used)
        if step["do"] == "tokens":
            rows, shape = PROMPT, (self.lengths[step["tokenizer"]],)
            self._are([step["text"]], "text")
            template = step["template"]
            expect(template.count("{}") == 1 and len(template) <= 4096, "a bad template")
            expect(step["up_to"] in (None, *shape), f"ids up to {step['up_to']}: {shape}")
        elif step["do"] == "pixels":
            self._pixels(step)
            rows = GIVEN
        elif step["do"] == "numbers":
            names = named(step)
            self._are(names, "numbers")
            rows = PROMPT if any(self.arguments[name]["rows"] for name in names) else CALL
            shape = (sum(1 if n not in names else self.arguments[n]["count"] for n in step["of"]),)
            constants = [number for number in step["of"] if number not in names]
            expect(all(abs(number) <= 1e9 for number in constants), f"numbers: {constants}")
        elif step["do"] == "noise":
            self._are(step["rows"], "image", "mask")
            rows = GIVEN if step["rows"] else MADE
        elif step["do"] == "zeros":
            expect((step["like"] is None) == bool(step["shape"]), "zeros of two forms, or of none")
            shape = used[0][2] if used else shape
        else:  # join and choose
            forms = [(own, [*shape]) for _, own, shape in used]
            sizes = [form.pop(step["axis"] - 1) for _, form in forms] if "axis" in step else []
            expect(all(form == forms[0] for form in forms), f"{needs(step)} are of other forms")
            expect(step.get("axis", 1) >= 1 and step.get("when", [1]), "a bad axis, or no test")
            shape = used[0][2]
            if sizes:
                at = step["axis"]
                shape = (*shape[: at - 1], sum(sizes), *shape[at:])
        expect(shape, f"{step['do']}: no shape")
        return {step["gives"]: (rows, integers, shape)}

    def _are(self, names: Sequence[str], *kinds: str) -> None:
        expect(all(self.arguments[n]["kind"] in kinds for n in names), f"{names}: no {kinds}")

    def _pixels(self, step: Node) -> None:
        self._are([step["of"]], "image", "mask")
        argument, count = self.arguments[step["of"]], self.arguments[step["of"]].get("count")
        channels = 3 if argument["kind"] == "image" else 1
        expect(len(step["shape"]) == 3 and step["shape"][0] == channels, "pixels: bad shape")
        expect((step["item"] is None) == (count is None), "an item of no list")
        expect(0 <= (step["item"] or 0) < (count or 1), "an item beyond the list")
        gap = 1 if step["reducing_gap"] is None else step["reducing_gap"]
        expect(1 <= gap <= 16 and (step["reducing_gap"] is None or step["fit"] != "crop"), "a gap")
        if step["fill_where"] is not None:
            self._are([step["fill_where"]], "mask")
            expect(channels == 3 and 0 <= step["fill"] <= 1, "a bad fill")

    def _graph(self, name: str, values: Mapping[str, str]) -> dict[str, Type]:
        """Return the types of what a graph gives, which is fed values."""
        graph, symbols = self.graphs[name], dict[str, int]()
        expect(graph["inputs"].keys() == values.keys(), f"{name} takes {[*graph['inputs']]}")
        for input, value in values.items():
            _, integers, shape = self.types[value]
            spec = graph["inputs"][input]
            expect(("int" in spec["dtype"]) == integers, f"{name}.{input}: {spec['dtype']}")
            free = value not in self.shorter or isinstance(spec["shape"][-1], str)
            expect(free, f"{name}.{input} takes texts of one length")
            bind(spec["shape"], (7, *shape), symbols)  # as many rows as no other size is likely
            expect(spec["shape"][0] == "batch", f"{name}.{input}: no rows")
        made = {}
        for output, spec in graph["outputs"].items():
            sizes = tuple(dimension(size, symbols) for size in spec["shape"])
            expect(spec["shape"][0] == "batch", f"{name}.{output}: {sizes}, no rows")
            made[output] = (MADE, "int" in spec["dtype"], sizes[1:])
        return made

    def _run(self, step: Node, rows: int) -> dict[str, Type]:
        made = self._graph(step["component"], step["feeds"])
        one = len(step["feeds"]) == len(step["gives"]) == 1
        expect(one or not step["tiles"], "tiles of several inputs or outputs")
        return {name: (rows, *made[output][1:]) for output, name in step["gives"].items()}

    def _cut(self, step: Node, rows: int) -> dict[str, Type]:
        (_, integers, shape), at, sizes = self.types[step["of"]], step["axis"], step["sizes"]
        expect(len(sizes) == len(step["gives"]) > 0 < at <= len(shape), "cut: bad sizes or axis")
        expect(min(sizes) > 0 and sum(sizes) <= shape[at - 1], f"cut: {sizes} of {shape}")
        shapes = [(*shape[: at - 1], size, *shape[at:]) for size in sizes]
        return {n: (rows, integers, s) for n, s in zip(step["gives"], shapes, strict=True)}

    def _emit(self, step: Node, rows: int) -> dict[str, Type]:
        kind, integers, shape = self.types[step["of"]]
        rate = step["rate"]
        expect(rate is None or (step["kind"] == "frames" and 0 < rate <= 1000), f"rate {rate}")
        if step["kind"] == "arrays":
            return {}
        sides = tuple(unit * self.symbols[name] + more for unit, more, name in self.sides)
        axes = 4 if step["kind"] == "frames" else 3
        right = kind == MADE and not integers and len(shape) == axes and shape[-2:] == sides
        expect(right and shape[-3] in (1, 3, 4), f"emit: no images of {sides}: {shape}")
        return {}

    def _loop(self, loop: Node, rows: int) -> dict[str, Type]:
        state, graph, cache = loop["state"], self.graphs[loop["denoiser"]], loop["cache"]
        states = states_of(loop)
        for each in states:
            self._state(each, graph)
        kind, integers, shape = sample = self.types[state["noise"]]
        own, time = graph["inputs"][state["input"]], graph["inputs"]["timestep"]
        expect(time["dtype"] == "float32", "loop: bad timestep")
        expect(time["shape"] in ([1], ["batch"]), f"loop: timestep {time['shape']}")
        for names in ([s["input"] for s in states], [s["prediction"] for s in states]):
            expect(len({*names}) == len(names) <= 16 > len(loop["switches"]), "loop: too many")
        said = [each["prediction"] for each in states]
        if any(each["variance"] for each in states):
            expect(len(states) == 1 != said.count(state["variance"]), "loop: a bad variance")
            said.append(state["variance"])
            like = graph["outputs"][state["prediction"]]
            expect(graph["outputs"].get(state["variance"]) == like, "loop: no such variance")
        for switch in loop["switches"]:
            other = self.graphs[switch["component"]]
            alike = other["inputs"] == graph["inputs"] and not cache and other is not graph
            forms = [[g["outputs"].get(name) for name in said] for g in (graph, other)]
            expect(alike and forms[0] == forms[1], "loop: another denoiser")
        if loop["combine"]:
            self._combine(loop, graph["outputs"][state["prediction"]])
        inputs = {n: spec for n, spec in graph["inputs"].items() if n != "timestep"}
        self.graphs = {**self.graphs, loop["denoiser"]: {**graph, "inputs": inputs}}
        if loop["views"]:
            shape = self._view(loop["views"], shape, cache)
            expect(not state["variance"], "loop: views, and a variance")
            sides = [side for side in own["shape"][2:] if isinstance(side, str)]
            alike = len({*sides, "batch"}) <= len(sides)
            every = [n for n in inputs if n != state["input"]]
            sizes = [str(size).split("*")[-1] for n in every for size in inputs[n]["shape"][1:]]
            expect(not alike and not {*sides} & {*sizes}, "loop: views, and bad symbols")
            self.types = {**self.types, state["noise"]: (kind, integers, shape)}
        for branch in loop["branches"]:
            expect(not loop["feeds"].keys() & branch["feeds"], "loop: an input is fed twice")
            feeds = fed({**loop["feeds"], **branch["feeds"]})
            feeds |= {each["input"]: each["noise"] for each in states}
            made = self._graph(loop["denoiser"], feeds)
            for each in states:
                form = self.types[each["noise"]]
                expect(made[each["prediction"]] == form, "loop: bad prediction")
        if cache:
            shallow = self.graphs[cache["component"]]
            known = graph["inputs"] | {name: graph["outputs"][name] for name in cache["keeps"]}
            right = all(known[name] == spec for name, spec in shallow["inputs"].items())
            given = [[each["outputs"].get(n) for n in said] for each in (graph, shallow)]
            taken = 0 < len({*cache["keeps"]} & shallow["inputs"].keys()) == len(cache["keeps"])
            expect(right and taken and given[0] == given[1], "loop: a bad cache")
        self.types = {**self.types, state["noise"]: sample}
        return {each["name"]: self.types[each["noise"]] for each in states}

    def _state(self, state: Node, graph: Node) -> None:
        kind, integers, shape = self.types[state["noise"]]
        keep = state["keep"] or {}
        same = [state["clean"] or state["noise"], *(keep[n] for n in ("value", "noise") if keep)]
        expect(all(self.types[name][1:] == (False, shape) for name in same), "loop: other forms")
        expect(kind == MADE and not integers and shape, "loop: no noise of images")
        if keep:
            expect(self.types[keep["where"]][1:] == (False, (1, *shape[1:])), "loop: bad `where`")
        expect(graph["inputs"][state["input"]]["dtype"] == "float32", "loop: bad sample")
        expect(state["prediction"] in graph["outputs"], "loop: no such prediction")

    def _combine(self, loop: Node, prediction: Node) -> None:
        combine, names = loop["combine"], [branch["name"] for branch in loop["branches"]]
        graph = self.graphs[combine["component"]]
        forms = [*graph["inputs"].values(), graph["outputs"].get(loop["state"]["prediction"])]
        expect(all(form == prediction for form in forms), "combine: other forms")
        expect(combine["feeds"].keys() == graph["inputs"].keys(), "combine: other inputs")
        known = {*combine["feeds"].values()} <= {"guided", *names}
        expect(known and len(names) > 1 and not loop["views"], "combine: no such branches")

    def _view(self, views: Node, shape: Sequence[int], cache: Node | None) -> tuple[int, ...]:
        """Return the form of a view of a state."""
        size, stride = views["size"], views["stride"]
        right = 1 <= stride <= size <= 4096 and size % stride == 0 and len(shape) == 3
        expect(right and not cache, f"views of {size} every {stride}")
        expect(all(each % stride == 0 for each in self.multiples), "views that leave something out")
        return (shape[0], *(min(side, size) for side in shape[1:]))


def problems(program: Node) -> Iterator[str]:
    """Yield which rules a program breaks, of those that hold whatever the graphs are."""
    steps, symbols, bins = program["steps"], program["symbols"], program["bins"]
    arguments = {each["name"]: each for each in program["arguments"]}
    sizes = [symbol["argument"] for symbol in symbols.values()]
    values = [name for step in steps for name in gives(step)]
    names = [*(each["name"] for each in program["arguments"]), *sizes, *values, "scheduler"]
    if len(program["arguments"]) > 64 or len(steps) > 256 or not 2 <= len(symbols) <= 16:
        yield "too many arguments, statements or symbols, or too few"
        return
    if len({*names}) < len(names) or not all(map(_NAME.fullmatch, names)):
        yield "bad names, or two that are alike"
    if any(name[0] == "_" for name in (*arguments, *sizes)):
        yield "a private argument"
    emits = [step for step in steps if step["do"] == "emit"]
    kinds = [step["kind"] for step in emits]
    if sum(kind != "arrays" for kind in kinds) != 1 or not 1 <= len(loops_of(program)) <= 8:
        yield "no loop, too many, or images that are not emitted once"
        return
    if len({step["of"] for step in emits}) < len(emits):
        yield "something is emitted twice"
    if bins:
        sides = [side for _, *own in bins["sizes"] for side in own]
        whole = all(isinstance(side, int) and 1 <= side <= 2**20 for side in sides)
        right = whole and len(sides) == 2 * len(bins["sizes"]) <= 2048
        if not right or bins["argument"] in names:
            yield "bad bins"
    yield from _symbol_problems(symbols, arguments, sizes)
    yield from _argument_problems(program["arguments"], sizes)
    for loop in loops_of(program):
        yield from _loop_problems(loop, program, arguments)
    yield from _use_problems(program, arguments, {*names})


def loops_of(program: Node) -> list[Node]:
    """Return the loops of a program, the main one last."""
    return [step for step in program["steps"] if step["do"] == "loop"]


def _symbol_problems(symbols: Node, arguments: Node, sizes: Sequence[str]) -> Iterator[str]:
    for name, each in symbols.items():
        most = 2**20 if each["most"] is None else each["most"]
        numbers = (each["default"], each["multiple"], each["least"])
        if not re.fullmatch(r"[a-z][a-z0-9_]{0,31}", name) or not 1 <= each["unit"] <= 2**20:
            yield f"{name}: a bad symbol or unit"
        elif not all(1 <= number <= most <= 2**20 for number in numbers):
            yield f"{name}: numbers out of range"
        elif each["default"] < each["least"] or each["default"] % each["multiple"]:
            yield f"{name}: a bad default"
        elif (each["most"] or 0) % each["multiple"] or not {*each["together"]} <= {*sizes}:
            yield f"{name}: a bad limit, or together with no size"
        elif abs(each["offset"]) > 2**20 or each["unit"] * each["least"] + each["offset"] < 1:
            yield f"{name}: an offset of {each['offset']}"
        elif each["nearest"] and not each["rounds"]:
            yield f"{name}: the nearest of nothing"
        elif each["of"] and not 1 <= each["of"]["times"] <= 64:
            yield f"{name}: {each['of']['times']} times an image"
        elif each["of"] and arguments[each["of"]["image"]]["kind"] not in ("image", "mask"):
            yield f"{name}: of no image"


def _argument_problems(arguments: Sequence[Node], sizes: Sequence[str]) -> Iterator[str]:
    earlier: dict[str, Node] = {}
    for each in arguments:
        other = earlier.get(each.get("fallback") or "", {})
        ways = sum([each.get("default") not in (None, []), each.get("fallback") is not None])
        ways += each.get("optional", False)
        if each.get("fallback") is not None and other.get("kind") != each["kind"]:
            yield f"{each['name']}: falls back to nothing before it"
        if not 1 <= (1 if each.get("count") is None else each["count"]) <= 64:
            yield f"{each['name']}: {each['count']} of them"
        rows = each.get("rows", False)
        if ways > 1 or (each["kind"] == "numbers" and not ways and not rows):
            yield f"{each['name']}: a default, a fallback or optional"
        if each["kind"] == "numbers":
            if each["default"] and len(each["default"]) != each["count"]:
                yield f"{each['name']}: {len(each['default'])} defaults"
            if any(isinstance(n, str) and n not in sizes for n in each["default"]):
                yield f"{each['name']}: a default that is no size"
            others = (each["fallback"], each["optional"], each["spread"], each["count"] != 1)
            if rows and (any(others) or any(isinstance(n, str) for n in each["default"])):
                yield f"{each['name']}: not one number for each prompt"
            if other and (other["count"] != each["count"] or other["optional"] or other["rows"]):
                yield f"{each['name']}: falls back to other numbers"
        earlier[each["name"]] = each


def _is_number(each: Node) -> bool:
    """Return whether an argument is one number in every call, whatever its size."""
    one = each.get("kind") == "numbers" and each["count"] == 1 and not each["optional"]
    one = one and not each["rows"]
    return one and not any(isinstance(n, str) for n in each["default"])


def _loop_problems(loop: Node, program: Node, arguments: Mapping[str, Node]) -> Iterator[str]:
    part, states, names = loop["part"], states_of(loop), [b["name"] for b in loop["branches"]]
    (base, *more) = [each for each in loop["branches"] if not each["push"]] or [{"when": [1]}]
    if not 1 <= len({*names}) == len(names) <= 16 or more or base["when"] or base["during"]:
        yield "branches that are alike, too many, or without one base that always runs"
        return
    pushes = [(b["name"], push) for b in loop["branches"] for push in b["push"]]
    if any(push["branch"] not in names or push["branch"] == own for own, push in pushes):
        yield "a push of no other branch"
    every = [loop["plan"]["steps"], part["strength"], part["stop"], loop["rescale"]]
    every += [push["by"] for _, push in pushes] + [(loop["cache"] or {}).get("every")]
    if not all(_is_number(arguments.get(name, {})) for name in every if name is not None):
        yield "an argument of the loop that is no number in every call"
    if part["start"] and arguments.get(part["start"], {}).get("count") != 1:
        yield "a start that is no number"
    if not 1 <= (arguments[loop["plan"]["steps"]]["most"] or 0) <= 10000:
        yield "no largest step count, or a larger one than 10000"
    drawn = [step["gives"] for step in program["steps"] if step["do"] == "noise"]
    for state in states:
        if state["clean"] is None and (state["clean_when"] or part["strength"] or part["start"]):
            yield "nothing clean to start from"
        if state["noise"] not in drawn or loop["plan"]["scheduler"] in arguments:
            yield "no noise to begin with, or no scheduler"
    if len(states) > 1 and any(loop[n] for n in ("cache", "views", "rescale", "combine")):
        yield "several states, and what knows one"
    if loop["plan"]["fixed"] and loop["plan"]["scheduler"] != "scheduler":
        yield "plans of two kinds"
    counts = [branch["during"]["count"] for branch in loop["branches"] if branch["during"]]
    if "guided" in names or "timestep" in counts:
        yield "a bad branch"
    for window in windows_of(loop):
        ends = [window["start"], window["stop"]]
        known = [arguments.get(end, {}) for end in ends if isinstance(end, str)]
        fractions = [end for end in ends if not isinstance(end, str)]
        if not all(each.get("kind") == "numbers" and not each["optional"] for each in known):
            yield "a window by what is no number in every call"
        empty = len(fractions) == 2 and ends[0] >= ends[1]
        most = 1e6 if window["count"] == "timestep" else 1
        if empty or not all(0 <= end <= most for end in fractions):
            yield f"a window from {ends[0]} to {ends[1]}"


def windows_of(loop: Node) -> list[Node]:
    """Return the windows of a loop's denoisers, branches, pushes and feeds."""
    feeds = [f for b in ({"feeds": loop["feeds"]}, *loop["branches"]) for f in b["feeds"].values()]
    pushes = [push for branch in loop["branches"] for push in branch["push"]]
    every = [*loop["switches"], *loop["branches"], *pushes]
    own = [each["during"] for each in every if each["during"]]
    return own + [feed["during"] for feed in feeds if not isinstance(feed, str)]


def _use_problems(program: Node, arguments: Mapping[str, Node], names: set[str]) -> Iterator[str]:
    """Check tests, and that everything is used by something."""
    steps = program["steps"]
    tests = [test for step in steps for test in step.get("when", [])]
    for loop in loops_of(program):
        parts = [state["clean_when"] for state in states_of(loop)]
        parts += [branch["when"] for branch in loop["branches"]]
        tests += [test for part in parts for test in part]
    for test in tests:
        limits = [test[n] for n in ("above", "at_least", "below", "at_most") if test[n] is not None]
        if bool(test["given"]) == (test["argument"] is not None and len(limits) == 1):
            yield "a test of nothing, or of two things"
        if not {*test["given"]} <= names or any(name[0] == "_" for name in test["given"]):
            yield f"a test of {test['given']}"
        tested = arguments.get(test["argument"], {})
        if test["argument"] is not None and not (_is_number(tested) and tested["default"]):
            yield f"a test of {test['argument']}, which is no number with a default"
    used: set[Any] = {name for step in steps for name in needs(step)}
    used |= {step["gives"] for step in steps if step.get("always")}
    used |= {name for test in tests for name in (*test["given"], test["argument"])}
    runs = {name: step for step in steps if step["do"] == "run" for name in gives(step)}
    emits = {step["of"]: step["kind"] for step in steps if step["do"] == "emit"}
    arrays = [name for name, kind in emits.items() if kind == "arrays"]
    if any(name[0] == "_" or runs.get(name, {"group": 1})["group"] for name in arrays):
        yield f"private arrays, or none of a component in no group: {arrays}"
    (shown,) = emits.keys() - {*arrays}
    for _ in steps:
        if len(runs.get(shown, {"feeds": ()})["feeds"]) == 1:
            (shown,) = runs[shown]["feeds"].values()
    if shown not in gives(loops_of(program)[-1]) or shown in emits:
        yield "images that components of one input do not make of what the loop gives"
    for step in steps:
        if gives(step) and all(name[0] == "_" and name not in used for name in gives(step)):
            yield f"nothing uses {gives(step)}"
        own = [step.get("text"), step.get("fill_where")]
        own += [step["of"]] if step["do"] == "pixels" else step.get("rows", [])
        own += named(step) if step["do"] == "numbers" else []
        used |= {*own}
    used |= {each.get("fallback") for each in arguments.values()}
    used |= {symbol["of"]["image"] for symbol in program["symbols"].values() if symbol["of"]}
    for loop in loops_of(program):
        used |= {end for window in windows_of(loop) for end in (window["start"], window["stop"])}
        used |= {*loop["part"].values(), *loop["plan"].values(), loop["rescale"]}
        used |= {push["by"] for branch in loop["branches"] for push in branch["push"]}
        used |= {(loop["cache"] or {}).get("every")}
    if not arguments.keys() <= used:
        yield f"nothing uses {sorted(arguments.keys() - used)}"
