"""The tests that `SECURITY.md` and the receiver's promises name exist, and each threat and promise has one."""

import ast
import re
from functools import cache
from typing import NamedTuple

import pytest

from tests.house.pages import ROOT, read_pages, section
from tests.torture.__main__ import PARTS

PAGES = read_pages()
THREATS = section(PAGES["SECURITY.md"], "Threats")
PROMISES = section(PAGES["receiver/README.md"], "Promises")
TEST = re.compile(r"`(tests/[\w/]+\.py)::([\w:]+)`")


class Row(NamedTuple):
    """A row of a table: its first cell, and all cells."""

    subject: str
    cells: list[str]


def rows_of(table: str) -> list[Row]:
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]
    return [Row(row[0], row) for row in cells]


@cache
def names_in(path: str) -> set[str]:
    """Return the tests of a file as pytest names them; of a suite, `Class::test`. Those that are skipped are none."""
    found = set()
    for node in ast.parse((ROOT / path).read_text()).body:
        inner = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}::" if isinstance(node, ast.ClassDef) else ""
        for one in inner:
            if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef) and one.name.startswith("test_"):
                marks = "".join(ast.unparse(mark) for mark in one.decorator_list)
                if "mark.skip" not in marks and "mark.xfail" not in marks:
                    found.add(prefix + one.name)
    return found


def missing_in(row: Row) -> list[str]:
    return [
        f"{row.subject}: {path}::{name}"
        for path, name in TEST.findall(row.cells[2] if len(row.cells) > 2 else "")
        if not (ROOT / path).is_file() or name not in names_in(path)
    ]


@pytest.mark.parametrize(("table", "columns"), [(THREATS, 3), (PROMISES, 5)], ids=["threats", "promises"])
def test_each_row_names_tests_that_exist(table: str, columns: int) -> None:
    rows = rows_of(table)
    assert len(rows) >= 8
    for row in rows:
        assert len(row.cells) == columns, row.subject
        assert all(row.cells), row.subject
        assert TEST.search(row.cells[2]), f"{row.subject}: no test"
        assert TEST.sub("", row.cells[2]).strip(", ") == "", f"{row.subject}: more than the names of tests"
        assert missing_in(row) == []


def test_a_test_that_does_not_exist_is_found() -> None:
    page = "`tests/unit/test_app.py::test_no_such`, `tests/unit/test_none.py::test_x`, `tests/unit/test_app.py::sign`"
    (row,) = rows_of(f"| threat | defence | tests |\n|---|---|---|\n| a | b | {page} |\n")
    assert len(missing_in(row)) == 3
    in_a_suite = "`tests/conformance/ledgers.py::LedgerSuite::test_reserve_is_idempotent`"
    assert missing_in(Row("a", ["a", "b", in_a_suite])) == []
    assert missing_in(Row("a", ["a", "b", in_a_suite.replace("LedgerSuite::", "")])) != []


def test_each_part_of_the_torture_belongs_to_a_promise() -> None:
    named = {part for parts in re.findall(r'PARTS="([a-z ]+)"', PROMISES) for part in parts.split()}
    assert set(PARTS) <= named
