"""Options that are declared once: their names, types, defaults, limits and one sentence each.

An option is a key of a `TypedDict` whose type is annotated with an `Option`:

    class LoadArguments(TypedDict, total=False):
        threads: Annotated[int, Option("Threads of the engine.", default=0, least=0, most=4096)]

The TypedDict is the signature that type checkers see (``**arguments: Unpack[LoadArguments]``); the
checks, what `help` shows, the command line and the tables of the documentation are made of its
options. A key of a TypedDict without ``total=False`` must be given. What another declaration has
already is taken from there (`like`).
"""

from __future__ import annotations

import inspect
import math
import os
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from numbers import Integral, Real
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from latentc.runtimes.errors import InputError, shown
from latentc.runtimes.unknown_names import ADVICE_ON_OPTIONS, suggestion

_COMMON = (bool, int, float, str)
_FUNCTION = cast(type, Callable)
_OPTIONS = "{options}"  # in a docstring: where the lines of the options go
_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Option:
    """An option says what a keyword is, besides its name and type.

    `help`: one sentence, for ``--help`` and the documentation; `details`: what the documentation
    and docstrings say besides. `default`: what holds where the option is not given; `usual` says it
    in words where a value cannot. `least` and `most`: inclusive limits of a number, `above` and
    `below`: exclusive ones. `choices`: the texts that are possible, where the type does not say
    them. `flags`: on the command line, where that is not the name with hyphens, and of those one
    that says no (``--no-``) after one that says yes; `aliases`: flags that other tools have for the
    same, which the command line takes and does not show; `metavar`: what stands for its value
    there. `hidden`: why the command line has no such option. `see`: a link from docs/ to where more
    is said.
    """

    help: str
    default: Any = None
    usual: str = ""
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    metavar: str = ""
    hidden: str = ""
    see: str = ""
    details: str = ""

    @property
    def meaning(self) -> str:
        """Everything that is said of it in words, its default aside."""
        return f"{self.help} {self.details}".rstrip()


@dataclass(frozen=True)
class Declared:
    """A keyword with its option. `kind`: the type of one value, of `_COMMON`, `Path`, `Callable`,
    or `object` where it is none of them; `several`: whether a sequence of them is taken as well;
    `optional`: whether None is; `hint`: its type as it was written; `required`: whether it must be
    given."""

    name: str
    kind: type
    several: bool
    optional: bool
    option: Option
    hint: Any
    required: bool = False

    @property
    def flags(self) -> tuple[str, ...]:
        """Return its spellings on the command line."""
        return self.option.flags or ("--" + self.name.replace("_", "-"),)

    @property
    def aliases(self) -> tuple[str, ...]:
        """Return further spellings that the command line takes: flags of other tools, the keyword's
        own name, and underscores in the place of hyphens."""
        named = () if self.says_no else ("--" + self.name.replace("_", "-"),)
        flags = (flag for flag in self.flags if self.says_no or not flag.startswith("--no-"))
        hyphened = (*flags, *self.option.aliases, *named)
        long = (flag for flag in hyphened if flag.startswith("--"))
        every = dict.fromkeys((*hyphened, *("--" + flag[2:].replace("-", "_") for flag in long)))
        return tuple(flag for flag in every if flag not in self.flags)

    @property
    def says_no(self) -> bool:
        """Return whether the command line has a flag for False alone."""
        keyword_says_so = self.name.startswith("no_")
        return not keyword_says_so and all(flag.startswith("--no-") for flag in self.flags)

    @property
    def usual(self) -> str:
        """Return what holds where it is not given, in words; "" where that is nothing."""
        default = self.option.default
        if isinstance(default, tuple):
            return self.option.usual or ", ".join(map(str, default))
        if self.option.usual or not isinstance(default, str | int | float) or default is False:
            return self.option.usual
        return "on" if default is True else str(default)

    @cached_property
    def parameter(self) -> inspect.Parameter:
        """Return the parameter that it is in the signature of a function."""
        kind = inspect.Parameter.KEYWORD_ONLY
        default = inspect.Parameter.empty if self.required else self.option.default
        return inspect.Parameter(self.name, kind, default=default, annotation=self.hint)

    @property
    def explained(self) -> str:
        """Return its meaning, the texts that are possible, and what holds where the default's value
        does not say it."""
        choices, usual = ", ".join(self.option.choices), self.option.usual
        sentences = (
            self.option.meaning,
            f"One of {choices}." if choices else "",
            f"By default {usual}." if usual else "",
        )
        return " ".join(filter(None, sentences))


