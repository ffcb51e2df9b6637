"""Tables for people: what a bundle holds, what verification measured, which backends there are.

rich is imported when a table is drawn: it costs more than reading a manifest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from latentc.runtimes.bundle.manifest import Manifest
from latentc.runtimes.bundle.quantities import build_size, megabytes, ranges
from latentc.runtimes.bundle.sizes import Limits, form_of
from latentc.runtimes.bundle.structures import (
    Build,
    Component,
    ProgramCall,
    ProgramCheck,
    Score,
    Source,
    TensorSpec,
    Verification,
)
from latentc.runtimes.errors import LatentcError
from latentc.runtimes.programs.latents import other_sizes
from latentc.runtimes.terminal import visible

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from latentc.runtimes.presets.setups import Setup
    from latentc.runtimes.presets.trials import Fidelity, Tuning

_BAD = "bold red"
_WIDTH_OF_FILES = 140  # characters, where no terminal says how wide it is


@dataclass(frozen=True)
class Styled:
    """A cell with a style of rich's."""

    text: str
    style: str


Cell: TypeAlias = str | Styled


def print_manifest(manifest: Manifest) -> None:
    """Print what `latentc inspect` shows."""
    _print_facts(manifest)
    _show(_components_table(manifest))
    _show(_programs_table(manifest))
    _show(_builds_table(manifest))
    _show(_schedules_table(manifest))
    if any(build.verification for build in manifest.builds):
        print_verification(manifest)


def print_verification(manifest: Manifest) -> None:
    """The verification figures that stand in a manifest, build by build."""
    print_measured([(each, each.verification) for each in manifest.builds if each.verification])


def print_measured(measured: Sequence[tuple[Build, Verification]]) -> None:
    """One line for each (build, verification): the largest relative L2 error of each component
    and of the final latents, the image, the judge's score. What missed says what was allowed."""
    subjects = list(dict.fromkeys(row[0] for _, each in measured for row in worst_checks(each)))
    judged = any(each.score for _, each in measured)
    table = _table(
        "Against PyTorch (relative L2, largest difference of 255 and PSNR of the image)",
        *("Build", "MB", "Verified on"),
        *(subject.replace("_", " ") for subject in subjects),
        *("Latents", "Image", *(["Judge"] if judged else []), ""),
    )
    for build, verification in measured:
        errors = {each[0]: each for each in worst_checks(verification)}
        row: list[Cell] = [build.name, f"{build_size(build) / 1e6:.1f}", _engine(verification)]
        row += [_error(*errors[name][1:]) if name in errors else "" for name in subjects]
        row += _whole(verification)
        row += [_score(verification.score)] if judged else []
        _row(table, *row, _verdict(verification.passed))
    _show(table)


def print_tuning(found: Tuning) -> None:
    """Print what `latentc tune` tried, the fastest first.

    A row has the seconds of an image with the default steps, how many times as fast as the
    reference that is, and what it keeps of the reference's image.
    """
    judged = any(t.fidelity and t.fidelity.right is not None for t in found.trials)
    table = _table(
        f"An image on this machine (fidelity against {found.reference.setup.build}, "
        f"{found.steps} steps, prompts: {max(1, len(found.prompts))})",
        *("Build", "Backend", "Loaded", "Arguments", "s", "×", "Image", "Latents"),
        *(["Judge"] if judged else []),
        "Preset",
    )
    usual = found.reference.seconds or 0.0
    for trial in found.trials:
        won = ", ".join(name for name, each in found.winners.items() if each == trial)
        style = "bold" if won else None
        setup = trial.setup
        row = [setup.build, f"{setup.backend}, {setup.device}", _loaded(setup)]
        row += [_arguments(trial.arguments), *_speed(trial.seconds, usual)]
        row += _kept(trial.fidelity, judged)
        _row(table, *row, Styled(won, "green") if won else trial.note, style=style)
    _show(table)


def print_backends(backends: Iterable[Mapping[str, Any]]) -> None:
    """Print what `latentc backends` shows, from the records of `backend_records`."""
    table = _table("Backends", "Name", "Version", "Devices", "Loads", "To install")
    for each in backends:
        devices = ", ".join(each["devices"]) if each["installed"] else "-"
        version = each["version"] if each["installed"] else "not installed"
        hint = "" if each["installed"] else each["install"] or ""
        _row(table, each["name"], version, devices, ", ".join(each["targets"]), hint)
    _show(table)


