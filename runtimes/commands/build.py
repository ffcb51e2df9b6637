"""``latentc build``: engines for this machine, from a bundle's graphs and recipes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from latentc.runtimes.commands.option_types import Finite
from latentc.runtimes.errors import BackendError, InputError
from latentc.runtimes.terminal import say

if TYPE_CHECKING:
    from latentc.runtimes.backends.backend import Backend, Built, SessionOptions
    from latentc.runtimes.bundle.files import Bundle
    from latentc.runtimes.bundle.manifest import Manifest
    from latentc.runtimes.bundle.recipe import Range
    from latentc.runtimes.bundle.structures import Build

_GIB = 1 << 30
_SPANS = ("images", "height", "width", "num_frames")


@click.command(
    epilog="""
    \b
    Examples:
      latentc build bundle --target tensorrt
      latentc build bundle --build tensorrt-fp16 --images 1:1:4 --height 512 --width 512:768:1024
      latentc build bundle --target tensorrt --device cuda:1 --workspace 8 --force

    \b
    Exit codes: 2 bad argument · 4 bad bundle · 5 no such engine or GPU, or it refused a graph.
    """
)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-t", "--target", metavar="NAME", help="Of several builds, those for this target.")
@click.option("--build", "name", metavar="NAME", help="Of several builds, this one.")
@click.option("--device", metavar="NAME", help="See: latentc backends.")
@click.option("--images", metavar="MIN:OPT:MAX", help="Images in one call, such as 1:1:4.")
@click.option("--height", metavar="MIN:OPT:MAX", help="In pixels; one number is that size only.")
@click.option("--width", metavar="MIN:OPT:MAX", help="Likewise.")
@click.option("--num-frames", metavar="MIN:OPT:MAX", help="Likewise, of a video.")
@click.option("--workspace", type=Finite(0, min_open=True), metavar="GIB", help="Limit.")
@click.option("--tf32/--no-tf32", default=None, help="Allow TensorFloat-32 products.  [no]")
@click.option("--cache", metavar="FOLDER", type=click.Path(path_type=Path), help="For engines.")
@click.option("--force", is_flag=True, help="Build also what is there and fits.")
@click.option("--json", "as_json", is_flag=True, help="Print the engines as JSON.")
def build(bundle: Path, target: str | None, name: str | None, **options: Any) -> None:
    """Build the engines of BUNDLE on this machine, for this machine.

    An engine fits one GPU, one driver, one version of its library and one graph; what fits is
    kept, anything else is built anew, and said why. Engines are kept in the cache folder, not
    in the bundle.
    """
    from latentc.runtimes.backends.backend import SessionOptions
    from latentc.runtimes.backends.tensorrt.engine_store import engines_folder
    from latentc.runtimes.bundle.files import Bundle
    from latentc.runtimes.bundle.sizes import ranges, text_lengths
    from latentc.runtimes.programs.latents import other_sizes
    from latentc.runtimes.storage.outputs import check_folder

    spans = _spans(options)
    opened = Bundle.open(bundle)
    _refuse_fixed(opened.manifest, spans)
    manifest, others = opened.manifest, other_sizes(opened.manifest.programs[0])
    components, guidance = manifest.components, manifest.guidance
    lengths = text_lengths(manifest.programs, components)
    profiles = ranges(components, manifest.latents, guidance, spans, lengths, others)
    if not spans:
        profiles = {name: {} for name in profiles}
    session = SessionOptions(cache=options["cache"])
    jobs = [
        (chosen, engine, engine.device(options["device"]))
        for chosen, engine in _to_build(manifest, target, name)
    ]
    check_folder(engines_folder(session.cache), "--cache")
    records = []
    for chosen, engine, device in jobs:
        for component, built in _build(opened, chosen, engine, device, session, profiles, options):
            records.append({"build": chosen.name, "component": component, **asdict(built)})
            if not options["as_json"]:
                say(_line(chosen.name, component, built))
    if options["as_json"]:
        say(json.dumps(records, indent=2, default=str))


def _build(
    bundle: Bundle,
    build: Build,
    engine: Backend,
    device: str,
    session: SessionOptions,
    profiles: Mapping[str, Mapping[str, Range]],
    options: Mapping[str, Any],
) -> Any:
    """Build each component on a device; yields its name and what was built.

    `profiles`: by component the ranges of its symbols that the user asked for.
    """
    from latentc.runtimes.backends.backend import BuildRequest
    from latentc.runtimes.bundle.files import graph_digest

    workspace = options["workspace"]
    for component in bundle.manifest.components:
        request = BuildRequest(
            profile=profiles[component.name],
            workspace=None if workspace is None else int(workspace * _GIB),
            tf32=options["tf32"],
            force=options["force"],
        )
        say(f"{build.name}, {component.name}: building", err=True)
        settings = replace(session, key=graph_digest(build.artifacts[component.name]))
        entry = bundle.entry(build, component.name, engine)
        yield component.name, engine.build(entry, component, device, settings, request)
    bundle.cache.save()


def _to_build(
    manifest: Manifest, target: str | None, name: str | None
) -> list[tuple[Build, Backend]]:
    """Every asked build that has to be built, with the backend that does it.

    Raises:
        InputError: none; says which there are, or how to export one.
        BackendUnavailable: its engine is not installed.
    """
    from latentc.runtimes.backends.backend import get
    from latentc.runtimes.backends.choosing import describe

    targets = _builders()
    chosen = [
        each
        for each in manifest.builds
        if target in (None, each.target) and name in (None, each.name) and each.target in targets
    ]
    if not chosen:
        known = ", ".join(targets)
        raise InputError(
            f"nothing to build: engines are built for the targets {known}; the bundle has: "
            f"{describe(manifest)}; add one with: latentc export SOURCE -o BUNDLE "
            f"--target {next(iter(targets))}"
        )
    return [(each, get(targets[each.target])) for each in chosen]


def _builders() -> dict[str, str]:
    """The backend that builds the engines of each target that needs any."""
    from latentc.runtimes.backends.backend import find, names

    found: dict[str, str] = {}
    for name in names():
        with suppress(BackendError):  # a broken package of somebody else's
            kind = find(name)
            found |= {target: name for target in kind.targets if kind.builds}
    return found


def _refuse_fixed(manifest: Manifest, spans: Mapping[str, Range]) -> None:
    """Raises InputError for a range of what the graphs have fixed, or do not have."""
    shape = manifest.sample().shape
    arguments = {each.argument: name for name, each in manifest.programs[0].symbols.items()}
    for name in set(spans) - {"images"}:
        flag = f"--{name.replace('_', '-')}"
        if name not in arguments:
            raise InputError(f"this bundle has no {name}; leave {flag} out")
        if arguments[name] not in shape:
            raise InputError(f"this bundle was exported for one {name}; leave {flag} out")


def _spans(options: Mapping[str, Any]) -> dict[str, Range]:
    from latentc.runtimes.bundle.recipe import parse_range

    return {
        name: parse_range(f"--{name.replace('_', '-')}", options[name])
        for name in _SPANS
        if options[name] is not None
    }


def _line(build: str, component: str, built: Built) -> str:
    if not built.seconds:
        return f"{build}, {component}: is there and fits, {built.path}"
    why = f", the old one did not fit: {built.reason}" if built.reason else ""
    return f"{build}, {component}: built in {built.seconds:.0f} s{why}, {built.path}"
