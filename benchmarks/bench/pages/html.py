"""The report as one HTML page that needs nothing else: charts and images are inside.

Every figure of the page is an element with `data-ref`, a JSON pointer (RFC 6901) into report.json,
and `data-unit`, how it is written; `figure` is the only way that numbers get into the tables.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from latentc.benchmarks.bench import model
from latentc.benchmarks.bench.model import SCENARIOS, Report
from latentc.benchmarks.bench.pages import charts, texts
from latentc.runtimes.calls import given_images
from latentc.runtimes.errors import InputError
from latentc.runtimes.storage.files import read_regular
from latentc.runtimes.storage.parsing import parser

_SIDE = 256  # pixels: no image of the page is larger
_QUALITY = 85  # of smaller copies
_TEMPLATES = Path(__file__).with_name("templates")
UNITS: Mapping[str, Callable[[Any], str]] = {
    "seconds": texts.seconds,
    "times": texts.times,
    "percent": texts.percent,
    "noise": lambda value: f"±{texts.percent(value)}",
    "bytes": texts.mebibytes,
    "megabytes": lambda value: f"{value / 1e6:,.1f} MB",
    "decibels": lambda value: f"{value:.1f} dB",
    "share": lambda value: f"{value:.4f}",
    "error": lambda value: f"{value:.1e}",
    "rate": lambda value: f"{texts.digits(value / 1e9)} G",
    "giga": lambda value: f"{texts.digits(value / 1e9)} G",
    "load": lambda value: f"{value:.1f}",
    "joules": texts.digits,
    "count": lambda value: f"{value:,}",
    "plain": str,
}


def page(report: Report, folder: Path) -> str:
    """Return the page; images are read from `folder`."""
    from jinja2 import Environment, FileSystemLoader
    from markupsafe import Markup, escape

    document = json.loads(model.encode(report))

    def figure(pointer: str, unit: str) -> Markup:
        value = resolve(document, pointer)
        text = "" if value is None else UNITS[unit](value)
        return Markup('<span data-ref="{}" data-unit="{}">{}</span>').format(
            pointer, unit, escape(text)
        )

    def image(path: str | None) -> Markup:
        if path is None or not (folder / path).is_file():
            return Markup("")
        kind, content = small(folder / path)
        data = base64.b64encode(content).decode("ascii")
        return Markup("data:image/{};base64,{}").format(kind, data)

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html.j2").render(
        report=report,
        scenarios=texts.scenarios_of(report),
        names=SCENARIOS,
        winner=_winner(report),
        charts={name: Markup(svg) for name, svg in charts.draw(report).items()},
        figure=figure,
        image=image,
        case_of={case.id: (place, case) for place, case in enumerate(report.cases)},
        rows=list(enumerate(report.rows)),
        command=" ".join(report.command),
    )


@parser(InputError, "path", "an image that can be read")
def small(path: Path) -> tuple[str, bytes]:
    """Return an image as the page shows it, its kind and its bytes.

    It is the file itself, or a smaller one that is good to look at. Images of random weights do not
    compress.
    """
    from PIL import Image

    data = read_regular(path, given_images.LARGEST_FILE)
    with Image.open(BytesIO(data)) as image:
        if max(image.size) <= _SIDE:
            return "png", data
        image.thumbnail((_SIDE, _SIDE))
        buffer = BytesIO()
        image.save(buffer, "WEBP", quality=_QUALITY)
        return "webp", buffer.getvalue()


def resolve(document: Any, pointer: str) -> Any:
    """Return the value that a JSON pointer names.

    Raises:
        KeyError, IndexError: there is none.
    """
    for part in pointer.strip("/").split("/"):
        part = part.replace("~1", "/").replace("~0", "~")
        document = document[int(part)] if isinstance(document, list) else document[part]
    return document


def _winner(report: Report) -> dict[str, Any] | None:
    found = texts.winner(report)
    if found is None:
        return None
    row, case, baseline = found
    assert row.speedup is not None
    return {
        "place": report.rows.index(row),
        "verdict": row.speedup.verdict,
        "case": case,
        "baseline": baseline,
        "scenario": SCENARIOS[row.scenario],
    }
