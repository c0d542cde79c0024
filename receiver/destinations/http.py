"""Sends events to HTTP endpoints: CloudEvents over HTTP, signed by Standard Webhooks.

Success is 2xx. A redirect is a failure: following it would take a signed event elsewhere. 410
asks for nothing more; 429 and 503 may say when to come back; what is too large (413) stays so.
"""

import asyncio
import ssl
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC
from email.utils import parsedate_to_datetime

import httpx

from receiver.cloudevents import encode, traceparent
from receiver.destinations.base import Outcome
from receiver.hooks import Hook
from receiver.signature import sign
from submitter.egress import AddressForbidden, guarded_client
from submitter.event import Event

ANSWER_MAX = 1024 * 1024
BODY_PATIENCE_S = 1.0
RETRY_AFTER_MAX_S = 86400.0
_ssl_context: ssl.SSLContext | None = None


class HttpDestination:
    """One HTTP hook, with connections of its own."""

    def __init__(self, hook: Hook, client: httpx.AsyncClient) -> None:
        self._hook = hook
        self._client = client

    async def send(self, event: Event, now_s: float) -> Outcome:
        encoded = encode(event, self._hook.mode)
        headers = {f"ce-{name}": _header(value) for name, value in encoded.attributes.items()}
        headers |= {
            "user-agent": "kling-relay",
            "content-type": encoded.content_type,
            "traceparent": traceparent(event),
            **sign(self._hook.secrets, event.id, int(now_s), encoded.body),
        }
        outcome, _ = await post(self._client, self._hook.url, encoded.body, headers, now_s)
        return outcome

    async def reach(self) -> str | None:
        return await reach(self._client, self._hook.url)

    async def close(self) -> None:
        await self._client.aclose()


def open(hook: Hook, allow_hosts: frozenset[str]) -> HttpDestination:
    """Open an HTTP destination that reaches public addresses, and `allow_hosts`."""
    return HttpDestination(hook, open_client(hook, allow_hosts))


def open_client(hook: Hook, allow_hosts: frozenset[str]) -> httpx.AsyncClient:
    """Open a client for a hook, with its timeout and room for its concurrency."""
    global _ssl_context  # noqa: PLW0603 - reading the CA bundle costs 100 ms, and every hook needs the same
    if _ssl_context is None:
        _ssl_context = ssl.create_default_context()
    return guarded_client(allow_hosts, timeout_s=hook.timeout_s, verify=_ssl_context, connections=hook.concurrency)


async def post(
    client: httpx.AsyncClient,
    url: str,
    body: bytes,
    headers: Mapping[str, str],
    now_s: float,
    *,
    patience_s: float = BODY_PATIENCE_S,
) -> tuple[Outcome, bytes]:
    """Send one request; return what became of it, and what was said within `patience_s` of the status.

    The status decides. A body that ends soon is read, since only then is the connection kept.
    """
    try:
        async with client.stream("POST", url, content=body, headers=headers) as response:
            said = await _read(response, patience_s)
    except AddressForbidden as error:
        return Outcome(False, str(error)), b""
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return Outcome(False, f"{type(error).__name__}: {error}"[:500]), b""
    status = response.status_code
    if response.is_success:
        return Outcome(True, f"HTTP {status}"), said
    retry_after_s = read_retry_after(response.headers.get("retry-after"), now_s) if status in (429, 503) else None
    answer = f"HTTP {status} {said[:200].decode(errors='replace')}".replace("\n", " ").strip()
    return Outcome(False, answer, retry_after_s, is_gone=status == 410, is_final=status == 413), said


async def _read(response: httpx.Response, patience_s: float) -> bytes:
    said = b""
    with suppress(httpx.HTTPError, TimeoutError):
        async with asyncio.timeout(patience_s):
            async for chunk in response.aiter_bytes():
                said += chunk
                if len(said) > ANSWER_MAX:
                    break
    return said


async def reach(client: httpx.AsyncClient, url: str) -> str | None:
    """Return None when somebody answers there, whatever it answers to HEAD, or why nobody does."""
    try:
        async with client.stream("HEAD", url):
            return None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return str(error) or type(error).__name__


def read_retry_after(value: str | None, now_s: float) -> float | None:
    """Return the seconds that a Retry-After header asks for (RFC 9110: seconds, or a date), at most a day."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return min(float(value[:12]), RETRY_AFTER_MAX_S)
    try:
        moment = parsedate_to_datetime(value)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return min(max(moment.timestamp() - now_s, 0.0), RETRY_AFTER_MAX_S)


def _header(value: str) -> str:
    """Percent-encode as the HTTP binding asks (CloudEvents HTTP 3.1.3.2): space, quote, percent, non-ASCII."""
    return "".join(
        char if "!" <= char <= "~" and char not in '"%' else "".join(f"%{byte:02X}" for byte in char.encode())
        for char in value
    )
