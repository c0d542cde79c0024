"""Attacks on a whole installation: stolen URLs, wrong tokens, requests into the network, secrets in logs."""

import asyncio
import json
import socket
from asyncio.selector_events import BaseSelectorEventLoop
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from receiver.destinations import open_destination
from receiver.hook import Hook
from submitter import log
from submitter.callback_url import callback_url
from submitter.guarded_http import guarded_client
from submitter.media.download import CannotFetch, download
from submitter.media.probe import Medium, probe
from submitter.sandbox.server import all_listening, free_socket
from submitter.task import TaskStatus
from tests.conformance.destinations import NOW_S, event
from tests.world import HOOK_SECRET, KEY, WEBHOOK_SECRET, World

VECTORS = Path(__file__).parents[1] / "vectors"
TOKENS = {"tick_token": "t" * 20, "events_token": "e" * 20}


async def test_a_stolen_url_of_an_unsigned_vendor_ends_no_task(world: World, client: httpx.AsyncClient) -> None:
    """The thief's report makes the task due for a poll, and the vendor's answer decides."""
    novita = world.stand_in("novita")
    novita.pace_s = 30
    await world.start()
    task = await world.submitter.submit(world.request(vendor="novita", external_task_id="order-1"))
    ring = world.settings.common.ring
    assert ring is not None
    stolen = callback_url(world.receiver_url, ring, "novita", "order-1", world.clock.now_s())
    body = json.loads((VECTORS / "novita/callback-succeed.json").read_text())["body"]
    body["payload"]["task"]["task_id"] = task.task.task_id
    for _ in range(3):
        answer = await client.post(stolen, json=body)
        assert (answer.status_code, answer.headers["kling-relay-result"]) == (200, "unconfirmed")
    another = await client.post(stolen.replace("order-1", "order-2"), json=body)
    assert another.status_code == 404
    done = await world.skip_to_end(task)
    assert done.status is TaskStatus.SUCCEED
    assert all(video.url.startswith(world.sandbox_url) for video in done.videos)  # none is the thief's


async def test_each_endpoint_accepts_its_own_token_alone(world: World, client: httpx.AsyncClient) -> None:
    world.environ |= {f"KLING_RELAY_{name.upper()}": token for name, token in TOKENS.items()}
    await world.start()
    others = {*TOKENS.values(), KEY, WEBHOOK_SECRET, HOOK_SECRET, "sandbox-key"}
    for path, own in (("/tick", TOKENS["tick_token"]), ("/events", TOKENS["events_token"])):
        for token in others - {own}:
            answer = await client.post(f"{world.receiver_url}{path}", headers={"authorization": f"Bearer {token}"})
            assert answer.status_code == 401, (path, token)
        answer = await client.post(f"{world.receiver_url}{path}", headers={"authorization": f"Bearer {own}"})
        assert answer.status_code in (200, 400)
    for token in others:  # nor is any of them the token of a callback URL
        for path in (f"/callbacks/kling/order-1/{token}", f"/callbacks/kling/order-1/test.9999999999.{token}"):
            assert (await client.post(f"{world.receiver_url}{path}", content=b"{}")).status_code == 404


# -- requests into the network --------------------------------------------------------------------


