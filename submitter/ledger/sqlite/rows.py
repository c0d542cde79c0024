"""SQL statements over many rows at once: one step for a whole group releases the interpreter lock (GIL) once."""

import sqlite3
from collections.abc import Sequence
from typing import Any

ROWS_PER_STEP = 64


def execute_rows(db: sqlite3.Connection, sql: str, rows: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Execute `sql` with `{rows}` replaced by up to ROWS_PER_STEP rows at a time; return what it returns."""
    found = []
    for start in range(0, len(rows), ROWS_PER_STEP):
        chunk = rows[start : start + ROWS_PER_STEP]
        row = f"({', '.join('?' * len(chunk[0]))})"
        values = [value for values in chunk for value in values]
        found.extend(db.execute(sql.format(rows=", ".join([row] * len(chunk))), values).fetchall())
    return found
