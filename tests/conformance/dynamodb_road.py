"""A bad road to DynamoDB's stand-in: answers get lost, calls are refused, indexes lag."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from submitter.sandbox.server import free_socket, listening

Fault = Callable[[str, dict[str, Any]], Response | str | None]
"""What becomes of a call, by its operation and what it asks: an answer instead, "lost" (done, but
its answer does not arrive), or None: nothing is wrong with it.
"""


def refusal(code: str, status: int = 400, **more: Any) -> Response:
    """Return a refusal as DynamoDB words it."""
    body = {"__type": f"com.amazonaws.dynamodb.v20120810#{code}", "message": "no", **more}
    return Response(msgspec.json.encode(body), status, media_type="application/x-amz-json-1.0")


class BadRoad:
    """Its `url` leads to the stand-in, as far as `fault` lets it."""

    def __init__(self, stand_in: str, client: httpx.AsyncClient) -> None:
        self._stand_in = stand_in
        self._client = client
        self.fault: Fault = lambda operation, asked: None
        self.operations: list[str] = []
        self.url = ""

    async def pass_on(self, request: Request) -> Response:
        operation = request.headers["x-amz-target"].rpartition(".")[2]
        body = await request.body()
        self.operations.append(operation)
        fault = self.fault(operation, msgspec.json.decode(body))
        if isinstance(fault, Response):
            return fault
        kept = {name: value for name, value in request.headers.items() if name not in ("host", "content-length")}
        answer = await self._client.post(self._stand_in, content=body, headers=kept)
        if fault == "lost":
            return Response(status_code=500)
        return Response(answer.content, answer.status_code, media_type=answer.headers["content-type"])


@asynccontextmanager
async def bad_road(stand_in: str) -> AsyncIterator[BadRoad]:
    """Open a bad road to a stand-in."""
    async with httpx.AsyncClient(trust_env=False) as client:
        road = BadRoad(stand_in, client)
        bound, road.url = free_socket()
        async with listening(Starlette(routes=[Route("/", road.pass_on, methods=["POST"])]), bound):
            yield road
