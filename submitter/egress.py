"""Which addresses may be reached, checked on the address that is connected to.

A name is resolved once, its addresses are judged, and the connection goes to one that passed:
between the check and the connection no resolver is asked again. The host name still goes into
the `Host` header and into TLS (SNI and the certificate's check).
"""

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

import httpx

Resolve = Callable[[str, int], Awaitable[list[str]]]

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_NAT64_LOCAL = ipaddress.ip_network("64:ff9b:1::/48")  # RFC 8215: each network's own


class AddressForbidden(httpx.ConnectError):
    """The host has no address that may be reached; nothing was sent."""


def is_public(address: str) -> bool:
    """Tell whether an IP address lies in the public internet, whatever form it is wrapped in."""
    ip = ipaddress.ip_address(address.partition("%")[0])
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
    """Return the addresses of `host`, as the system resolves it; raise httpx.ConnectError."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise httpx.ConnectError(f"{host} cannot be resolved: {error}") from error
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def _public_of(host: str, addresses: list[str]) -> list[str]:
    """Return a host's addresses that may be reached; raise AddressForbidden when it has none."""
    public = [address for address in addresses if is_public(address)]
    if not public:
        where = "is" if addresses == [host] else f"leads to {', '.join(addresses) or 'no address'},"
        raise AddressForbidden(
            f"{host} {where} inside a private network; add {host} to KLING_RELAY_ALLOW_HOSTS to allow it"
        )
    return public


async def require_allowed(url: str, allow_hosts: frozenset[str]) -> None:
    """Raise AddressForbidden unless a URL's host may be reached, for clients that connect by themselves.

    They resolve the name again, so this guards against a wrong URL and not against a hostile resolver.
    """
    host = urlsplit(url).hostname or ""
    if host.lower() not in allow_hosts:
        _public_of(host, await resolve(host, 0))


class GuardedTransport(httpx.AsyncBaseTransport):
    """An httpx transport that reaches public addresses and the allowed hosts, and no others.

    Each host has a connection pool of its own: two names on one address never share a connection.
    """

    def __init__(
        self,
        allow_hosts: frozenset[str],
        *,
        verify: ssl.SSLContext | bool = True,
        limits: httpx.Limits | None = None,
        resolve: Resolve = resolve,
    ) -> None:
        self._allow_hosts = frozenset(host.lower().strip("[]") for host in allow_hosts)
        self._verify = verify
        self._limits = limits or httpx.Limits()
        self._resolve = resolve
        self._pools: dict[str, httpx.AsyncHTTPTransport] = {}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send the request to the first address of its host that may be, and can be, reached."""
        host = request.url.host
        pool = self._pools.get(host)
        if pool is None:
            pool = self._pools[host] = httpx.AsyncHTTPTransport(
                verify=self._verify, limits=self._limits, trust_env=False
            )
        if host.lower() in self._allow_hosts:
            return await pool.handle_async_request(request)
        port = request.url.port or (443 if request.url.scheme == "https" else 80)
        public = _public_of(host, await self._resolve(host, port))
        failure: httpx.ConnectError | None = None
        for address in public:
            pinned = httpx.Request(
                request.method,
                request.url.copy_with(host=address),
                headers=request.headers,  # Host is among them, and stays the name
                stream=request.stream,
                extensions={**request.extensions, "sni_hostname": host},
            )
            try:
                return await pool.handle_async_request(pinned)
            except httpx.ConnectError as error:  # nothing was sent: the next address may answer
                failure = error
        raise failure or AddressForbidden(host)

    async def aclose(self) -> None:
        """Close every pool."""
        for pool in self._pools.values():
            await pool.aclose()


def guarded_client(
    allow_hosts: frozenset[str], *, timeout_s: float, verify: ssl.SSLContext | bool = True, connections: int = 20
) -> httpx.AsyncClient:
    """Return a client that follows no redirect, reads no proxy settings, and goes where it may."""
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
    return httpx.AsyncClient(
        transport=GuardedTransport(allow_hosts, verify=verify, limits=limits),
        timeout=httpx.Timeout(timeout_s),
        follow_redirects=False,
        trust_env=False,
    )
