"""A PostgreSQL server of a part alone, in a temporary folder, which it can stop, restart and make read-only."""

import asyncio
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import asyncpg

from tests.conformance.brokers import free_port, is_listening
from tests.torture.parts import Missing

USER = "postgres"


class OwnPostgres:
    """The server; use it as a context manager. As root, it runs as the user `postgres`: it refuses to run as root."""

    def __init__(self) -> None:
        self._bin = _programs()
        self._as: dict[str, Any] = {}
        if os.geteuid() == 0:
            try:
                pwd.getpwnam(USER)
            except KeyError:
                raise Missing(f"this is root, and there is no user {USER} to run PostgreSQL as") from None
            self._as = {"user": USER, "group": USER, "extra_groups": []}
        self.port = free_port()
        self._folder = Path(tempfile.mkdtemp(prefix="torture-postgres-"))
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"postgresql://{USER}@127.0.0.1:{self.port}/{USER}"

    def __enter__(self) -> Self:
        if self._as:
            shutil.chown(self._folder, USER, USER)
        data = str(self._folder / "data")
        command = [str(self._bin / "initdb"), "--pgdata", data, "--username", USER, "--auth", "trust"]
        made = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/", **self._as)
        if made.returncode:
            raise RuntimeError(made.stderr)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        shutil.rmtree(self._folder)

    async def start(self) -> None:
        """Start it, and wait until it answers a query."""
        with (self._folder / "log").open("ab") as log:
            command = [str(self._bin / "postgres"), "-D", str(self._folder / "data"), "-p", str(self.port)]
            command += ["-k", str(self._folder), "-c", "listen_addresses=127.0.0.1"]
            process = subprocess.Popen(command, stdout=log, stderr=log, cwd="/", **self._as)
        self._process = process
        async with asyncio.timeout(60):
            while not is_listening(self.port) or not await self._answers():
                if process.poll() is not None:
                    raise RuntimeError((self._folder / "log").read_text()[-2000:])
                await asyncio.sleep(0.05)

    def stop(self) -> None:
        """Stop it as `pg_ctl stop -m immediate` does: without a checkpoint, cutting every connection."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait()
            self._process = None

    async def query(self, statement: str, *values: object) -> list[Any]:
        """Run a statement on a connection of this call alone."""
        connection = await asyncpg.connect(self.url, timeout=10)
        try:
            rows: list[Any] = await connection.fetch(statement, *values)
            return rows
        finally:
            await connection.close()

    async def set_read_only(self, *, on: bool) -> None:
        """Refuse every write, as a server that became a replica does, or accept writes again."""
        await self.query(f"ALTER SYSTEM SET default_transaction_read_only = {'on' if on else 'off'}")
        await self.query("SELECT pg_reload_conf()")

    async def _answers(self) -> bool:
        try:
            await self.query("SELECT 1")
        except (OSError, TimeoutError, asyncpg.PostgresError):
            return False
        return True


def _programs() -> Path:
    """Return the folder of initdb; raise Missing."""
    found = shutil.which("initdb")
    folders = [Path(found).parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not folders or not (folders[-1] / "initdb").exists():
        raise Missing("there is no initdb in PATH or in /usr/lib/postgresql")
    return folders[-1]
