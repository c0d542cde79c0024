"""The HTTP client for vendors: sends an `HttpRequest`, returns an answer, `NotSent` or `Unanswered`.

A connection error and a request that cannot be built are `NotSent`: repeating the request is safe. Every
other failure is `Unanswered`: the vendor may have acted. A request that must not be repeated uses a fresh connection,
because a kept-alive connection that the vendor has closed would look like `Unanswered`.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import msgspec

from submitter.egress import tls_context
from submitter.vendors.base import HttpAnswer, HttpRequest

ANSWER_MAX = 16 * 1024 * 1024


class NotSent(msgspec.Struct, frozen=True):
    """The vendor was not reached: it has not received the request."""

    reason: str


class Unanswered(msgspec.Struct, frozen=True):
    """The request may have reached the vendor, and no complete response arrived."""

    reason: str


Outcome = HttpAnswer | NotSent | Unanswered


class VendorHttp:
    """Sends requests to vendors. Follows no redirects. Timeouts in seconds."""

    def __init__(self, *, connect_timeout_s: float = 10, answer_timeout_s: float = 60) -> None:
        self._connect_timeout_s = connect_timeout_s
        timeout = httpx.Timeout(answer_timeout_s, connect=connect_timeout_s, pool=None)
        verify = tls_context()
        self._once = httpx.AsyncClient(
            timeout=timeout, verify=verify, limits=httpx.Limits(max_keepalive_connections=0), follow_redirects=False
        )
        self._kept = httpx.AsyncClient(
            timeout=timeout, verify=verify, limits=httpx.Limits(max_connections=20), follow_redirects=False
        )

    async def run(self, request: HttpRequest, *, fresh: bool = False) -> Outcome:
        """Send `request`; with `fresh`, on a new connection."""
        client = self._once if fresh else self._kept
        try:
            async with client.stream(
                request.method, request.url, headers=request.headers, content=request.body
            ) as response:
                body = bytearray()
                async for chunk in response.aiter_bytes():
                    body += chunk
                    if len(body) > ANSWER_MAX:
                        return Unanswered(f"the response is longer than {ANSWER_MAX} bytes")
                headers = {name.lower(): value for name, value in response.headers.items()}
                return HttpAnswer(response.status_code, headers, bytes(body))
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            return NotSent(_reason(error))
        except (httpx.LocalProtocolError, httpx.UnsupportedProtocol, httpx.InvalidURL, UnicodeError) as error:
            # The library's text would show the value of a header, which is the API key.
            return NotSent(f"the request cannot be built ({type(error).__name__}): check the API key and the base URL")
        except (httpx.HTTPError, httpx.StreamError) as error:
            return Unanswered(_reason(error))

    @asynccontextmanager
    async def stream(self, request: HttpRequest, *, silence_s: float) -> AsyncIterator[httpx.Response]:
        """Open a streaming response; raise httpx.ReadTimeout when no data arrived for `silence_s` seconds."""
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
