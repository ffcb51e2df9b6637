"""The compiler's commands: export and schedule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from latentc.exporter.passes import PASSES
from latentc.exporter.targets import options as options_of_targets
from latentc.exporter.targets.options import flag
from latentc.runtimes.storage.locks import WAITING
from latentc.runtimes.terminal import markup, say, visible

if TYPE_CHECKING:
    from latentc.exporter.progress import Event

BUILTIN = "builtin"


def target_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add a flag for each own option of each target; its value is None where it is not given."""
    for kind in reversed(options_of_targets().values()):
        for each in reversed(fields(kind)):
            choices = each.metadata["choices"]
            kind_of_value = click.Choice(choices) if choices else type(each.default)
            settings: dict[str, Any] = {"type": kind_of_value}
            if isinstance(each.default, bool):
                settings = {"is_flag": True}
            command = click.option(
                flag(each.name), each.name, default=None, help=each.metadata["help"], **settings
            )(command)
    return command


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
@click.argument("source")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Bundle.")
@click.option(
    "-t",
    "--target",
    "targets",
    multiple=True,
    default=("onnx",),
    show_default=True,
    help="onnx, openvino, torch, coreml or tensorrt; may be repeated; or all.",
)
@click.option(
    "-p",
    "--precision",
    "precisions",
    multiple=True,
    default=("fp32",),
    show_default=True,
    help="fp32, fp16, bf16, int8 or int4 (weights), w8a8 (weights and activations of 8 bits); for "
    "coreml palette8, palette6, palette4; or by component, as denoiser=int8,vae_decoder=fp16; "
    "may be repeated; all: each target in every precision that it has.",
)
@click.option(
    "--pass",
    "passes",
    multiple=True,
    metavar="NAME",
    help="Faster, and another image: "
    + "; ".join(f"{name}: {each.does}" for name, each in PASSES.items())
    + "; may be repeated.",
)
@click.option(
    "--task",
    "tasks",
    multiple=True,
    metavar="NAME",
    help="What the bundle is for besides text-to-image: image-to-image adds the VAE's encoder, for "
    "calls with an image; may be repeated.",
)
@click.option(
    "--calibration-prompts",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="For w8a8: prompts to calibrate with, one a line.  [default: a varied list]",
)
@click.option(
    "--calibration-samples",
    type=click.IntRange(1, 4096),
    help="For w8a8: denoiser calls to calibrate with.  [default: 32]",
)
@click.option(
    "--fidelity-floor",
    type=float,
    metavar="DB",
    help="PSNR that the image must reach: the most sensitive layers stay in half precision.",
)
@click.option(
    "--scheduler",
    "schedulers",
    multiple=True,
    help="Short name or diffusers class; may be repeated. Replaces the default set; the "
    "pipeline's own scheduler is always there.",
)
@click.option(
    "--steps",
    multiple=True,
    type=click.IntRange(1, 1000),
    help="Step count to make plans for; may be repeated.  [default: 1-30, 40, 50, 100]",
)
@click.option("--height", type=click.IntRange(1), help="Fix the height, in pixels.")
@click.option("--width", type=click.IntRange(1), help="Fix the width, in pixels.")
@click.option("--verify/--no-verify", default=True, help="Compare with PyTorch.  [default: on]")
@click.option(
    "--preflight/--no-preflight",
    default=True,
    help="Refuse what does not fit into memory or disk.  [default: on]",
)
@click.option("--dry-run", is_flag=True, help="Say what the export will need; make nothing.")
@click.option("--overwrite", is_flag=True, help="Replace a bundle of another source.")
@click.option(
    "--lora",
    "loras",
    multiple=True,
    metavar="FILE_OR_ID[:SCALE]",
    help="Fuse a LoRA into the weights; may be repeated.",
)
@click.option(
    "--textual-inversion",
    "inversions",
    multiple=True,
    metavar="FILE_OR_ID[:WORD]",
    help="Add a word with learnt vectors, for prompts; may be repeated.",
)
@click.option("--vae", metavar="FOLDER_OR_ID", help="A VAE in the place of the pipeline's own.")
@click.option(
    "--controlnet",
    multiple=True,
    metavar="FOLDER_OR_ID",
    help="A ControlNet to fuse with the denoiser; may be repeated.",
)
@click.option(
    "--t2i-adapter",
    multiple=True,
    metavar="FOLDER_OR_ID",
    help="A T2I-Adapter, whose features the denoiser adds to its own; may be repeated.",
)
@click.option(
    "--ip-adapter",
    multiple=True,
    metavar="FILE_OR_ID",
    help="An IP-Adapter's file, its image_encoder beside it, or OWNER/NAME/PATH on the Hub; may be "
    "repeated.",
)
@click.option(
    "--image-encoder",
    metavar="FOLDER_OR_ID",
    help="The image encoder of the IP-Adapters.  [default: image_encoder beside their file]",
)
@click.option(
    "--config",
    metavar="FOLDER_OR_ID",
    help="For a checkpoint of one file: whose configuration it has.  [default: guessed]",
)
@click.option(
    "--allow-pickle",
    is_flag=True,
    help="Read a checkpoint, which may then run code, or an adapter's file that is a pickle.",
)
@click.option(
    "--without",
    multiple=True,
    metavar="PART",
    help="Leave out a part that the pipeline works without, such as text_encoder_3 or "
    "safety_checker, or say that "
    "watermark, which the bundle has not, is meant to be left out; may be repeated.",
)
@click.option(
    "--watermark",
    is_flag=True,
    help="Put the invisible watermark into images that diffusers puts into those of SDXL where the "
    "package invisible-watermark is installed.",
)
@click.option(
    "--share-with",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="BUNDLE",
    help="Take over what this bundle has already, as hard links: stored once; may be repeated.",
)
@click.option("--revision", help="Hub revision: branch, tag or commit.")
@click.option("--variant", help="Weight variant, such as fp16.")
@target_options
@click.option("-q", "--quiet", is_flag=True, help="Print the result only.")
def export(
    source: str,
    output: Path,
    targets: tuple[str, ...],
    precisions: tuple[str, ...],
    passes: tuple[str, ...],
    tasks: tuple[str, ...],
    schedulers: tuple[str, ...],
    steps: tuple[int, ...],
    height: int | None,
    width: int | None,
    verify: bool,
    preflight: bool,
    dry_run: bool,
    overwrite: bool,
    revision: str | None,
    variant: str | None,
    calibration_prompts: Path | None,
    calibration_samples: int | None,
    fidelity_floor: float | None,
    loras: tuple[str, ...],
    inversions: tuple[str, ...],
    vae: str | None,
    controlnet: tuple[str, ...],
    t2i_adapter: tuple[str, ...],
    ip_adapter: tuple[str, ...],
    image_encoder: str | None,
    config: str | None,
    allow_pickle: bool,
    without: tuple[str, ...],
    watermark: bool,
    share_with: tuple[Path, ...],
    quiet: bool,
    **own: Any,
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

    reporter = Reporter(quiet)
    place = builtin_folder() if source == BUILTIN else source
    with reporter:
        ask = compiler.preflight if dry_run else compiler.export
        result = ask(
            place,
            output,
            targets=targets,
            precision=precisions,
            passes=passes,
            tasks=tasks,
            schedulers=schedulers or None,
            steps=steps or None,
            height=height,
            width=width,
            verify=verify,
            preflight=preflight,
            overwrite=overwrite,
            revision=revision,
            variant=variant,
            calibration_prompts=calibration_prompts,
            calibration_samples=calibration_samples,
            fidelity_floor=fidelity_floor,
            lora=loras,
            textual_inversion=inversions,
            vae=vae,
            controlnet=controlnet,
            t2i_adapter=t2i_adapter,
            ip_adapter=ip_adapter,
            image_encoder=image_encoder,
            config=config,
            allow_pickle=allow_pickle,
            without=without,
            watermark=watermark,
            share_with=share_with,
            report=reporter.report,
            **own,
        )
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
      latentc schedule shapes --scheduler euler --steps 35 --steps 60
      latentc schedule shapes --scheduler kdpm2
    """
)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--scheduler",
    "schedulers",
    multiple=True,
    required=True,
    help="Short name or diffusers class; may be repeated.",
)
@click.option(
    "--steps",
    multiple=True,
    type=click.IntRange(1, 1000),
    help="Step count; may be repeated.  [default: 1-30, 40, 50, 100]",
)
@click.option("-q", "--quiet", is_flag=True, help="Print the result only.")
def schedule(
    bundle: Path, schedulers: tuple[str, ...], steps: tuple[int, ...], quiet: bool
) -> None:
    """Add sampling plans to a bundle, without exporting it again."""
    from latentc.exporter.progress import Progress
    from latentc.exporter.schedulers.plans import add_to_bundle

    reporter = Reporter(quiet)
    with reporter:
        manifest = add_to_bundle(bundle, schedulers, steps or None, Progress(reporter.report))
    for entry in manifest.schedules:
        if entry.name in schedulers:
            say(f"{entry.name}: {describe_steps(entry.steps)} steps")


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


def describe_steps(steps: tuple[int, ...]) -> str:
    """``1-30, 40``: step counts with runs joined."""
    runs: list[list[int]] = []
    for count in sorted(steps):
        if runs and count == runs[-1][1] + 1:
            runs[-1][1] = count
        else:
            runs.append([count, count])
    return ", ".join(f"{a}-{b}" if a != b else str(a) for a, b in runs)
