"""``latentc verify``: whether a bundle's files are whole, and what its builds compute here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from latentc.runtimes.commands.declared_options import given_options, options_of
from latentc.runtimes.terminal import say
from latentc.runtimes.verification.verify_arguments import VerifyArguments

if TYPE_CHECKING:
    from latentc.runtimes.verification.whole_bundle import Verified

_STANDARD_OUTPUT = "-"


@click.command(
    epilog="""
    \b
    Examples:
      latentc verify shapes
      latentc verify shapes --backend openvino --device GPU --json figures.json
      latentc verify shapes --files-only
    """
)
@click.argument("bundle", type=click.Path(path_type=Path))
@options_of(VerifyArguments)
@click.option(
    "--json",
    "json_file",
    metavar="FILE",
    type=click.Path(allow_dash=True),
    help="Write the figures there; - is the standard output.",
)
def verify(bundle: Path, json_file: str | None, **options: Any) -> None:
    """Hash every file of BUNDLE, then repeat its probes on this machine's backends.

    A probe is an input with what PyTorch made of it at export. Exit code 6 says that a build
    does not reproduce it here.
    """
    from latentc.runtimes.commands.report import print_measured
    from latentc.runtimes.storage.outputs import check_file
    from latentc.runtimes.verification import whole_bundle

    if json_file and json_file != _STANDARD_OUTPUT:
        check_file(Path(json_file), "--json")
    arguments = given_options(options)
    verified = whole_bundle.verify(bundle, report=lambda line: say(line, err=True), **arguments)
    if verified.measured and json_file != _STANDARD_OUTPUT:
        print_measured(verified.measured)
    if json_file and not options["files_only"]:
        _write_figures(json_file, bundle, verified)
    verified.refuse()


def _write_figures(target: str, bundle: Path, verified: Verified) -> None:
    import msgspec

    from latentc.runtimes.bundle.quantities import build_size

    records = [
        {"build": build.name, "size": build_size(build), **msgspec.to_builtins(figures)}
        | {"passed": figures.passed}
        for build, figures in verified.measured
    ]
    failed = [failure._asdict() for failure in verified.failures]
    document = {"bundle": str(bundle), "verified": records, "failed": failed}
    text = json.dumps(document, indent=2)
    if target == _STANDARD_OUTPUT:
        say(text)
    else:
        Path(target).write_text(text + "\n", "utf-8")
