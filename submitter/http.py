"""Runs one `HttpRequest`: an answer, or `NotSent`, or `Unanswered`.

Only an error of connecting is `NotSent`. Every other failure is `Unanswered`, the costly
reading: the vendor may have acted. A request that must not be repeated goes out on a fresh
connection, so that a connection which the vendor closed while idle is never mistaken for it.
"""

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import msgspec

from submitter.vendors.base import HttpAnswer, HttpRequest

ANSWER_MAX = 16 * 1024 * 1024


class NotSent(msgspec.Struct, frozen=True):
    """The vendor was not reached: nothing happened there."""

    reason: str


class Unanswered(msgspec.Struct, frozen=True):
    """The request may have reached the vendor, and no whole answer came."""

    reason: str


class VendorHttp:
    """The connections to the vendors."""

    def __init__(self, *, connect_timeout_s: float = 10, answer_timeout_s: float = 60) -> None:
        self._connect_timeout_s = connect_timeout_s
        timeout = httpx.Timeout(answer_timeout_s, connect=connect_timeout_s, pool=None)
        verify = ssl.create_default_context()
        self._once = httpx.AsyncClient(
            timeout=timeout, verify=verify, limits=httpx.Limits(max_keepalive_connections=0), follow_redirects=False
        )
        self._kept = httpx.AsyncClient(
            timeout=timeout, verify=verify, limits=httpx.Limits(max_connections=20), follow_redirects=False
        )

    async def run(self, request: HttpRequest, *, fresh: bool = False) -> HttpAnswer | NotSent | Unanswered:
        """Send `request`, on a connection of its own when `fresh`."""
        client = self._once if fresh else self._kept
        try:
            async with client.stream(
                request.method, request.url, headers=request.headers, content=request.body
            ) as response:
                body = bytearray()
                async for chunk in response.aiter_bytes():
                    body += chunk
                    if len(body) > ANSWER_MAX:
                        return Unanswered(f"the answer is longer than {ANSWER_MAX} bytes")
                headers = {name.lower(): value for name, value in response.headers.items()}
                return HttpAnswer(response.status_code, headers, bytes(body))
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            return NotSent(_reason(error))
        except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL) as error:
            return Unanswered(_reason(error))

    @asynccontextmanager
    async def stream(self, request: HttpRequest, *, silence_s: float) -> AsyncIterator[httpx.Response]:
        """Open an answer that goes on; raise httpx.ReadTimeout once nothing came for `silence_s`."""
        timeout = httpx.Timeout(silence_s, connect=self._connect_timeout_s)
        async with self._once.stream(
            request.method, request.url, headers=request.headers, content=request.body, timeout=timeout
        ) as response:
            yield response

    async def close(self) -> None:
        """Close every connection."""
        await self._once.aclose()
        await self._kept.aclose()


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
