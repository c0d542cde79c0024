"""The supervisor of `serve --workers N`: runs N server processes on one listening socket, and replaces those that end.

It accepts no connection itself. SIGTERM or SIGINT stops all processes gracefully, a second one at once. SIGHUP
replaces them one after the other: each new one serves before the old one stops, so no connection is refused. A process
that ends is replaced, after a pause if it did not last; one whose event loop hangs is ended first.
"""

import asyncio
import os
import signal
import socket
import sys
from pathlib import Path

from prometheus_client.multiprocess import mark_process_dead

from submitter.clock import Clock
from submitter.log import Logger
from submitter.schedule import Backoff

RESTART_BACKOFF = Backoff(first_s=1, factor=2, max_s=30)
STEADY_S = 60.0
"""A process that lasted this long is replaced at once, and so is the first that did not."""

SILENCE_S = 30.0
"""A process sends a byte about every second; after so long without one its event loop hangs."""

LISTEN_S = 1.0
"""Silence is counted in steps of this, so that a freeze of all processes (a paused container) counts as one of them."""

STOP_S = 60.0
"""How long a process may take to stop: its idle connections, its requests, then its deliveries under way."""

log = Logger("supervisor")


class StartFailed(Exception):
    """A server process ended before it served, with this exit status."""

    def __init__(self, status: int) -> None:
        super().__init__(f"exit status {status}")
        self.status = status


def pause_s(short_lives: int) -> float:
    """Return the seconds to wait before a process is replaced, after so many in a row that did not last."""
    return 0.0 if short_lives <= 1 else RESTART_BACKOFF.delay_s(short_lives - 2)


class ServerProcess:
    """A server process. It says that it lives on a connection, and stops by itself when that is closed."""

    def __init__(
        self, process: asyncio.subprocess.Process, connection: socket.socket, number: int, clock: Clock
    ) -> None:
        self._process = process
        self._connection = connection
        self._clock = clock
        self._heard = asyncio.Event()
        self._is_stopping = False
        self.pid = process.pid
        self.number = number
        self.is_serving = False
        self.ended = asyncio.create_task(self._watch())
        """Returns its exit status once it has ended; negative is the signal that ended it."""

    async def started(self) -> None:
        """Return once it serves; raise StartFailed if it ended before."""
        heard = asyncio.create_task(self._heard.wait())
        await asyncio.wait({heard, self.ended}, return_when=asyncio.FIRST_COMPLETED)
        heard.cancel()
        if not self._heard.is_set():
            raise StartFailed(self.ended.result())

    async def stop(self) -> None:
        """Stop it gracefully, within STOP_S; return once it has ended."""
        self._is_stopping = True
        self._send(signal.SIGTERM)
        try:
            async with self._clock.timeout(STOP_S):
                await asyncio.shield(self.ended)
        except TimeoutError:
            self.kill(f"it did not stop within {STOP_S:g} s")
            await self.ended

    def kill(self, reason: str) -> None:
        """End it at once."""
        log.error("process.killed", pid=self.pid, reason=reason)
        self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        if self._process.returncode is None:
            self._process.send_signal(number)

    async def _watch(self) -> int:
        while await self._beat():
            self.is_serving = True
            self._heard.set()
        status = await self._process.wait()
        self.is_serving = False
        self._connection.close()
        return status

    async def _beat(self) -> bool:
        """Return True when it said that it lives, False when it closed the connection, or hung and was killed."""
        heard = asyncio.ensure_future(asyncio.get_running_loop().sock_recv(self._connection, 64))
        silent_s = 0.0
        while silent_s < SILENCE_S:
            try:
                async with self._clock.timeout(LISTEN_S):
                    return bool(await asyncio.shield(heard))
            except TimeoutError:
                if self.is_serving and not self._is_stopping:  # a migration may take longer
                    silent_s += LISTEN_S
            except OSError:
                return False
        heard.cancel()
        self.kill(f"its event loop hung for {SILENCE_S:g} s")
        return False


