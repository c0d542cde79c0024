"""The receiver inside another ASGI app (FastAPI, Starlette), and behind a root path."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import fastapi
import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.types import ASGIApp, Receive, Scope, Send
from structlog.testing import capture_logs

from receiver.service import build_app
from submitter.sandbox.server import free_socket, listening
from submitter.task import TaskStatus
from tests.world import World

Lifespan = Callable[[Any], AbstractAsyncContextManager[None]]


def in_fastapi(relay: Starlette, lifespan: Lifespan | None) -> ASGIApp:
    outer = fastapi.FastAPI(lifespan=lifespan)
    outer.mount("/relay", relay)
    return outer


def in_starlette(relay: Starlette, lifespan: Lifespan | None) -> ASGIApp:
    return Starlette(routes=[Mount("/deep", routes=[Mount("/relay", relay)])], lifespan=lifespan)


def of(relay: Starlette) -> Lifespan:
    @asynccontextmanager
    async def lifespan(outer: Any) -> AsyncIterator[None]:
        async with relay.router.lifespan_context(relay):
            yield

    return lifespan


@pytest.mark.parametrize(("outer", "path"), [(in_fastapi, "/relay"), (in_starlette, "/deep/relay")])
async def test_a_mounted_receiver_gets_callbacks_and_notifies_hooks(
    world: World, client: httpx.AsyncClient, outer: Callable[..., ASGIApp], path: str
) -> None:
    bound, url = free_socket()
    world.environ["KLING_RELAY_PUBLIC_URL"] = url + path
    await world.start(receiver=False)
    relay = build_app(world.settings, clock=world.clock)
    async with listening(outer(relay, of(relay)), bound):
        assert (await client.get(f"{url}{path}/readyz")).status_code == 200
        task = await world.submitter.submit(world.request())  # its video is published at /media
        assert (await task.result(timeout=60)).status is TaskStatus.SUCCEED
        await world.inbox.until(3)
        assert world.kling.counts["query_v2"] == 0
        assert (await client.post(f"{url}/callbacks/kling/x/y")).status_code == 404  # not the receiver's
        forged = await client.post(f"{url}{path}/callbacks/kling/x/y")
        assert forged.headers["content-type"] == "application/problem+json"


class AtRootPath:
    """Sets `root_path`, as servers do that have a prefix set (uvicorn --root-path)."""

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self._app = app
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope = {**scope, "root_path": self._root_path, "path": self._root_path + scope["path"]}
        await self._app(scope, receive, send)


async def test_a_receiver_with_a_root_path_gets_callbacks(world: World, client: httpx.AsyncClient) -> None:
    bound, url = free_socket()
    world.environ["KLING_RELAY_PUBLIC_URL"] = url
    await world.start(receiver=False)
    async with listening(AtRootPath(build_app(world.settings, clock=world.clock), "/relay"), bound):
        assert (await client.get(f"{url}/readyz")).status_code == 200
        task = await world.submitter.submit(world.request())
        assert (await task.result(timeout=60)).heard_from_vendor


async def test_a_mounted_receiver_without_its_lifespan_says_so_and_loses_nothing(
    world: World, client: httpx.AsyncClient
) -> None:
    bound, url = free_socket()
    world.environ["KLING_RELAY_PUBLIC_URL"] = f"{url}/relay"
    await world.start(receiver=False)
    relay = build_app(world.settings, clock=world.clock)
    with capture_logs() as logs:
        async with listening(in_fastapi(relay, None), bound):
            await check_without_lifespan(world, client, relay, url)
    assert [entry["event"] for entry in logs].count("lifespan.missing") == 1


async def check_without_lifespan(world: World, client: httpx.AsyncClient, relay: Starlette, url: str) -> None:
    ready = await client.get(f"{url}/relay/readyz")
    assert (ready.status_code, ready.json()["title"]) == (503, "the app's lifespan did not run")
    assert "app.router.lifespan_context(app)" in ready.json()["detail"]
    task = await world.submitter.submit(world.request())
    assert (await task.result(timeout=60)).status is TaskStatus.SUCCEED  # stored, and not notified
    assert world.inbox.requests == []
    async with relay.router.lifespan_context(relay):
        await world.inbox.until(3)
