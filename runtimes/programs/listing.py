"""Programs as people read them: one line for each statement."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from latentc.runtimes.programs import statements as form
from latentc.runtimes.programs.statements import (
    Branch,
    During,
    Feed,
    Image,
    Loop,
    Mask,
    Numbers,
    Program,
    Statement,
    Test,
    Text,
    Window,
)


def listing(program: Program) -> str:
    """Return a program in the form of docs/programs.md, which explains it."""
    head = f"program {program.name}"
    lines = [f"{head:<60}stands for {program.stands_for}"]
    lines += [f"  {line}" for line in _arguments(program)]
    lines.append("")
    for statement in program.steps:
        lines += [f"  {line}" for line in _statement(statement)]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _arguments(program: Program) -> Iterator[str]:
    for argument in program.arguments:
        match argument:
            case Text():
                yield f"text    {argument.name}{_text_default(argument)}"
            case Image():
                many = "" if argument.count is None else f"[{argument.count}]"
                latents = f" (latents: {argument.latents})" if argument.latents else ""
                yield f"image   {argument.name}{many}{latents}"
            case Mask():
                yield f"mask    {argument.name}"
            case Numbers():
                yield f"number  {_number(argument)}"
    for name, symbol in program.symbols.items():
        yield f"size    {_symbol(name, symbol)}"
    if program.bins is not None:
        count = len(program.bins.sizes)
        yield f"size    in the nearest of {count} sizes, unless {program.bins.argument} = False"


def _text_default(text: Text) -> str:
    if text.fallback is not None:
        return f" = {text.fallback}"
    if text.default is not None:
        return f' = "{text.default}"'
    return "?" if text.optional else ""


def _number(numbers: Numbers) -> str:
    many = "" if numbers.count == 1 else f"[{numbers.count}]"
    default = numbers.fallback or ", ".join(_shown(value) for value in numbers.default)
    limits = ""
    if (numbers.least, numbers.above, numbers.most) != (None, None, None):
        low = f"({_shown(numbers.above)}" if numbers.above is not None else ""
        low = low or f"[{'' if numbers.least is None else _shown(numbers.least)}"
        high = "" if numbers.most is None else _shown(numbers.most)
        limits = f" {low}..{high}]"
    kind = " whole" if numbers.whole else ""
    spread = " spread" if numbers.spread else ""
    spread = " for each prompt" if numbers.rows else spread
    given = f" = {default}" if default else "" if numbers.rows else "?"
    return f"{numbers.name}{many}{given}{limits}{kind}{spread}"


def _symbol(name: str, symbol: form.Symbol) -> str:
    offset = f" {'+' if symbol.offset > 0 else '-'} {abs(symbol.offset)}" if symbol.offset else ""
    parts = [f"{symbol.argument} = {name} * {symbol.unit}{offset}"]
    if symbol.multiple > 1:
        parts.append(f"multiple {symbol.multiple}")
    if symbol.least > 1:
        parts.append(f"least {symbol.least}")
    if symbol.most is not None:
        parts.append(f"most {symbol.most}")
    if symbol.rounds:
        parts.append("rounds to the nearest" if symbol.nearest else "rounds down")
    parts.append(f"default {symbol.default}")
    if symbol.of is not None:
        times = "" if symbol.of.times == 1 else f" times {symbol.of.times}"
        parts.append(f"of {symbol.of.image}{times} where given")
    if symbol.together:
        parts.append(
            f"together with {', '.join(n for n in symbol.together if n != symbol.argument)}"
        )
    return ", ".join(parts)


def _shown(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def _statement(statement: Statement) -> Iterator[str]:
    match statement:
        case form.Tokens():
            yield _tokens(statement)
        case form.Pixels():
            yield _pixels(statement)
        case form.NumberRow():
            yield f"{statement.gives} = numbers {', '.join(map(_shown, statement.of))}"
        case form.Noise():
            yield _noise(statement)
        case form.Zeros():
            of = f"like {statement.like}" if statement.like else _shape(statement.shape)
            yield f"{statement.gives} = zeros {of}"
        case form.Run():
            yield _run(statement)
        case form.Join():
            group = _group(statement.group)
            yield f"{statement.gives} = join axis {statement.axis} {', '.join(statement.of)}{group}"
        case form.Cut():
            sizes = ", ".join(map(str, statement.sizes))
            gives = ", ".join(statement.gives)
            yield f"{gives} = cut axis {statement.axis} {statement.of} in {sizes}"
        case form.Choose():
            when = _tests(statement.when)
            chosen = f"{statement.then} when {when} else {statement.otherwise}"
            yield f"{statement.gives} = choose {chosen}{_group(statement.group)}"
        case form.Emit():
            rate = "" if statement.rate is None else f" rate {statement.rate:g}"
            yield f"emit {statement.kind} {statement.of}{rate}"
        case Loop():
            yield from _loop(statement)


def _group(group: str | None) -> str:
    return f"    group {group}" if group else ""


def _shape(shape: form.Shape) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _tokens(tokens: form.Tokens) -> str:
    framed = tokens.template != "{}"
    within = f" in {json.dumps(tokens.template, ensure_ascii=False)}" if framed else ""
    most = "" if tokens.up_to is None else f" up to {tokens.up_to}"
    return f"{tokens.gives} = tokens {tokens.text} by {tokens.tokenizer}{most}{within}"


def _pixels(pixels: form.Pixels) -> str:
    item = "" if pixels.item is None else f"[{pixels.item}]"
    how = "" if pixels.resample == "lanczos" else f" {pixels.resample}"
    how += "" if pixels.reducing_gap is None else f" reducing_gap {pixels.reducing_gap:g}"
    fit = "" if pixels.fit == "stretch" else f" {pixels.fit}"
    fill = f" fill {pixels.fill:g} where {pixels.fill_where}" if pixels.fill_where else ""
    rows = " for prompts" if pixels.for_prompts else ""
    what = f"{pixels.of}{item} {_shape(pixels.shape)}"
    return f"{pixels.gives} = pixels {what}{how}{fit}{fill}{rows}"


def _noise(noise: form.Noise) -> str:
    rows = f"rows of {', '.join(noise.rows)}" if noise.rows else "rows of the images made"
    each = ", with several generators of the images made" if noise.each_made else ""
    always = " always" if noise.always else ""
    return f"{noise.gives} = noise {_shape(noise.shape)} {rows}{each}{always}"


def _run(run: form.Run) -> str:
    feeds = _pairs(run.feeds)
    gives = ", ".join(run.gives.values())
    outputs = ", ".join(run.gives)
    outputs = outputs if len(run.gives) == 1 else f"({outputs})"
    tiles = " tiles" if run.tiles else ""
    return f"{gives} = run {run.component}({feeds}).{outputs}{tiles}{_group(run.group)}"


def _pairs(feeds: Mapping[str, str]) -> str:
    return ", ".join(f"{name}: {value}" for name, value in feeds.items())


def _loop(loop: Loop) -> Iterator[str]:
    part = "".join(_part(loop.part))
    plans = loop.plan.scheduler if loop.plan.fixed is None else f"of {loop.plan.fixed}"
    plan = f"plan {plans}, {loop.plan.steps}"
    names = ", ".join(state.name for state in loop.states)
    yield f"{names} = loop {loop.denoiser}    {plan}{part}"
    for switch in loop.switches:
        yield f"  {switch.component} in its place during {_window(switch.during)}"
    for state in loop.states:
        yield from (f"  {line}" for line in _state(state))
    if loop.views is not None:
        yield f"  views of {loop.views.size} every {loop.views.stride}"
    if loop.feeds:
        yield f"  feeds {_feeds(loop.feeds)}"
    for branch in loop.branches:
        yield from (f"  {line}" for line in _branch(branch))
    if loop.rescale is not None:
        yield f"  rescale {loop.rescale}"
    if loop.combine is not None:
        yield f"  combine {loop.combine.component}({_pairs(loop.combine.feeds)})"
    if loop.cache is not None:
        keeps = ", ".join(loop.cache.keeps)
        yield f"  cache {loop.cache.component} keeps {keeps} every {loop.cache.every}"


def _part(part: form.Part) -> Iterator[str]:
    if part.strength is not None:
        yield f"    part last {part.strength} {part.rounds}"
    if part.start is not None:
        yield f"    from {part.start}"
    if part.stop is not None:
        yield f"    until {part.stop}"


def _state(state: form.State) -> Iterator[str]:
    clean = ""
    if state.clean is not None:
        when = f" when {_tests(state.clean_when)}" if state.clean_when else ""
        clean = f", clean {state.clean}{when}"
    variance = "" if state.variance is None else f", variance {state.variance}"
    gives = f"{state.input}/{state.prediction}{variance}"
    yield f"state {state.name} from {state.noise}{clean} -> {gives}"
    if state.keep is not None:
        keep = state.keep
        kept = f"keep {keep.value} where {keep.where} = 0"
        yield f"  {kept}, as noisy as the step with {keep.noise}"


def _branch(branch: Branch) -> Iterator[str]:
    kind = "branch" if branch.push else "base"
    when = f" when {_tests(branch.when)}" if branch.when else ""
    during = f" during {_window(branch.during)}" if branch.during is not None else ""
    yield f"{kind} {branch.name}{when}{during}: {_feeds(branch.feeds)}".rstrip(": ")
    for push in branch.push:
        less = f" - {push.less:g}" if push.less else ""
        during = f" during {_window(push.during)}" if push.during is not None else ""
        yield f"  push {push.branch} away by {push.by}{less}{during}"


def _feeds(feeds: Mapping[str, Feed]) -> str:
    return ", ".join(f"{name} = {_feed(feed)}" for name, feed in feeds.items())


def _feed(feed: Feed) -> str:
    return f"{feed.value} during {_window(feed.during)}" if isinstance(feed, During) else feed


def _window(window: Window) -> str:
    return f"{window.count} {_shown(window.start)} .. {_shown(window.stop)}"


def _tests(tests: tuple[Test, ...]) -> str:
    return " and ".join(map(_test, tests))


def _test(test: Test) -> str:
    if test.given:
        return f"given {'any of ' if len(test.given) > 1 else ''}{', '.join(test.given)}"
    limits = {">": test.above, ">=": test.at_least, "<": test.below, "<=": test.at_most}
    sign, limit = next((sign, each) for sign, each in limits.items() if each is not None)
    return f"{test.argument} {sign} {limit:g}"