class Supervisor:
    """Keeps `workers` processes serving on `listening`; they share their metrics in the directory `metrics`."""

    def __init__(self, listening: socket.socket, workers: int, metrics: Path, clock: Clock) -> None:
        self._listening = listening
        self._workers = workers
        self._metrics = metrics
        self._clock = clock
        self._alive: set[ServerProcess] = set()
        self._has_served = asyncio.Event()
        self._one_at_a_time = asyncio.Lock()
        self._replace = [asyncio.Event() for _ in range(workers)]

    async def run(self) -> int:
        """Run the processes until a signal; return the exit status."""
        loop = asyncio.get_running_loop()
        stopped = asyncio.Event()

        def stop() -> None:
            if stopped.is_set():
                for process in self._alive:
                    process.kill("a second signal")
            stopped.set()

        loop.add_signal_handler(signal.SIGTERM, stop)
        loop.add_signal_handler(signal.SIGINT, stop)
        loop.add_signal_handler(signal.SIGHUP, self._replace_all)
        keeping = asyncio.create_task(self._keep_all())
        stopping = asyncio.create_task(stopped.wait())
        await asyncio.wait({keeping, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        keeping.cancel()
        (failure,) = await asyncio.gather(keeping, return_exceptions=True)
        self._listening.close()
        log.info("supervisor.stopping", processes=len(self._alive))
        await asyncio.gather(*(process.stop() for process in self._alive))
        if isinstance(failure, StartFailed):
            return max(failure.status, 1)
        if isinstance(failure, Exception):
            raise failure
        return 0

    def _replace_all(self) -> None:
        log.info("supervisor.replacing", processes=self._workers)
        for event in self._replace:
            event.set()

    async def _keep_all(self) -> None:
        keepers = [asyncio.create_task(self._keep(place)) for place in range(self._workers)]
        try:
            await asyncio.gather(*keepers)
        finally:
            for keeper in keepers:
                keeper.cancel()

    async def _keep(self, place: int) -> None:
        """Keep one process serving; that of place 0 polls vendors. Raise StartFailed if none can serve."""
        if place:  # the first one alone migrates the ledger, and says what is wrong
            await self._has_served.wait()
        short_lives = 0
        while True:
            begun_s = self._clock.monotonic_s()
            try:
                status = await self._run(place)
            except StartFailed as failure:
                if not any(process.is_serving for process in self._alive):
                    raise
                status = failure.status
            lasted_s = self._clock.monotonic_s() - begun_s
            short_lives = 0 if lasted_s >= STEADY_S else short_lives + 1
            wait_s = pause_s(short_lives)
            log.error("process.restarting", status=status, lasted_s=round(lasted_s, 1), next_in_s=wait_s)
            await self._clock.sleep(wait_s)

    async def _run(self, place: int) -> int:
        """Run a process and those that replace it; return the exit status of the one that ended by itself."""
        replace = self._replace[place]
        replace.clear()
        process = await self._start(place, place)
        while not process.ended.done():
            asked = asyncio.create_task(replace.wait())
            await asyncio.wait({process.ended, asked}, return_when=asyncio.FIRST_COMPLETED)
            asked.cancel()
            if replace.is_set():
                replace.clear()
                process = await self._replacement(place, process)
        return process.ended.result()

    async def _replacement(self, place: int, old: ServerProcess) -> ServerProcess:
        """Replace a process once another one serves; keep it if the other one did not start."""
        async with self._one_at_a_time:
            try:
                new = await self._start(place, place if old.number != place else place + self._workers)
            except StartFailed as failure:
                log.error("process.kept", pid=old.pid, reason=f"its replacement did not start: {failure}")
                return old
            log.info("process.replaced", pid=old.pid, by=new.pid)
            await old.stop()
            return new

    async def _start(self, place: int, number: int) -> ServerProcess:
        """Start a process, and return it once it serves. `number` is that of no other process."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs:
            fds = (self._listening.fileno(), theirs.fileno())
            try:
                created = await asyncio.create_subprocess_exec(
                    sys.executable,
                    *([] if {"", os.getcwd()} & set(sys.path) else ["-P"]),  # -m would add the working directory
                    *("-m", "receiver.cli.server_process", *map(str, fds), str(number)),
                    *(["polls"] if place == 0 else []),
                    pass_fds=fds,
                    env=os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(self._metrics)},
                )
            except OSError as error:  # no memory, files or process ids, for now
                ours.close()
                log.error("process.not_started", reason=str(error))
                raise StartFailed(1) from error
            process = ServerProcess(created, ours, number, self._clock)
        self._alive.add(process)
        process.ended.add_done_callback(lambda _: self._forget(process))
        await process.started()
        log.info("process.started", pid=process.pid)
        self._has_served.set()
        return process

    def _forget(self, process: ServerProcess) -> None:
        log.info("process.ended", pid=process.pid, status=process.ended.result())
        self._alive.discard(process)
        mark_process_dead(process.number, str(self._metrics))  # type: ignore[no-untyped-call]
