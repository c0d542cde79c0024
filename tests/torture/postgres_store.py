"""A PostgreSQL server that a part stops, makes read-only, and whose connections it cuts."""

import asyncio
import random
from collections.abc import Awaitable, Callable

from tests.torture.load import Stored
from tests.torture.own_postgres import OwnPostgres
from tests.torture.proxy import FaultyProxy, Treatment
from tests.torture.store_trial import Fault

SCHEMA = "kling_relay"


class PostgresStore:
    """A schema on a server of this part; the receiver reaches it through a proxy."""

    def __init__(self, server: OwnPostgres, proxy: FaultyProxy, seed: int) -> None:
        self._server = server
        self._proxy = proxy
        self._random = random.Random(seed)
        self._running: asyncio.Task[None] | None = None
        self.url = server.url.replace(str(server.port), str(proxy.port))
        self.environ: dict[str, str] = {}

    async def read(self) -> Stored:
        tasks = await self._server.query(f"SELECT external_task_id, status FROM {SCHEMA}.tasks")
        events = await self._server.query(f"SELECT id, external_task_id, type FROM {SCHEMA}.events")
        return Stored(dict(map(tuple, tasks)), list(map(tuple, events)))

    def faults(self) -> list[Fault]:
        """Return every fault, in an order by seed."""
        last_s = self._random.uniform(2, 4)
        server = self._server
        faults = [
            Fault("PostgreSQL stopped at once", server.stop, server.start, last_s),
            Fault(
                "PostgreSQL read-only",
                lambda: server.set_read_only(on=True),
                lambda: server.set_read_only(on=False),
                last_s,
            ),
            Fault("connections terminated", self._begin(self._terminate), self._cease, last_s, stops_writes=False),
            Fault("answers to commits lost", self._begin(self._lose), self._heal, last_s, stops_writes=False),
        ]
        self._random.shuffle(faults)
        return faults

    def _begin(self, repeat: Callable[[], Awaitable[None]]) -> Callable[[], None]:
        async def run() -> None:
            while True:
                await repeat()
                await asyncio.sleep(self._random.uniform(0.05, 0.3))

        def begin() -> None:
            self._running = asyncio.create_task(run())

        return begin

    def _cease(self) -> None:
        assert self._running is not None
        self._running.cancel()

    async def _terminate(self) -> None:
        """Terminate about half of the connections."""
        await self._server.query(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() AND random() < 0.5"
        )

    async def _lose(self) -> None:
        """Cut the connection of the next statement, after its commit and before its answer."""
        self._proxy.lose_answer()

    def _heal(self) -> None:
        self._cease()
        self._proxy.treat(lambda: Treatment("pass"))
