"""This module declares once each argument of `latentc.load`, which says how a bundle is loaded.

As in `latentc.runtimes.calls.call_arguments`, little is imported and annotations are no texts.
"""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

from latentc.runtimes.options import Option

if TYPE_CHECKING:
    from latentc.runtimes.backends.backend import Backend
else:
    Backend = Any  # its module imports numpy

AUTO = "auto"  # `faithful` where the bundle has been tuned here, else as without a preset
MOST_THREADS = 4096


class PlaceArguments(TypedDict, total=False):
    """These arguments say where a bundle runs; they may also be given by their place."""

    backend: Annotated[
        str | Backend | None,
        Option(
            "An engine, such as onnxruntime, openvino or torch (see: latentc backends).",
            usual="the first installed one that fits",
            metavar="NAME",
            details="A name, or an instance of a `Backend`.",
        ),
    ]
    device: Annotated[
        str | None,
        Option(
            'By the engine\'s own name, such as "cpu" (see: latentc backends).',
            usual="the engine's first",
            metavar="NAME",
        ),
    ]


class LoadKeywords(TypedDict, total=False):
    """These arguments are given by name only."""

    build: Annotated[
        str | None,
        Option("Of several builds, this one.", usual="what the backend likes best", metavar="NAME"),
    ]
    precision: Annotated[
        str | None,
        Option(
            "Of several builds, one of this precision.",
            usual="fp32 is preferred",
            metavar="NAME",
            see="passes.md",
            details="With passes as `w8a8+downsampled-attention`.",
        ),
    ]
    threads: Annotated[
        int,
        Option(
            "Threads of the engine.",
            default=0,
            usual="0, the engine's choice",
            least=0,
            most=MOST_THREADS,
            aliases=("-t", "--num-threads"),
            metavar="N",
        ),
    ]
    cache: Annotated[
        str | os.PathLike[str] | bool | None,
        Option(
            "A folder for compiled graphs, for engines that keep some.",
            default=True,
            usual="latentc's own (LATENTC_CACHE)",
            metavar="FOLDER",
            see="devices.md#compiled-once-per-machine",
            details="`True` is latentc's own; with `False` or `None` none are kept or used. "
            "Engines that must be built before (TensorRT) are in latentc's own folder then.",
        ),
    ]
    compute: Annotated[
        str | None,
        Option(
            "Compute in fp32, fp16, bf16 or auto, if the engine has a choice.",
            usual="the build's precision",
            metavar="NAME",
            see="devices.md",
            details="`auto` is the engine's own choice.",
        ),
    ]
    compile: Annotated[
        bool,
        Option(
            "Let the engine compile the graphs first: minutes, and faster afterwards.",
            default=False,
        ),
    ]
    static: Annotated[
        Mapping[str, float] | bool | None,
        Option(
            "Load for calls of one size only; some engines gain by it, and NPUs need it.",
            details='Any of `"height"`, `"width"`, `"images"` and `"guidance_scale"` (or what else '
            'turns the bundle\'s guidance on, such as `"true_cfg_scale"`), `"num_frames"` of '
            'videos, and `"use_resolution_binning"` where calls take it; defaults for the others, '
            "for all of them if `True`. The command line takes the call's.",
        ),
    ]
    low_memory: Annotated[
        bool,
        Option(
            "Hold one component at a time in memory: each is loaded when a call needs it.",
            default=False,
            details="As much memory as the largest one takes, and loading times at each call; ONNX "
            "Runtime leaves the weights of components of 4 GiB or more in their files, and widens "
            "them one at a time.",
        ),
    ]
    options: Annotated[
        Mapping[str, str] | None,
        Option(
            "Passed to the engine as it is, which must have such an option.",
            flags=("--option",),
            metavar="KEY=VALUE",
        ),
    ]
    verify: Annotated[
        bool,
        Option(
            "Hash every file that is loaded, also those hashed here before.",
            default=False,
            hidden="latentc verify hashes files",
        ),
    ]
    preset: Annotated[
        str | None,
        Option(
            "faithful, balanced or fast: what latentc tune found on this machine.",
            metavar="NAME",
            see="presets.md",
            details="Arguments of calls included, which a call may replace; calls of any size "
            "work. Without a record the figures in the manifest choose, with a warning. `auto` is "
            "faithful, where there is a record and nothing else was asked for, else no preset.",
        ),
    ]


class LoadArguments(PlaceArguments, LoadKeywords, total=False):
    """All arguments of `latentc.load`, the bundle's folder aside."""
