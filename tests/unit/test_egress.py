"""The SSRF guard: private addresses are refused, connections are pinned to the checked address."""

import socket
from typing import Any

import httpx
import pytest

from submitter.egress import AddressForbidden, GuardedTransport, is_public
from tests.world import World


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0", "100.64.0.1",
        "224.0.0.1", "255.255.255.255", "192.0.2.1", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "ff02::1",
        "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::",
        "2001:db8::1", "64:ff9b:1::1",
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
    with pytest.raises(AddressForbidden, match="KLING_RELAY_ALLOW_HOSTS"):
        await get(f"http://hook.example.com:{port}/", set(), ["127.0.0.1", "::1"])
    with pytest.raises(AddressForbidden):
        await get(f"http://127.0.0.1:{port}/", set(), ["127.0.0.1"])
    with pytest.raises(AddressForbidden):
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
