"""SQLite ledger: the conformance suite, group commit, durability, locking, migrations."""

import asyncio
import sqlite3
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from submitter.clock import Clock
from submitter.errors import InvalidSettings, LedgerUnavailable
from submitter.ledger import open_ledger
from submitter.ledger.sqlite import ledger as sqlite
from submitter.ledger.sqlite.ledger import SqliteLedger
from submitter.task import Task, TaskStatus
from submitter.transition import Transition
from tests.conformance.ledgers import ALL, NOW, LedgerSuite, Open, report, succeed, task


@pytest.fixture
async def opened(tmp_path: Path) -> AsyncIterator[Open]:
    ledgers: list[SqliteLedger] = []

    def open_again() -> SqliteLedger:
        ledgers.append(SqliteLedger(tmp_path / "relay.db"))
        return ledgers[-1]

    yield open_again
    for ledger in ledgers:
        await ledger.close()


@pytest.fixture
async def empty(tmp_path: Path) -> AsyncIterator[Open]:
    ledger = SqliteLedger(tmp_path / "other.db")
    yield lambda: ledger
    await ledger.close()


class TestSqlite(LedgerSuite):
    """The conformance suite on a real file."""


async def test_concurrent_operations_share_a_transaction(opened: Open, tmp_path: Path) -> None:
    ledger = opened()
    await asyncio.gather(*(ledger.reserve(task(f"t{i}")) for i in range(200)))
    begun: list[str] = []
    assert isinstance(ledger, SqliteLedger)
    ledger._write_connection.set_trace_callback(lambda sql: begun.append(sql) if sql.startswith("BEGIN") else None)
    await asyncio.gather(*(ledger.apply(f"t{i}", report(TaskStatus.SUBMITTED)) for i in range(200)))
    assert len(begun) <= 3
    assert await ledger.open_tasks("kling") == 200


