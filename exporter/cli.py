"""The compiler's commands: export and schedule."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from latentc.exporter.export_arguments import (
    FILE_OR_PROMPTS,
    available_options,
)
from latentc.exporter.schedulers.schedule_arguments import ScheduleArguments
from latentc.runtimes.commands.declared_options import given_options, options_of
from latentc.runtimes.storage.locks import WAITING
from latentc.runtimes.terminal import markup, say, visible

if TYPE_CHECKING:
    from latentc.exporter.progress import Event

BUILTIN = "builtin"
# Places stay as they were typed: "./name" is no Hub id, and what follows a colon no path.
IN_OTHER_FORM: Mapping[str, Mapping[str, Any]] = {
    **{name: {"type": str} for name, option in available_options().items() if option.kind is Path},
    FILE_OR_PROMPTS: {"type": str, "multiple": False, "default": None},
}
OUTPUT = "The bundle's folder; what is there of the same source is kept and added to."


@click.command(
    epilog="""
    \b
    Examples:
      latentc export builtin -o shapes --target onnx --target openvino
      latentc export stable-diffusion-v1-5/stable-diffusion-v1-5 -o sd15 --target onnx
      latentc export ./my-pipeline -o bundle --target openvino --precision fp16 \\
          --height 512 --width 512
      latentc export ./my-pipeline -o bundle --target tensorrt --precision fp16
      latentc export builtin -o every-build --target all --precision all
      latentc export ./my-pipeline -o bundle --target openvino --precision int8 \\
          --fidelity-floor 30
      latentc export ./my-pipeline -o bundle --target openvino \\
          --precision denoiser=w8a8,vae_decoder=fp16 --calibration-prompts prompts.txt
      latentc export model.safetensors -o bundle --config ./my-pipeline
      latentc export ./my-pipeline -o bundle --lora style.safetensors:0.8 --lora owner/name
      latentc export ./my-pipeline -o bundle --textual-inversion "cat.safetensors:<cat>"
      latentc export ./my-sd3 -o bundle --target openvino --without text_encoder_3
      latentc export builtin -o bundle --target openvino --pass step-cache
      latentc export builtin -o redraw --target openvino --task image-to-image
      latentc export builtin -o shapes --target openvino --precision w8a8 \\
          --pass downsampled-attention
    """
)
@click.argument("source", required=False, metavar="SOURCE")
@click.option("-m", "--model", metavar="SOURCE", hidden=True, help="SOURCE, as optimum-cli has it.")
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), metavar="PATH", help=OUTPUT
)
@options_of(available_options(), settings=IN_OTHER_FORM)
@click.option("--dry-run", is_flag=True, help="Say what the export will need; make nothing.")
@click.option("-q", "--quiet", is_flag=True, help="Print the result only.")
def export(
    source: str | None,
    model: str | None,
    output: Path,
    dry_run: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Compile a diffusers pipeline into a bundle.

    SOURCE is a Hub id, a diffusers folder, a checkpoint of one file, or "builtin" for the model in
    the package. The
    size is dynamic unless --height and --width fix it. Every build is verified against
    PyTorch on its own runtime; if it differs, nothing is written and the exit code is 6.
    Running an unchanged export again does nothing; an interrupted one resumes.
    """
    from latentc.exporter.compiler import export as compiler
    from latentc.exporter.compiler.preflight import Need
    from latentc.runtimes.commands.report import print_verification

    named = _one_source(source, model)
    reporter = Reporter(quiet)
    place = builtin_folder() if named == BUILTIN else named
    with reporter:
        ask = compiler.preflight if dry_run else compiler.export
        result = ask(place, output, report=reporter.report, **given_options(options))
    if isinstance(result, Need):
        say(result.line())
        return
    if result.shared:
        say(f"{megabytes(result.shared)} are shared with other bundles")
    for each in result.manifest.left_out:
        if not each.chosen:
            hint = f"--without {each.name} if that is meant"
            say(f"left out: {each.name} ({each.why}); {hint}", err=True)
    if not result.made:
        say(f"{result.bundle} is up to date")
        return
    print_verification(result.manifest)
    size = sum(file.size for file in result.manifest.files())
    say(f"{result.bundle}: {len(result.manifest.builds)} builds, {megabytes(size)}")


@click.command(
    epilog="""
    \b
    Examples:
      latentc schedule shapes --scheduler euler --steps 75 --steps 137
      latentc schedule shapes --scheduler kdpm2
    """
)
@click.argument("bundle", type=click.Path(path_type=Path))
@options_of(ScheduleArguments)
@click.option("-q", "--quiet", is_flag=True, help="Print the result only.")
def schedule(bundle: Path, schedulers: tuple[str, ...], quiet: bool, **options: Any) -> None:
    """Add sampling plans to a bundle, without exporting it again."""
    from latentc.exporter.schedulers.plans import add_to_bundle
    from latentc.runtimes.bundle.quantities import ranges

    reporter = Reporter(quiet)
    arguments = given_options(options)
    with reporter:
        manifest = add_to_bundle(bundle, schedulers=schedulers, report=reporter.report, **arguments)
    for entry in manifest.schedules:
        if entry.name in schedulers:
            say(f"{entry.name}: {ranges(entry.steps)} steps")


def _one_source(source: str | None, model: str | None) -> str:
    """Return what is exported, which is given by its place or by ``--model``.

    Raises:
        click.UsageError: it is given twice, or not at all.
    """
    context = click.get_current_context()
    if source and model:
        context.fail(f"{source!r} and --model {model}: one SOURCE is exported; its folder is -o")
    if not (source or model):
        (place,) = (each for each in context.command.params if each.name == "source")
        raise click.MissingParameter(ctx=context, param=place)
    return source or model or ""


class Reporter:
    """Draws the stages: a spinner with the running one, a line for each that is over."""

    def __init__(self, quiet: bool) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, quiet=quiet, highlight=False)
        self._status = self._console.status("starting")

    def __enter__(self) -> Reporter:
        self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._status.stop()

    def report(self, event: Event) -> None:
        """Draw one event."""
        subject, stage = (visible(each, one_line=True) for each in (event.subject, event.stage))
        if event.seconds is None:
            count = f" {event.done} of {event.total}" if event.total else ""
            self._status.update(markup(f"{subject}: {stage}{count}"))
            if event.stage == WAITING and not self._console.is_terminal:  # no spinner says so
                self._console.print(f"  {subject}: {stage}", markup=False)
            return
        size = megabytes(event.size) if event.size else ""
        self._console.print(
            f"  {subject:<18} {stage:<28} {event.seconds:7.1f} s {size:>10}", markup=False
        )


def builtin_folder() -> Path:
    """The pipeline that ships in the package, found without importing the package above."""
    from importlib.resources import files

    return Path(str(files("latentc") / "models" / "shapes"))


def megabytes(size: int) -> str:
    """A size in MB with one decimal."""
    return f"{size / 1e6:.1f} MB"
