"""This module turns the arguments of a measurement, and its file of cases, into a plan."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

from latentc.benchmarks.bench import cases, plan
from latentc.benchmarks.bench.bench_arguments import AxisArguments, BenchArguments, FlagArguments
from latentc.benchmarks.bench.cases import (
    NO_BASELINE,
    CaseFile,
    Group,
    check_scenarios,
    parse_size,
)
from latentc.benchmarks.bench.model import SCENARIOS, Settings
from latentc.benchmarks.bench.plan import Plan
from latentc.runtimes.bundle.manifest import Manifest
from latentc.runtimes.options import complete, declared, takes, tuple_of

_COMPILE = "compile"
_PEERS_AXES = ("batches", "sizes", "threads", "steps")


@takes(BenchArguments)
def requested_plan(bundle: str | os.PathLike[str], **arguments: Unpack[BenchArguments]) -> Plan:
    """Return the plan of a measurement: everything that can be refused is refused here.

    Args:
        bundle: its folder.
        {options}

    Raises:
        BundleError: missing or damaged.
        InputError: an argument that cannot be used, or nothing to run.
        PlanNotFound: no sampling plan for the step count.
        SourceError: the baseline's source is missing, or is not what the bundle was made from.
        BackendError: an engine, device or peer that was asked for by name is not here.
    """
    options = complete(BenchArguments, arguments)
    manifest = Manifest.load(Path(bundle))
    file = CaseFile(()) if options["cases"] is None else cases.read(Path(options["cases"]))
    source = options["source"]
    return plan.make(
        Path(bundle),
        _groups(options, file),
        _baselines(options, file),
        _settings(options, file, texts=bool(manifest.tokenizers)),
        source=None if source is None else Path(source),
        score=options["score"],
    )


def _baselines(options: Mapping[str, Any], file: CaseFile) -> tuple[str, ...]:
    chosen = tuple_of(options["baselines"]) or file.baselines or ()
    if NO_BASELINE in chosen:
        return ()
    return chosen or (("torch",) if options["short"] else ("torch", "torch-channels-last"))


def _groups(options: Mapping[str, Any], file: CaseFile) -> list[Group]:
    """Return the file's cases, and one group of what the arguments name."""
    values_by_axis = {name: tuple_of(options[name]) for name in declared(AxisArguments)}
    axes: dict[str, Any] = {name: values for name, values in values_by_axis.items() if values}
    if "sizes" in axes:
        axes["sizes"] = tuple(map(parse_size, axes["sizes"]))
    flags = {name: options[name] for name in declared(FlagArguments)}
    flags["call"] = options["call"] or {}
    groups = [*file.groups]
    if "builds" in axes or not groups:
        groups.append(Group(**axes, **flags))
    peers = tuple_of(options["peers"])
    if peers:
        shared = {name: axes[name] for name in _PEERS_AXES if name in axes}
        groups.append(Group(peers=peers, settings=(options["peer_settings"],), **shared))
    return groups


def _settings(options: Mapping[str, Any], file: CaseFile, texts: bool) -> Settings:
    scenarios = tuple_of(options["scenarios"]) or file.scenarios
    usual = [name for name in SCENARIOS if name != _COMPILE or _compiles(options)]
    short = options["short"]
    return Settings(
        prompt=options["prompt"] if texts else None,
        negative_prompt=options["negative_prompt"],
        guidance_scale=options["guidance_scale"],
        seed=options["seed"],
        scenarios=[*check_scenarios(scenarios or usual)],
        rounds=options["rounds"] or file.rounds or (2 if short else 3),
        repeats=options["repeats"] or file.repeats or (1 if short else 2),
        timeout=options["timeout"],
        memory_limit=_memory_limit(options["memory_limit"]),
        short=short,
    )


def _compiles(options: Mapping[str, Any]) -> bool:
    named = any(_COMPILE in name for name in tuple_of(options["baselines"]))
    return options["compile"] or named or options["cases"] is not None


def _memory_limit(gib: float | None) -> int:
    """Return the bytes at which a process is ended; 0 is never."""
    if gib is not None:
        return int(gib * 2**30)
    try:
        import psutil
    except ImportError:
        return 0
    return int(0.9 * psutil.virtual_memory().available)
