"""The short form of `make torture PARTS=network`, and the proof that it finds what is broken."""

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from submitter.sandbox.server import free_socket, listening
from tests.conftest import needs
from tests.torture import broken
from tests.torture.engines import has_postgres
from tests.torture.network import unclear_reasons, weather
from tests.torture.proxy import FaultyProxy, Treatment


async def test_faults_of_every_link_lose_nothing_and_pay_nothing_twice(tmp_path: Path) -> None:
    needs("PostgreSQL", is_there=has_postgres())
    done = await weather(1, tmp_path, tasks=30, storm_s=3)
    assert done.findings == []
    assert done.counts["tasks"] == 30
    for what in ("fault lose", "repeats by the program", "callbacks acknowledged"):
        assert done.counts[what] > 0, what


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sabotage", "words"),
    [
        (broken.send_again_without_asking, ["paid for more than once"]),
        (broken.keep_what_arrives, ["archived result of", "downloaded result of"]),
        (broken.count_a_cut_request_as_delivered, ["never got event"]),
        (broken.acknowledge_before_the_commit, ["was acknowledged"]),
        (broken.forget_polls, ["is not settled"]),
        (broken.give_no_reason, ["without a reason"]),
    ],
)
async def test_a_broken_product_is_found(tmp_path: Path, sabotage: Callable[[], None], words: list[str]) -> None:
    needs("PostgreSQL", is_there=has_postgres())
    findings: list[str] = []
    for seed in range(2, 6):  # a round finds what its faults meet, which depends on the machine's load too
        folder = tmp_path / str(seed)
        folder.mkdir()
        findings += (await weather(seed, folder, tasks=60, storm_s=8, settle_s=8, sabotage=sabotage)).findings
        if all(any(one in finding for finding in findings) for one in words):
            break
    else:
        pytest.fail(f"not found: {words} in {findings}")


def test_a_failure_without_a_reason_is_found() -> None:
    assert unclear_reasons(b'listening\n{"event":"a","reason":"ReadError"}\n{"event":"b","answer":"HTTP 204"}') == []
    for line in (b'{"reason":""}', b'{"answer":"ReadError: "}', b'{"reason":"x was not saved:"}'):
        assert len(unclear_reasons(line)) == 1


ANSWER = bytes(range(256)) * 40


@pytest.mark.parametrize(
    ("kind", "size", "received", "requests"),
    [
        ("pass", 0, None, 1),
        ("refuse", 0, 0, 0),
        ("cut_request", 10, 0, 0),
        ("cut", 5000, 5000, 1),
        ("reset", 5000, 5000, 1),
        ("lose", 0, 0, 1),
    ],
)
async def test_the_proxy_delivers_what_precedes_a_fault(
    kind: str, size: int, received: int | None, requests: int
) -> None:
    arrived = []

    async def answer(request: Request) -> Response:
        arrived.append(request.url.path)
        return Response(ANSWER, headers={"connection": "close"})

    bound, url = free_socket()
    async with listening(Starlette(routes=[Route("/", answer)]), bound), FaultyProxy() as proxy:
        proxy.target = urlsplit(url).port or 0
        proxy.treat(lambda: Treatment(kind, size=size))
        content = await asyncio.to_thread(_ask, proxy.port)
    assert len(arrived) == requests
    assert len(content) == received if received is not None else content.endswith(ANSWER)


def _ask(port: int) -> bytes:
    """Return all bytes that arrive before the connection ends: a blocking socket drops none before an RST."""
    content = b""
    with suppress(ConnectionError), socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nhost: here\r\n\r\n")
        while chunk := connection.recv(65536):
            content += chunk
    return content
