"""The tables of options in docs/ are those that their declarations make."""

from __future__ import annotations

import re

from tests import option_tables


def test_tables_are_up_to_date() -> None:
    assert not option_tables.stale(), "run python -m tests.option_tables"


def test_every_table_stands_in_a_page() -> None:
    pages = (path.read_text("utf-8") for path in option_tables.DOCS.glob("*.md"))
    names = [name for text in pages for name in re.findall(r"<!-- options: (\w+) -->", text)]
    assert sorted(names) == sorted(option_tables.TABLES)


def test_only_what_is_between_the_marks_is_written() -> None:
    old = "before\n<!-- options: coreml -->\n| old |\n<!-- end of options -->\nafter\n| old |\n"
    new = option_tables.with_tables(old, "coreml.md")
    assert new.startswith("before\n<!-- options: coreml -->\n| Flag of")
    assert new.endswith("<!-- end of options -->\nafter\n| old |\n")
    assert new.count("| old |") == 1
