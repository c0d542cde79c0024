"""How the ledger reaches PostgreSQL: its connections, its migrations, and the notices of changes."""

import asyncio
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import asyncpg

from submitter.errors import InvalidSettings, LedgerUnavailable, Problem
from submitter.ledger.changes import Changes

CONNECTIONS = 4
TIMEOUT_S = 30
STATEMENTS = 100
TRIES = 3  # of what a deadlock or a serialization failure undid
SCHEMA = "kling_relay"

BROKEN = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError, TimeoutError)
POOLED = (asyncpg.InvalidSQLStatementNameError, asyncpg.DuplicatePreparedStatementError)
UNDONE = (asyncpg.DeadlockDetectedError, asyncpg.SerializationError)

T = TypeVar("T")
Connection = Any  # asyncpg's own, or its pool's proxy of one


class Server:
    """A schema on a server. Connected to, made and migrated at its first use."""

    def __init__(self, url: str) -> None:
        self.url, self.schema, self.statements = read_url(url)
        self.channel = f"kling_relay_{self.schema}"
        self._host = urlsplit(self.url).hostname or "its socket"
        self._pool: asyncpg.Pool[asyncpg.Record] | None = None
        self._opening = asyncio.Lock()
        self._closed = False

    def sql(self, statement: str) -> str:
        """Return a statement with its schema."""
        return statement.replace("SCHEMA.", f'"{self.schema}".')

    async def fetch(self, statement: str, *values: Any) -> list[asyncpg.Record]:
        """Run one statement; raise LedgerUnavailable."""
        return await self.run(lambda db: db.fetch(self.sql(statement), *values))

    async def run(self, run: Callable[[Connection], Awaitable[T]]) -> T:
        """Run on one connection; again when the server undid it for another's sake.

        Raises LedgerUnavailable, and asyncpg.DataError for what cannot be stored.
        """
        pool = await self._open()
        for left in reversed(range(TRIES)):
            try:
                async with pool.acquire(timeout=TIMEOUT_S) as db:
                    return await run(db)
            except UNDONE as error:
                if not left:
                    raise self.unavailable(error) from error
            except asyncpg.DataError:
                raise
            except BROKEN as error:
                raise self.unavailable(error) from error
        raise AssertionError

    def unavailable(self, error: BaseException) -> LedgerUnavailable:
        """Return the error of a server that does not answer."""
        said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        if isinstance(error, POOLED):
            said = "a pooler lost a prepared statement: add ?pooler=transaction to KLING_RELAY_LEDGER"
        return LedgerUnavailable(f"the ledger at {self._host} does not answer: {said}")

    async def close(self) -> None:
        """Let go of every connection."""
        self._closed = True
        if self._pool is not None:
            await close(self._pool)

    async def _open(self) -> "asyncpg.Pool[asyncpg.Record]":
        if self._closed:
            raise LedgerUnavailable("the ledger is closed")
        async with self._opening:
            if self._pool is None:
                try:
                    pool = await asyncpg.create_pool(
                        self.url,
                        min_size=1,
                        max_size=CONNECTIONS,
                        timeout=TIMEOUT_S,
                        command_timeout=TIMEOUT_S,
                        statement_cache_size=self.statements,
                        reset=_leave_as_it_is,
                    )
                    try:
                        await self._migrate(pool)
                    except BaseException:
                        await close(pool)
                        raise
                except BROKEN as error:
                    raise self.unavailable(error) from error
                self._pool = pool
            return self._pool

    async def _migrate(self, pool: "asyncpg.Pool[asyncpg.Record]") -> None:
        script = Path(__file__).with_name("postgres.sql").read_text()
        migrations = [migration.partition("\n")[2] for migration in script.split("-- migration ")[1:]]
        known = len(migrations)
        async with pool.acquire() as db, db.transaction():
            # So that of several processes that start at once one migrates.
            await db.execute("SELECT pg_advisory_xact_lock(hashtextextended($1, 0))", self.channel)
            if await db.fetchval("SELECT to_regclass($1)", f'"{self.schema}".version') is None:
                await db.execute(f'CREATE SCHEMA IF NOT EXISTS "{self.schema}"')
                await db.execute(self.sql("CREATE TABLE SCHEMA.version (applied integer NOT NULL)"))
                await db.execute(self.sql("INSERT INTO SCHEMA.version VALUES (0)"))
            version = await db.fetchval(self.sql("SELECT applied FROM SCHEMA.version"))
            if version > known:
                raise LedgerUnavailable(
                    f"this ledger has schema {version} and this kling-relay knows {known}; upgrade kling-relay"
                )
            for migration in migrations[version:]:
                await db.execute(self.sql(migration))
            if version < known:
                await db.execute(self.sql("UPDATE SCHEMA.version SET applied = $1"), known)


class Notices(Changes):
    """Who waits for a change is woken by this process's own at once, and by another's notice (LISTEN).

    A notice goes out with the transaction that it tells of: nothing is left to do behind it.
    """

    def __init__(self, server: Server) -> None:
        super().__init__()
        self._server = server
        self._listener: asyncpg.Connection[asyncpg.Record] | None = None
        self._connecting = asyncio.Lock()
        self._closed = False

    async def changed(self, mark: int, timeout_s: float | None) -> None:
        """Return once something changed since `mark`, or after `timeout_s`; raise LedgerUnavailable."""
        await self._listen()
        if not self._closed:  # a notice may be lost with its connection, or swallowed by a pooler
            await self.wait(mark, timeout_s)

    async def close(self) -> None:
        """Listen no more."""
        self._closed = True
        self.wake()
        async with self._connecting:
            if self._listener is not None:
                await close(self._listener)

    async def _listen(self) -> None:
        async with self._connecting:
            if self._closed or (self._listener is not None and not self._listener.is_closed()):
                return
            try:
                self._listener = await asyncpg.connect(self._server.url, timeout=TIMEOUT_S)
                await self._listener.add_listener(self._server.channel, lambda *_: self.wake())
            except BROKEN as error:
                raise self._server.unavailable(error) from error
            self.wake()  # nobody knows what was told before


def read_url(url: str) -> tuple[str, str, int]:
    """Return the URL as PostgreSQL's clients know it, its schema, and how many statements a connection keeps.

    Behind a pooler that gives each transaction another connection it keeps none. Raises InvalidSettings.
    """
    parts = urlsplit(url)
    asked = parse_qsl(parts.query, keep_blank_values=True)
    schema = dict(asked).get("schema", SCHEMA)
    if not re.fullmatch(r"[a-z_][a-z0-9_]{0,40}", schema):
        problem = Problem("KLING_RELAY_LEDGER", f"schema {schema!r}", "a-z 0-9 _, at most 41", "Mend ?schema=...")
        raise InvalidSettings([problem])
    pooler = dict(asked).get("pooler", "none")
    if pooler not in ("none", "transaction"):
        problem = Problem("KLING_RELAY_LEDGER", f"pooler {pooler!r}", "none or transaction", "Mend ?pooler=...")
        raise InvalidSettings([problem])
    rest = urlencode([(name, value) for name, value in asked if name not in ("schema", "pooler")])
    return urlunsplit(parts._replace(query=rest)), schema, STATEMENTS if pooler == "none" else 0


async def _leave_as_it_is(db: Connection) -> None:
    """Save the round trip by which a pool cleans a connection: nothing here outlives its statement."""


async def close(it: Any) -> None:
    """Close a connection or a pool, and let go of it if the server does not answer."""
    try:
        async with asyncio.timeout(5):
            await it.close()
    except BROKEN:
        it.terminate()