class Network:
    """A server inside the network, which notes its requests, and one outside that redirects to it."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.inside, self.url = free_socket()
        self.outside, outside_url = free_socket()
        self.redirect = f"{outside_url}/redirect"

    async def answer(self, request: Request) -> Response:
        self.requests.append(request.url.path)
        return Response(b"secret")

    async def lead_inside(self, request: Request) -> Response:
        return Response(b"", 302, headers={"location": f"{self.url}/secret"})

    def running(self) -> AbstractAsyncContextManager[None]:
        methods = ["GET", "POST"]
        inside = Starlette(routes=[Route("/{path:path}", self.answer, methods=methods)])
        outside = Starlette(routes=[Route("/redirect", self.lead_inside, methods=methods)])
        return all_listening((inside, self.inside), (outside, self.outside))


async def fetch_media(url: str, folder: Path, allow: frozenset[str]) -> str:
    async with guarded_client(allow, timeout_s=5) as client:
        found = await probe(Medium("video", url=url), client)
    assert found.facts is None
    return str(found.warning)


async def fetch_result(url: str, folder: Path, allow: frozenset[str]) -> str:
    with pytest.raises(CannotFetch) as refused:
        await download(url, folder / "result.mp4", allow)
    assert list(folder.iterdir()) == []
    return str(refused.value)


async def notify(url: str, folder: Path, allow: frozenset[str]) -> str:
    destination = open_destination(Hook("inbox", url), allow)
    outcome = await destination.send(event(), NOW_S)
    await destination.close()
    assert not outcome.is_delivered
    return outcome.answer


Fetch = Callable[[str, Path, frozenset[str]], Awaitable[str]]


@pytest.mark.parametrize("fetch", [fetch_media, fetch_result, notify])
async def test_no_url_leads_into_the_network(fetch: Fetch, tmp_path: Path) -> None:
    network = Network()
    async with network.running():
        assert "KLING_RELAY_ALLOW_HOSTS" in await fetch(f"{network.url}/secret", tmp_path, frozenset())
        assert network.requests == []


@pytest.mark.parametrize("fetch", [fetch_media, fetch_result, notify])
async def test_no_redirect_leads_into_the_network(fetch: Fetch, tmp_path: Path) -> None:
    network = Network()
    async with network.running():
        assert "302" in await fetch(network.redirect, tmp_path, frozenset({"127.0.0.1"}))
        assert network.requests == []


@pytest.mark.parametrize("fetch", [fetch_media, fetch_result, notify])
async def test_no_rebound_name_leads_into_the_network(
    fetch: Fetch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name's address is public when it is checked, and inside the network whenever it is resolved again."""
    resolve, resolved, connected = socket.getaddrinfo, [], []

    def rebind(host: Any, *rest: Any, **more: Any) -> Any:
        if host != "rebinding.example.com":
            return resolve(host, *rest, **more)
        resolved.append(host)
        return resolve("1.1.1.1" if len(resolved) == 1 else "127.0.0.1", *rest, **more)

    async def connect(self: Any, request: httpx.Request) -> httpx.Response:
        connected.append(request.url.host)
        raise httpx.ConnectError("no network in this test")

    async def connect_socket(self: Any, sock: socket.socket, address: tuple[str, int]) -> None:
        connected.append(address[0])
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", rebind)
    monkeypatch.setattr(httpx.AsyncHTTPTransport, "handle_async_request", connect)  # of media and results
    monkeypatch.setattr(BaseSelectorEventLoop, "sock_connect", connect_socket)  # of hooks
    assert "no network" in await fetch("http://rebinding.example.com/secret", tmp_path, frozenset())
    assert (len(resolved), connected) == (1, ["1.1.1.1"])


# -- secrets in logs ------------------------------------------------------------------------------


@pytest.fixture
def logged() -> Iterator[list[dict[str, Any]]]:
    """Everything that is logged, as the processors of either style get it."""
    lines: list[dict[str, Any]] = []

    def keep(logger: Any, method: str, line: Any) -> Any:
        structlog.processors.format_exc_info(logger, method, line)
        lines.append(dict(log._redact(logger, method, line)))
        raise structlog.DropEvent

    log.send_to(keep)
    yield lines
    structlog.reset_defaults()


async def test_no_secret_is_logged_while_everything_fails(
    world: World, client: httpx.AsyncClient, logged: list[dict[str, Any]]
) -> None:
    """A vendor repeats the callback URL in its reason, a hook repeats what it was sent, and strangers guess."""
    world.environ |= {f"KLING_RELAY_{name.upper()}": token for name, token in TOKENS.items()}
    world.hooks += "schedule = [0, 0.1]\n"
    await world.start()
    ring = world.settings.common.ring
    assert ring is not None
    url = callback_url(world.receiver_url, ring, "kling", "order-1", world.clock.now_s())
    token = url.rpartition("/")[2]
    world.inbox.answers = [Response(f"cannot handle {url}", 500)] * 9
    world.faults(fail=1, fail_reason=f"could not call {url}", forge=1, repeat=1)
    task = await world.submitter.submit(world.request(external_task_id="order-1"))
    assert (await task.result(timeout=60)).status is TaskStatus.FAILED
    await world.inbox.until(4)
    for path in (f"/callbacks/kling/order-1/{token}", f"/callbacks/kling/order-2/{token}", "/tick", "/events"):
        await client.post(f"{world.receiver_url}{path}", content=b"{", headers={"authorization": "Bearer wrong"})
    async with asyncio.timeout(30):
        while not any(line["event"] == "delivery.attempted" for line in logged):
            await asyncio.sleep(0.01)
    shown = repr(logged) + repr(world.settings) + repr(world.submitter) + repr(world.settings.hooks)
    assert "callback.refused" in shown
    assert "[hidden]" in shown  # the hook's answer had the URL
    secrets = [token, KEY, WEBHOOK_SECRET, HOOK_SECRET, *TOKENS.values(), world.environ["KLING_API_KEY"]]
    assert [secret for secret in secrets if secret in shown or secret.removeprefix("whsec_") in shown] == []
