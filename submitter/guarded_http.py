"""httpx with the SSRF guard, for media and results: connects only to public addresses and explicitly allowed hosts.

A host name is resolved once, its addresses are judged by `egress`, and the connection is pinned to one that passed.
"""

import ssl
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial

import httpx

from submitter.egress import CannotConnect, Resolve, public_of, resolve, tls_context

POOLS_MAX = 32
"""Idle connection pools that a client keeps, one for each host."""


class GuardedTransport(httpx.AsyncBaseTransport):
    """An httpx transport that connects only to public addresses and allowed hosts.

    Each host has a separate connection pool: two names with the same address never share a connection. Hosts are
    judged before they get a pool. Of the pools without a request, the POOLS_MAX that were used last are kept.
    """

    def __init__(
        self,
        allow_hosts: frozenset[str],
        *,
        verify: ssl.SSLContext | None = None,
        limits: httpx.Limits | None = None,
        resolve: Resolve = resolve,
    ) -> None:
        self._allow_hosts = frozenset(host.lower().strip("[]") for host in allow_hosts)
        self._verify = verify or tls_context()
        self._limits = limits or httpx.Limits()
        self._resolve = resolve
        self._pools: dict[str, httpx.AsyncHTTPTransport] = {}  # the one that was used last is the last
        self._requests: Counter[str] = Counter()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send the request to the first allowed address of its host that accepts a connection."""
        host = request.url.host
        if host.lower() in self._allow_hosts:
            return await self._send(host, request)
        port = request.url.port or (443 if request.url.scheme == "https" else 80)
        try:
            public = public_of(host, await self._resolve(host, port))
        except CannotConnect as error:
            raise httpx.ConnectError(str(error)) from error
        failure: httpx.ConnectError | None = None
        for address in public:
            pinned = httpx.Request(
                request.method,
                request.url.copy_with(host=address),
                headers=request.headers,  # includes Host, which remains the name
                stream=request.stream,
                extensions={**request.extensions, "sni_hostname": host},
            )
            try:
                return await self._send(host, pinned)
            except httpx.ConnectError as error:  # nothing was sent, so try the next address
                failure = error
        assert failure is not None  # there is at least one address
        raise failure

    async def _send(self, host: str, request: httpx.Request) -> httpx.Response:
        pool = self._pools.pop(host, None) or httpx.AsyncHTTPTransport(
            verify=self._verify, limits=self._limits, trust_env=False
        )
        self._pools[host] = pool
        self._requests[host] += 1
        try:
            response = await pool.handle_async_request(request)
        except BaseException:
            await self._release(host)
            raise
        assert isinstance(response.stream, httpx.AsyncByteStream)
        response.stream = _Released(response.stream, partial(self._release, host))
        return response

    async def _release(self, host: str) -> None:
        """Note the end of a request, and close the pools that are one too many."""
        self._requests[host] -= 1
        if not self._requests[host]:
            del self._requests[host]
        idle = [name for name in self._pools if name not in self._requests]
        # All are taken out before the first is closed: meanwhile other requests open and release pools.
        closing = [self._pools.pop(name) for name in idle[: max(0, len(self._pools) - POOLS_MAX)]]
        for pool in closing:
            await pool.aclose()

    async def aclose(self) -> None:
        """Close every pool."""
        for pool in self._pools.values():
            await pool.aclose()


class _Released(httpx.AsyncByteStream):
    """A response's body, with a callback at its end."""

    def __init__(self, stream: httpx.AsyncByteStream, release: Callable[[], Awaitable[None]]) -> None:
        self._stream = stream
        self._release = release

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for part in self._stream:
            yield part

    async def aclose(self) -> None:
        try:
            await self._stream.aclose()
        finally:
            release, self._release = self._release, _nothing
            await release()


async def _nothing() -> None:
    """Do nothing: a second close releases nothing."""


def guarded_client(
    allow_hosts: frozenset[str], *, timeout_s: float, verify: ssl.SSLContext | None = None, connections: int = 20
) -> httpx.AsyncClient:
    """Return an httpx client with the SSRF guard; it follows no redirects and ignores proxy settings."""
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
    return httpx.AsyncClient(
        transport=GuardedTransport(allow_hosts, verify=verify, limits=limits),
        timeout=httpx.Timeout(timeout_s),
        follow_redirects=False,
        trust_env=False,
    )
