"""A benchmark's report as a run of Weights & Biases.

What goes where is decided by `mapped` alone, from the report's shape and not from its names: a
report may grow without a change here.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from latentc.runtimes.calls import given_images
from latentc.runtimes.errors import LatentcError
from latentc.runtimes.storage.files import LARGEST_DOCUMENT, open_regular
from latentc.runtimes.storage.parsing import reason

PROJECT = "latentc-benchmarks"
ROWS = "rows"
# The first of these that a row has is its name; else the row's place is.
_NAMES = ("name", "id", "case", "label")
_IMAGE_FOLDERS = ("images", "pictures")  # the second in reports of earlier versions
_IMAGES_INSIDE = tuple(f"{folder}/*.png" for folder in _IMAGE_FOLDERS)
_FILES = ("*.json", "*.html", "*.md", "*.csv", "*.txt", *_IMAGES_INSIDE)
_IMAGES = (*_IMAGES_INSIDE, "*.png")

Table = tuple[list[str], list[list[Any]]]  # columns, rows


@dataclass(frozen=True)
class Mapped:
    """A report by what Weights & Biases makes of it.

    `metrics`: ``<row>/<key>`` → number. `images`: caption → file. `files`: for the artifact.
    """

    config: Mapping[str, Any]
    metrics: Mapping[str, float]
    tables: Mapping[str, Table]
    images: Mapping[str, Path]
    files: Sequence[Path]


def library() -> ModuleType:
    """Return the package wandb, imported.

    Raises:
        LatentcError: it is not installed; the message has the line that installs it.
    """
    try:
        import wandb
    except ImportError as error:
        raise LatentcError(
            f"Weights & Biases cannot be used ({error}): pip install 'latentc[wandb]'"
        ) from error
    module: ModuleType = wandb
    return module


def log_report(report: Mapping[str, Any], folder: Path, project: str | None = None) -> str:
    """Log a report: configuration, a metric for every number of a row, tables, images, files.

    Args:
        report: what ``report.json`` holds. Lists of dictionaries become tables, ``rows`` metrics
            as well; the rest is configuration.
        folder: where its files and its images are; they become an artifact.
        project: None logs to the run that there is, or else to a new one in `PROJECT`.

    Returns:
        The run's address, or its folder where it has none (offline).

    Raises:
        LatentcError: wandb is not installed, or cannot log; a file of the report is no regular one,
            or a link out of its folder.
    """
    wandb = library()
    found = mapped(report, folder)
    try:
        if project is None and wandb.run is not None:
            return _log(wandb, wandb.run, found)
        with wandb.init(project=project or PROJECT, job_type="benchmark") as run:
            return _log(wandb, run, found)
    except wandb.Error as error:
        raise LatentcError(f"Weights & Biases: {error}") from error


def mapped(report: Mapping[str, Any], folder: Path) -> Mapped:
    """Return what of the report goes where.

    Raises:
        LatentcError: a file in `folder` is no regular one, too large, or a link out of it.
    """
    lists = {name: value for name, value in report.items() if _is_table(value)}
    return Mapped(
        config={name: value for name, value in report.items() if name not in lists},
        metrics=dict(_metrics(lists.get(ROWS, []))),
        tables={name: _table(rows) for name, rows in lists.items()},
        images={path.stem: path for path in _inside(folder, _IMAGES)},
        files=_inside(folder, _FILES),
    )


def flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested dictionaries, their keys joined by dots; lists are leaves."""
    for name, each in value.items():
        if isinstance(each, Mapping):
            yield from flat(each, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", each


def _log(wandb: ModuleType, run: Any, found: Mapped) -> str:
    run.config.update(dict(found.config), allow_val_change=True)
    logged: dict[str, Any] = {
        name: wandb.Table(columns=columns, data=rows, allow_mixed_types=True)
        for name, (columns, rows) in found.tables.items()
    }
    if found.images:
        table = wandb.Table(columns=["name", "image"])
        images = {name: given_images.read(path) for name, path in found.images.items()}
        for name, image in images.items():
            table.add_data(name, wandb.Image(image, caption=name))
        logged["images"] = table
        logged["image"] = [wandb.Image(image, caption=name) for name, image in images.items()]
    run.log({**found.metrics, **logged})
    if found.files:
        artifact = wandb.Artifact(f"report-{run.id}", type="benchmark-report")
        for path in found.files:
            inside = path.parent.name + "/" if path.parent.name in _IMAGE_FOLDERS else ""
            artifact.add_file(str(path), name=inside + path.name)
        run.log_artifact(artifact)
    return str(run.url or run.dir)


def _is_table(value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str | bytes)
        and len(value) > 0
        and all(isinstance(each, Mapping) for each in value)
    )


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table with the columns of all rows, in the order in which they are seen first."""
    flattened = [dict(flat(row)) for row in rows]
    columns = [*dict.fromkeys(name for row in flattened for name in row)]
    return columns, [[_cell(row.get(name)) for name in columns] for row in flattened]


def _cell(value: Any) -> Any:
    if value is None or isinstance(value, str | int | float):
        return value
    return json.dumps(value, default=str)


def _metrics(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, float]]:
    names = [_name(row, index) for index, row in enumerate(rows)]
    times = Counter(names)
    for index, row in enumerate(rows):
        # Rows of one name would overwrite each other.
        name = names[index] if times[names[index]] == 1 else f"{names[index]}-{index}"
        for key, value in flat(row):
            if isinstance(value, int | float) and not isinstance(value, bool):
                yield f"{name}/{key}", value


def _name(row: Mapping[str, Any], index: int) -> str:
    given = next((str(row[name]) for name in _NAMES if row.get(name)), f"row-{index}")
    return re.sub(r"[^\w .:+=-]+", "-", given)  # a slash would make another group of panels


def _inside(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """Return the files of a report, which may come from anybody: what is logged is published.

    Raises:
        LatentcError: one is no regular file, too large, or a link that leads out of the folder.
    """
    found = [path for pattern in patterns for path in sorted(folder.glob(pattern))]
    for path in found:
        try:
            with open_regular(path, LARGEST_DOCUMENT, root=folder):
                pass
        except OSError as error:
            raise LatentcError(f"{path}: no file of a report: {reason(error)}") from error
    return found
