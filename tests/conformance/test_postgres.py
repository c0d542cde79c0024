"""PostgreSQL ledger: the conformance suite, batching, rollback, LISTEN/NOTIFY, durability, migrations."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import msgspec
import pytest

from submitter.errors import InvalidSettings, LedgerUnavailable
from submitter.ledger import open_ledger
from submitter.ledger.postgres.ledger import PostgresLedger
from submitter.ledger.postgres.server import read_url
from submitter.task import Task, TaskStatus
from submitter.transition import Transition
from tests.conformance.ledgers import NOW, LedgerSuite, Open, report, succeed, task


async def opening(url: str) -> AsyncIterator[Open]:
    ledgers: list[PostgresLedger] = []

    def open_again() -> PostgresLedger:
        ledger = open_ledger(url)
        assert isinstance(ledger, PostgresLedger)
        ledgers.append(ledger)
        return ledger

    yield open_again
    for ledger in ledgers:
        await ledger.close()


@pytest.fixture
async def empty(another_postgres_url: str) -> AsyncIterator[Open]:
    async for open_again in opening(another_postgres_url):
        yield open_again


@pytest.fixture
async def opened(postgres_url: str) -> AsyncIterator[Open]:
    async for open_again in opening(postgres_url):
        yield open_again


class TestPostgres(LedgerSuite):
    """The conformance suite on a real server, with prepared statements and without (`pooler=transaction`)."""

    @pytest.fixture(params=["", "&pooler=transaction"])
    async def opened(self, request: pytest.FixtureRequest, postgres_url: str) -> AsyncIterator[Open]:
        async for open_again in opening(postgres_url + request.param):
            yield open_again


@pytest.fixture
def schema(postgres_url: str) -> str:
    return read_url(postgres_url)[1]


@pytest.fixture
async def db(postgres_url: str) -> AsyncIterator[Any]:
    """A second connection, outside the ledger."""
    connection = await asyncpg.connect(read_url(postgres_url)[0])
    yield connection
    await connection.close()


async def test_concurrent_applies_share_one_batch(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = opened()
    assert isinstance(ledger, PostgresLedger)
    await asyncio.gather(*(ledger.reserve(task(f"t{i}")) for i in range(200)))
    runs = []
    run = ledger._run

    async def counted(work: Any) -> Any:
        runs.append(work)
        return await run(work)

    monkeypatch.setattr(ledger, "_run", counted)
    await asyncio.gather(*(ledger.apply(f"t{i}", report(TaskStatus.SUBMITTED)) for i in range(200)))
    assert len(runs) == 1
    assert await ledger.open_tasks("kling") == 200


async def test_a_value_that_cannot_be_stored_fails_alone(opened: Open) -> None:
    ledger = opened()
    for id in ("a", "b"):
        await ledger.reserve(task(id))

    def unstorable(current: Task) -> Transition | None:
        moved = report(TaskStatus.SUBMITTED)(current)
        assert moved is not None
        return Transition(moved.task, "x\x00")  # PostgreSQL cannot store a NUL in a text

    results = await asyncio.gather(
        ledger.apply("a", unstorable), ledger.apply("b", report(TaskStatus.SUBMITTED)), return_exceptions=True
    )
    assert isinstance(results[0], LedgerUnavailable)
    assert (await ledger.get("b")).status is TaskStatus.SUBMITTED
    assert (await ledger.get("a")).status is TaskStatus.CREATED


async def test_a_batch_is_rolled_back_when_its_connection_is_terminated(opened: Open, db: Any, schema: str) -> None:
    """The batch waits for locked rows; then the server terminates its connection."""
    ledger = opened()
    for n in range(20):
        await ledger.reserve(task(f"t{n}"))
    async with db.transaction():
        await db.execute(f'SELECT FROM "{schema}".tasks FOR UPDATE')
        waiting = [asyncio.create_task(ledger.apply(f"t{n}", report(TaskStatus.SUBMITTED))) for n in range(20)]
        terminated = 0
        async with asyncio.timeout(60):
            while not terminated:
                await db.execute("SELECT pg_stat_clear_snapshot()")
                terminated = await db.fetchval(
                    "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
                    " WHERE wait_event_type = 'Lock' AND query LIKE '%' || $1 || '%'",
                    schema,
                )
                await asyncio.sleep(0.01)
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(outcome, LedgerUnavailable) for outcome in outcomes), outcomes
    assert {(await ledger.get(f"t{n}")).status for n in range(20)} == {TaskStatus.CREATED}
    assert [await ledger.events(f"t{n}") for n in range(20)] == [[]] * 20
    await asyncio.gather(*(ledger.apply(f"t{n}", report(TaskStatus.SUBMITTED)) for n in range(20)))  # a retry
    assert {len(await ledger.events(f"t{n}")) for n in range(20)} == {1}


async def test_notify_wakes_another_process(opened: Open) -> None:
    ledger, other = opened(), opened()
    await ledger.reserve(task("a"))
    await other.get("a")
    await other.wait_for_change(other.version(), 5)  # LISTEN is active afterwards
    loop = asyncio.get_running_loop()
    for n in range(5):
        version, begun_s = other.version(), loop.time()
        waiting = asyncio.create_task(other.wait_for_change(version, 30))
        await ledger.reserve(task(f"b{n}"))
        await waiting
        if loop.time() - begun_s < 0.9:  # woken by NOTIFY: the timed re-check is 1 s
            return
    pytest.fail("no notification arrived")


async def test_waiters_share_one_listen_connection(opened: Open, db: Any, schema: str) -> None:
    ledger = opened()
    await asyncio.gather(*(ledger.wait_for_change(ledger.version(), 0.1) for _ in range(5)))
    listening = await db.fetchval(
        "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'LISTEN%' || $1 || '%'", schema
    )
    assert listening == 1


async def test_confirmed_writes_survive_sigkill(postgres_url: str, opened: Open) -> None:
    """A process prints each confirmed write, and is killed by SIGKILL while it writes more."""
    script = """
