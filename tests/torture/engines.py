"""The stores that the state machine runs on: a SQLite file, a schema of PostgreSQL, a table of DynamoDB's stand-in."""

import itertools
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from submitter.ledger import Ledger, open_ledger
from submitter.ledger.sqlite.ledger import SqliteLedger
from tests.conformance.brokers import is_listening

POSTGRES = os.environ.get("TEST_POSTGRES_URL", "postgresql://postgres@127.0.0.1:5432/test")
_numbers = itertools.count()


def has_postgres() -> bool:
    """Return whether a PostgreSQL server is there to be used."""
    return "TEST_POSTGRES_URL" in os.environ or is_listening(5432)


class Store(Protocol):
    """One empty store. `is_sql`: it answers from one snapshot, and not from indexes that are read one by one."""

    is_sql: bool

    def open(self) -> Ledger:
        """Open the store once more, as another process does."""
        ...

    def another(self) -> "Store":
        """Return another empty store of this kind."""
        ...

    async def drop(self) -> None:
        """Delete the store; its ledgers are closed."""
        ...


class SqliteStore:
    """A new SQLite file in `folder`; `ledger` may be a class that breaks a promise."""

    is_sql = True

    def __init__(self, folder: Path, ledger: Callable[[Path], Ledger] = SqliteLedger) -> None:
        self._folder, self._ledger = folder, ledger
        self._path = folder / f"{next(_numbers)}.db"

    def open(self) -> Ledger:
        return self._ledger(self._path)

    def another(self) -> "SqliteStore":
        return SqliteStore(self._folder, self._ledger)

    async def drop(self) -> None:
        for suffix in ("", "-wal", "-shm"):
            Path(f"{self._path}{suffix}").unlink(missing_ok=True)


class PostgresStore:
    """A new schema of the server at POSTGRES."""

    is_sql = True

    def __init__(self) -> None:
        self._schema = f"torture_{uuid.uuid4().hex[:12]}"
        self.url = f"{POSTGRES}?schema={self._schema}"

    def open(self) -> Ledger:
        return open_ledger(self.url)

    def another(self) -> "PostgresStore":
        return PostgresStore()

    async def drop(self) -> None:
        import asyncpg

        db = await asyncpg.connect(POSTGRES)
        await db.execute(f'DROP SCHEMA IF EXISTS "{self._schema}" CASCADE')
        await db.close()


class DynamoStore:
    """A new table of the stand-in to which the environment variables lead; it ends with the stand-in."""

    is_sql = False

    def __init__(self) -> None:
        self._table = f"torture-{uuid.uuid4().hex[:12]}"

    def open(self) -> Ledger:
        return open_ledger(f"dynamodb://{self._table}?shards=2")

    def another(self) -> "DynamoStore":
        return DynamoStore()

    async def drop(self) -> None:
        return None
