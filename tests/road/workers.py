"""`kling-relay serve --workers N` as a process with its log, and a client that floods it with callbacks."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import msgspec

from tests.conformance.brokers import free_port

Line = dict[str, Any]


class Serving:
    """A running `serve`: its process, its URL, and the lines of its log."""

    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self.process = process
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.lines: list[Line] = []
        self.text = ""
        self._read = asyncio.Condition()
        self._reading = asyncio.create_task(self._read_log())

    async def _read_log(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            async with self._read:
                self.text += line.decode()
                if line.startswith(b"{"):
                    self.lines.append(msgspec.json.decode(line))
                self._read.notify_all()

    def found(self, event: str) -> list[Line]:
        """Return the lines of an event."""
        return [line for line in self.lines if line["event"] == event]

    async def until(self, event: str, count: int = 1) -> list[Line]:
        """Return the lines of an event once there are `count`."""
        async with asyncio.timeout(60), self._read:
            await self._read.wait_for(lambda: len(self.found(event)) >= count or self.process.returncode is not None)
        assert len(self.found(event)) >= count, self.text
        return self.found(event)

    def pids(self) -> list[int]:
        """Return the process ids of the server processes."""
        pid = self.process.pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    async def end(self) -> int:
        """Return the exit status once the process and its log have ended."""
        async with asyncio.timeout(60):
            status = await self.process.wait()
            await self._reading
        return status

    async def metrics(self) -> str:
        async with httpx.AsyncClient(trust_env=False) as client:
            return (await client.get(f"{self.url}/metrics")).text


@asynccontextmanager
async def serving(environ: Mapping[str, str], *arguments: str, processes: int = 2) -> AsyncIterator[Serving]:
    """Run `kling-relay serve` until the block ends; the block starts once `processes` serve."""
    port = free_port()
    root = str(Path(__file__).parents[2])
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "receiver", "serve", "--port", str(port), *arguments),
        env={"PATH": os.environ["PATH"], "PYTHONPATH": root, "KLING_RELAY_LOG": "json"} | dict(environ),
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,  # so that a signal can be sent to all its processes, as systemd does
    )
    running = Serving(process, port)
    try:
        await running.until("service.started", processes)
        if processes > 1:
            await running.until("process.started", processes)
        yield running
    finally:
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        await running.end()


class Vendor:
    """Sends callbacks over kept connections, each until it is answered 200, as a vendor does."""

    def __init__(self, port: int, requests: list[bytes]) -> None:
        self.port = port
        self.requests = requests
        self.left = requests[::-1]
        self.repeats = False
        """Whether all are sent again, once all are sent."""
        self.acknowledged: list[bytes] = []
        self.failures: list[str] = []
        """What went wrong with each attempt that was not answered 200."""
        self._answered = asyncio.Condition()

    async def send_all(self, connections: int = 16) -> None:
        """Return once every callback is acknowledged."""
        async with asyncio.timeout(60):
            await asyncio.gather(*(self._send() for _ in range(connections)))

    async def until(self, count: int) -> None:
        """Return once `count` callbacks are acknowledged."""
        async with asyncio.timeout(60), self._answered:
            await self._answered.wait_for(lambda: len(self.acknowledged) >= count)

    async def _send(self) -> None:
        writer = None
        while self.left or self.repeats:
            self.left = self.left or self.requests[::-1]
            request = self.left.pop()
            try:
                if writer is None:
                    reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
                writer.write(request)
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                await reader.readexactly(int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0] or 0))
                assert head.startswith(b"http/1.1 200"), head
            except (OSError, asyncio.IncompleteReadError, AssertionError) as error:
                self.failures.append(f"{type(error).__name__}: {error}")
                self.left.append(request)
                head = b"connection: close\r\n"
            else:
                async with self._answered:
                    self.acknowledged.append(request)
                    self._answered.notify_all()
            if writer is not None and b"connection: close\r\n" in head:
                writer.close()
                writer = None
        if writer is not None:
            writer.close()


async def gone(pid: int) -> None:
    """Return once a process that may be no child of this one has ended."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(descriptor, ended.set)
    try:
        async with asyncio.timeout(60):
            await ended.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
