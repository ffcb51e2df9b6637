"""The runtime's commands: generate, inspect, plans, backends.

Only click is imported here; what a command needs, it imports when it runs.
"""

from __future__ import annotations

import json
import shlex
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from latentc.runtimes.commands.call_options import (
    BUNDLE,
    arguments_of,
    arrays_of,
    chosen,
    images_per_prompt,
    of_call,
    of_loading,
)
from latentc.runtimes.commands.declared_options import given_options, options_of
from latentc.runtimes.errors import InputError
from latentc.runtimes.sampling.plans_arguments import PlansArguments
from latentc.runtimes.terminal import say, tell
from latentc.runtimes.unknown_names import suggestion

if TYPE_CHECKING:
    from latentc.runtimes.bundle.manifest import Manifest
    from latentc.runtimes.calls.request import Request
    from latentc.runtimes.calls.signature import Signature
    from latentc.runtimes.pipeline.loading import Loading
    from latentc.runtimes.pipeline.pipeline import Pipeline
    from latentc.runtimes.pipeline.run import Result, Run


@click.command(
    epilog="""
    \b
    Examples:
      latentc generate shapes "a large red circle" --steps 25 --seed 42 -o circle.png
      latentc generate shapes "a red circle" "a blue square" -n 2 -o image-{index}.png
      latentc generate bundle "a castle" --negative-prompt "fog" --arg prompt_2="oil on canvas" \\
          --arg original_size=1024,1024 --backend openvino --json
      latentc generate bundle "a castle" --backend openvino --device GPU --static
      latentc generate bundle "a castle" --backend onnxruntime --device cuda
      latentc generate bundle "a castle" --preset fast
      latentc generate bundle "a castle" --image sketch.png --strength 0.7
      latentc generate bundle "a castle" --image photo.png --mask mask.png --padding-mask-crop 32
      latentc generate base "a castle" --denoising-end 0.8 --refiner refiner
      latentc generate bundle "a castle" --value image_latents=latents.npz --strength 0.7
      latentc generate video "a red circle rises" --num-frames 33 -o circle.webp
    """
)
@BUNDLE
@click.argument("prompts", nargs=-1, metavar="[PROMPT]...")
@click.option(
    "-p",
    "--prompt",
    "named_prompts",
    multiple=True,
    metavar="TEXT",
    help="Another PROMPT.  May be repeated.",
)
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    help="Where to: .png, .jpg or .webp. Several images are numbered: out-0.png, "
    "out-1.png …, or where {index} stands in the name. Videos are animations, .webp, .png or "
    ".gif, or, with a name that ends in /, folders of numbered frames.  [default: out.png, of "
    "videos out.webp]",
)
@of_call
@click.option(
    "--refiner",
    type=click.Path(path_type=Path),
    metavar="BUNDLE",
    help="A second bundle that goes on with the latents of the first.",
)
@of_loading
@click.option("--vae-slicing", is_flag=True, help="Decode one image at a time: less memory.")
@click.option("--vae-tiling", is_flag=True, help="Decode large images in tiles: less memory.")
@click.option("--json", "as_json", is_flag=True, help="Print paths, seeds and times as JSON.")
def generate(
    bundle: Path,
    prompts: tuple[str, ...],
    named_prompts: tuple[str, ...],
    output: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Make images or videos with BUNDLE, one or more for each PROMPT."""
    from latentc.runtimes.pipeline.pipeline import open_pipeline

    _refuse_unquoted(bundle, prompts)
    prompts += named_prompts
    options["given_texts"], options["given_values"] = arrays_of(options)
    rows = {**options["given_texts"], **options["given_values"]}.get("prompt_embeds", ())
    count = max(1, len(prompts), len(rows)) * images_per_prompt(options)
    calls = _planned(bundle, prompts, options, count)
    paths = _output_paths(output, calls[-1].request)
    _check_sizes(calls[0].request, paths)
    with open_pipeline(calls[0].loading) as pipe:
        result = _drawn(pipe, options, calls[0].request)
    for call in calls[1:]:
        request = call.loading.request({**call.arguments, "image": result.latents}, tell=tell)
        with open_pipeline(call.loading) as pipe:
            result = _drawn(pipe, options, request)
    _save(result, paths)
    _print_generated(result, paths, as_json)


@click.command(
    epilog="""
    \b
    Examples:
      latentc inspect shapes
      latentc inspect shapes --json | jq .builds
      latentc inspect shapes --program text-to-image
    """
)
@BUNDLE
@click.option("--json", "as_json", is_flag=True, help="Print the manifest and sizes as JSON.")
@click.option(
    "--program",
    metavar="TASK",
    help="Print what a call of this task does with the components, step by step.",
)
def inspect(bundle: Path, as_json: bool, program: str | None) -> None:
    """Show what BUNDLE holds: components, builds, schedulers, sizes, verification figures."""
    from latentc.runtimes.bundle.manifest import Manifest
    from latentc.runtimes.bundle.quantities import build_size
    from latentc.runtimes.commands.report import print_manifest

    manifest = Manifest.load(bundle)
    if program is not None:
        _print_program(manifest, program, as_json)
        return
    if not as_json:
        print_manifest(manifest)
        return
    document = json.loads(manifest.encode())
    document["sizes"] = {
        "total": sum({file.path: file.size for file in manifest.files()}.values()),
        "builds": {build.name: build_size(build) for build in manifest.builds},
    }
    say(json.dumps(document, indent=2))


def _print_program(manifest: Manifest, name: str, as_json: bool) -> None:
    """Print one of a bundle's programs.

    Raises:
        InputError: it has none of this name.
    """
    import msgspec

    from latentc.runtimes.programs.listing import listing

    by_name = {program.name: program for program in manifest.programs}
    if name not in by_name:
        hint = suggestion(name, by_name, "it has")
        raise InputError(f"no program {name!r} in this bundle; {hint}")
    if as_json:
        say(msgspec.json.format(msgspec.json.encode(by_name[name]), indent=2).decode())
    else:
        say(listing(by_name[name]).rstrip())


@click.command(
    epilog="""
    \b
    Examples:
      latentc plans shapes -o plans
      latentc plans shapes -o plans --scheduler euler --steps 20 --steps 30
    """
)
@BUNDLE
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Folder to write to.",
)
@options_of(PlansArguments)
def plans(bundle: Path, output: Path, **options: Any) -> None:
    """Write the sampling plans of BUNDLE as JSON, one file per scheduler.

    For programs that start from noise only: each plan is whole, without the table's indices.
    """
    from latentc.runtimes.bundle.files import Bundle
    from latentc.runtimes.bundle.quantities import megabytes
    from latentc.runtimes.sampling.plan_json import write_plans
    from latentc.runtimes.storage.outputs import check_folder

    check_folder(output)
    for path in write_plans(Bundle.open(bundle), output, **given_options(options)):
        say(f"{path}  {megabytes(path.stat().st_size)}")


@click.command(
    epilog="""
    \b
    Examples:
      latentc backends
      latentc backends --json
    """
)
@click.option("--json", "as_json", is_flag=True, help="Print them as JSON.")
def backends(as_json: bool) -> None:
    """List the inference engines: installed or how to install, versions, devices, targets."""
    from latentc.runtimes.commands.report import backend_records, print_backends

    records = backend_records()
    if as_json:
        say(json.dumps(records, indent=2))
    else:
        print_backends(records)


def _refuse_unquoted(bundle: Path, prompts: tuple[str, ...]) -> None:
    """Refuse prompts that are one word each, as those of one sentence without its quotes are.

    Raises:
        InputError: says how to type one prompt, and how several of one word.
    """
    words = all(len(prompt.split()) == 1 for prompt in prompts)
    without_spaces = any(unicodedata.east_asian_width(each) in "WF" for each in "".join(prompts))
    if len(prompts) < 2 or not words or without_spaces:
        return
    sentence = " ".join(prompts)
    quoted = shlex.quote(sentence) if set(sentence) & set('"$`\\!') else f'"{sentence}"'
    named = " ".join(f"-p {shlex.quote(prompt)}" for prompt in prompts)
    place = shlex.quote(str(bundle))
    raise InputError(
        f"{len(prompts)} prompts of one word each look like one without its quotes: type latentc "
        f"generate {place} {quoted}, or for {len(prompts)} images latentc generate {place} {named}"
    )


class _Call(NamedTuple):
    """One bundle's part of the work: how it is loaded, and its call, as given and as checked."""

    loading: Loading
    arguments: Mapping[str, Any]
    request: Request


def _planned(
    bundle: Path, prompts: tuple[str, ...], options: Mapping[str, Any], count: int
) -> list[_Call]:
    """Return the call of the bundle, then that of the refiner if there is one; nothing is loaded.

    Raises:
        InputError: an option that cannot be used.
        PlanNotFound: no sampling plan for the step count.
        BackendError: an engine or device that is not here.
    """
    refiner = options["refiner"]
    loading = chosen(bundle, options, count)
    arguments = arguments_of(loading.signature, prompts, options)
    arguments["output_type"] = "pil" if refiner is None else "latent"
    calls = [_Call(loading, arguments, loading.request(arguments, tell=tell))]
    if refiner is not None:
        loading = chosen(refiner, options, count)
        arguments = _refining(loading.signature, calls[0])
        calls.append(_Call(loading, arguments, loading.request(arguments, tell=tell)))
    return calls


def _check_sizes(request: Request, paths: list[Path]) -> None:
    """Refuse images that do not fit into the formats of their files."""
    from latentc.runtimes.images.animation import FORMATS
    from latentc.runtimes.images.image import FORMATS as STILL
    from latentc.runtimes.images.image import check_format

    formats = FORMATS if request.facts.emit.kind == "frames" else STILL
    for width, height in request.image_sizes():
        for path in paths:
            check_format(path, formats.get(path.suffix.lower(), "PNG"), width, height)


def _drawn(pipe: Pipeline, options: Mapping[str, Any], request: Request) -> Result:
    """Run a call, with a progress bar."""
    from latentc.runtimes.interrupts import on_interrupt

    for name in ("vae_slicing", "vae_tiling"):
        if options[name]:
            getattr(pipe, f"enable_{name}")()
    run = pipe.start(request)
    with on_interrupt(run.close), _progress(run) as advance:
        for _ in run:
            advance()
    return run.finish()


def _refining(signature: Signature, call: _Call) -> dict[str, Any]:
    """Return the call of a refiner that goes on with the latents of another bundle's call; zeros
    stand for these, which are not there yet."""
    import numpy as np

    known = {name: call.arguments[name] for name in signature.names if name in call.arguments}
    end = call.arguments.get("denoising_end")
    start = {} if end is None else {"denoising_start": end}
    sizes = ("height", "width", "latents", "denoising_end", "output_type")
    images = ("image", "mask_image", "control_image")
    left = {*sizes, *images, *signature.values}  # which the other bundle's components made
    kept = {name: value for name, value in known.items() if name not in left}
    seeds = call.request.seeds
    latents = np.zeros(call.request.latents_shape(), np.float32)
    return {**kept, **start, "image": latents, "seed": seeds[0] if len(seeds) == 1 else list(seeds)}


def _output_paths(output: str | None, request: Request) -> list[Path]:
    """Return where the images or videos go; refused now rather than after the work."""
    from latentc.runtimes.images import animation, image

    videos = request.facts.emit.kind == "frames"
    if output == "":
        raise InputError("--output: expected the name of a file, not an empty one")
    named = output or ("out.webp" if videos else "out.png")
    if request.made > 1 and "{index}" not in named:
        path = Path(named)
        folder = "/" if videos and animation.is_folder(named) else ""
        named = str(path.with_name(f"{path.stem}-{{index}}{path.suffix}")) + folder
    check = animation.check_path if videos else image.check_path
    return [check(named.replace("{index}", str(index))) for index in range(request.made)]


def _save(result: Result, paths: list[Path]) -> None:
    from latentc.runtimes.images import animation, image

    for index, (made, path) in enumerate(zip(result.images, paths, strict=True)):
        settings = {**result.settings, "index": index}
        if result.kind == "frames":
            animation.save(made, path, result.rate, settings)
        else:
            image.save(made, path, settings)


def _print_generated(result: Result, paths: list[Path], as_json: bool) -> None:
    from dataclasses import asdict

    if as_json:
        document = {
            "videos" if result.kind == "frames" else "images": [str(path) for path in paths],
            "seeds": list(result.seeds),
            "values": {name: array.tolist() for name, array in result.values.items()},
            "timings": asdict(result.timings),
            "settings": result.settings,
        }
        say(json.dumps(document, indent=2))
        return
    seeds, timings = result.seeds, result.timings
    for index, path in enumerate(paths):
        seed = seeds[index] if len(seeds) > 1 else seeds[0]
        say("  ".join((str(path), f"seed {seed}", *_remarks(result, index))))
    say(
        f"{timings.total:.2f} s: encode {timings.encode:.2f}, denoise {timings.denoise:.2f} "
        f"({len(timings.steps)} steps), decode {timings.decode:.2f}  "
        f"[{_used(result.settings)}]"
    )


def _remarks(result: Result, index: int) -> list[str]:
    """Return the names of what the bundle says of an image or a video with a number that is not 0,
    such as that it was made black."""
    shown = result.images[index]
    frames = shown if result.kind == "frames" else [shown]
    black = "" if any(frame.getbbox() for frame in frames) else " (made black)"
    return [
        f"{name}{black}"
        for name, array in result.values.items()
        if array.shape == (len(result.images),) and array[index]
    ]


def _used(settings: Mapping[str, Any]) -> str:
    """Return what made the images, in a few words."""
    words = [settings[name] for name in ("backend", "device", "build")]
    if "preset" in settings:
        shortcuts = ("guidance_start", "guidance_stop", "cache_interval")
        words += [f"{name} {settings[name]:g}" for name in shortcuts if settings.get(name)]
        words.append(f"preset {settings['preset']}")
    return ", ".join(words)


@contextmanager
def _progress(run: Run) -> Iterator[Any]:
    """A bar on a terminal, nothing elsewhere; yields what to call after each step."""
    import sys

    if not sys.stderr.isatty():
        yield lambda: None
        return
    with click.progressbar(length=run.num_timesteps, label="denoise", file=sys.stderr) as bar:
        yield lambda: bar.update(1)
