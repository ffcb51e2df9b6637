"""This module cleans what is written to a terminal: no name or text from elsewhere steers it.

Names in bundles, files' names and messages of engines can hold escape sequences, which clear lines,
set the clipboard or imitate a shell's prompt, and characters that turn a line's order round.
"""

from __future__ import annotations

import re

# Control characters but tab and newline; marks, embeddings, overrides and isolates of direction;
# separators of lines and paragraphs; what has no width (joiners aside, which scripts and emoji
# need); halves of surrogate pairs; tags.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\ud800-\udfff\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e007f]"
)
_BREAKS = re.compile("[\n\t]")


def visible(text: object, *, one_line: bool = False) -> str:
    """Return a text whose control characters are escapes, as JSON writes them (``\\u001b``).

    Args:
        one_line: escape newlines and tabs, too.
    """
    escaped = _HIDDEN.sub(_escape, str(text))
    return _BREAKS.sub(_escape, escaped) if one_line else escaped


def markup(text: object) -> str:
    """Return a name as markup of rich that shows it as it is, in one line."""
    from rich.markup import escape

    return escape(visible(text, one_line=True))


def say(text: object = "", err: bool = False) -> None:
    """Write a line to the standard output, or the standard error, with all that it holds visible.

    JSON means the same afterwards.
    """
    import click

    click.echo(visible(text), err=err)


def tell(text: object) -> None:
    """Write a line to the standard error, as `say` does: what is going on, beside results."""
    say(text, err=True)


def _escape(found: re.Match[str]) -> str:
    units = found.group().encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i : i + 2].hex()}" for i in range(0, len(units), 2))