# What a function or a command takes: a TypedDict, or options that are known at run time alone.
Arguments = type | Mapping[str, Declared]


@cache
def declared(arguments: type) -> Mapping[str, Declared]:
    """Return the options of a TypedDict by name, in their order.

    Raises:
        TypeError: a key has no option.
    """
    hints = get_type_hints(arguments, include_extras=True)
    needed: frozenset[str] = getattr(arguments, "__required_keys__", frozenset())
    return {name: _declared(name, hint, name in needed) for name, hint in hints.items()}


def like(arguments: type, name: str, **changes: Any) -> Option:
    """Return the option of another TypedDict, for a keyword that means the same; `changes` are
    fields that differ, such as `usual`."""
    return replace(declared(arguments)[name].option, **changes)


@cache  # a key that several declarations inherit is looked at once
def _declared(name: str, hint: Any, required: bool) -> Declared:
    if get_origin(hint) is not Annotated:
        raise TypeError(f"{name}: expected Annotated[type, Option(…)], found {hint!r}")
    annotated, *extras = get_args(hint)
    (option,) = (extra for extra in extras if isinstance(extra, Option))
    kinds, several = set[type](), False
    for part in _members(annotated):
        sequence = _is_sequence(get_origin(part))
        several = several or sequence
        kinds |= {_kind(item) for item in (_items(part) if sequence else (part,))}
    optional = type(None) in kinds
    kinds.discard(type(None))
    if kinds == {int, float} or kinds == {str, Path}:
        kinds = {float} if int in kinds else {Path}
    kind = kinds.pop() if len(kinds) == 1 else object
    return Declared(name, kind, several, optional, option, annotated, required)


def _members(hint: Any) -> Sequence[Any]:
    """Return what a union is made of, or the type alone."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _is_sequence(origin: Any) -> bool:
    return (
        isinstance(origin, type)
        and issubclass(origin, Iterable)
        and not issubclass(origin, Mapping)
    )


def _items(sequence: Any) -> Sequence[Any]:
    return [part for item in get_args(sequence) if item is not ... for part in _members(item)]


def _kind(part: Any) -> type:
    if get_origin(part) is Literal:
        return str
    if get_origin(part) is os.PathLike:
        return Path
    if get_origin(part) is Callable:
        return _FUNCTION
    return part if part in (*_COMMON, Path, type(None)) else object


def takes(arguments: type, others: bool = False) -> Callable[[_Function], _Function]:
    """Return a decorator for a function that takes ``**arguments: Unpack[arguments]``.

    `inspect.signature` and `help` then show each option by its name and default, and a line of the
    docstring that is ``{options}`` becomes one line for each, those that are parameters besides
    included.

    Args:
        others: whether the function takes keywords of other names as well.
    """

    def decorate(function: _Function) -> _Function:
        signature = inspect.signature(function)
        options = declared(arguments)
        by_place, by_name, of_any_name = [], {}, []
        for parameter in signature.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                of_any_name.append(parameter.replace(annotation=Any))
            elif parameter.kind is parameter.KEYWORD_ONLY:
                by_name[parameter.name] = parameter
            else:
                by_place.append(parameter)
        places = {parameter.name for parameter in by_place}
        declared_ones = {n: option.parameter for n, option in options.items() if n not in places}
        named = {**declared_ones, **by_name}.values()
        parameters = [*by_place, *named, *(of_any_name if others else ())]
        function.__signature__ = signature.replace(  # type: ignore[attr-defined]  # read by inspect
            parameters=parameters
        )
        if function.__doc__ and _OPTIONS in function.__doc__:
            function.__doc__ = _with_lines(function.__doc__, options)
        return function

    return decorate


def _with_lines(text: str, options: Mapping[str, Declared]) -> str:
    """Return a docstring with a line for each option in the place of ``{options}``."""
    before, _, after = text.partition(_OPTIONS)
    indent = before.rpartition("\n")[2]
    lines = (f"{name}: {each.explained}" for name, each in options.items())
    return before + f"\n{indent}".join(lines) + after


def options_in(arguments: Arguments) -> Mapping[str, Declared]:
    """Return the options by name."""
    return declared(arguments) if isinstance(arguments, type) else arguments


def given_of(arguments: Arguments, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was given, checked; options that are None and may be count as not given.

    Raises:
        InputError: an unknown name, with those that are near; a value of another type, or beyond
            its limits.
    """
    known = options_in(arguments)
    for name in given:
        if name not in known:
            raise InputError(unknown_argument(name, known))
    checked = {name: value for name, value in given.items() if value is not None}
    for name, value in checked.items():
        check(known[name], value)
    return checked


