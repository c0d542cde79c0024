"""The HTTP client of hooks: which addresses it connects to, what it sends, how much of an answer it reads."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trustme

from receiver.destinations.http_client import BODY_MAX_BYTES, Answer, GuardedClient, NoAnswer
from submitter.egress import Resolve
from tests.loopback import tcp_server

ALLOWED = frozenset({"127.0.0.1"})
EMPTY = b"HTTP/1.1 204 No Content\r\n\r\n"


class Peer:
    """A server that records each request's bytes and answers it with fixed bytes."""

    def __init__(self, answer: bytes = EMPTY) -> None:
        self.answer = answer
        self.requests: list[bytes] = []
        self.connections = 0
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
            self.requests.append(head + await reader.readexactly(int(length)))
            writer.write(self.answer)
            await writer.drain()

    @asynccontextmanager
    async def listening(self, address: str = "127.0.0.1", tls: ssl.SSLContext | None = None) -> AsyncIterator[None]:
        async with tcp_server(self.serve, address, tls) as self.port:
            yield


@asynccontextmanager
async def client_of(
    allow: frozenset[str] = frozenset(), resolve: Resolve | None = None, timeout_s: float = 5
) -> AsyncIterator[Callable[..., Any]]:
    client = GuardedClient(
        allow, timeout_s=timeout_s, connections=4, **({} if resolve is None else {"resolve": resolve})
    )

    async def post(url: str, body: bytes = b"{}", headers: dict[str, str] | None = None) -> Answer:
        return await client.post(url, body, headers or {}, body_timeout_s=0.2)

    try:
        yield post
    finally:
        await client.close()


def resolver(*answers: list[str]) -> Resolve:
    """Return a resolver that gives these answers, one after the other."""
    left = list(answers)

    async def resolve(host: str, port: int) -> list[str]:
        return left.pop(0)

    return resolve


@pytest.mark.parametrize(
    "host", ["169.254.169.254", "[::1]", "127.0.0.1", "0.0.0.0", "[::ffff:127.0.0.1]", "[64:ff9b::7f00:1]"]
)
async def test_a_private_ip_address_in_a_url_is_refused(host: str) -> None:
    async with client_of() as post:
        with pytest.raises(NoAnswer, match=r"is not a public address\. To allow it, add .* to KLING_"):
            await post(f"http://{host}:9/latest/meta-data/")


@pytest.mark.parametrize("host", ["2130706433", "0x7f000001", "127.1", "017700000001"])
async def test_no_other_form_of_a_private_address_is_connected_to(host: str) -> None:
    peer = Peer()
    async with peer.listening(), client_of() as post:
        with pytest.raises(NoAnswer):
            await post(f"http://{host}:{peer.port}/")
    assert peer.connections == 0


async def test_a_name_that_leads_into_the_network_is_refused_with_its_addresses() -> None:
    async with client_of(resolve=resolver(["10.0.0.1", "::1"])) as post:
        with pytest.raises(NoAnswer, match=r"hook\.example\.com \(resolves to 10\.0\.0\.1, ::1\) is not a public"):
            await post("http://hook.example.com/")


