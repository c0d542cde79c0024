"""SQLite passes the ledgers' suite, and keeps its own promises."""

import asyncio
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from submitter.errors import InvalidSettings, LedgerUnavailable
from submitter.ledger import open_ledger, sqlite
from submitter.ledger.sqlite import SqliteLedger
from submitter.task import Task, TaskStatus, Transition
from tests.conformance.ledgers import ALL, NOW, LedgerSuite, Open, report, succeed, task


@pytest.fixture
async def opened(tmp_path: Path) -> AsyncIterator[Open]:
    ledgers: list[SqliteLedger] = []

    def again() -> SqliteLedger:
        ledgers.append(SqliteLedger(tmp_path / "relay.db"))
        return ledgers[-1]

    yield again
    for ledger in ledgers:
        await ledger.close()


@pytest.fixture
async def empty(tmp_path: Path) -> AsyncIterator[Open]:
    ledger = SqliteLedger(tmp_path / "other.db")
    yield lambda: ledger
    await ledger.close()


class TestSqlite(LedgerSuite):
    """The suite, on a real file."""


async def test_concurrent_operations_share_a_transaction(opened: Open, tmp_path: Path) -> None:
    ledger = opened()
    await asyncio.gather(*(ledger.reserve(task(f"t{i}")) for i in range(200)))
    begun: list[str] = []
    assert isinstance(ledger, SqliteLedger)
    ledger._write_connection.set_trace_callback(lambda sql: begun.append(sql) if sql.startswith("BEGIN") else None)
    await asyncio.gather(*(ledger.apply(f"t{i}", report(TaskStatus.SUBMITTED)) for i in range(200)))
    assert len(begun) <= 3
    assert await ledger.open_tasks("kling") == 200


async def test_what_was_answered_survives_a_kill(tmp_path: Path) -> None:
    """A process writes, says what was answered, and is killed by SIGKILL in the middle of more."""
    script = """
import asyncio, sys
from submitter.ledger.sqlite import SqliteLedger
from tests.conformance.ledgers import succeed
async def main():
    ledger = SqliteLedger(sys.argv[1])
    async def one(i):
        await succeed(ledger, f"t{i}")
        print(f"t{i}", flush=True)
    await asyncio.gather(*(one(i) for i in range(5000)))
asyncio.run(main())
"""
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "relay.db")], cwd=root, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    answered = [process.stdout.readline().strip() for _ in range(40)]
    process.kill()
    rest, _ = process.communicate()
    answered += [line for line in rest.splitlines() if line.startswith("t")]
    ledger = SqliteLedger(tmp_path / "relay.db")
    found = {one.external_task_id: one.status for one in await ledger.get_many(answered)}
    assert {found[id] for id in answered} == {TaskStatus.SUCCEED}
    for id in answered[:40]:
        assert [event.type for event in await ledger.events(id)] == ["task.submitted", "task.succeed"]
    await ledger.close()


async def test_a_busy_file_is_waited_for(opened: Open, tmp_path: Path) -> None:
    ledger = opened()
    other = sqlite3.connect(tmp_path / "relay.db", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    waiting = asyncio.create_task(ledger.reserve(task("a")))
    done, _ = await asyncio.wait([waiting], timeout=0.3)
    assert not done
    other.execute("COMMIT")
    other.close()
    assert (await waiting) is not None


async def test_one_that_cannot_be_stored_does_not_take_the_others_with_it(opened: Open) -> None:
    ledger = opened()
    for id in ("a", "b"):
        await ledger.reserve(task(id))

    def collide(current: Task) -> Transition | None:
        moved = report(TaskStatus.SUBMITTED)(current)
        assert moved is not None
        return Transition(moved.task, "x" * 10 + "\ud800")  # SQLite takes no lone surrogate

    results = await asyncio.gather(
        ledger.apply("a", collide), ledger.apply("b", report(TaskStatus.SUBMITTED)), return_exceptions=True
    )
    assert isinstance(results[0], Exception)
    assert (await ledger.get("b")).status is TaskStatus.SUBMITTED
    assert (await ledger.get("a")).status is TaskStatus.CREATED


async def test_events_cannot_be_changed(opened: Open, tmp_path: Path) -> None:
    await succeed(opened(), "a")
    db = sqlite3.connect(tmp_path / "relay.db")
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        db.execute("UPDATE events SET type = 'task.failed'")
    db.close()


async def test_a_ledger_of_the_first_version_goes_on(opened: Open, tmp_path: Path) -> None:
    """A file as the first version left it, with a task under way and one event that no hook was given yet."""
    first = schema_file().read_text().split("-- migration ")[1].partition("\n")[2]
    known = task("a", status=TaskStatus.SUBMITTED, task_id="893", sequence=1)
    db = sqlite3.connect(tmp_path / "relay.db")
    db.executescript(first)
    doc = msgspec.json.encode(known).decode()
    db.execute("INSERT INTO tasks VALUES ('a', 'kling', 'submitted', 1, ?, ?, ?)", (NOW, NOW + 1000, doc))
    db.execute("INSERT INTO events VALUES (1, 'a', 1, 'evt_1', 'task.submitted', ?, '{}')", (NOW,))
    db.execute("PRAGMA user_version = 1")
    db.commit()
    db.close()
    ledger, other = opened(), opened()
    assert await ledger.by_task_ids("kling", ["893"]) == [known]
    assert [one.event.id for one in (await other.claim_deliveries([ALL], NOW, 1000)).items] == ["evt_1"]
    assert len((await ledger.claim_polls(NOW + 1000, 1000, 9)).items) == 1
    await other.apply("a", report(TaskStatus.SUCCEED))
    assert [event.sequence for event in await ledger.events("a")] == [1, 2]
    await ledger.pause("all", NOW, "HTTP 500")


def schema_file() -> Path:
    return Path(sqlite.__file__).with_name("schema.sql")


def test_a_ledger_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    db = sqlite3.connect(tmp_path / "relay.db")
    db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(LedgerUnavailable, match="upgrade kling-relay"):
        SqliteLedger(tmp_path / "relay.db")


@pytest.mark.parametrize("url", ["mysql://x", "sqlite://", "sqlite:///", "relay.db", ""])
def test_a_wrong_url_is_an_error_that_names_the_remedy(url: str) -> None:
    with pytest.raises(InvalidSettings, match=r"sqlite:///relay\.db"):
        open_ledger(url)