def complete(arguments: Arguments, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the value of every option: the one that was given, checked, or the default.

    Raises:
        InputError: as `given_of`; or one is not given that must be.
    """
    values = given_of(arguments, given)
    for name, option in options_in(arguments).items():
        if option.required and name not in values:
            raise InputError(f"the argument {name!r} is missing; give it: {option.option.help}")
    defaults = {name: each.option.default for name, each in options_in(arguments).items()}
    return {**defaults, **values}


def tuple_of(value: Any) -> tuple[Any, ...]:
    """Return the values of an option that takes several, of which one may be given alone."""
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,)


def unknown_argument(
    name: str,
    options: Mapping[str, Declared],
    taken: Sequence[str] | None = None,
    has: str = "known",
) -> str:
    """Return what to say of a name that is no argument.

    Args:
        options: what is declared, by name.
        taken: the names that there are; None says those of the options.
        has: what leads to their list.
    """
    names = [*options] if taken is None else taken
    spelled = {
        flag.lstrip("-"): option.name
        for option in options.values()
        if option.name in names and not option.says_no
        for flag in (*option.flags, *option.aliases)
    }
    hint = suggestion(name, names, has, other_names=spelled, advice=ADVICE_ON_OPTIONS)
    return f"unknown argument {name!r}; {hint}"


def check(option: Declared, value: Any) -> None:
    """Check a value's type and limits, where they are known here.

    Raises:
        InputError: another type, too small or large, or none of the choices.
    """
    several = option.several and isinstance(value, Sequence) and not isinstance(value, str | bytes)
    for item in value if several else (value,):
        _check_type(option, item)
        check_limits(option, item)


def _check_type(option: Declared, value: Any) -> None:
    accepted: dict[type, tuple[type, ...]] = {int: (Integral,), float: (Real,), Path: (str, Path)}
    kinds = (object,) if option.kind is object else accepted.get(option.kind, (option.kind,))
    flag_for_number = isinstance(value, bool) and option.kind in (int, float)
    if not isinstance(value, kinds) or flag_for_number:
        words = {bool: "True or False", int: "an integer", float: "a number", str: "a text"}
        is_function = option.kind is _FUNCTION
        wanted = "a function" if is_function else words.get(option.kind, "a path")
        how = f": {option.option.help}" if is_function else ""
        raise InputError(f"{option.name!r} must be {wanted}, not {shown(value)}{how}")


def check_limits(option: Declared, value: Any) -> None:
    """Check a value of the right type. Raises InputError as `check` does."""
    limits = option.option
    if limits.choices and isinstance(value, str) and value not in limits.choices:
        names, near = ", ".join(limits.choices), suggestion(value, limits.choices, has="")
        said = f"{option.name!r} must be one of {names}, not {shown(value)}"
        raise InputError(f"{said}; {near}" if near else said)
    number = isinstance(value, Real)
    if number and limits.least is not None and not value >= limits.least:
        raise InputError(f"{option.name!r} must be at least {limits.least}, not {shown(value)}")
    if number and limits.most is not None and not value <= limits.most:
        raise InputError(f"{option.name!r} must be at most {limits.most}, not {shown(value)}")
    if number and limits.above is not None and not value > limits.above:
        raise InputError(f"{option.name!r} must be above {limits.above}, not {shown(value)}")
    if number and limits.below is not None and not value < limits.below:
        raise InputError(f"{option.name!r} must be below {limits.below}, not {shown(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{option.name!r} must be finite, not {value}")
