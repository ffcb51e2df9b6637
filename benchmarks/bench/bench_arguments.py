"""This module declares once each argument of a measurement, and of comparing two reports.

Most may be given several times: every combination is a case. A command line reads this before it
does anything.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, TypeAlias, TypedDict

from latentc.benchmarks.bench.cases import BASELINES, NO_BASELINE, PEER_SETTINGS, PEERS
from latentc.benchmarks.bench.model import SCENARIOS
from latentc.runtimes.calls.call_arguments import CallArguments
from latentc.runtimes.options import Option, like
from latentc.runtimes.presets.load_arguments import LoadArguments

Texts: TypeAlias = str | Sequence[str]
Numbers: TypeAlias = int | Sequence[int]


class AxisArguments(TypedDict, total=False):
    """The arguments of which each combination of values is a case."""

    builds: Annotated[
        Texts,
        like(
            LoadArguments,
            "build",
            help="Only this build.",
            default=(),
            usual="all that run here",
            flags=("--build",),
        ),
    ]
    backends: Annotated[
        Texts,
        like(
            LoadArguments,
            "backend",
            help="With this engine (see: latentc backends).",
            default=(),
            usual="the first that fits",
            flags=("--backend",),
            details="Slow ones such as `coreml-reference` run only if named.",
        ),
    ]
    devices: Annotated[
        Texts,
        like(LoadArguments, "device", default=(), flags=("--device",)),
    ]
    computes: Annotated[
        Texts,
        like(LoadArguments, "compute", default=(), flags=("--compute",)),
    ]
    batches: Annotated[
        Numbers,
        Option(
            "Images in a call.", default=(), usual="1", least=1, flags=("--batch",), metavar="N"
        ),
    ]
    sizes: Annotated[
        Texts,
        Option(
            "Size of the images, in pixels.",
            default=(),
            usual="the bundle's",
            flags=("--size",),
            metavar="WIDTHxHEIGHT",
        ),
    ]
    threads: Annotated[Numbers, like(LoadArguments, "threads", default=())]
    steps: Annotated[
        Numbers,
        like(
            CallArguments,
            "num_inference_steps",
            default=(),
            usual="what is nearest to 10",
            least=1,
        ),
    ]


class FlagArguments(TypedDict, total=False):
    """The arguments that hold for every case of a bundle's builds."""

    compile: Annotated[bool, like(LoadArguments, "compile")]
    static: Annotated[
        bool,
        like(
            LoadArguments,
            "static",
            help="Load for the calls' size only; some engines gain by it, and NPUs need it.",
            default=False,
            details="",
        ),
    ]
    low_memory: Annotated[bool, like(LoadArguments, "low_memory")]
    no_cache: Annotated[
        bool,
        Option(
            "Compile graphs at each start.",
            default=False,
            details="Without it the rounds read what the warm-up has compiled.",
        ),
    ]
    call: Annotated[
        Mapping[str, float] | None,
        Option(
            "Further argument of the calls, such as `cache_interval=3`; a step is then the mean of "
            "all steps.",
            metavar="NAME=NUMBER",
        ),
    ]


class _ComparedArguments(TypedDict, total=False):
    scenarios: Annotated[
        Texts,
        Option(
            f"One of {', '.join(f'`{name}`' for name in SCENARIOS)}.",
            default=(),
            usual="all that apply",
            flags=("--scenario",),
            metavar="NAME",
        ),
    ]
    cases: Annotated[
        str | Path | None,
        Option("A TOML file of cases.", metavar="FILE", see="benchmarking.md#a-file-of-cases"),
    ]
    baselines: Annotated[
        Texts,
        Option(
            "The first is compared with, others are rows.",
            default=(),
            usual="torch and torch-channels-last",
            flags=("--baseline",),
            choices=(*BASELINES, NO_BASELINE),
        ),
    ]
    source: Annotated[
        str | Path | None,
        Option(
            "The pipeline that the bundle was made from.",
            usual="the built-in model's",
            metavar="FOLDER",
        ),
    ]
    peers: Annotated[
        Texts,
        Option(
            "Another program, in an environment of its own.",
            default=(),
            flags=("--peer",),
            choices=PEERS,
            see="benchmarking.md#other-programs",
        ),
    ]
    peer_settings: Annotated[
        Literal["default", "best"],
        Option(
            "The peers' own settings, or those that are known to be the fastest.",
            default="default",
            choices=PEER_SETTINGS,
        ),
    ]


class _MeasuredArguments(TypedDict, total=False):
    rounds: Annotated[
        int | None, Option("Processes of each case.", usual="3", least=1, metavar="N")
    ]
    repeats: Annotated[
        int | None,
        Option("Calls in each process after the first.", usual="2", least=1, metavar="N"),
    ]
    prompt: Annotated[
        str,
        Option("What to draw.", default="a large red circle", metavar="TEXT"),
    ]
    negative_prompt: Annotated[str | None, like(CallArguments, "negative_prompt", details="")]
    guidance_scale: Annotated[float | None, like(CallArguments, "guidance_scale")]
    seed: Annotated[
        int,
        like(CallArguments, "seed", help="Seed of the noise.", default=0, usual="", details=""),
    ]
    score: Annotated[
        int,
        Option(
            "Images for the judge of the built-in model; 0 is none.",
            default=10,
            least=0,
            metavar="N",
        ),
    ]
    timeout: Annotated[
        float,
        Option(
            "Seconds after which a process is ended; 0 is never.",
            default=1800,
            least=0,
            metavar="SECONDS",
        ),
    ]
    memory_limit: Annotated[
        float | None,
        Option(
            "Memory at which a process is ended; 0 is never.",
            usual="90% of what is free",
            least=0,
            metavar="GIB",
        ),
    ]
    short: Annotated[
        bool,
        Option("Two rounds of one call, `torch` as the only baseline.", default=False),
    ]


class BenchArguments(
    AxisArguments, FlagArguments, _ComparedArguments, _MeasuredArguments, total=False
):
    """The arguments of `latentc.benchmarks.bench.requested_plan`, the bundle aside."""


class CompareArguments(TypedDict, total=False):
    """The arguments of `latentc.benchmarks.bench.compare.compare`, the reports aside."""

    threshold: Annotated[
        float,
        Option(
            "Share by which something must differ to count.", default=0.05, least=0, metavar="X"
        ),
    ]
    scenarios: Annotated[Texts, like(BenchArguments, "scenarios", usual="all")]
    seconds: Annotated[bool, Option("Compare seconds, not times the baseline.", default=False)]
