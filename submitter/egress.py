"""SSRF guard for outgoing HTTP: connects only to public addresses and explicitly allowed hosts.

Safe against DNS rebinding: a host name is resolved once, its addresses are checked, and the connection
is pinned to an address that passed. The host name is still used for the `Host` header and for TLS
(SNI and certificate verification).
"""

import asyncio
import ipaddress
import socket
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from functools import cache, partial
from urllib.parse import urlsplit

import httpx

Resolve = Callable[[str, int], Awaitable[list[str]]]

POOLS_MAX = 32
"""Idle connection pools that a client keeps, one for each host."""

# Networks that are not public and that `ipaddress.is_global` lets through, in this or an earlier Python.
NOT_PUBLIC = tuple(
    ipaddress.ip_network(network)
    for network in (
        "168.63.129.16/32",  # Azure's platform services: metadata, DNS, health (Azure documentation)
        "192.0.0.0/24",  # IETF protocol assignments; Oracle Cloud's metadata (RFC 6890)
        "192.88.99.0/24",  # 6to4 relay anycast, deprecated (RFC 7526)
        "::/96",  # IPv4-compatible addresses, deprecated (RFC 4291, 2.5.5.1)
        "::ffff:0:0:0/96",  # IPv4-translated addresses (RFC 2765)
        "3fff::/20",  # documentation (RFC 9637)
        "5f00::/16",  # segment identifiers of SRv6 (RFC 9602)
        "fec0::/10",  # site-local addresses, deprecated (RFC 3879)
    )
)

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_NAT64_LOCAL = ipaddress.ip_network("64:ff9b:1::/48")  # RFC 8215: for use inside one network


@cache
def tls_context() -> ssl.SSLContext:
    """Return the TLS context that all HTTP clients share: loading the CA certificates takes 40 to 100 ms."""
    return ssl.create_default_context()


class AddressForbidden(httpx.ConnectError):
    """The host has no allowed address; nothing was sent."""


def is_public(address: str) -> bool:
    """Return whether an IP address is public, also when it is embedded (IPv4-mapped, 6to4, Teredo, NAT64)."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if any(ip in network for network in NOT_PUBLIC):
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        if ip in _NAT64_LOCAL:
            return False
    return ip.is_global and not ip.is_multicast


async def resolve(host: str, port: int) -> list[str]:
    """Return the addresses of `host` from the system's resolver; raise httpx.ConnectError."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:  # `a..b` is no name that can be encoded
        raise httpx.ConnectError(f"cannot resolve {host}: {error}") from error
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def _public_of(host: str, addresses: list[str]) -> list[str]:
    """Return the public ones of a host's addresses; raise AddressForbidden if there are none."""
    public = [address for address in addresses if is_public(address)]
    if not public:
        resolved = "" if addresses == [host] else f" (resolves to {', '.join(addresses) or 'no address'})"
        raise AddressForbidden(
            f"{host}{resolved} is not a public address. To allow it, add {host} to KLING_RELAY_ALLOW_HOSTS."
        )
    return public


async def require_allowed(url: str, allow_hosts: frozenset[str]) -> None:
    """Raise AddressForbidden unless the host of `url` is public or allowed, for clients with their own transport.

    Such a client resolves the name again: this guards against a wrong URL, not against DNS rebinding.
    """
    host = urlsplit(url).hostname or ""
    if host.lower() not in allow_hosts:
        _public_of(host, await resolve(host, 0))


async def connect(url: str, allow_hosts: frozenset[str], timeout_s: float = 10) -> None:
    """Open a connection (TCP, and TLS for https) to an allowed address of a URL's host, and close it: nothing is sent.

    Raises httpx.ConnectError, which says why not.
    """
    parts = urlsplit(url)
    host, is_tls = (parts.hostname or "").lower(), parts.scheme == "https"
    port = parts.port or (443 if is_tls else 80)
    addresses = await resolve(host, port)
    if host not in allow_hosts:
        addresses = _public_of(host, addresses)
    reason = ""
    for address in addresses:
        try:
            async with asyncio.timeout(timeout_s):
                tls = tls_context() if is_tls else None
                _, writer = await asyncio.open_connection(address, port, ssl=tls, server_hostname=host if tls else None)
        except (OSError, TimeoutError) as error:
            reason = f"{host}, port {port}: {error or 'no answer'}"
            continue
        writer.close()
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(1):
                await writer.wait_closed()
        return
    raise httpx.ConnectError(f"no connection to {reason}")


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
        public = _public_of(host, await self._resolve(host, port))
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
        raise failure or AddressForbidden(host)

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
