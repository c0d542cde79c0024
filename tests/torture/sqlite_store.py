"""A SQLite file that a part fills up, locks, moves, replaces, makes immutable and damages.

Which faults can be made depends on the user. A full disk is a small tmpfs as root, else a limit of the process on the
size of files. A file system that became read-only is `chattr +i` as root on ext4 (it holds for open files too, which
chmod does not), else it is left out.
"""

import errno
import os
import random
import resource
import signal
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from tests.torture.load import Damaged, Load, Stored
from tests.torture.receiver_process import ReceiverProcess
from tests.torture.store_trial import Fault, Step

DISK_MB = 24
LOCKED_S = 8.0  # longer than a write waits for a lock
BRIEFLY_LOCKED_S = 2.0
PAGE = 4096


class SqliteStore:
    """The file `relay.db` in a folder."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.file = folder / "relay.db"
        self.url = f"sqlite:///{self.file}"
        self.environ: dict[str, str] = {}
        self._random = random.Random(seed)
        self._holder: sqlite3.Connection | None = None

    async def read(self) -> Stored:
        return read_file(self.file)

    def faults(self, receiver: ReceiverProcess, load: Load, *, disk_is_small: bool) -> list[Fault]:
        """Return every fault that this user can make, in an order by seed."""
        last_s = self._random.uniform(2, 4)
        filler, moved, backup = (self.file.with_name(name) for name in ("filler", "moved.db", "backup.db"))
        unlimited = resource.RLIM_INFINITY
        full = Fault("a full disk", lambda: _fill_up(filler), filler.unlink, last_s)
        if not disk_is_small:
            full = Fault(
                "a full disk (RLIMIT_FSIZE)", lambda: _limit(receiver, 0), lambda: _limit(receiver, unlimited), last_s
            )
        faults = [
            full,
            Fault("a lock held too long", self._lock, self._unlock, LOCKED_S),
            Fault("a lock held for a while", self._lock, self._unlock, BRIEFLY_LOCKED_S, stops_writes=False),
            Fault("the file moved away", lambda: move(self.file, moved), lambda: move(moved, self.file), last_s),
            Fault(
                "replaced by a backup",
                self._replacing(load, backup),
                load.resume,
                last_s,
                restarts=True,
                restart_by=self._random.choice((signal.SIGTERM, signal.SIGKILL)),
            ),
        ]
        if can_be_immutable(self.file.parent):
            freeze, thaw = (lambda: self._immutable("+i")), (lambda: self._immutable("-i"))
            faults.append(Fault("read-only", freeze, thaw, last_s, kills_by=signal.SIGBUS))
        self._random.shuffle(faults)
        return faults

    def _replacing(self, load: Load, backup: Path) -> Step:
        async def replace() -> None:
            # What came between a backup and its use would be lost by its use, not by the receiver.
            await load.pause()
            with closing(sqlite3.connect(self.file)) as source, closing(sqlite3.connect(backup)) as copy:
                source.backup(copy)
            backup.replace(self.file)
            load.resume()

        return replace

    def _lock(self) -> None:
        self._holder = sqlite3.connect(self.file, isolation_level=None, timeout=10)
        self._holder.execute("BEGIN IMMEDIATE")

    def _unlock(self) -> None:
        assert self._holder is not None
        self._holder.execute("ROLLBACK")
        self._holder.close()

    def _immutable(self, flag: str) -> None:
        files = [self.file, *self.file.parent.glob("relay.db-*")]
        subprocess.run(["chattr", flag, *files], check=True)


def read_file(file: Path) -> Stored:
    """Return what a file holds; raise Damaged if SQLite's check of its integrity finds something."""
    with closing(sqlite3.connect(file)) as db:
        try:
            (found,) = db.execute("PRAGMA integrity_check").fetchone()
            if found != "ok":
                raise Damaged(f"{file.name}: {found[:300]}")
            statuses = dict(db.execute("SELECT external_task_id, status FROM tasks"))
            return Stored(statuses, db.execute("SELECT id, external_task_id, type FROM events").fetchall())
        except sqlite3.DatabaseError as error:
            raise Damaged(f"{file.name}: {error}") from error


def move(source: Path, target: Path) -> None:
    """Move a file to another name; its open files stay open."""
    source.rename(target)


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Mount a small file system at `folder` while the block runs; yield whether this user may."""
    options = ["-t", "tmpfs", "-o", f"size={DISK_MB}m", "torture", str(folder)]
    is_mounted = os.geteuid() == 0 and subprocess.run(["mount", *options], capture_output=True).returncode == 0
    try:
        yield is_mounted
    finally:
        if is_mounted:
            subprocess.run(["umount", "--lazy", folder], check=True)


def can_be_immutable(folder: Path) -> bool:
    """Return whether `chattr +i` works here, and stops writes to a file that is open already."""
    probe = folder / "probe"
    with probe.open("wb", buffering=0) as file:
        try:
            if subprocess.run(["chattr", "+i", probe], capture_output=True).returncode:
                return False
            file.write(b"x")
        except FileNotFoundError:
            return False
        except OSError:
            return True
        finally:
            subprocess.run(["chattr", "-i", probe], capture_output=True)
            probe.unlink()
    return False


def _fill_up(filler: Path) -> None:
    """Write until the disk is full."""
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 20, PAGE, 1):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise


def _limit(receiver: ReceiverProcess, size: int) -> None:
    """Let the receiver write no file beyond `size`. Its log goes through a pipe, which has no such limit."""
    hard = resource.prlimit(receiver.pid, resource.RLIMIT_FSIZE)[1]
    resource.prlimit(receiver.pid, resource.RLIMIT_FSIZE, (size, hard))
