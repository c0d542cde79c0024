"""A TCP proxy that passes, refuses, cuts, slows and resets connections, loses answers, and answers with lies."""

import asyncio
import contextlib
import fcntl
import socket
import struct
import termios
from collections import Counter
from collections.abc import Callable

import msgspec

HTML = b"<html><body>Please log in to the airport's network.</body></html>"
HEAD = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-type: %s\r\ncontent-length: %d\r\n\r\n"
CUT_SHORT = b'{"code":0,"data":{"ta'
LIES = (
    HEAD % (b"text/html", len(HTML)) + HTML,
    HEAD % (b"application/json", 0),
    HEAD % (b"application/json", len(CUT_SHORT)) + CUT_SHORT,
    HEAD % (b"application/json", 400) + CUT_SHORT,
)
"""What a captive portal or a broken gateway answers: HTML, nothing, JSON that ends too early, less than announced."""

ARRIVES_WITHIN_S = 1.0


class Treatment(msgspec.Struct, frozen=True):
    """What happens to one connection.

    pass         nothing
    refuse       it is reset before anything is read
    cut_request  it is closed after `size` bytes of the request have arrived
    cut          it is closed after `size` bytes of the answer
    reset        the same, by RST
    slow         the answer stalls after `size` bytes, then goes on with a byte every `pause_s`
    lie          the request is swallowed, and answered with `lie`
    lie_after    the request arrives, and its answer is replaced by `lie`
    lose         the request arrives, and its answer is lost with the connection
    """

    kind: str
    size: int = 0
    pause_s: float = 1.0
    lie: bytes = LIES[0]


PASS = Treatment("pass")


class FaultyProxy:
    """A proxy in front of the port `target` of `host`; `choose` draws the treatment of each connection."""

    def __init__(self) -> None:
        self.host = "127.0.0.1"
        self.target = 0
        self.port = 0
        self.treated: Counter[str] = Counter()
        self._choose: Callable[[], Treatment] = lambda: PASS
        self._server: asyncio.Server | None = None
        self._holder = socket.socket()  # keeps the port while nothing listens at it
        self._holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._serving: set[asyncio.Task[None]] = set()
        self._answers_to_lose = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def treat(self, choose: Callable[[], Treatment]) -> None:
        """Choose the treatment of later connections."""
        self._choose = choose
        self._answers_to_lose = 0

    def lose_answer(self) -> None:
        """Cut the next connection that sends something, when the answer to it arrives."""
        self._answers_to_lose = 1

    def heal(self) -> None:
        """Pass every later connection, and cut those of now."""
        self.treat(lambda: PASS)
        for serving in self._serving:
            serving.cancel()

    async def __aenter__(self) -> "FaultyProxy":
        self._holder.bind(("127.0.0.1", 0))
        self.port = self._holder.getsockname()[1]
        await self.listen()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.vanish()
        self._holder.close()

    async def listen(self) -> None:
        """Accept connections, if it does not yet."""
        if self._server is None:
            self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port, reuse_port=True)

    async def vanish(self) -> None:
        """Cut every connection, and let the system refuse later ones, as when the other side's process has ended."""
        server, self._server = self._server, None
        if server is not None:
            server.close()
            for serving in self._serving:
                serving.cancel()
            await asyncio.gather(*self._serving, return_exceptions=True)
            await server.wait_closed()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving = asyncio.current_task()
        assert serving is not None
        self._serving.add(serving)
        treatment = self._choose()
        self.treated[treatment.kind] += 1
        others: list[asyncio.StreamWriter] = []
        try:
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await self._serve(treatment, reader, writer, others)
        finally:
            self._serving.discard(serving)
            for one in (writer, *others):
                one.transport.abort() if treatment.kind != "pass" else one.close()

    async def _serve(
        self,
        treatment: Treatment,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        others: list[asyncio.StreamWriter],
    ) -> None:
        if treatment.kind == "refuse":
            _reset_at_close(writer)
            return
        if treatment.kind == "lie":
            await _read_request(reader)
            await _answer(writer, treatment.lie)
            return
        server_reader, server_writer = await asyncio.open_connection(self.host, self.target)
        others.append(server_writer)
        loses = asyncio.Event()
        if treatment.kind in ("lie_after", "lose"):
            loses.set()
        if treatment.kind == "cut_request":
            with contextlib.suppress(asyncio.IncompleteReadError):
                server_writer.write(await reader.readexactly(treatment.size))
                await _arrive(server_writer)
            return
        up = asyncio.create_task(self._pump_up(reader, server_writer, loses))
        try:
            await self._pump_down(treatment, server_reader, writer, loses)
        finally:
            up.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await up

    async def _pump_up(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, loses: asyncio.Event) -> None:
        with contextlib.suppress(OSError):
            while chunk := await reader.read(65536):
                if self._answers_to_lose:
                    self._answers_to_lose = 0
                    self.treated["lose"] += 1
                    loses.set()
                writer.write(chunk)
                await writer.drain()
            writer.write_eof()

    async def _pump_down(
        self, treatment: Treatment, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, loses: asyncio.Event
    ) -> None:
        left = treatment.size
        while chunk := await reader.read(65536):
            if loses.is_set():
                if treatment.kind == "lie_after":
                    await _answer(writer, treatment.lie)
                return
            if treatment.kind in ("cut", "reset", "slow"):
                now, later, left = chunk[:left], chunk[left:], max(0, left - len(chunk))
                writer.write(now)
                await writer.drain()
                if later:
                    await _end_badly(treatment, writer, later)
                    if treatment.kind != "slow":
                        return
            else:
                writer.write(chunk)
                await writer.drain()
        writer.write_eof()


async def _end_badly(treatment: Treatment, writer: asyncio.StreamWriter, later: bytes) -> None:
    if treatment.kind == "reset":
        await _arrive(writer)
        _reset_at_close(writer)
    elif treatment.kind == "slow":
        for number in range(len(later)):
            await asyncio.sleep(treatment.pause_s)
            writer.write(later[number : number + 1])
            await writer.drain()
    else:
        writer.write_eof()


def _reset_at_close(writer: asyncio.StreamWriter) -> None:
    """Let the connection end by RST, which also discards what was not sent yet."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def _arrive(writer: asyncio.StreamWriter) -> None:
    """Return when the other side's system has all that was written, or a second later."""
    writer.transport.set_write_buffer_limits(high=0)
    await writer.drain()
    descriptor = writer.get_extra_info("socket").fileno()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(ARRIVES_WITHIN_S):
            while struct.unpack("i", fcntl.ioctl(descriptor, termios.TIOCOUTQ, bytes(4)))[0]:
                await asyncio.sleep(0.002)  # no event says so


async def _read_request(reader: asyncio.StreamReader) -> None:
    """Read one request: until it pauses, since only its answer matters."""
    await reader.read(65536)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.1):
            while await reader.read(65536):
                pass


async def _answer(writer: asyncio.StreamWriter, answer: bytes) -> None:
    writer.write(answer)
    await writer.drain()
    writer.write_eof()
    await asyncio.sleep(0.1)  # an abort right after the write could overtake it
