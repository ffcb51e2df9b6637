"""The command that brings bundles of older formats up to date."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from latentc.runtimes.terminal import say


class _Spoken:
    """Stages, each in a line on standard error."""

    @contextmanager
    def stage(self, subject: str, stage: str) -> Iterator[None]:
        """Say what is done, and do it."""
        say(f"{subject}: {stage} …", err=True)
        yield


@click.command(
    epilog="""
    \b
    Examples:
      latentc upgrade shapes
      latentc upgrade shapes another-bundle
    """,
)
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path))
def upgrade(bundles: tuple[Path, ...]) -> None:
    """Bring BUNDLES of format 1 up to date, each in its place.

    Graphs, tokenizers and probes stay as they are, and so do all images. Takes seconds, needs
    neither PyTorch nor the pipeline that the bundle was made from. A bundle that is up to date
    is left alone.
    """
    from latentc.runtimes.errors import LatentcError
    from latentc.runtimes.version_1.upgrade import upgrade as upgraded

    failed: LatentcError | None = None
    for bundle in bundles:
        try:
            manifest = upgraded(bundle, _Spoken())
        except LatentcError as error:  # the others are brought up to date all the same
            if failed is not None:
                say(f"error: {failed}", err=True)
            failed = error
            continue
        if manifest is None:
            say(f"{bundle}: is up to date")
        else:
            names = ", ".join(program.name for program in manifest.programs)
            say(f"{bundle}: format {manifest.format_version}, with the programs {names}")
    if failed is not None:
        raise failed
