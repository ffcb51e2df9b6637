"""This module reads what the documentation tests need of Markdown: sections, tables, code blocks,
links.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})\s*(\S*)")
_HEADING = re.compile(r"^(#{1,6})\s+(.*?)\s*#*\s*$")
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)")


@dataclass(frozen=True)
class Block:
    """A fenced code block: its language, its text, and where it begins."""

    language: str
    text: str
    file: Path
    line: int

    @property
    def label(self) -> str:
        return f"{self.file.relative_to(ROOT).as_posix()}:{self.line}"


def documents() -> list[Path]:
    """README.md, CHANGELOG.md and everything under docs/."""
    top = [ROOT / "README.md", ROOT / "CHANGELOG.md"]
    return [path for path in [*top, *sorted((ROOT / "docs").rglob("*.md"))] if path.exists()]


def blocks(path: Path) -> Iterator[Block]:
    """The fenced code blocks of a document."""
    fence, start, language, held = "", 0, "", []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        match = _FENCE.match(line)
        if not fence and match:
            fence, language, start, held = match[1], match[2], number, []
        elif fence and line.strip() == fence:
            yield Block(language, "\n".join(held), path, start)
            fence = ""
        elif fence:
            held.append(line)


def prose(path: Path) -> str:
    """The document without its code blocks and inline code."""
    kept, fence = [], ""
    for line in path.read_text("utf-8").splitlines():
        match = _FENCE.match(line)
        if not fence and match:
            fence = match[1]
        elif fence and line.strip() == fence:
            fence = ""
        elif not fence:
            kept.append(line)
    return "\n".join(kept)


def links(path: Path) -> list[str]:
    """The targets of all links and images."""
    return _LINK.findall(re.sub(r"`[^`\n]*`", "", prose(path)))


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives to the headings."""
    found: set[str] = set()
    for line in prose(path).splitlines():
        match = _HEADING.match(line)
        if match:
            text = re.sub(r"[^\w\- ]", "", match[2].replace("`", "").lower()).replace(" ", "-")
            unique, count = text, 0
            while unique in found:
                count += 1
                unique = f"{text}-{count}"
            found.add(unique)
    return found


def section(path: Path, heading: str) -> str:
    """The text under the heading, up to the next one of the same or a higher level."""
    lines = path.read_text("utf-8").splitlines()
    matches = [(i, _HEADING.match(line)) for i, line in enumerate(lines)]
    headings = [(i, len(match[1]), match[2]) for i, match in matches if match]
    begin, level = next((i, level) for i, level, text in headings if text == heading)
    end = next((i for i, other, _ in headings if i > begin and other <= level), len(lines))
    return "\n".join(lines[begin + 1 : end])


def table(text: str, first_column: str) -> list[dict[str, str]]:
    """The rows of the first table whose first column has that heading, by column."""
    lines = iter(text.splitlines())
    for line in lines:
        columns = _cells(line)
        if columns and columns[0] == first_column:
            next(lines)
            rows = []
            for row in lines:
                if not row.startswith("|"):
                    break
                rows.append(dict(zip(columns, _cells(row), strict=True)))
            return rows
    raise LookupError(f"no table with the column {first_column!r}")


def _cells(line: str) -> list[str]:
    if not line.startswith("|"):
        return []
    cells = re.split(r"(?<!\\)\|", line.strip()[1:-1])
    return [cell.strip().replace("\\|", "|") for cell in cells]
