"""The SSRF guard: private addresses are refused, connections are pinned to the checked address."""

import asyncio
import contextlib
import socket
from typing import Any

import httpx
import pytest

from submitter.egress import is_public
from submitter.guarded_http import POOLS_MAX, GuardedTransport
from tests.world import World


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0", "100.64.0.1",
        "224.0.0.1", "255.255.255.255", "192.0.2.1", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "ff02::1",
        "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::",
        "2001:db8::1", "64:ff9b:1::1",
        "168.63.129.16", "192.0.0.1", "192.0.0.9", "192.0.0.192", "192.88.99.1", "fec0::1", "feff::1", "::1.1.1.1",
        "::ffff:0:1.1.1.1", "3fff::1", "5f00::1", "::ffff:168.63.129.16", "64:ff9b::a83f:8110", "2002:a83f:8110::1",
    ],
)  # fmt: skip
def test_private_addresses_are_not_public_in_any_form(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["1.1.1.1", "8.8.8.8", "2606:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101"])
def test_public_addresses_are_public(address: str) -> None:
    assert is_public(address)


async def get(url: str, allow: set[str], resolved: list[str]) -> httpx.Response:
    async def resolve(host: str, port: int) -> list[str]:
        return resolved

    transport = GuardedTransport(frozenset(allow), resolve=resolve)
    async with httpx.AsyncClient(transport=transport, timeout=2, trust_env=False) as client:
        return await client.request("HEAD", url)


async def test_a_name_that_resolves_to_a_private_address_is_refused_with_a_remedy(world: World) -> None:
    await world.start(receiver=False)
    port = world.hook_url.rpartition(":")[2]
    with pytest.raises(httpx.ConnectError, match="KLING_RELAY_ALLOW_HOSTS"):
        await get(f"http://hook.example.com:{port}/", set(), ["127.0.0.1", "::1"])
    with pytest.raises(httpx.ConnectError, match="not a public address"):
        await get(f"http://127.0.0.1:{port}/", set(), ["127.0.0.1"])
    with pytest.raises(httpx.ConnectError, match="not a public address"):
        await get(f"http://2130706433:{port}/", set(), ["127.0.0.1"])
    assert world.inbox.requests == []
    answer = await get(f"http://127.0.0.1:{port}/", {"127.0.0.1"}, [])
    assert answer.status_code == 204


async def test_the_connection_is_pinned_to_the_checked_address(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name is not resolved again, and it is still sent in the Host header."""
    await world.start(receiver=False)
    port = world.hook_url.rpartition(":")[2]
    monkeypatch.setattr("submitter.egress.is_public", lambda address: address == "127.0.0.1")
    resolve, resolved = socket.getaddrinfo, []

    def watch(host: Any, *rest: Any, **more: Any) -> Any:
        resolved.append(host)
        return resolve(host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", watch)
    answer = await get(f"http://rebinding.example.com:{port}/", set(), ["10.0.0.1", "127.0.0.1"])
    assert answer.status_code == 204
    assert world.inbox.requests[0][0]["host"] == f"rebinding.example.com:{port}"
    assert "rebinding.example.com" not in resolved


class Origin:
    """A server that counts the connections to it."""

    def __init__(self) -> None:
        self.connections = 0
        self.serving: list[asyncio.Task[None] | None] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.serving.append(asyncio.current_task())
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                await reader.readuntil(b"\r\n\r\n")
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    async def ended(self) -> None:
        """Wait until every connection is closed."""
        await asyncio.gather(*filter(None, self.serving))


async def test_pools_are_closed_once_while_many_hosts_are_asked_at_the_same_time() -> None:
    origin, hosts = Origin(), [f"127.0.1.{n}" for n in range(1, 3 * POOLS_MAX)]
    async with await asyncio.start_server(origin.serve, "0.0.0.0", 0, backlog=500) as server:
        port = server.sockets[0].getsockname()[1]
        async with httpx.AsyncClient(transport=GuardedTransport(frozenset(hosts)), timeout=30) as client:
            for _ in range(5):
                answers = await asyncio.gather(*(client.get(f"http://{host}:{port}/") for host in hosts))
                assert {answer.text for answer in answers} == {"ok"}
        await origin.ended()
        server.close()


async def test_pools_of_many_hosts_are_bounded_and_a_refused_host_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("submitter.egress.is_public", lambda address: address == "127.0.0.1")
    origin = Origin()

    async def resolve(host: str, port: int) -> list[str]:
        return ["10.0.0.1"] if host.startswith("private") else ["127.0.0.1"]

    async with await asyncio.start_server(origin.serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        transport = GuardedTransport(frozenset(), resolve=resolve)
        async with httpx.AsyncClient(transport=transport, trust_env=False) as client:
            for n in range(3 * POOLS_MAX):
                assert (await client.get(f"http://host-{n}.example.com:{port}/")).text == "ok"
                with pytest.raises(httpx.ConnectError, match="not a public address"):
                    await client.get(f"http://private-{n}.example.com:{port}/")
            last = f"http://host-{3 * POOLS_MAX - 1}.example.com:{port}/"
            before = origin.connections
            assert (await client.get(last)).text == "ok"
            assert origin.connections == before  # its connection was kept
            assert len(transport._pools) == POOLS_MAX
            assert not any(name.startswith("private") for name in transport._pools)
            async with contextlib.AsyncExitStack() as stack:  # a pool in use is never closed
                urls = [f"http://busy-{n}.example.com:{port}/" for n in range(2 * POOLS_MAX)]
                answers = [await stack.enter_async_context(client.stream("GET", url)) for url in urls]
                assert {await answer.aread() for answer in answers} == {b"ok"}
            assert len(transport._pools) == POOLS_MAX
        await origin.ended()
        server.close()
