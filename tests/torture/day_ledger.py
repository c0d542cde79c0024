"""The SQLite ledger in virtual time: groups are committed on the loop, after a simulated fsync."""

import asyncio
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from submitter.ledger.sqlite import ledger as sqlite_ledger
from submitter.ledger.sqlite.group_commit import GroupWriter, Operation
from submitter.ledger.sqlite.ledger import SqliteLedger

FSYNC_S = (0.001, 0.006)
NEVER_S = 1e6


class Disk:
    """A ledger file that several processes have open: each notices the commits of the others a little later."""

    def __init__(self, path: Path, seed: str) -> None:
        self.path = path
        self.random = random.Random(seed)
        self.commits = 0
        self._ledgers: dict[DayLedger, None] = {}

    def open(self) -> "DayLedger":
        """Open the ledger, as one process does."""
        ledger = DayLedger(self)
        self._ledgers[ledger] = None
        return ledger

    def committed(self, by: "DayLedger") -> None:
        """Wake the other processes' waiters, within the interval at which they look for commits."""
        self.commits += 1
        loop = asyncio.get_running_loop()
        for ledger in self._ledgers:
            if ledger is not by and ledger.is_waited_for:
                loop.call_later(self.random.uniform(0, CHECK_EVERY_S), ledger._wake_waiters)

    def closed(self, ledger: "DayLedger") -> None:
        """Wake this one no more."""
        self._ledgers.pop(ledger, None)


CHECK_EVERY_S = sqlite_ledger.CHECK_EVERY_S


@contextmanager
def woken_by_commits() -> Iterator[None]:
    """Let no ledger look for other processes' commits by a timer: `Disk` announces them."""
    with mock.patch.object(sqlite_ledger, "CHECK_EVERY_S", NEVER_S):
        yield


class DayLedger(SqliteLedger):
    """A SqliteLedger without threads, and without a real fsync."""

    def __init__(self, disk: Disk) -> None:
        super().__init__(disk.path)
        self._disk = disk
        self._write_connection.execute("PRAGMA synchronous = OFF")
        self._writer._groups.put(None)  # ends the writer thread
        self._writer._thread.join()
        self._groups = _Groups(self._writer, self, disk)
        self._writer._groups = self._groups  # type: ignore[assignment]

    @property
    def is_waited_for(self) -> bool:
        """Whether a task waits for a change: one that begins to wait later looks at the version first."""
        return self._committed is not None and not self._committed.is_set()

    def kill(self) -> None:
        """Lose what is not committed."""
        self._groups.is_lost = True
        self._disk.closed(self)

    async def close(self) -> None:
        self._disk.closed(self)
        await super().close()

    def close_connections(self) -> None:
        """Close the files of a killed process."""
        for connection in (self._write_connection, self._read_connection, self._version_connection):
            connection.close()


class _Groups:
    """Takes the place of the queue to the writer thread: commits a group later, on the loop."""

    def __init__(self, writer: GroupWriter, ledger: DayLedger, disk: Disk) -> None:
        self._writer = writer
        self._ledger = ledger
        self._disk = disk
        self._waiting: list[list[Operation]] = []
        self.is_lost = False

    def put(self, group: list[Operation] | None) -> None:
        if group is None:
            self._commit_waiting()
            return
        self._waiting.append(group)
        random, loop = self._disk.random, asyncio.get_running_loop()
        if random.random() < 0.5:  # a process may be killed before its commit, or before it learns of it
            self._commit_waiting()
        loop.call_later(random.uniform(*FSYNC_S), self._resolve, group)

    def _commit_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        for group in waiting:
            self._writer._commit(group)
            self._disk.committed(self._ledger)

    def _resolve(self, group: list[Operation]) -> None:
        if not self.is_lost:
            self._commit_waiting()
            self._writer._resolve(group)
