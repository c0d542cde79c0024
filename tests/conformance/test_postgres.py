"""PostgreSQL passes the ledgers' suite, and keeps its own promises."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from submitter.errors import InvalidSettings, LedgerUnavailable
from submitter.ledger import open_ledger
from submitter.ledger.postgres import PostgresLedger
from submitter.ledger.postgres_server import read_url
from submitter.task import Task, TaskStatus, Transition
from tests.conformance.ledgers import LedgerSuite, Open, report, succeed, task


async def opening(url: str) -> AsyncIterator[Open]:
    ledgers: list[PostgresLedger] = []

    def again() -> PostgresLedger:
        ledger = open_ledger(url)
        assert isinstance(ledger, PostgresLedger)
        ledgers.append(ledger)
        return ledger

    yield again
    for ledger in ledgers:
        await ledger.close()


@pytest.fixture
async def empty(another_postgres_url: str) -> AsyncIterator[Open]:
    async for again in opening(another_postgres_url):
        yield again


@pytest.fixture
async def opened(postgres_url: str) -> AsyncIterator[Open]:
    async for again in opening(postgres_url):
        yield again


class TestPostgres(LedgerSuite):
    """The suite, on a real server, with prepared statements and as behind a pooler."""

    @pytest.fixture(params=["", "&pooler=transaction"])
    async def opened(self, request: pytest.FixtureRequest, postgres_url: str) -> AsyncIterator[Open]:
        async for again in opening(postgres_url + request.param):
            yield again


@pytest.fixture
def schema(postgres_url: str) -> str:
    return read_url(postgres_url)[1]


@pytest.fixture
async def db(postgres_url: str) -> AsyncIterator[Any]:
    """A connection of this test's own."""
    connection = await asyncpg.connect(read_url(postgres_url)[0])
    yield connection
    await connection.close()


async def test_reports_that_arrive_together_share_two_statements(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
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


async def test_one_that_cannot_be_stored_does_not_take_the_others_with_it(opened: Open) -> None:
    ledger = opened()
    for id in ("a", "b"):
        await ledger.reserve(task(id))

    def unstorable(current: Task) -> Transition | None:
        moved = report(TaskStatus.SUBMITTED)(current)
        assert moved is not None
        return Transition(moved.task, "x\x00")  # PostgreSQL takes no NUL in a text

    results = await asyncio.gather(
        ledger.apply("a", unstorable), ledger.apply("b", report(TaskStatus.SUBMITTED)), return_exceptions=True
    )
    assert isinstance(results[0], LedgerUnavailable)
    assert (await ledger.get("b")).status is TaskStatus.SUBMITTED
    assert (await ledger.get("a")).status is TaskStatus.CREATED


async def test_a_connection_that_dies_in_the_middle_leaves_all_or_nothing(opened: Open, db: Any, schema: str) -> None:
    """The tasks' rows are locked, so that the group waits; then its connection is ended by the server."""
    ledger = opened()
    for n in range(20):
        await ledger.reserve(task(f"t{n}"))
    async with db.transaction():
        await db.execute(f'SELECT FROM "{schema}".tasks FOR UPDATE')
        waiting = [asyncio.create_task(ledger.apply(f"t{n}", report(TaskStatus.SUBMITTED))) for n in range(20)]
        ended = 0
        async with asyncio.timeout(10):
            while not ended:
                await db.execute("SELECT pg_stat_clear_snapshot()")
                ended = await db.fetchval(
                    "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
                    " WHERE wait_event_type = 'Lock' AND query LIKE '%' || $1 || '%'",
                    schema,
                )
                await asyncio.sleep(0.01)
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(outcome, LedgerUnavailable) for outcome in outcomes), outcomes
    assert {(await ledger.get(f"t{n}")).status for n in range(20)} == {TaskStatus.CREATED}
    assert [await ledger.events(f"t{n}") for n in range(20)] == [[]] * 20
    await asyncio.gather(*(ledger.apply(f"t{n}", report(TaskStatus.SUBMITTED)) for n in range(20)))  # they come again
    assert {len(await ledger.events(f"t{n}")) for n in range(20)} == {1}


async def test_another_process_is_woken_by_a_notice(opened: Open) -> None:
    ledger, other = opened(), opened()
    await ledger.reserve(task("a"))
    await other.get("a")
    await other.changed(other.mark(), 5)  # it listens now
    loop = asyncio.get_running_loop()
    for n in range(5):
        mark, begun_s = other.mark(), loop.time()
        waiting = asyncio.create_task(other.changed(mark, 30))
        await ledger.reserve(task(f"b{n}"))
        await waiting
        if loop.time() - begun_s < 0.9:  # a notice: nobody looks sooner than after a second
            return
    pytest.fail("no notice came")


async def test_those_who_wait_share_one_listening_connection(opened: Open, db: Any, schema: str) -> None:
    ledger = opened()
    await asyncio.gather(*(ledger.changed(ledger.mark(), 0.1) for _ in range(5)))
    listening = await db.fetchval(
        "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'LISTEN%' || $1 || '%'", schema
    )
    assert listening == 1


async def test_what_was_answered_survives_a_kill(postgres_url: str, opened: Open) -> None:
    """A process writes, says what was answered, and is killed by SIGKILL in the middle of more."""
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
    answered = [process.stdout.readline().strip() for _ in range(120)]
    process.kill()
    rest, _ = process.communicate()
    answered += [line for line in rest.splitlines() if line.startswith("t")]
    ledger = opened()
    found = {one.external_task_id: one.status for one in await ledger.get_many(answered)}
    assert {found[id] for id in answered} == {TaskStatus.SUCCEED}


async def test_events_cannot_be_changed(opened: Open, db: Any, schema: str) -> None:
    await succeed(opened(), "a")
    with pytest.raises(asyncpg.RaiseError, match="append-only"):
        await db.execute(f"UPDATE \"{schema}\".events SET type = 'task.failed'")


async def test_a_ledger_of_a_newer_version_is_refused(opened: Open, db: Any, schema: str) -> None:
    await opened().counts()
    await db.execute(f'UPDATE "{schema}".version SET applied = 99')
    with pytest.raises(LedgerUnavailable, match="upgrade kling-relay"):
        await opened().counts()


async def test_many_processes_that_start_at_once_migrate_once(opened: Open, db: Any, schema: str) -> None:
    await asyncio.gather(*(opened().counts() for _ in range(8)))
    assert await db.fetchval(f'SELECT count(*) FROM "{schema}".version') == 1


async def test_a_server_that_is_not_there_is_told_without_the_password() -> None:
    ledger = open_ledger("postgresql://me:s3cret@127.0.0.1:9/none")
    with pytest.raises(LedgerUnavailable) as refused:
        await ledger.counts()
    assert "127.0.0.1" in str(refused.value)
    assert "s3cret" not in str(refused.value)
    await ledger.close()


def test_the_url_names_schema_and_pooler() -> None:
    assert read_url("postgresql://h/d?sslmode=require") == ("postgresql://h/d?sslmode=require", "kling_relay", 100)
    pooled = read_url("postgresql://h/d?schema=mine&sslmode=require&pooler=transaction")
    assert pooled == ("postgresql://h/d?sslmode=require", "mine", 0)
    for query, remedy in (('schema=x"; DROP', r"Mend \?schema="), ("pooler=session", r"Mend \?pooler=")):
        with pytest.raises(InvalidSettings, match=remedy):
            read_url(f"postgresql://h/d?{query}")