async def test_a_name_that_changes_its_address_between_two_requests_is_judged_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("submitter.egress.is_public", lambda address: address == "127.0.0.2")
    outside, inside = Peer(EMPTY.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n")), Peer()
    changing = resolver(["127.0.0.2"], ["127.0.0.1"])
    async with outside.listening("127.0.0.2"), inside.listening("127.0.0.1"), client_of(resolve=changing) as post:
        assert (await post(f"http://rebinding.example.com:{outside.port}/")).status == 204
        with pytest.raises(NoAnswer, match="not a public address"):
            await post(f"http://rebinding.example.com:{outside.port}/")
    assert (outside.connections, inside.connections) == (1, 0)


async def test_only_the_allowed_addresses_of_a_name_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("submitter.egress.is_public", lambda address: address.startswith("127.0.0.2"))
    inside, outside = Peer(), Peer()
    asked: list[Any] = []
    getaddrinfo = socket.getaddrinfo

    def watch(host: Any, *rest: Any, **more: Any) -> Any:
        asked.append(host)
        return getaddrinfo(host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", watch)
    found = resolver(["127.0.0.1", "127.0.0.21", "127.0.0.2"])  # forbidden, not listening, listening
    async with outside.listening("127.0.0.2"), inside.listening("127.0.0.1"), client_of(resolve=found) as post:
        assert (await post(f"http://hook.example.com:{outside.port}/")).status == 204
    assert (inside.connections, outside.connections) == (0, 1)
    assert f"host: hook.example.com:{outside.port}".encode() in outside.requests[0].lower()
    assert "hook.example.com" not in asked  # it is not resolved a second time


async def test_a_socket_to_a_private_address_is_refused_even_if_the_resolver_let_it_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("receiver.destinations.http_client._Resolver.resolve", _let_pass)
    peer = Peer()
    async with peer.listening(), client_of() as post:
        with pytest.raises(NoAnswer, match=r"127\.0\.0\.1 is not a public address"):
            await post(f"http://hook.example.com:{peer.port}/")
    assert peer.connections == 0


async def _let_pass(self: Any, host: str, port: int = 0, family: int = 0) -> list[dict[str, Any]]:
    return [{"hostname": host, "host": "127.0.0.1", "port": port, "family": socket.AF_INET, "proto": 0, "flags": 0}]


async def test_tls_is_verified_for_the_name_although_the_connection_goes_to_an_address(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    authority = trustme.CA()
    served, trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority.issue_cert("hook.example.com").configure_cert(served)
    authority.configure_trust(trusting)
    names: list[str | None] = []
    served.sni_callback = lambda tls, name, context: names.append(name)
    monkeypatch.setattr("receiver.destinations.http_client.tls_context", lambda: trusting)
    monkeypatch.setattr("submitter.egress.is_public", lambda address: True)
    peer = Peer()
    async with peer.listening(tls=served), client_of(resolve=resolver(["127.0.0.1"], ["127.0.0.1"])) as post:
        assert (await post(f"https://hook.example.com:{peer.port}/")).status == 204
        with pytest.raises(NoAnswer, match=r"(?i)certificate"):
            await post(f"https://other.example.com:{peer.port}/")
    assert names == ["hook.example.com", "other.example.com"]
    assert len(peer.requests) == 1


async def test_a_url_is_sent_as_it_was_written() -> None:
    peer = Peer()
    async with peer.listening(), client_of(ALLOWED) as post:
        await post(f"http://127.0.0.1:{peer.port}/a%2Fb/%7Ec?sig=x%2By%3D%26+z&empty=#part")
    assert peer.requests[0].startswith(b"POST /a%2Fb/%7Ec?sig=x%2By%3D%26+z&empty= HTTP/1.1\r\n")


async def test_a_password_in_the_url_becomes_basic_authentication() -> None:
    peer = Peer()
    async with peer.listening(), client_of(ALLOWED) as post:
        await post(f"http://user:p%40ss@127.0.0.1:{peer.port}/events")
    head = peer.requests[0].lower()
    assert b"\r\nauthorization: basic dxnlcjpwqhnz\r\n" in head
    assert f"host: 127.0.0.1:{peer.port}\r\n".encode() in head


async def test_proxies_cookies_and_redirects_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    peer = Peer(b"HTTP/1.1 302 Found\r\nlocation: /other\r\nset-cookie: a=b; path=/\r\ncontent-length: 0\r\n\r\n")
    async with peer.listening(), client_of(ALLOWED) as post:
        url = f"http://127.0.0.1:{peer.port}/events"
        assert [(await post(url)).status for _ in range(2)] == [302, 302]
    assert len(peer.requests) == 2
    assert not any(b"cookie" in request.lower() for request in peer.requests)
    assert peer.connections == 1  # it is kept


async def test_an_odd_redirect_or_cookie_is_still_an_answer() -> None:
    peer = Peer(b"HTTP/1.1 302 Found\r\nlocation: http://[\r\nset-cookie: \xff=;;;=\r\ncontent-length: 0\r\n\r\n")
    async with peer.listening(), client_of(ALLOWED) as post:
        assert (await post(f"http://127.0.0.1:{peer.port}/")).status == 302


ENDLESS = {
    "a status line": b"HTTP/1.1 200 " + b"x" * 100_000,
    "a header": b"HTTP/1.1 200 OK\r\na: " + b"x" * 100_000,
    "headers": b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 10_000,
    "no HTTP": b"SSH-2.0-OpenSSH_9.2\r\n",
    "nothing": b"\r\n\r\n",
}


@pytest.mark.parametrize("answer", ENDLESS.values(), ids=ENDLESS)
async def test_an_answer_without_an_end_is_refused_early(answer: bytes) -> None:
    peer = Peer(answer)
    async with peer.listening(), client_of(ALLOWED, timeout_s=1) as post:
        with pytest.raises(NoAnswer):
            await post(f"http://127.0.0.1:{peer.port}/")


async def test_a_body_is_read_up_to_its_bound_and_its_connection_not_used_again() -> None:
    peer = Peer(b"HTTP/1.1 500 Oops\r\ncontent-length: 100000000\r\n\r\n" + bytes(4 * BODY_MAX_BYTES))
    async with peer.listening(), client_of(ALLOWED) as post:
        answer = await post(f"http://127.0.0.1:{peer.port}/")
        assert (answer.status, BODY_MAX_BYTES < len(answer.body) < 2 * BODY_MAX_BYTES) == (500, True)
        await post(f"http://127.0.0.1:{peer.port}/")
    assert peer.connections == 2


async def test_a_body_that_does_not_arrive_is_not_waited_for_longer_than_its_time() -> None:
    peer = Peer(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nabc")
    async with peer.listening(), client_of(ALLOWED) as post:
        assert await post(f"http://127.0.0.1:{peer.port}/") == Answer(200, None, b"abc")


async def test_a_request_without_an_answer_ends_in_time() -> None:
    peer = Peer(b"")
    async with peer.listening(), client_of(ALLOWED, timeout_s=0.2) as post:
        with pytest.raises(NoAnswer, match=r"no answer within 0\.2 s"):
            await post(f"http://127.0.0.1:{peer.port}/")


async def test_a_header_that_cannot_be_sent_is_an_error_before_anything_is_sent() -> None:
    peer = Peer()
    async with peer.listening(), client_of(ALLOWED) as post:
        with pytest.raises(NoAnswer, match="ValueError"):
            await post(f"http://127.0.0.1:{peer.port}/", headers={"x": "a\r\nb: c"})
    assert peer.requests == []


async def test_a_large_body_arrives_whole() -> None:
    peer, body = Peer(), bytes(range(256)) * 20_000
    async with peer.listening(), client_of(ALLOWED) as post:
        assert (await post(f"http://127.0.0.1:{peer.port}/", body)).status == 204
    assert peer.requests[0].endswith(b"\r\n\r\n" + body)


async def test_a_long_header_of_an_answer_is_read() -> None:
    peer = Peer(b"HTTP/1.1 200 OK\r\ncontent-security-policy: " + b"x" * 20_000 + b"\r\ncontent-length: 0\r\n\r\n")
    async with peer.listening(), client_of(ALLOWED) as post:
        assert (await post(f"http://127.0.0.1:{peer.port}/")).status == 200


@pytest.mark.parametrize("answer", [*ENDLESS.values(), b"", b"HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n"])
async def test_no_error_shows_the_path_or_the_query_of_a_url(answer: bytes) -> None:
    """They can be a hook's only secret."""
    peer = Peer(answer)
    async with peer.listening(), client_of(ALLOWED, timeout_s=0.3) as post:
        for host in (f"127.0.0.1:{peer.port}", "127.1", "127.0.0.1:9"):
            with pytest.raises(NoAnswer) as raised:
                await post(f"http://{host}/SECRET?token=SECRET")
            assert "SECRET" not in str(raised.value)
