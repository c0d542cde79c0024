"""Baseline for the cold start on Lambda: a bare Starlette route with a minimal ASGI adapter."""

import asyncio

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route


async def endpoint(request: Request) -> Response:
    await request.body()
    return Response()


app = Starlette(routes=[Route("/callbacks/{vendor}/{id}/{token}", endpoint, methods=["POST"])])
loop = asyncio.new_event_loop()


async def run(event):  # type: ignore[no-untyped-def]
    sent = []
    scope = {
        "type": "http",
        "method": event["requestContext"]["http"]["method"],
        "path": event["rawPath"],
        "query_string": event["rawQueryString"].encode(),
        "headers": [(name.encode(), value.encode()) for name, value in event["headers"].items()],
    }

    async def receive():  # type: ignore[no-untyped-def]
        return {"type": "http.request", "body": event["body"].encode(), "more_body": False}

    async def send(message):  # type: ignore[no-untyped-def]
        sent.append(message)

    await app(scope, receive, send)
    body = b"".join(message.get("body", b"") for message in sent[1:])
    return {"statusCode": sent[0]["status"], "body": body.decode(), "headers": {}}


def handler(event, context):  # type: ignore[no-untyped-def]
    return loop.run_until_complete(run(event))  # type: ignore[no-untyped-call]
