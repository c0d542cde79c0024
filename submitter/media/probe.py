"""Media probing: reads format, size, dimensions and duration of images and videos for preflight.

Reads only a few kilobytes: of a URL by range requests, with an upper limit. A medium that cannot be
probed is a warning, since the vendor may be able to reach it. `submitter.media.check` checks
the result against the vendor's limits.
"""

import asyncio
import base64
import binascii
import hashlib
import io
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Literal

import httpx
import imagesize
import msgspec

from submitter.callback_url import redact
from submitter.errors import Problem
from submitter.media.check import MediaFacts
from submitter.media.isobmff import Reading, Unreadable, read_movie, sniff
from submitter.web_address import why_not_web

CHUNK = 64 * 1024
REMOTE_MAX = 8 * 1024 * 1024
REMOTE_REQUESTS = 24
TIMEOUT_S = 30.0  # of one probe: beyond it, the medium is not checked

ReadAt = Callable[[int, int], Awaitable[bytes]]


class Medium(msgspec.Struct, frozen=True):
    """One image or video: exactly one of `url`, `path` and `inline` (decoded bytes)."""

    field: str
    url: str | None = None
    path: Path | None = None
    inline: bytes | None = None

    @property
    def kind(self) -> Literal["url", "file", "inline"]:
        """The kind of its source."""
        return "url" if self.url is not None else "file" if self.path is not None else "inline"


class Probe(msgspec.Struct, frozen=True):
    """The result of a probe. `warning` is the reason if `facts` is missing."""

    facts: MediaFacts | None = None
    problems: tuple[Problem, ...] = ()
    warning: str | None = None


class CannotProbe(Exception):
    """The medium cannot be read from here; the vendor may still be able to read it."""


def open_medium(field: str, value: str | Path, *, inline: bool) -> Medium | Problem:
    """Return the medium that `value` denotes: a URL, a file, or (if `inline`) base64; or the problem with it."""
    if isinstance(value, str):
        if value.startswith(("http://", "https://")):
            wrong = why_not_web(value)
            if wrong is not None:
                return Problem(
                    field, repr(redact(value[:120])), f"a URL that can be opened: {wrong}", "Correct the URL."
                )
            return Medium(field, url=value)
        raw = value.partition("base64,")[2] if value.startswith("data:") else value
        decoded = _decode(raw) if len(raw) > 255 or value.startswith("data:") else None
        if decoded is not None and inline:
            return Medium(field, inline=decoded)
        if decoded is not None or len(value) > 4096:
            return Problem(field, "base64", "a URL or a file", "Use a URL, or a file and a media store.")
        if "://" in value:
            return Problem(field, repr(value[:80]), "http:// or https://", "Use a URL that the vendor can fetch.")
    path = Path(value)
    try:
        is_file = path.is_file()
    except OSError:  # the name is too long to be one
        is_file = False
    if not is_file:
        kinds = "a URL, a file or base64" if inline else "a URL or a file"
        return Problem(field, repr(str(value)[:120]), kinds, "There is no such file. Check the path.")
    return Medium(field, path=path.absolute())


def digest(medium: Medium) -> str:
    """Return the identity of a medium, independent of file names: its URL, or the SHA-256 of its bytes."""
    if medium.url is not None:
        return medium.url
    if medium.inline is not None:
        return f"sha256:{hashlib.sha256(medium.inline).hexdigest()}"
    assert medium.path is not None
    with medium.path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


async def probe(medium: Medium, client: httpx.AsyncClient) -> Probe:
    """Probe a medium, reading as few of its bytes as possible. A failure is returned, not raised."""
    try:
        if medium.url is not None:
            remote = _Remote(client, medium.url)
            async with asyncio.timeout(TIMEOUT_S):
                await remote.open()
                return Probe(await _facts(remote.read, remote.size))
        if medium.path is not None:
            path = medium.path
            return Probe(
                await _facts(
                    lambda offset, length: asyncio.to_thread(_read_file, path, offset, length), path.stat().st_size
                )
            )
        inline = medium.inline or b""

        async def read(offset: int, length: int) -> bytes:
            return inline[offset : offset + length]

        return Probe(await _facts(read, len(inline)))
    except Unreadable as error:
        remedy = "Export the file again, and check that it plays."
        return Probe(problems=(Problem(medium.field, str(error), "a complete file", remedy),))
    except (CannotProbe, httpx.HTTPError, httpx.InvalidURL, UnicodeError, OSError, TimeoutError) as error:
        reason = str(error) or type(error).__name__
        return Probe(warning=redact(f"{medium.field} was not checked: {reason}"))


