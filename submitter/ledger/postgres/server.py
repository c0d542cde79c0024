"""PostgreSQL connection pool, schema migrations, and change notification (LISTEN/NOTIFY)."""

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
STATEMENT_CACHE_SIZE = 100
ATTEMPTS = 3  # at a call that a deadlock or a serialization failure rolls back
SCHEMA = "kling_relay"

UNAVAILABLE = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError, TimeoutError)
POOLER_ERRORS = (asyncpg.InvalidSQLStatementNameError, asyncpg.DuplicatePreparedStatementError)
RETRYABLE = (asyncpg.DeadlockDetectedError, asyncpg.SerializationError)

T = TypeVar("T")
Connection = Any  # an asyncpg.Connection, or a pool's proxy of one


class Server:
    """One schema on a server. The first use connects, creates the schema, and migrates it."""

    def __init__(self, url: str) -> None:
        self.url, self.schema, self._statement_cache_size = read_url(url)
        self.channel = f"kling_relay_{self.schema}"
        self._host = urlsplit(self.url).hostname or "its socket"
        self._pool: asyncpg.Pool[asyncpg.Record] | None = None
        self._opening = asyncio.Lock()
        self._closed = False

    def sql(self, statement: str) -> str:
        """Return a statement with `SCHEMA.` replaced by this schema's name."""
        return statement.replace("SCHEMA.", f'"{self.schema}".')

    async def fetch(self, statement: str, *values: Any) -> list[asyncpg.Record]:
        """Run one statement; raise LedgerUnavailable."""
        return await self.run(lambda db: db.fetch(self.sql(statement), *values))

    async def run(self, run: Callable[[Connection], Awaitable[T]]) -> T:
        """Run on one connection; retry after a deadlock or serialization failure.

        Raises LedgerUnavailable, and asyncpg.DataError for a value that cannot be stored.
        """
        pool = await self._open()
        for attempts_left in reversed(range(ATTEMPTS)):
            try:
                async with pool.acquire(timeout=TIMEOUT_S) as db:
                    return await run(db)
            except RETRYABLE as error:
                if not attempts_left:
                    raise self.unavailable(error) from error
            except asyncpg.DataError:
                raise
            except UNAVAILABLE as error:
                raise self.unavailable(error) from error
        raise AssertionError

    def unavailable(self, error: BaseException) -> LedgerUnavailable:
        """Return the error to raise for an error of asyncpg or of the network."""
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        if isinstance(error, POOLER_ERRORS):
            reason = "a connection pooler lost a prepared statement; add ?pooler=transaction to KLING_RELAY_LEDGER"
        return LedgerUnavailable(f"the ledger at {self._host} is unavailable: {reason}")

    async def close(self) -> None:
        """Close every connection."""
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
                        min_size=0,  # the pool logs a traceback each time it cannot restore its minimum
                        max_size=CONNECTIONS,
                        timeout=TIMEOUT_S,
                        command_timeout=TIMEOUT_S,
                        statement_cache_size=self._statement_cache_size,
                        reset=_skip_reset,
                    )
                    try:
                        await self._migrate(pool)
                    except BaseException:
                        await close(pool)
                        raise
                except UNAVAILABLE as error:
                    raise self.unavailable(error) from error
                self._pool = pool
            return self._pool

    async def _migrate(self, pool: "asyncpg.Pool[asyncpg.Record]") -> None:
        script = Path(__file__).with_name("schema.sql").read_text()
        migrations = [migration.partition("\n")[2] for migration in script.split("-- migration ")[1:]]
        known = len(migrations)
        async with pool.acquire() as db, db.transaction():
            # Serializes processes that start at the same time: one of them migrates.
            await db.execute("SELECT pg_advisory_xact_lock(hashtextextended($1, 0))", self.channel)
            if await db.fetchval("SELECT to_regclass($1)", f'"{self.schema}".version') is None:
                await db.execute(f'CREATE SCHEMA IF NOT EXISTS "{self.schema}"')
                await db.execute(self.sql("CREATE TABLE SCHEMA.version (applied integer NOT NULL)"))
                await db.execute(self.sql("INSERT INTO SCHEMA.version VALUES (0)"))
            version = await db.fetchval(self.sql("SELECT applied FROM SCHEMA.version"))
            if version > known:
                raise LedgerUnavailable(
                    f"the ledger has schema {version}, but this kling-relay supports only up to {known};"
                    " upgrade kling-relay"
                )
            for migration in migrations[version:]:
                await db.execute(self.sql(migration))
            if version < known:
                await db.execute(self.sql("UPDATE SCHEMA.version SET applied = $1"), known)


class Notifications(Changes):
    """Wakes waiters on changes by this process, and on NOTIFY by other processes (LISTEN on one connection).

    PostgreSQL sends a notification when its transaction commits, so every notified change is visible.
    """

    def __init__(self, server: Server) -> None:
        super().__init__()
        self._server = server
        self._listener: asyncpg.Connection[asyncpg.Record] | None = None
        self._connecting = asyncio.Lock()
        self._closed = False

    async def wait_for_change(self, version: int, timeout_s: float | None) -> None:
        """Wait as `Changes.wait` does, while listening; raise LedgerUnavailable."""
        await self._listen()
        if not self._closed:  # the wait is limited: a broken connection or a pooler may drop notifications
            await self.wait(version, timeout_s)

    async def close(self) -> None:
        """Stop listening, and wake every waiter."""
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
            except UNAVAILABLE as error:
                raise self._server.unavailable(error) from error
            self.wake()  # notifications before LISTEN were missed


def read_url(url: str) -> tuple[str, str, int]:
    """Return the URL without our options, the schema, and the size of a connection's prepared-statement cache.

    The cache is 0 behind a transaction pooler, which may run each transaction on another
    connection. Raises InvalidSettings.
    """
    parts = urlsplit(url)
    options = parse_qsl(parts.query, keep_blank_values=True)
    schema = dict(options).get("schema", SCHEMA)
    if not re.fullmatch(r"[a-z_][a-z0-9_]{0,40}", schema):
        limit = "a-z 0-9 _, at most 41, no digit first"
        remedy = "Use a name such as ?schema=kling_relay."
        raise InvalidSettings([Problem("KLING_RELAY_LEDGER", f"schema {schema!r}", limit, remedy)])
    pooler = dict(options).get("pooler", "none")
    if pooler not in ("none", "transaction"):
        remedy = "Use ?pooler=transaction, or leave it out."
        raise InvalidSettings([Problem("KLING_RELAY_LEDGER", f"pooler {pooler!r}", "none or transaction", remedy)])
    rest = urlencode([(name, value) for name, value in options if name not in ("schema", "pooler")])
    return urlunsplit(parts._replace(query=rest)), schema, STATEMENT_CACHE_SIZE if pooler == "none" else 0


async def _skip_reset(db: Connection) -> None:
    """Replace the pool's reset of a released connection: it costs a round trip, and no session state is left."""


async def close(connection: Any) -> None:
    """Close a connection or a pool; terminate it if the server does not answer within 5 s."""
    try:
        async with asyncio.timeout(5):
            await connection.close()
    except UNAVAILABLE:
        connection.terminate()
