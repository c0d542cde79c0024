"""The HTTP client for vendors: sends an `HttpRequest`, returns an answer, `NotSent` or `Unanswered`.

A connection error and a request that cannot be built are `NotSent`: repeating the request is safe. Every
other failure is `Unanswered`: the vendor may have acted. A request that must not be repeated uses a fresh connection,
because a kept-alive connection that the vendor has closed would look like `Unanswered`.

An answer is bounded as it is sent and as it is expanded: a kilobyte that was compressed twice can become a gigabyte.
"""

import asyncio
import zlib
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from http.cookiejar import CookieJar, DefaultCookiePolicy

import httpx
import msgspec

from submitter.egress import tls_context
from submitter.vendors.base import HttpAnswer, HttpRequest

ANSWER_MAX = 16 * 1024 * 1024
EVENT_MAX = 1024 * 1024
"""Bytes of one event of a stream."""
_TOO_LONG = f"the response is longer than {ANSWER_MAX} bytes"
_GZIP = zlib.MAX_WBITS | 16


class NotSent(msgspec.Struct, frozen=True):
    """The vendor was not reached: it has not received the request."""

    reason: str


class Unanswered(msgspec.Struct, frozen=True):
    """The request may have reached the vendor, and no complete response arrived."""

    reason: str


Outcome = HttpAnswer | NotSent | Unanswered


class VendorHttp:
    """Sends requests to vendors. Follows no redirects. Timeouts in seconds. A `transport` replaces the connections."""

    def __init__(
        self,
        *,
        connect_timeout_s: float = 10,
        answer_timeout_s: float = 60,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._connect_timeout_s = connect_timeout_s
        self._total_s = connect_timeout_s + 1.5 * answer_timeout_s  # httpx limits each read, not their sum
        timeout = httpx.Timeout(answer_timeout_s, connect=connect_timeout_s, pool=None)
        verify = tls_context()
        self._once, self._kept = (
            httpx.AsyncClient(
                timeout=timeout,
                verify=verify,
                limits=limits,
                follow_redirects=False,
                transport=transport,
                cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),  # keeps none
                event_hooks={"response": [_forget_location]},
            )
            for limits in (httpx.Limits(max_keepalive_connections=0), httpx.Limits(max_connections=20))
        )

    async def run(self, request: HttpRequest, *, fresh: bool = False) -> Outcome:
        """Send `request`; with `fresh`, on a new connection."""
        client = self._once if fresh else self._kept
        try:
            headers = {"accept-encoding": "gzip", **request.headers}
            built = client.build_request(request.method, request.url, headers=headers, content=request.body)
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
            return _cannot_be_built(error)
        try:
            async with asyncio.timeout(self._total_s), aclosing(await client.send(built, stream=True)) as response:
                body = bytearray()
                async for chunk in response.aiter_raw():
                    body += chunk
                    if len(body) > ANSWER_MAX:
                        return Unanswered(_TOO_LONG)
                expanded = _expand(bytes(body), response.headers.get("content-encoding", ""))
                if isinstance(expanded, Unanswered):
                    return expanded
                received = {name.lower(): value for name, value in response.headers.items()}
                return HttpAnswer(response.status_code, received, expanded)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            return NotSent(_reason(error))
        except (httpx.LocalProtocolError, httpx.UnsupportedProtocol) as error:  # both before anything is written
            return _cannot_be_built(error)
        except TimeoutError:
            return Unanswered(f"the response was not complete within {self._total_s:g} s")
        except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL, UnicodeError) as error:
            return Unanswered(_reason(error))

    @asynccontextmanager
    async def stream(self, request: HttpRequest, *, silence_s: float) -> AsyncIterator[httpx.Response]:
        """Open an event stream. Reading raises httpx.ReadTimeout after `silence_s` seconds without data.

        It raises httpx.DecodingError for an event, up to its blank line, of more than EVENT_MAX bytes.
        """
        timeout = httpx.Timeout(silence_s, connect=self._connect_timeout_s)
        headers = {"accept-encoding": "identity", **request.headers}
        async with self._once.stream(
            request.method, request.url, headers=headers, content=request.body, timeout=timeout
        ) as response:
            encoding = response.headers.get("content-encoding", "identity")
            if encoding.lower() != "identity":  # httpx would expand it without a limit
                raise httpx.DecodingError(f"the stream is compressed ({encoding:.40})")
            assert isinstance(response.stream, httpx.AsyncByteStream)
            response.stream = _BoundedEvents(response.stream)
            yield response

    async def close(self) -> None:
        """Close every connection."""
        await self._once.aclose()
        await self._kept.aclose()


class _BoundedEvents(httpx.AsyncByteStream):
    """A stream of events, which a reader holds until their blank lines: none may be endless."""

    def __init__(self, stream: httpx.AsyncByteStream) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size, end = 0, b""
        async for chunk in self._stream:
            seen = end + chunk
            last = max(seen.rfind(blank) for blank in (b"\n\n", b"\r\n\r\n", b"\r\r"))
            size = size + len(chunk) if last < 0 else len(seen) - last
            if size > EVENT_MAX:
                raise httpx.DecodingError(f"an event of the stream is longer than {EVENT_MAX} bytes")
            end = seen[-3:]
            yield chunk

    async def aclose(self) -> None:
        await self._stream.aclose()


def _expand(body: bytes, encoding: str) -> bytes | Unanswered:
    """Return the content of a body that may be compressed once; Unanswered if it is too long or cannot be read."""
    encoding = encoding.strip().lower()
    if encoding in ("", "identity") or not body:
        return body
    if encoding not in ("gzip", "x-gzip"):
        return Unanswered(f"the response has an encoding that was not asked for: {encoding:.40}")
    expander = zlib.decompressobj(_GZIP)
    try:
        content = expander.decompress(body, ANSWER_MAX + 1)
    except zlib.error as error:
        return Unanswered(f"the response cannot be expanded: {error}")
    if len(content) > ANSWER_MAX:
        return Unanswered(_TOO_LONG)
    return content if expander.eof else Unanswered("the compressed response is incomplete")


async def _forget_location(response: httpx.Response) -> None:
    """Drop the target of a redirect: httpx would parse it, although it follows none, and fail if it is no URL."""
    response.headers.pop("location", None)


def _cannot_be_built(error: Exception) -> NotSent:
    # The library's text would show the value of a header, which is the API key.
    return NotSent(f"the request cannot be built ({type(error).__name__}): check the API key and the base URL")


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