async def test_confirmed_writes_survive_sigkill(tmp_path: Path) -> None:
    """A process prints each confirmed write, and is killed by SIGKILL while it writes more."""
    script = """
import asyncio, sys
from submitter.ledger.sqlite.ledger import SqliteLedger
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
    confirmed = [process.stdout.readline().strip() for _ in range(40)]
    process.kill()
    rest, _ = process.communicate()
    confirmed += [line for line in rest.splitlines() if line.startswith("t")]
    ledger = SqliteLedger(tmp_path / "relay.db")
    found = {one.external_task_id: one.status for one in await ledger.get_many(confirmed)}
    assert {found[id] for id in confirmed} == {TaskStatus.SUCCEED}
    for id in confirmed[:40]:
        assert [event.type for event in await ledger.events(id)] == ["task.submitted", "task.succeed"]
    await ledger.close()


async def test_a_write_waits_while_another_process_holds_the_lock(opened: Open, tmp_path: Path) -> None:
    ledger = opened()
    other = sqlite3.connect(tmp_path / "relay.db", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    waiting = asyncio.create_task(ledger.reserve(task("a")))
    done, _ = await asyncio.wait([waiting], timeout=0.3)
    assert not done
    other.execute("COMMIT")
    other.close()
    assert (await waiting) is not None


async def test_a_value_that_cannot_be_stored_fails_alone(opened: Open) -> None:
    ledger = opened()
    for id in ("a", "b"):
        await ledger.reserve(task(id))

    def unstorable(current: Task) -> Transition | None:
        moved = report(TaskStatus.SUBMITTED)(current)
        assert moved is not None
        return Transition(moved.task, "x" * 10 + "\ud800")  # SQLite cannot store a lone surrogate

    results = await asyncio.gather(
        ledger.apply("a", unstorable), ledger.apply("b", report(TaskStatus.SUBMITTED)), return_exceptions=True
    )
    assert isinstance(results[0], Exception)
    assert (await ledger.get("b")).status is TaskStatus.SUBMITTED
    assert (await ledger.get("a")).status is TaskStatus.CREATED


async def test_events_are_append_only(opened: Open, tmp_path: Path) -> None:
    await succeed(opened(), "a")
    db = sqlite3.connect(tmp_path / "relay.db")
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        db.execute("UPDATE events SET type = 'task.failed'")
    db.close()


async def test_a_ledger_of_schema_version_1_is_migrated(opened: Open, tmp_path: Path) -> None:
    """A file of schema version 1, with an open task and one event in the outbox."""
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


async def test_a_refused_task_of_schema_version_2_gets_its_status(opened: Open, tmp_path: Path) -> None:
    """Before version 3, a refused task was `created` with a flag; another one is being sent."""
    _, first, second, *_ = schema_file().read_text().split("-- migration ")
    db = sqlite3.connect(tmp_path / "relay.db")
    for migration in (first, second):
        db.executescript(migration.partition("\n")[2])
    refused = msgspec.to_builtins(task("refused", metadata={"status": "created"})) | {"refused": True}
    for is_open, doc in ((0, refused), (1, msgspec.to_builtins(task("sending")))):
        values = (doc["external_task_id"], is_open, NOW, msgspec.json.encode(doc).decode())
        db.execute(
            "INSERT INTO tasks (external_task_id, vendor, status, is_open, created_at_ms, doc)"
            " VALUES (?, 'kling', 'created', ?, ?, ?)",
            values,
        )
    db.execute("PRAGMA user_version = 2")
    db.commit()
    db.close()
    ledger = opened()
    assert await ledger.get("refused") == task("refused", status=TaskStatus.REFUSED, metadata={"status": "created"})
    assert (await ledger.get("sending")).status is TaskStatus.CREATED
    assert [one.external_task_id for one in await ledger.tasks(status=TaskStatus.REFUSED, limit=9)] == ["refused"]


def schema_file() -> Path:
    return Path(sqlite.__file__).with_name("schema.sql")


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    db = sqlite3.connect(tmp_path / "relay.db")
    db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(LedgerUnavailable, match="upgrade kling-relay"):
        SqliteLedger(tmp_path / "relay.db")


@pytest.mark.parametrize("url", ["mysql://x", "sqlite://", "sqlite:///", "relay.db", ""])
def test_an_invalid_url_raises_an_error_with_a_remedy(url: str) -> None:
    with pytest.raises(InvalidSettings, match=r"sqlite:///relay\.db"):
        open_ledger(url)


# -- a file that is moved, replaced, locked or full ---------------------------------------------------


@pytest.mark.parametrize("fate", ["removed", "moved", "replaced"])
async def test_nothing_is_acknowledged_into_a_file_that_no_name_leads_to(
    tmp_path: Path, opened: Open, fate: str
) -> None:
    ledger, file = opened(), tmp_path / "relay.db"
    await ledger.reserve(task("a"))
    if fate == "replaced":  # by a restored backup
        backup = tmp_path / "backup.db"
        backup.write_bytes(file.read_bytes())
        backup.replace(file)
    elif fate == "moved":
        file.rename(tmp_path / "moved.db")
    else:
        file.unlink()
    with pytest.raises(LedgerUnavailable, match="moved, removed or replaced: restart"):
        await ledger.reserve(task("b"))
    with pytest.raises(LedgerUnavailable):
        await ledger.check_write()


@pytest.mark.parametrize("is_written_meanwhile", [True, False])
async def test_a_backup_in_the_place_of_an_open_file_is_not_damaged_by_its_log(
    tmp_path: Path, is_written_meanwhile: bool
) -> None:
    """SQLite finds the write-ahead log by its name, and would replay the old file's log over the backup."""
    ledger, file, backup = SqliteLedger(tmp_path / "relay.db"), tmp_path / "relay.db", tmp_path / "backup.db"
    await asyncio.gather(*(ledger.reserve(task(f"t{n}")) for n in range(50)))
    with closing(sqlite3.connect(file)) as source, closing(sqlite3.connect(backup)) as copy:
        source.backup(copy)
    for n in range(50):
        await succeed(ledger, f"later{n}")
    backup.replace(file)
    if is_written_meanwhile:
        with pytest.raises(LedgerUnavailable, match="moved, removed or replaced"):
            await ledger.reserve(task("b"))
    await ledger.close()
    with closing(sqlite3.connect(file)) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert db.execute("SELECT count(*), max(external_task_id) FROM tasks").fetchone() == (50, "t9")