import asyncio, sys
from submitter.ledger import open_ledger
from tests.conformance.ledgers import succeed
async def main():
    ledger = open_ledger(sys.argv[1])
    async def one(i):
        await succeed(ledger, f"t{i}")
        print(f"t{i}", flush=True)
    for start in range(0, 5000, 50):
        await asyncio.gather(*(one(start + i) for i in range(50)))
asyncio.run(main())
"""
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", script, postgres_url], cwd=root, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    confirmed = [process.stdout.readline().strip() for _ in range(120)]
    process.kill()
    rest, _ = process.communicate()
    confirmed += [line for line in rest.splitlines() if line.startswith("t")]
    ledger = opened()
    found = {one.external_task_id: one.status for one in await ledger.get_many(confirmed)}
    assert {found[id] for id in confirmed} == {TaskStatus.SUCCEED}


async def test_events_are_append_only(opened: Open, db: Any, schema: str) -> None:
    await succeed(opened(), "a")
    with pytest.raises(asyncpg.RaiseError, match="append-only"):
        await db.execute(f"UPDATE \"{schema}\".events SET type = 'task.failed'")


async def test_a_newer_schema_is_refused(opened: Open, db: Any, schema: str) -> None:
    await opened().counts()
    await db.execute(f'UPDATE "{schema}".version SET applied = 99')
    with pytest.raises(LedgerUnavailable, match="upgrade kling-relay"):
        await opened().counts()


async def test_processes_that_start_at_the_same_time_migrate_once(opened: Open, db: Any, schema: str) -> None:
    await asyncio.gather(*(opened().counts() for _ in range(8)))
    assert await db.fetchval(f'SELECT count(*) FROM "{schema}".version') == 1


async def test_a_refused_task_of_schema_version_1_gets_its_status(opened: Open, db: Any, schema: str) -> None:
    """Before version 2, a refused task was `created` with a flag; another one is being sent."""
    ledger = opened()
    await ledger.counts()
    refused = msgspec.to_builtins(task("refused", metadata={"status": "created"})) | {"refused": True}
    for is_open, doc in ((False, refused), (True, msgspec.to_builtins(task("sending")))):
        await db.execute(
            f'INSERT INTO "{schema}".tasks (external_task_id, vendor, status, is_open, created_at_ms, doc)'
            " VALUES ($1, 'kling', 'created', $2, $3, $4)",
            doc["external_task_id"], is_open, NOW, msgspec.json.encode(doc).decode(),
        )  # fmt: skip
    await db.execute(f'UPDATE "{schema}".version SET applied = 1')
    again = opened()
    assert await again.get("refused") == task("refused", status=TaskStatus.REFUSED, metadata={"status": "created"})
    assert (await again.get("sending")).status is TaskStatus.CREATED


async def test_the_error_of_an_unreachable_server_hides_the_password() -> None:
    ledger = open_ledger("postgresql://me:s3cret@127.0.0.1:9/none")
    with pytest.raises(LedgerUnavailable) as refused:
        await ledger.counts()
    assert "127.0.0.1" in str(refused.value)
    assert "s3cret" not in str(refused.value)
    await ledger.close()


def test_the_url_sets_schema_and_pooler() -> None:
    assert read_url("postgresql://h/d?sslmode=require") == ("postgresql://h/d?sslmode=require", "kling_relay", 100)
    pooled = read_url("postgresql://h/d?schema=mine&sslmode=require&pooler=transaction")
    assert pooled == ("postgresql://h/d?sslmode=require", "mine", 0)
    for query, remedy in (('schema=x"; DROP', r"Use .* \?schema="), ("pooler=session", r"Use \?pooler=transaction")):
        with pytest.raises(InvalidSettings, match=remedy):
            read_url(f"postgresql://h/d?{query}")
