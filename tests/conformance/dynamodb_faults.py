"""Fault-injecting proxy in front of a DynamoDB stand-in: lost responses, error responses, lagging indexes."""

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
"""Decides what happens to a call, by its operation and parameters.

It returns a response to send instead, "lost" (the call is executed, its response is not sent), or
None (no fault).
"""


def refusal(code: str, status: int = 400, **more: Any) -> Response:
    """Return an error response in DynamoDB's format."""
    body = {"__type": f"com.amazonaws.dynamodb.v20120810#{code}", "message": "no", **more}
    return Response(msgspec.json.encode(body), status, media_type="application/x-amz-json-1.0")


class FaultyProxy:
    """Forwards calls to the stand-in unless `fault` intervenes; `operations` lists the calls."""

    def __init__(self, stand_in: str, client: httpx.AsyncClient) -> None:
        self._stand_in = stand_in
        self._client = client
        self.fault: Fault = lambda operation, parameters: None
        self.operations: list[str] = []
        self.url = ""

    async def forward(self, request: Request) -> Response:
        operation = request.headers["x-amz-target"].rpartition(".")[2]
        body = await request.body()
        self.operations.append(operation)
        fault = self.fault(operation, msgspec.json.decode(body))
        if isinstance(fault, Response):
            return fault
        headers = {name: value for name, value in request.headers.items() if name not in ("host", "content-length")}
        response = await self._client.post(self._stand_in, content=body, headers=headers)
        if fault == "lost":
            return Response(status_code=500)
        return Response(response.content, response.status_code, media_type=response.headers["content-type"])


@asynccontextmanager
async def faulty_proxy(stand_in: str) -> AsyncIterator[FaultyProxy]:
    """Run a proxy in front of a stand-in."""
    async with httpx.AsyncClient(trust_env=False) as client:
        proxy = FaultyProxy(stand_in, client)
        bound, proxy.url = free_socket()
        async with listening(Starlette(routes=[Route("/", proxy.forward, methods=["POST"])]), bound):
            yield proxy