async def _facts(read: ReadAt, size: int | None) -> MediaFacts:
    head = await read(0, 32)
    format = sniff(head)
    if format in ("mp4", "mov"):
        if size is None:
            raise CannotProbe("its server does not send its length")
        return await _drive(read_movie(format, size), read)
    if format in ("png", "jpeg"):
        width, height = -1, -1
        for length in (CHUNK, 16 * CHUNK, REMOTE_MAX - 32 * CHUNK):  # the size in a JPEG follows its metadata
            start = await read(0, length)
            width, height = await asyncio.to_thread(imagesize.get, io.BytesIO(start))
            if width > 0 or len(start) < length:
                break
        if width <= 0:
            raise Unreadable(f"the {format} file has no readable size")
        return MediaFacts(format, size, width, height)
    return MediaFacts(format, size)


async def _drive(reading: Reading, read: ReadAt) -> MediaFacts:
    """Run the parser in a thread: the event loop must not stop while it works on a large box."""
    step: tuple[int, int] | MediaFacts = next(reading)
    while isinstance(step, tuple):
        data = await read(*step)
        step = await asyncio.to_thread(_step, reading, data)
    return step


def _step(reading: Reading, data: bytes) -> tuple[int, int] | MediaFacts:
    """Send the parser its bytes; return what it asks for next, or its result."""
    try:
        return reading.send(data)
    except StopIteration as done:
        facts: MediaFacts = done.value
        return facts


class _Remote:
    """Reads a URL by range requests, in cached chunks; raises CannotProbe beyond a limit of bytes or requests."""

    def __init__(self, client: httpx.AsyncClient, url: str) -> None:
        self._client = client
        self._url = url
        self._chunks: dict[int, bytes] = {}
        self._fetched = 0
        self._requests = 0
        self.size: int | None = None

    async def open(self) -> None:
        await self._fetch(0, CHUNK)

    async def read(self, offset: int, length: int) -> bytes:
        for start, chunk in self._chunks.items():
            if start <= offset and (
                offset + length <= start + len(chunk) or (self.size is not None and start + len(chunk) >= self.size)
            ):
                return chunk[offset - start : offset - start + length]
        return (await self._fetch(offset, max(length, CHUNK)))[:length]

    async def _fetch(self, offset: int, length: int) -> bytes:
        self._requests += 1
        if self._fetched + length > REMOTE_MAX or self._requests > REMOTE_REQUESTS:
            raise CannotProbe(f"probing it takes more than {REMOTE_MAX} bytes or {REMOTE_REQUESTS} requests")
        headers = {"range": f"bytes={offset}-{offset + length - 1}", "accept-encoding": "identity"}
        async with self._client.stream("GET", self._url, headers=headers) as response:
            if response.status_code == 200 and offset > 0:
                raise CannotProbe("its server does not support range requests")
            if response.status_code not in (200, 206):
                raise CannotProbe(f"its server returned HTTP {response.status_code}")
            total = response.headers.get("content-range", "").rpartition("/")[2]
            if response.status_code == 200:
                total = response.headers.get("content-length", "")
            self.size = int(total) if total.isdecimal() else self.size
            data = bytearray()
            async for part in response.aiter_raw():
                data += part
                if len(data) >= length:
                    break
        chunk = bytes(data[:length])
        self._fetched += len(chunk)
        self._chunks[offset] = chunk
        return chunk


def _decode(raw: str) -> bytes | None:
    try:
        return base64.b64decode("".join(raw.split()), validate=True)
    except (binascii.Error, ValueError):
        return None


def _read_file(path: Path, offset: int, length: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(length)
