"""Schema migrations of the SQLite ledger: applies the blocks of `schema.sql` that a file lacks."""

import sqlite3
from pathlib import Path

from submitter.errors import LedgerUnavailable
from submitter.ledger.sqlite.group_commit import transaction


def migrate(db: sqlite3.Connection) -> None:
    """Bring a file to this version's schema, in one transaction; raise LedgerUnavailable if its schema is newer.

    `user_version` in the file counts the migrations applied.
    """
    script = Path(__file__).with_name("schema.sql").read_text()
    migrations = script.split("-- migration ")[1:]
    with transaction(db):  # takes the write lock: of several processes that start at once, one migrates
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version > len(migrations):
            raise LedgerUnavailable(
                f"the ledger has schema {version}, but this kling-relay supports only up to {len(migrations)};"
                " upgrade kling-relay"
            )
        for migration in migrations[version:]:
            statement = ""
            for line in migration.splitlines(keepends=True)[1:]:
                statement += line
                if sqlite3.complete_statement(statement):
                    db.execute(statement)
                    statement = ""
        db.execute(f"PRAGMA user_version = {len(migrations)}")