def backend_records() -> list[dict[str, Any]]:
    """One JSON-compatible record per known backend."""
    from latentc.runtimes.backends.backend import find, get, names
    from latentc.runtimes.plugins import started

    records = []
    for name in names():
        record: dict[str, Any] = {"name": name, "installed": False, "version": None}
        record |= {"devices": [], "targets": [], "install": None, "problem": None}
        try:
            kind = find(name)
            record |= {"targets": [*kind.targets], "install": kind.install}
            made = get(name)
            with started(f"backend {name!r}"):
                record |= {"version": made.version(), "devices": made.devices(), "installed": True}
        except (LatentcError, ImportError) as error:
            record["problem"] = str(error)
        records.append(record)
    return records


def worst_checks(verification: Verification) -> list[tuple[str, float, float, bool]]:
    """For each component: the largest error of its probes, its tolerance, whether all passed."""
    worst: dict[str, tuple[float, float, bool]] = {}
    for check in verification.checks:
        error, tolerance, passed = worst.get(check.subject, (0.0, check.tolerance, True))
        worst[check.subject] = (
            max(error, check.relative_l2),
            min(tolerance, check.tolerance),
            passed and check.passed,
        )
    return [(subject, *figures) for subject, figures in worst.items()]


def _engine(verification: Verification) -> str:
    version = verification.version.partition("-")[0]
    return f"{verification.backend} {version}, {verification.device}"


def _loaded(setup: Setup) -> str:
    words = [f"compute {setup.compute}"] if setup.compute else []
    words += [f"threads {setup.threads}"] if setup.threads else []
    return ", ".join([*words, "one size" if setup.static else "any size"])


def _arguments(arguments: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in arguments.items())


def _speed(seconds: float | None, usual: float) -> list[str]:
    return ["", ""] if seconds is None else [f"{seconds:.3g}", f"{usual / seconds:.2f}"]


def _kept(fidelity: Fidelity | None, judged: bool) -> list[str]:
    if fidelity is None:
        return ["", "", *([""] if judged else [])]
    latents = "" if fidelity.latents is None else f"{fidelity.latents:.1e}"
    right = "" if fidelity.right is None else f"{fidelity.right} of {fidelity.images}"
    return [f"{fidelity.image_psnr:.0f} dB", latents, *([right] if judged else [])]


def _error(error: float, tolerance: float, passed: bool) -> Cell:
    return f"{error:.1e}" if passed else Styled(f"{error:.1e}, allowed {tolerance:.1e}", _BAD)


def _whole(verification: Verification) -> list[Cell]:
    loop = verification.loop
    if loop is None:
        return ["", ""]
    image = f"± {loop.image_max_difference}, {loop.image_psnr:.0f} dB"
    within = loop.latents_relative_l2 <= loop.tolerance
    latents = _error(loop.latents_relative_l2, loop.tolerance, within)
    return [latents, image if loop.passed else Styled(image, _BAD)]


def _score(score: Score | None) -> Cell:
    if score is None:
        return ""
    text = f"{score.right} of {score.images}"
    return text if score.passed else Styled(f"{text}, at least {score.least}", _BAD)


def _verdict(passed: bool) -> Styled:
    return Styled("ok", "green") if passed else Styled("MISS", _BAD)


def _print_facts(manifest: Manifest) -> None:
    latents, made = manifest.latents, manifest.created_by
    scales = ", ".join(f"{n} {v:g}" for n, v in manifest.guidance.defaults.items())
    defaults = manifest.defaults
    facts = {
        "Source": f"{manifest.source.id} ({manifest.source.pipeline_class})",
        **_said(manifest.source),
        **_ingredients(manifest),
        **_left_out(manifest),
        "Tasks": ", ".join(program.name for program in manifest.programs),
        "Made by": f"latentc {made.latentc}, Python {made.python}, {made.platform}",
        "Image": f"{latents.default_width} × {latents.default_height} by default, sides in "
        f"steps of {latents.factor * latents.multiple}",
        **_other_sizes(manifest),
        "Default": ", ".join(
            filter(None, [defaults.scheduler, f"{defaults.num_inference_steps} steps", scales])
        ),
    }
    table = _table("")
    for name, value in facts.items():
        _row(table, name, value)
    table.show_header = False
    _show(table)


def _other_sizes(manifest: Manifest) -> dict[str, str]:
    """Return the sizes of a call that are neither height nor width, such as the frames of a
    video."""
    return {
        symbol.argument.removeprefix("num_").capitalize(): (
            f"{symbol.argument_of(symbol.default)} by default, {form_of(Limits.of(symbol))}"
        )
        for symbol in other_sizes(manifest.programs[0]).values()
    }


def _said(source: Source) -> dict[str, str]:
    """Return what the source says of itself."""
    said = {
        "Licence": source.licence,
        "Author": source.author,
        "Base model": ", ".join(source.base_model),
    }
    return {name: text for name, text in said.items() if text}


