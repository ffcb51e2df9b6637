"""This module holds what the tests ask about the HTML page of a benchmark's report."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

from latentc.benchmarks.bench import model
from latentc.benchmarks.bench.model import Report
from latentc.benchmarks.bench.pages import html

VOID = {"meta", "img", "br", "link", "input", "hr", "path", "use"}
DIGIT = re.compile(r"\d")


class Page(HTMLParser):
    """A page answers what the tests ask about it: figures, cells' texts, addresses, ids."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.figures: list[tuple[str, str, str]] = []
        self.bare_cells: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self._open: list[tuple[str, dict[str, str | None]]] = []
        self._texts: dict[int, list[str]] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        self.addresses += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v]
        if given.get("id"):
            self.ids.append(str(given["id"]))
        if tag not in VOID:
            self._open.append((tag, given))
            if "data-ref" in given:
                self._texts[len(self._open)] = []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        depth = len(self._open)
        opened, given = self._open.pop()
        assert opened == tag, f"<{opened}> is closed by </{tag}>"
        if "data-ref" in given:
            text = "".join(self._texts.pop(depth)).strip()
            self.figures.append((str(given["data-ref"]), str(given["data-unit"]), text))

    def handle_data(self, data: str) -> None:
        for held in self._texts.values():
            held.append(data)
        names = [tag for tag, _ in self._open]
        if not self._texts and "td" in names and "small" not in names and DIGIT.search(data):
            self.bare_cells.append(data)


def check_figures(report: Report, page: Page) -> None:
    """Every figure of the page is the one of report.json that it says it is."""
    document = json.loads(model.encode(report))
    assert len(page.figures) > 50
    for pointer, unit, text in page.figures:
        value = html.resolve(document, pointer)
        assert text == ("" if value is None else html.UNITS[unit](value)), pointer
    assert not page.bare_cells
