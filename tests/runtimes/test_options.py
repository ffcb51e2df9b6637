"""Options declared once: types, limits and the command line come of the declaration."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict, Unpack

import click
import numpy as np
import pytest
from click.testing import CliRunner

from latentc.runtimes.commands.declared_options import given_options, options_of
from latentc.runtimes.errors import InputError
from latentc.runtimes.options import Option, complete, declared, given_of, like, takes, tuple_of


class Arguments(TypedDict, total=False):
    height: Annotated[int | None, Option("The height.", least=8, most=64, metavar="PIXELS")]
    scale: Annotated[float, Option("How strong.", default=1.0, least=0)]
    verify: Annotated[bool, Option("Compare.", default=True)]
    lora: Annotated[str | Path | Sequence[str | Path], Option("LoRA files.", default=())]
    kind: Annotated[Literal["pil", "np"], Option("Images.", default="pil", choices=("pil", "np"))]
    floor: Annotated[float, Option("What is reached.", above=0, below=99)]
    latents: Annotated[Any, Option("Noise.", hidden="arrays are given by --value")]


def test_types_are_read() -> None:
    found = {
        name: (option.kind, option.several, option.optional)
        for name, option in declared(Arguments).items()
    }
    assert found == {
        "height": (int, False, True),
        "scale": (float, False, False),
        "verify": (bool, False, False),
        "lora": (Path, True, False),
        "kind": (str, False, False),
        "floor": (float, False, False),
        "latents": (object, False, False),
    }


def test_what_is_no_sequence() -> None:
    class Others(TypedDict, total=False):
        cache: Annotated[str | os.PathLike[str] | None, Option("A folder.")]
        options: Annotated[Mapping[str, str], Option("Options.")]
        callback: Annotated[Callable[[int], str] | None, Option("Is called.")]

    kinds = {name: (each.kind, each.several) for name, each in declared(Others).items()}
    assert kinds == {
        "cache": (Path, False),
        "options": (object, False),
        "callback": (Callable, False),
    }


def test_a_key_without_an_option() -> None:
    class Bare(TypedDict, total=False):
        height: int

    with pytest.raises(TypeError, match="height: expected Annotated"):
        declared(Bare)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"heigth": 8}, "unknown argument 'heigth'; did you mean 'height'?"),
        ({"coffee": 8}, "unknown argument 'coffee'; known: height, scale, verify, lora"),
        ({"height": 7}, "'height' must be at least 8, not 7"),
        ({"height": 65}, "'height' must be at most 64, not 65"),
        ({"height": True}, "'height' must be an integer, not True"),
        ({"height": 8.5}, "'height' must be an integer, not 8.5"),
        ({"height": 10**5000}, "'height' must be at most 64, not one of type int"),
        ({"scale": float("inf")}, "'scale' must be finite, not inf"),
        ({"scale": float("nan")}, "'scale' must be at least 0, not nan"),
        ({"verify": 1}, "'verify' must be True or False, not 1"),
        ({"lora": ["a", 3]}, "'lora' must be a path, not 3"),
        ({"kind": "jpg"}, "'kind' must be one of pil, np, not 'jpg'"),
        ({"floor": 0}, "'floor' must be above 0, not 0"),
        ({"floor": 99}, "'floor' must be below 99, not 99"),
    ],
)
def test_what_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        given_of(Arguments, given)
    assert message in str(error.value)


def test_defaults_stand_for_what_is_not_given() -> None:
    assert given_of(Arguments, {"height": None, "scale": 2}) == {"scale": 2}
    whole = complete(Arguments, {"height": 16})
    assert whole["height"] == 16
    assert whole["verify"] is True
    assert whole["lora"] == ()


def test_options_that_are_known_at_run_time_alone() -> None:
    known = {name: declared(Arguments)[name] for name in ("height", "scale")}
    assert complete(known, {"height": 16}) == {"height": 16, "scale": 1.0}
    with pytest.raises(InputError, match="unknown argument 'verify'; known: height, scale"):
        complete(known, {"verify": True})


def test_numbers_of_other_kinds() -> None:
    assert given_of(Arguments, {"height": np.int64(16), "scale": np.float32(2)})["height"] == 16
    with pytest.raises(InputError, match="'height' must be at most 64, not "):
        given_of(Arguments, {"height": np.uint8(65)})


def test_functions_show_their_options() -> None:
    @takes(Arguments, others=True)
    def make(name: str, scale: float = 1.0, **arguments: Unpack[Arguments]) -> None:
        """Make it.

        Args:
            {options}

        Returns:
            nothing.
        """

    parameters = inspect.signature(make).parameters
    expected = ["name", "scale", "height", "verify", "lora", "kind", "floor", "latents"]
    assert list(parameters) == [*expected, "arguments"]
    assert str(parameters["height"]) == "height: int | None = None"
    assert "Args:\n    height: The height.\n    scale: How strong." in inspect.getdoc(make)
    assert "kind: Images. One of pil, np.\n" in inspect.getdoc(make)
    assert "latents: Noise.\n\nReturns:" in inspect.getdoc(make)


def test_what_functions_do_not_show() -> None:
    @takes(Arguments)
    def make(*, name: str = "", scale: float = 2.0, **arguments: Unpack[Arguments]) -> None:
        """Make it."""

    shown = list(inspect.signature(make).parameters.values())
    assert [parameter.name for parameter in shown] == [*declared(Arguments), "name"]
    assert shown[1].default == 2.0
    assert make.__doc__ == "Make it."


def test_the_command_line() -> None:
    seen: dict[str, Any] = {}

    @click.command()
    @options_of(Arguments)
    def command(**options: Any) -> None:
        seen.update(options)

    result = CliRunner().invoke(command, ["--height", "9", "--no-verify", "--lora", "a.b"])
    assert result.exit_code == 0, result.output
    assert seen == {
        "height": 9,
        "scale": None,
        "verify": False,
        "lora": (Path("a.b"),),
        "kind": None,
        "floor": None,
    }
    assert given_options(seen) == {"height": 9, "verify": False, "lora": (Path("a.b"),)}
    help_text = CliRunner().invoke(command, ["--help"]).output
    assert "--height PIXELS" in help_text
    assert "[default: 1.0]" in help_text
    assert "May be repeated" in help_text
    refused = CliRunner().invoke(command, ["--height", "7"])
    assert refused.exit_code == 2
    assert "Invalid value for '--height': 'height' must be at least 8, not 7" in refused.output


def test_what_the_command_line_takes_in_another_form() -> None:
    class Other(TypedDict, total=False):
        binning: Annotated[bool | None, Option("In `this` size.", flags=("--no-binning",))]
        steps: Annotated[int | None, Option("Steps.")]
        scale: Annotated[float | None, Option("A scale.")]
        image: Annotated[Any | Sequence[Any] | None, Option("An image.")]

    seen: list[dict[str, Any]] = []

    @click.command()
    @options_of(Other, settings={"image": {"type": click.Path(path_type=Path)}})
    def command(**options: Any) -> None:
        seen.append(options)

    for line in ("--no-binning --image a --image b", ""):
        assert CliRunner().invoke(command, line.split()).exit_code == 0
    assert seen == [
        {"binning": False, "image": (Path("a"), Path("b")), "steps": None, "scale": None},
        {"binning": None, "image": (), "steps": None, "scale": None},
    ]
    help_text = CliRunner().invoke(command, ["--help"]).output
    assert "In this size." in help_text
    assert "<=" not in help_text
    refused = CliRunner().invoke(command, ["--scale", "nan"]).output
    assert "Invalid value for '--scale': 'scale' must be finite, not nan" in refused


class _Needed(TypedDict):
    names: Annotated[str | Sequence[str], Option("A name.", flags=("--name",))]


class Whole(_Needed, total=False):
    size: Annotated[int | None, like(Arguments, "height", usual="one that fits")]
    exact: Annotated[
        bool | None,
        Option("Exactly.", usual="the file's", flags=("--exact", "--no-exact")),
    ]
    watch: Annotated[Callable[[int], None] | None, Option("Called after a step.", hidden="no")]


def test_what_another_declaration_has() -> None:
    size, height = declared(Whole)["size"], declared(Arguments)["height"]
    assert (size.usual, size.option.help) == ("one that fits", "The height.")
    assert height.usual == ""
    with pytest.raises(InputError, match="'size' must be at least 8, not 7"):
        complete(Whole, {"names": "a", "size": 7})


def test_what_must_be_given() -> None:
    @takes(Whole)
    def make(**arguments: Unpack[Whole]) -> dict[str, Any]:
        return complete(Whole, arguments)

    parameters = inspect.signature(make).parameters
    assert parameters["names"].default is inspect.Parameter.empty
    assert parameters["size"].default is None
    for given in ({}, {"names": None}):
        with pytest.raises(InputError, match="'names' is missing; give it: A name"):
            make(**given)
    assert make(names="a")["names"] == "a"


def test_one_or_several() -> None:
    assert tuple_of("ab") == ("ab",)
    assert tuple_of(["a", "b"]) == ("a", "b")
    assert tuple_of(()) == ()


def test_a_function_is_needed() -> None:
    message = "'watch' must be a function, not 3: Called after a step."
    with pytest.raises(InputError, match=re.escape(message)):
        complete(Whole, {"names": "a", "watch": 3})
    assert complete(Whole, {"names": "a", "watch": print})["watch"] is print


def test_flags_that_say_yes_and_no() -> None:
    seen: list[dict[str, Any]] = []

    @click.command()
    @options_of(Whole)
    def command(**options: Any) -> None:
        seen.append(given_options(options))

    for line in ("--name a --no-exact", "--name a --name b --exact", "--name a"):
        assert CliRunner().invoke(command, line.split()).exit_code == 0
    assert seen == [
        {"names": ("a",), "exact": False},
        {"names": ("a", "b"), "exact": True},
        {"names": ("a",)},
    ]
    assert "Missing option '--name'" in CliRunner().invoke(command, []).output


def test_a_keyword_that_says_no_has_a_flag_for_true() -> None:
    class Negative(TypedDict, total=False):
        no_cache: Annotated[bool, Option("Compile anew.", default=False)]
        verify: Annotated[bool, Option("Compare.", default=True, flags=("--no-verify",))]

    @click.command()
    @options_of(declared(Negative))
    def command(**options: Any) -> None:
        click.echo(repr(given_options(options)))

    for arguments, expected in (
        (["--no-cache"], {"no_cache": True}),
        (["--no_cache"], {"no_cache": True}),
        (["--no-verify"], {"verify": False}),
        ([], {}),
    ):
        result = CliRunner().invoke(command, arguments)
        assert result.output == f"{expected}\n", arguments
