"""The vendor among the strangers: sends authentic callbacks, each on a new connection, and keeps what was accepted."""

import asyncio
import itertools
import time
from collections.abc import Iterator

from tests.torture.bodies import callback
from tests.torture.raw_http import read_answer

STATUSES = ("processing", "succeeded")


class Vendor:
    """Sends `processing`, later `succeeded`, for the tasks `{prefix}-0`, `{prefix}-1`, ... of the ledger."""

    def __init__(self, port: int, prefix: str, tasks: int) -> None:
        self._port = port
        self._prefix = prefix
        self._next: Iterator[tuple[int, str]] = ((n, s) for s in STATUSES for n in range(tasks))
        self.accepted: set[tuple[str, str]] = set()
        """The external_task_id and status of each callback that was answered 2xx."""

        self.bytes_sent: list[bytes] = []
        """The accepted requests, to be replayed."""

    def next_callback(self) -> tuple[str, str, bytes]:
        """Return the id, the status and the bytes of the next callback. Raises StopIteration after the last."""
        number, status = next(self._next)
        return f"{self._prefix}-{number}", status, callback(self._prefix, number, status, time.time())

    def accept(self, id: str, status: str, request: bytes) -> None:
        """Note that a callback was answered 2xx."""
        self.accepted.add((id, status))
        self.bytes_sent.append(request)

    async def send(self, request: bytes, timeout_s: float) -> int | str:
        """Send a request on a new connection; return the status of its answer, or why there is none."""
        try:
            async with asyncio.timeout(timeout_s):
                reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
                try:
                    writer.write(request)
                    received = await reader.readuntil(b"\r\n\r\n")
                finally:
                    writer.transport.abort()
        except TimeoutError:
            return f"no answer within {timeout_s:g} s"
        except (OSError, asyncio.IncompleteReadError) as error:
            return f"no answer: {error!r}"
        answer = read_answer(received, 0, is_head=True)
        return answer.status if answer is not None else f"no answer: {received!r}"

    async def send_steadily(
        self, every_s: float, timeout_s: float, until: asyncio.Event
    ) -> tuple[list[float], list[str]]:
        """Send a callback every `every_s`, whether or not others are answered, until the event.

        Return the seconds that each accepted one took, and a sentence for each that was not accepted.
        """
        took: list[float] = []
        refused: list[str] = []
        loop = asyncio.get_running_loop()

        async def one(id: str, status: str, request: bytes) -> None:
            begun_s = loop.time()
            answer = await self.send(request, timeout_s)
            if answer == 200:
                took.append(loop.time() - begun_s)
                self.accept(id, status, request)
            else:
                refused.append(f"{status} of {id}: {answer}")

        begun_s = loop.time()
        async with asyncio.TaskGroup() as group:
            for turn in itertools.count():
                try:
                    group.create_task(one(*self.next_callback()))
                except StopIteration:
                    break
                left_s = begun_s + (turn + 1) * every_s - loop.time()
                try:
                    async with asyncio.timeout(max(left_s, 0)):
                        await until.wait()
                    break
                except TimeoutError:
                    continue
        return took, refused
