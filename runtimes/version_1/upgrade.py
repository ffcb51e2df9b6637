"""A bundle of format 1 becomes one of format 2 in its place, without PyTorch.

Graphs, tokenizers and probes stay as they are. Tables of sampling plans are written again as
JSON, and the manifest says in programs what it said in fields.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from msgspec.structs import replace

from latentc.runtimes.bundle.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    Manifest,
    read_document,
    version_of,
)
from latentc.runtimes.bundle.structures import File, Schedule
from latentc.runtimes.bundle.structures import Tokenizer as NewTokenizer
from latentc.runtimes.bundle.trust import check_unlinked, checked
from latentc.runtimes.errors import BundleError, InputError
from latentc.runtimes.programs.statements import Program
from latentc.runtimes.storage import files
from latentc.runtimes.storage.locks import Stages, writing
from latentc.runtimes.storage.outputs import check_folder
from latentc.runtimes.storage.parsing import parsing
from latentc.runtimes.texts.tokenizer import TextTokenizer
from latentc.runtimes.version_1 import manifest as old
from latentc.runtimes.version_1.fields import CallFields
from latentc.runtimes.version_1.plans import read_plans
from latentc.runtimes.version_1.translation import program_of, tokenizer_of, with_positions


def upgrade(bundle: Path, progress: Stages) -> Manifest | None:
    """Bring a bundle up to date; return its new manifest, or None where it was up to date.

    The bundle is whole at every moment: new files come first, then the manifest takes the old
    one's place, then the files go that it lists no longer.

    Raises:
        BundleError: there is no bundle of format 1 or 2, or its tokenizers and plans are not those
            that its manifest lists; graphs are looked at when they are loaded.
        InputError: the folder cannot be written.
    """
    data = read_document(bundle)
    if version_of(data, str(bundle / MANIFEST)) != old.FORMAT_VERSION:
        Manifest.decode(data, str(bundle / MANIFEST))
        return None
    check_folder(bundle)
    with writing(bundle, progress):
        return _upgraded(Path(os.path.realpath(bundle)), progress)


def _upgraded(root: Path, progress: Stages) -> Manifest | None:
    data = read_document(root)
    if version_of(data, str(root / MANIFEST)) != old.FORMAT_VERSION:
        return None  # another process was quicker
    before = old.Manifest.decode(data, str(root / MANIFEST))
    check_unlinked(root, [root / MANIFEST, *(root / each.file.path for each in before.schedules)])
    with progress.stage("programs", "translate"):
        now = _translated(root, before)
    with progress.stage("schedules", "write as JSON"):
        tables = dict(_as_json(root, schedule) for schedule in before.schedules)
        _refuse_taken(root, before, tables)
        now = replace(
            now,
            schedules=tuple(
                replace(schedule, file=_file(path, data))
                for schedule, (path, data) in zip(before.schedules, tables.items(), strict=True)
            ),
        )
        _write(root, {**tables, MANIFEST: now.checked()})
    listed = {file.path for file in now.files()}
    for path in {file.path for file in before.files()} - listed:
        files.remove(root / path, root=root)
    return now


def _translated(root: Path, before: old.Manifest) -> Manifest:
    """Return the manifest of format 2, whose tables of plans are still those of format 1."""
    fields = CallFields(
        pipeline_class=before.source.pipeline_class,
        num_inference_steps=before.defaults.num_inference_steps,
        latents=before.latents,
        texts={each.input: each.texts for each in before.tokenizers},
        arguments=before.arguments,
        vectors=before.vectors,
        guidance=before.guidance,
        components=before.components,
        embeddings=before.embeddings,
    )
    return Manifest(
        format_version=FORMAT_VERSION,
        programs=_programs(before, fields, str(root / MANIFEST)),
        source=before.source,
        created_by=before.created_by,
        components=tuple(
            with_positions(component, before.embeddings) for component in before.components
        ),
        tokenizers=tuple(_tokenizer(root, tokenizer) for tokenizer in before.tokenizers),
        builds=before.builds,
        schedules=before.schedules,
        defaults=before.defaults,
        probes=before.probes,
        left_out=before.left_out,
    )


def _programs(before: old.Manifest, fields: CallFields, origin: str) -> tuple[Program, ...]:
    """Return a program for each task. Raises BundleError for fields that contradict each other."""
    with parsing(origin, BundleError, "a manifest whose fields fit together"):
        return tuple(program_of(task, fields) for task in before.tasks)


def _tokenizer(root: Path, before: old.Tokenizer) -> NewTokenizer:
    """Return a tokenizer with what it puts around a text, which its file says."""
    path = checked(root, before.file, "always")
    texts = TextTokenizer.load(path, before.max_length, before.expansions, before.vocabulary)
    frame = texts.frame()
    return NewTokenizer(
        name=tokenizer_of(before.input),
        file=before.file,
        max_length=before.max_length,
        before=frame.before,
        after=frame.after,
        pad=frame.pad,
        expansions=before.expansions,
        vocabulary=before.vocabulary,
    )


def _as_json(root: Path, before: Schedule) -> tuple[str, bytes]:
    """Return where a scheduler's table will stand, and its JSON. Raises BundleError."""
    table = read_plans(checked(root, before.file, "always"))
    if table.step_counts != before.steps:
        raise BundleError(
            f"{before.file.path}: expected the steps {list(before.steps)}, found "
            f"{list(table.step_counts)}; export the bundle again"
        )
    return f"schedules/{before.name}.json", table.encoded()


def _file(path: str, data: bytes) -> File:
    return File(path, len(data), hashlib.sha256(data).hexdigest())


def _refuse_taken(root: Path, before: old.Manifest, tables: Mapping[str, bytes]) -> None:
    """Refuse to write where something else stands, or where nothing can be.

    Raises:
        BundleError: another file of the bundle has a table's name, or a link or a folder does.
    """
    taken = {file.path for file in before.files()} & tables.keys()
    if taken or len(tables) != len(before.schedules):
        raise BundleError(
            f"{root / MANIFEST}: lists {', '.join(sorted(taken)) or 'two schedules of one name'}, "
            "where a table of plans is to stand; export the bundle again"
        )
    places = [root / path for path in tables]
    check_unlinked(root, places)
    for place in places:
        if place.is_symlink() or place.is_dir():
            raise BundleError(f"{place}: a file is to stand there; remove what does")


def _write(root: Path, contents: Mapping[str, bytes]) -> None:
    """Write files in their order; where one cannot be written, take back those before it.

    Raises:
        InputError: says what cannot be written, and why.
    """
    for place, (path, data) in enumerate(contents.items()):
        try:
            files.write(root / path, data, root=root)
        except OSError as error:
            for earlier in [*contents][:place]:
                files.remove(root / earlier, root=root)
            raise InputError(
                f"{root / path}: cannot be written: {error.strerror or error}; the bundle is as "
                "it was"
            ) from error
