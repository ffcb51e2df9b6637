"""Options of commands, made of options that are declared once (`latentc.runtimes.options`)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from latentc.runtimes.commands.option_types import Finite
from latentc.runtimes.options import Declared, declared

_Command = TypeVar("_Command", bound=Callable[..., Any])


def options_of(
    arguments: type,
    without: Collection[str] = (),
    settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> Callable[[_Command], _Command]:
    """Return a decorator that gives a command the options of a TypedDict, in their order. A
    parameter has the keyword's name and is None, or an empty tuple, where it is not given.

    Args:
        settings: what click is told besides, by option, where the command line takes something
            else than Python, such as the name of a file.
    """

    def decorate(command: _Command) -> _Command:
        for option in reversed([*declared(arguments).values()]):
            if not option.option.hidden and option.name not in without:
                special = (settings or {}).get(option.name, {})
                command = click_option(option, special)(command)
        return command

    return decorate


def click_option(
    option: Declared, special: Mapping[str, Any] | None = None
) -> Callable[[_Command], _Command]:
    """Return the decorator for one option; `special` is what click is told besides. A flag that
    begins with ``--no-``, alone, says False."""
    flags = option.flags
    settings: dict[str, Any] = {"help": _help(option), "default": None}
    if option.option.metavar:
        settings["metavar"] = option.option.metavar
    if option.kind is bool:
        settings["is_flag"] = True
        if _says_no(option):
            settings["flag_value"] = False
        elif option.option.default is True and len(flags) == 1:
            flags = (f"{flags[0]}/--no-{flags[0].removeprefix('--')}",)
    else:
        settings["type"] = _type(option)
        if option.several:
            settings |= {"multiple": True, "default": ()}
    return click.option(*flags, option.name, **{**settings, **(special or {})})


def _says_no(option: Declared) -> bool:
    return all(flag.startswith("--no-") for flag in option.flags)


def _help(option: Declared) -> str:
    repeated = "  May be repeated." if option.several else ""
    usual = "" if _says_no(option) else option.usual
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
