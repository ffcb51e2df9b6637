"""Options of commands, made of options that are declared once (`latentc.runtimes.options`)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from latentc.runtimes.errors import InputError
from latentc.runtimes.options import Arguments, Declared, check, options_in
from latentc.runtimes.unknown_names import ADVICE_ON_OPTIONS, suggestion

_Command = TypeVar("_Command", bound=Callable[..., Any])
if TYPE_CHECKING:
    _Choice = click.Choice[str]
else:  # click 8.1 has no types in brackets
    _Choice = click.Choice


def options_of(
    arguments: Arguments,
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
        for option in reversed([*options_in(arguments).values()]):
            if not option.option.hidden and option.name not in without:
                special = (settings or {}).get(option.name, {})
                command = _click_option(option, special)(command)
        return command

    return decorate


def given_options(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return those parameters of a command that were given."""
    return {name: value for name, value in parameters.items() if value not in (None, ())}


class SpelledOption(click.Option):
    """An option that is also taken in spellings that help and completion do not show."""

    def __init__(self, *arguments: Any, aliases: Collection[str] = (), **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.aliases = tuple(aliases)

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        """Have the parser know all spellings; it takes them from `opts`, as help does."""
        shown = self.opts
        self.opts = [*shown, *self.aliases]
        try:
            super().add_to_parser(parser, ctx)
        finally:
            self.opts = shown


def no_such_option(flag: str, command: click.Command) -> str:
    """Return what to say of a flag that a command does not have."""
    shown: list[str] = []
    others: dict[str, str] = {}
    for parameter in command.params:
        if isinstance(parameter, click.Option) and not parameter.hidden:
            shown += [*parameter.opts, *parameter.secondary_opts]
            aliases = parameter.aliases if isinstance(parameter, SpelledOption) else ()
            others |= dict.fromkeys(aliases, parameter.opts[-1])
    hint = suggestion(flag, shown, has="", other_names=others, advice=ADVICE_ON_OPTIONS)
    return f"no such option: {flag}" + (f"; {hint}" if hint else "")


class CheckedChoice(_Choice):
    """The texts that are possible, for completion; the option's check refuses others."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the text as it is."""
        return str(value)


def _click_option(
    option: Declared, special: Mapping[str, Any] | None = None
) -> Callable[[_Command], _Command]:
    """Return the decorator for one option; `special` is what click is told besides. A flag that
    begins with ``--no-`` says False."""
    flags = option.flags
    settings: dict[str, Any] = {"default": None, "callback": _checked(option)}
    settings |= {"cls": SpelledOption, "aliases": option.aliases}
    if option.option.metavar:
        settings["metavar"] = option.option.metavar
    if option.kind is bool:
        settings["is_flag"] = True
        if option.says_no:
            settings["flag_value"] = False
        elif option.option.default is True and len(flags) == 1:
            flags = (f"{flags[0]}/--no-{flags[0].removeprefix('--')}",)
        elif any(map(_is_no, flags)):
            flags = ("/".join(flags),)
    else:
        settings["type"] = _type(option)
        if option.several:
            settings |= {"multiple": True, "default": ()}
    if option.required:
        settings["required"] = True
    settings |= special or {}
    help_line = _help(option, settings.get("multiple", False))
    return click.option(*flags, option.name, help=help_line, **settings)


def _is_no(flag: str) -> bool:
    return flag.startswith("--no-")


def _help(option: Declared, repeated: bool) -> str:
    usual = "" if option.says_no else option.usual
    words = [
        option.option.help,
        *(["May be repeated."] if repeated else []),
        *([f"[default: {usual}]"] if usual else []),
    ]
    return "  ".join(words).replace("`", "")


def _type(option: Declared) -> Any:
    if option.option.choices:
        return CheckedChoice(option.option.choices)
    types = {int: click.INT, float: click.FLOAT, Path: click.Path(path_type=Path)}
    return types.get(option.kind, click.STRING)


def _checked(option: Declared) -> Callable[[click.Context, click.Parameter, Any], Any]:
    """Return a callback that refuses a value in the words in which Python is refused it."""

    def callback(context: click.Context, parameter: click.Parameter, value: Any) -> Any:
        if value is not None:
            try:
                check(option, value)
            except InputError as error:
                raise click.BadParameter(str(error), context, parameter) from None
        return value

    return callback
