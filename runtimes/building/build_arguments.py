"""This module declares once each argument of building a bundle's engines.

As in `latentc.runtimes.calls.call_arguments`, little is imported and annotations are no texts.
"""

import os
from collections.abc import Callable
from typing import Annotated, TypeAlias, TypedDict

from latentc.runtimes.options import Option, like
from latentc.runtimes.presets.load_arguments import LoadArguments

Report: TypeAlias = Callable[[str], None]

_RANGE = "MIN:OPT:MAX"
_THE_RECIPES = "the recipe's"
_PAGE = "tensorrt.md#the-recipe"


class RangeArguments(TypedDict, total=False):
    """The arguments that say for which calls engines are built, each as a text."""

    images: Annotated[
        str | None,
        Option(
            "Images in one call, such as `1:1:4`.", usual=_THE_RECIPES, metavar=_RANGE, see=_PAGE
        ),
    ]
    height: Annotated[
        str | None,
        Option(
            "Height in pixels; one number is that size only.", usual=_THE_RECIPES, metavar=_RANGE
        ),
    ]
    width: Annotated[
        str | None, Option("Width in pixels, likewise.", usual=_THE_RECIPES, metavar=_RANGE)
    ]
    num_frames: Annotated[
        str | None,
        Option(
            "Frames of a video, likewise.",
            usual=_THE_RECIPES,
            metavar=_RANGE,
            see="cli.md#videos",
        ),
    ]


class _ChoiceArguments(TypedDict, total=False):
    """The arguments that say which engines are built, and where."""

    target: Annotated[
        str | None,
        Option(
            "Of several builds, those for this target.",
            usual="all that need engines",
            flags=("-t", "--target"),
            metavar="NAME",
        ),
    ]
    build: Annotated[str | None, like(LoadArguments, "build", usual="all that need engines")]
    device: Annotated[
        str | None,
        like(
            LoadArguments,
            "device",
            help='By the engine\'s own name, such as "cuda:1" (see: latentc backends).',
        ),
    ]


class BuildArguments(_ChoiceArguments, RangeArguments, total=False):
    """The arguments of `latentc.runtimes.building.engines.build_engines`, the bundle aside."""

    workspace: Annotated[
        float | None,
        Option(
            "Memory that the engine's kernels may use.",
            usual=_THE_RECIPES,
            above=0,
            metavar="GIB",
        ),
    ]
    tf32: Annotated[
        bool | None,
        Option(
            "Whether float32 products may be TensorFloat-32.",
            usual=_THE_RECIPES,
            flags=("--tf32", "--no-tf32"),
        ),
    ]
    cache: Annotated[
        str | os.PathLike[str] | None,
        like(
            LoadArguments,
            "cache",
            help="A folder for the engines.",
            default=None,
            see="",
            details="",
        ),
    ]
    force: Annotated[bool, Option("Build also what is there and fits.", default=False)]
    report: Annotated[
        Report | None,
        Option(
            "Called with a line about what is being built.",
            hidden="the command prints the lines",
        ),
    ]