def _ingredients(manifest: Manifest) -> dict[str, str]:
    """Return what went in beside the source; nothing where that is all."""
    texts = [
        f"{each.kind} {each.id}"
        + ("" if each.scale is None else f" at {each.scale:g}")
        + (f" as {each.token}" if each.token else "")
        for each in manifest.source.ingredients
    ]
    return {"With": ", ".join(texts)} if texts else {}


def _left_out(manifest: Manifest) -> dict[str, str]:
    """Return what the pipeline has and the bundle does not; nothing where that is nothing."""
    lines = [
        f"{each.name}{' (as asked)' if each.chosen else ''}: {each.why}"
        for each in manifest.left_out
    ]
    return {"Left out": "\n".join(lines)} if lines else {}


def _components_table(manifest: Manifest) -> Table:
    table = _table("Components", "Name", "Role", "Inputs", "Outputs")
    for component in manifest.components:
        _row(table, component.name, component.role, *_tensors(component))
    return table


def _tensors(component: Component) -> list[Styled]:
    """The inputs and the outputs, each in a line."""
    return [
        Styled("\n".join(_tensor(name, spec) for name, spec in specs.items()), "")
        for specs in (component.inputs, component.outputs)
    ]


def _tensor(name: str, spec: TensorSpec) -> str:
    return visible(f"{name} {_shape(spec)}", one_line=True)


def _shape(spec: TensorSpec) -> str:
    return f"{spec.dtype} [{', '.join(map(str, spec.shape))}]"


def _programs_table(manifest: Manifest) -> Table:
    """Return a line per program: the class that it was held against, and by how much the latents
    of each call were off."""
    records = {record.program: record for record in manifest.programs_checked}
    table = _table("Programs", "Name", "diffusers class", "Against it (relative L2)", "")
    for program in manifest.programs:
        record = records.get(program.name)
        if record is None:
            _row(table, program.name, program.stands_for, "not verified", "")
        else:
            calls = "; ".join(map(_call_text, record.calls))
            _row(table, program.name, record.pipeline_class, calls, _program_verdict(record))
    return table


def _call_text(call: ProgramCall) -> str:
    """Return how many images a call made and how far off they were, as
    ``2 × 2 images, 4 seeds: 1.2e-07``; the first number is that of prompts."""
    one = call.prompts * call.images == 1
    images = "1 image" if one else f"{call.prompts} × {call.images} images"
    seeds = f", {len(call.seeds)} seeds" if len(call.seeds) > 1 else ""
    where = " of a miniature" if call.miniature else ""
    if call.relative_l2 is None:
        return f"{images}{seeds}{where}: diffusers refuses ({call.refused})"
    allowed = "" if call.passed else f", allowed {call.tolerance:.1e}"
    return f"{images}{seeds}{where}: {call.relative_l2:.1e}{allowed}"


def _program_verdict(record: ProgramCheck) -> Cell:
    """Return the verdict on a program, none where diffusers refused all its calls."""
    compared = any(call.relative_l2 is not None for call in record.calls)
    return _verdict(record.passed) if compared else ""


def _builds_table(manifest: Manifest) -> Table:
    table = _table("Builds", "Name", "Target", "Precision", "Size", "Verified")
    for build in manifest.builds:
        verification = build.verification
        verdict: Cell = _verdict(verification.passed) if verification else "no"
        size = megabytes(build_size(build))
        kept = sum(len(artifact.kept) for artifact in build.artifacts.values())
        precision = build.precision + (f", {kept} layers in fp16" if kept else "")
        _row(table, build.name, build.target, precision, size, verdict)
    return table


def _schedules_table(manifest: Manifest) -> Table:
    table = _table("Schedulers", "Name", "diffusers class", "Steps", "Size")
    for schedule in manifest.schedules:
        size = megabytes(schedule.file.size)
        _row(table, schedule.name, schedule.class_name, ranges(schedule.steps), size)
    return table


def _table(title: str, *columns: str) -> Table:
    from rich import box
    from rich.table import Table

    heading = _text(Styled(title, "bold")) if title else None
    table = Table(title=heading, title_justify="left", box=box.SIMPLE)
    for column in columns:
        table.add_column(_text(column), overflow="fold")
    return table


def _row(table: Table, *cells: Cell, style: str | None = None) -> None:
    table.add_row(*map(_text, cells), style=style)


def _text(cell: Cell) -> Text:
    """A cell as it is: names come from bundles, and are no markup. Only those that are styled may
    have several lines."""
    from rich.text import Text

    if isinstance(cell, Styled):
        return Text(visible(cell.text), style=cell.style)
    return Text(visible(cell, one_line=True))


def _show(table: Table) -> None:
    import os

    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _WIDTH_OF_FILES
    console.print(table)
