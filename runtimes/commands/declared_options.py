"""Options of commands, made of options that are declared once (`latentc.runtimes.options`)."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

import click

from latentc.runtimes.commands.option_types import Finite
from latentc.runtimes.options import Declared, declared

_Command = TypeVar("_Command", bound=Callable[..., Any])


def options_of(arguments: type, without: Collection[str] = ()) -> Callable[[_Command], _Command]:
    """Return a decorator that gives a command the options of a TypedDict, in their order. A
    parameter has the keyword's name and is None, or an empty tuple, where it is not given."""

    def decorate(command: _Command) -> _Command:
        for option in reversed([*declared(arguments).values()]):
            if not option.option.hidden and option.name not in without:
                command = click_option(option)(command)
        return command

    return decorate


def click_option(option: Declared) -> Callable[[_Command], _Command]:
    """Return the decorator for one option."""
    settings: dict[str, Any] = {"help": _help(option), "default": None}
    if option.option.metavar:
        settings["metavar"] = option.option.metavar
    if option.kind is bool:
        flags = option.flags
        if option.option.default is True and len(flags) == 1:
            flags = (f"{flags[0]}/--no-{flags[0].removeprefix('--')}",)
        return click.option(*flags, option.name, is_flag=True, **settings)
    if option.several:
        settings |= {"multiple": True, "default": ()}
    return click.option(*option.flags, option.name, type=_type(option), **settings)


def _help(option: Declared) -> str:
    usual = option.option.usual
    default = option.option.default
    if not usual and isinstance(default, str | int | float) and not isinstance(default, bool):
        usual = str(default)
    if default is True:
        usual = usual or "on"
    repeated = "  May be repeated." if option.several else ""
    return f"{option.option.help}{repeated}" + (f"  [default: {usual}]" if usual else "")


def _type(option: Declared) -> Any:
    least, most = option.option.least, option.option.most
    if option.option.choices:
        return click.Choice(option.option.choices)
    if option.kind is int:
        return click.IntRange(least, most)  # type: ignore[arg-type]  # limits of integers are
    if option.kind is float:
        return Finite(least, most)
    return click.Path(path_type=Path) if option.kind is Path else str
