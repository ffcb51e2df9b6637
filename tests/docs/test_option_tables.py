"""The tables of options in docs/ are those that their declarations make."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.option_tables import END, TABLES, Table


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_tables_are_up_to_date(table: Table) -> None:
    text = table.page.read_text("utf-8")
    assert table.put_into(text) == text, "python -m tests.option_tables writes it"


def test_only_what_is_between_the_markers_is_written() -> None:
    table = Table(Path("page.md"), "nothing", lambda: ["| new |"])
    old = f"before\n\n{table.begin}\n\n| old |\n\n{END}\n\nafter\n{END}\n"
    assert table.put_into(old) == old.replace("old", "new")
    with pytest.raises(LookupError, match=r"page\.md: expected"):
        table.put_into("no table")
