"""SSRF guard: the addresses that outgoing connections may go to, which are public ones and explicitly allowed hosts.

Two HTTP clients connect by it: httpx for vendors, media and results (`guarded_http`), aiohttp for hooks
(`receiver.destinations.http_client`). Both are safe against DNS rebinding: the connection goes to the very address
that was judged. The host name is still used for the `Host` header and for TLS (SNI and certificate verification).
"""

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import cache
from urllib.parse import urlsplit

Resolve = Callable[[str, int], Awaitable[list[str]]]

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


class CannotConnect(OSError):
    """The host cannot be resolved or reached; nothing was sent."""


class AddressForbidden(CannotConnect):
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
    """Return the addresses of `host` from the system's resolver; raise CannotConnect."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:  # `a..b` is no name that can be encoded
        raise CannotConnect(f"cannot resolve {host}: {error}") from error
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def public_of(host: str, addresses: list[str]) -> list[str]:
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
        public_of(host, await resolve(host, 0))


async def connect(url: str, allow_hosts: frozenset[str], timeout_s: float = 10) -> None:
    """Open a connection (TCP, and TLS for https) to an allowed address of a URL's host, and close it: nothing is sent.

    Raises CannotConnect, which says why not.
    """
    parts = urlsplit(url)
    host, is_tls = (parts.hostname or "").lower(), parts.scheme == "https"
    port = parts.port or (443 if is_tls else 80)
    addresses = await resolve(host, port)
    if host not in allow_hosts:
        addresses = public_of(host, addresses)
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
    raise CannotConnect(f"no connection to {reason}")
