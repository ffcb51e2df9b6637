"""This module says what an export will need before it begins: memory, disk, time.

Sizes come from the headers of the files of weights. What an export takes besides is measured on
full-size models (`python -m latentc.benchmarks.export_cost`; docs/exporting-large-models.md
compares). Memory is anonymous memory: mapped files go out of memory when it is wanted for something
else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from latentc.exporter.components.names import precision_of
from latentc.exporter.options import ExportOptions, components_of
from latentc.exporter.resources import GIB, LARGE_BUILD, MIB, free_disk
from latentc.exporter.source import model_files
from latentc.exporter.source.adapters.kinds import KINDS, kind
from latentc.exporter.source.resolving import PipelineSource
from latentc.exporter.targets import TARGETS, verifier
from latentc.runtimes.backends import backend as engines
from latentc.runtimes.bundle.precision import split_passes
from latentc.runtimes.bundle.precisions import PRECISIONS
from latentc.runtimes.errors import ExportError
from latentc.runtimes.pipeline.pipeline import LEAN

_HALF, _FULL = 2, 4  # bytes of a number

# Measured on sdxl with fp16 files (docs/exporting-large-models.md), rounded up. What depends on a
# target stands in `latentc.exporter.targets.TargetInfo`, what depends on an engine in its backend's
# class; those of torch and coreml, and of all engines but onnxruntime, are estimates: so many
# copies of the weights.
_BASE = 0.45 * GIB  # PyTorch, diffusers and the converters, a pipeline's small weights
_GRAPH = 0.20 * GIB  # a captured program and what converters make of it …
_GRAPH_PER_PARAMETER = 0.14  # … and bytes for each parameter: larger models have more layers
_REFERENCE = 0.9 * GIB  # activations of the reference run in PyTorch
_LEAN = 1.0 * GIB  # of a component that an engine leaves in its files
_PROBES = 48 * MIB  # results of the reference runs, plans, tokenizers
# Processor seconds on two cores of 2020's servers: of any export, of a graph, for 1e9 parameters.
_SECONDS = 25.0
_SECONDS_PER_GRAPH = 12.0
_CAPTURE_PER_BILLION = 14.0
_VERIFYING_PER_BILLION = 60.0
SURE_WITHIN = 3  # times or a third of it: how far the time may be off on another machine


@dataclass(frozen=True)
class Weights:
    """A `Weights` describes those of a component.

    It says how many numbers, the bytes of one in the source's files, and whether they are brought
    into memory in float32 (they can be mapped otherwise).
    """

    count: int
    stored: float
    loaded: bool = False


@dataclass(frozen=True)
class Need:
    """`memory`: anonymous, at its peak, in bytes, and what it is for. `disk`: bytes at the
    destination while it runs. `seconds`: roughly; see `SURE_WITHIN`."""

    memory: int
    disk: int
    seconds: float
    reason: str

    def line(self) -> str:
        """One line to read."""
        return (
            f"{self.memory / GIB:.1f} GiB of memory ({self.reason}), {self.disk / GIB:.1f} GiB of "
            f"disk, {self.seconds / 60:.0f} to {self.seconds * SURE_WITHIN / 60:.0f} minutes of "
            "two cores"
        )


def need(
    components: Mapping[str, Weights],
    missing: Mapping[tuple[str, str], Sequence[str]],
    verify: bool,
) -> Need:
    """Return what an export needs.

    Args:
        components: the bundle's.
        missing: for each build, a target and a precision, the components to be made.
    """
    held = _BASE + sum(_FULL * each.count for each in components.values() if each.loaded)
    peaks: list[tuple[float, str]] = [(held, "loading")]
    disk, scratch, seconds = float(_PROBES), 0.0, _SECONDS
    captured: set[str] = set()
    for (target, precision), names in missing.items():
        info = TARGETS[target]
        for name in names:
            weights, own = components[name], split_passes(precision_of(precision, name))[0]
            known = PRECISIONS[own]
            size = known.bytes * weights.count
            disk += size
            if info.rewrites and known.stored_as == "floats":
                # What the files do not hold in this type is written to one that is mapped.
                scratch = max(scratch, 0 if known.bytes == weights.stored else size)
            lowering = _GRAPH + _GRAPH_PER_PARAMETER * weights.count + info.memory * size
            if known.stored_as == "integers":
                lowering += weights.count  # quantised weights are made in memory
            peaks.append((held + lowering, f"{name} to {target} {own}"))
            billions = weights.count / 1e9
            seconds += info.seconds * billions
            if name not in captured:
                captured.add(name)
                seconds += _SECONDS_PER_GRAPH + _CAPTURE_PER_BILLION * billions
    if verify:
        peaks += _verifying(components, missing, held)
        total = sum(each.count for each in components.values())
        seconds += _VERIFYING_PER_BILLION * total / 1e9 * (1 + len(missing))
    most, reason = max(peaks)
    return Need(int(most), int(disk + scratch), seconds, reason)


def _verifying(
    components: Mapping[str, Weights],
    builds: Iterable[tuple[str, str]],
    held: float,
) -> list[tuple[float, str]]:
    """The reference runs in PyTorch, and then, without PyTorch's weights, each build. Engines get
    one component at a time where all would be large (`latentc.exporter.compiler.export`)."""
    peaks = [(held + _REFERENCE, "the reference in PyTorch")]
    for target, precision in builds:
        own = {name: split_passes(precision_of(precision, name))[0] for name in components}
        engine = verifier(target, own.values())
        kind = engines.find(engine)
        sizes = {
            name: PRECISIONS[own[name]].bytes * each.count for name, each in components.items()
        }
        each_takes = [
            _LEAN
            if kind.lean and sizes[name] >= LEAN
            else kind.memory_per_weight * components[name].count
            for name in components
        ]
        together = max if sum(sizes.values()) >= LARGE_BUILD else sum
        wanted = _BASE + together(each_takes or [0])
        peaks.append((wanted, f"verifying {target} {precision}, --no-verify leaves it out"))
    return peaks


def weights_of(source: PipelineSource, options: ExportOptions) -> dict[str, Weights]:
    """The weights of each component, from the headers of the source's files. What cannot be told
    apart counts for all."""
    changed = {
        part
        for each in source.ingredients
        if KINDS[each.kind].writes
        for part in kind(each.kind).parts(source.pipeline_class)
    }
    parts = {name: _part(source, name, name in changed) for name in source.parts}
    found = {}
    for component, names in components_of(source, options).items():
        pieces = [parts[name] for name in names if name in parts]
        count = sum(each.count for each in pieces)
        found[component] = Weights(
            count,
            max((each.stored for each in pieces), default=_FULL),
            any(each.loaded for each in pieces),
        )
    return found


def _part(source: PipelineSource, name: str, changed: bool) -> Weights:
    from latentc.exporter.stored_weights import headers, stored_type

    replaced = [each.path for each in source.ingredients if each.kind == "vae"]
    if name == "vae" and replaced:
        files = model_files.weights(replaced[0], "diffusers", None)
    elif source.file:
        files = (source.file.path,)
    else:
        library, variant = source.parts[name][0], source.variants.get(name)
        files = model_files.weights(source.folder / name, library, variant)
    safe = [path for path in files if path.suffix == ".safetensors"]
    if not safe:
        size = sum(path.stat().st_size for path in files)
        return Weights(size // _HALF, _HALF, loaded=bool(size))
    tensors = [each for path in safe for each in headers(path)]
    stored = stored_type(safe).itemsize
    floats = {kind for kind, _ in tensors if kind in ("F64", "F32", "F16", "BF16")}
    count = sum(size for _, size in tensors) // stored
    return Weights(count, stored, changed or (floats - {"F32"} != set() and stored == _FULL))


def refuse(wanted: Need, output: Path) -> None:
    """Stop before an export that cannot fit.

    Raises:
        ExportError: with what it needs, what there is, and what else to do.
    """
    memory, disk = available_memory(), free_disk(output)
    if memory is not None and wanted.memory > memory:
        raise ExportError(
            f"the export needs about {wanted.memory / GIB:.1f} GiB of memory ({wanted.reason}), "
            f"and {memory / GIB:.1f} GiB are available; ask for fewer targets or smaller "
            "precisions at a time, end other programs, or try all the same with --no-preflight"
        )
    if wanted.disk > disk:
        raise ExportError(
            f"the export needs about {wanted.disk / GIB:.1f} GiB of disk at {output}, and "
            f"{disk / GIB:.1f} GiB are free; choose an output on another disk, ask for fewer "
            "targets, or try all the same with --no-preflight"
        )


def available_memory(cgroups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that can be had without swapping, of the machine and within the limits of the control
    groups that this process is in; None where nobody says."""
    try:
        import psutil
    except ImportError:
        return None
    return min([int(psutil.virtual_memory().available), *_left(cgroups)])


def _left(root: Path) -> list[int]:
    """Return what control groups (version 2) leave. Their use counts mapped files, which can go."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()
    except OSError:
        return []
    own = next((line[3:] for line in lines if line.startswith("0::")), "/").strip("/")
    folder, left = root / own, []
    while folder.is_relative_to(root):
        limit, used = _number(folder / "memory.max"), _number(folder / "memory.current")
        if limit is not None and used is not None:
            left.append(max(limit - used + _files_of(folder / "memory.stat"), 0))
        folder = folder.parent
    return left


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # "max": no limit
        return None


def _files_of(path: Path) -> int:
    try:
        pairs = (line.split() for line in path.read_text(encoding="ascii").splitlines())
        return sum(int(v) for k, v in pairs if k in ("inactive_file", "active_file"))
    except (OSError, ValueError):
        return 0
