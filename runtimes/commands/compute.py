"""The command ``latentc compute``: values of a call, such as encoded texts or the latents of an
image, into a file.

Only click is imported here; what the command needs, it imports when it runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from latentc.runtimes.errors import InputError
from latentc.runtimes.terminal import say, tell

if TYPE_CHECKING:
    from latentc.runtimes.arrays import Array


@click.command(
    epilog="""
    \b
    Examples:
      latentc compute shapes prompt_embeds --prompt "a red circle" -o red.npz
      latentc generate shapes --value prompt_embeds=red.npz
      latentc compute bundle prompt_embeds pooled_prompt_embeds --prompt "a castle" -o castle.npz
      latentc compute bundle image_latents --image photo.png --seed 1 -o latents.npz
      latentc compute bundle denoised --value latents=noise.npy --prompt "a castle" -o made.npz
    """
)
@BUNDLE
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Where to: a .npz file with an array for each NAME.",
)
@click.option(
    "--prompt",
    "prompts",
    multiple=True,
    metavar="TEXT",
    help="What the image shows; may be repeated.",
)
@of_call
@of_loading
def compute(
    bundle: Path, names: tuple[str, ...], output: Path, prompts: tuple[str, ...], **options: Any
) -> None:
    """Write values that a call of BUNDLE makes on its way to images: those called NAME.

    Only what they need is run. latentc inspect BUNDLE --program TASK shows the names; those with an
    underscore before them are private. A call takes each value by --value NAME=FILE.
    """
    from latentc.runtimes.interrupts import on_interrupt
    from latentc.runtimes.pipeline.pipeline import open_pipeline

    _check_output(output)
    options["given_texts"], options["given_values"] = arrays_of(options)
    loading = chosen(bundle, options, max(1, len(prompts)) * images_per_prompt(options))
    arguments = arguments_of(loading.signature, prompts, options)
    request = loading.request(arguments, names, tell)
    with open_pipeline(loading) as pipe, on_interrupt(pipe.close):
        values = pipe.computed(request, names)
    _write(output, values)
    for name, array in values.items():
        say(f"{output}  {name}  {array.dtype} {[*array.shape]}")


def _check_output(path: Path) -> None:
    """Refuse a file that cannot be written, or has another extension. Raises InputError."""
    from latentc.runtimes.storage.outputs import check_file

    if path.suffix.lower() != ".npz":
        raise InputError(f"output {path}: the extension {path.suffix!r} is not .npz")
    check_file(path)


def _write(path: Path, values: Mapping[str, Array]) -> None:
    """Write arrays by their names, the whole file or nothing."""
    from latentc.runtimes.storage.files import replacing
    from latentc.runtimes.storage.npz import write_arrays

    with replacing(path) as file:
        write_arrays(file, values)
