"""Options declared once: types, limits and the command line come of the declaration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import click
import pytest
from click.testing import CliRunner

from latentc.runtimes.commands.declared_options import options_of
from latentc.runtimes.errors import InputError
from latentc.runtimes.options import Option, complete, declared, given_of


class Arguments(TypedDict, total=False):
    height: Annotated[int | None, Option("The height.", least=8, most=64, metavar="PIXELS")]
    scale: Annotated[float, Option("How strong.", default=1.0, least=0)]
    verify: Annotated[bool, Option("Compare.", default=True)]
    lora: Annotated[str | Path | Sequence[str | Path], Option("LoRA files.", default=())]
    kind: Annotated[Literal["pil", "np"], Option("Images.", default="pil", choices=("pil", "np"))]
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
        "latents": (object, False, False),
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
        ({"scale": float("nan")}, "'scale' must be at least 0, not nan"),
        ({"verify": 1}, "'verify' must be True or False, not 1"),
        ({"lora": ["a", 3]}, "'lora' must be a path, not 3"),
        ({"kind": "jpg"}, "'kind' must be one of pil, np, not 'jpg'"),
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
    }
    help_text = CliRunner().invoke(command, ["--help"]).output
    assert "--height PIXELS" in help_text
    assert "[default: 1.0]" in help_text
    assert "May be repeated" in help_text
    assert CliRunner().invoke(command, ["--height", "7"]).exit_code == 2