async def test_a_group_that_meets_a_held_write_lock_fails_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not one operation after the other, each with the whole timeout."""
    monkeypatch.setattr("submitter.ledger.sqlite.ledger.BUSY_TIMEOUT_S", 0.5)
    ledger = SqliteLedger(tmp_path / "relay.db")
    holder = sqlite3.connect(tmp_path / "relay.db", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    clock = Clock()
    started_s = clock.monotonic_s()
    outcomes = await asyncio.gather(*(ledger.reserve(task(f"t{n}")) for n in range(40)), return_exceptions=True)
    assert clock.monotonic_s() - started_s < 10  # 40 timeouts are 20 s
    assert {type(outcome) for outcome in outcomes} == {LedgerUnavailable}
    holder.execute("ROLLBACK")
    holder.close()
    assert await ledger.reserve(task("t0")) is not None
    await ledger.close()


async def test_while_the_disk_hangs_operations_whose_callers_gave_up_are_dropped_before_they_run(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Callers give up after seconds and come again: without it, the longer a disk hangs, the more memory it takes."""
    monkeypatch.setattr("submitter.ledger.sqlite.group_commit.PENDING_MAX", 100)
    ledger = opened()
    writer = ledger._writer  # type: ignore[attr-defined]
    await ledger.reserve(task("a"))
    decided: list[int] = []

    async def hang(waiting_of_each_turn: int) -> None:
        """Let the disk hang while callers come in ten turns and most of them give up before the next turn."""
        reached, release = threading.Event(), threading.Event()

        def write(db: sqlite3.Connection) -> None:
            reached.set()
            release.wait(30)

        hanging = asyncio.ensure_future(writer.submit(run=write))
        await asyncio.to_thread(reached.wait, 30)
        kept: list[asyncio.Task[object]] = []
        for turn in range(10):

            def decide(current: Task, turn: int = turn) -> None:
                decided.append(turn)

            callers = [asyncio.create_task(ledger.apply("a", decide)) for _ in range(90)]
            await asyncio.sleep(0)
            kept += callers[:waiting_of_each_turn]
            for caller in callers[waiting_of_each_turn:]:
                caller.cancel()
            await asyncio.wait(callers[waiting_of_each_turn:])
            assert len(writer._pending) < 200
        release.set()
        await hanging
        await asyncio.gather(*kept)

    await hang(1)
    assert len(decided) < 200
    assert set(decided) == set(range(10))  # each caller that waited got its result
    await hang(0)
    await succeed(ledger, "b")  # and the next one, though all before it gave up


async def test_a_full_disk_is_an_error_and_ends_when_there_is_room(opened: Open) -> None:
    ledger = opened()
    await ledger.reserve(task("a"))
    database = ledger._write_connection  # type: ignore[attr-defined]
    pages = database.execute("PRAGMA page_count").fetchone()[0]
    database.execute(f"PRAGMA max_page_count = {pages}")
    large = task("b", metadata={"order": "x" * 100_000})
    with pytest.raises(LedgerUnavailable, match="full"):
        await ledger.reserve(large)
    assert (await ledger.get("a")).status is TaskStatus.CREATED
    database.execute("PRAGMA max_page_count = 1000000")
    assert await ledger.reserve(large) is not None


async def test_a_relative_path_is_kept_when_the_working_folder_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ledger = SqliteLedger("relay.db")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    await ledger.check_write()
    await ledger.close()
