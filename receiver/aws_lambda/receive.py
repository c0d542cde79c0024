"""The receiver on AWS Lambda: HTTP requests, scheduled ticks, wake-ups by a DynamoDB stream.

Handler: `receiver.aws_lambda.receive.handler`. The event decides the work: HTTP (see
`receiver.aws_lambda.http`), an EventBridge schedule (delivers and polls), or a DynamoDB stream (delivers
what was just stored). Ticks and wake-ups end RESERVE_S before the timeout; nothing runs after a response.
"""

# Garbage collection during imports takes a tenth of the cold start, and frees nothing.
import gc

gc.disable()

import asyncio
from collections.abc import Mapping
from functools import cache
from typing import Any

import msgspec
from starlette.applications import Starlette

from receiver.aws_lambda.http import FunctionRequest, read_http, write_http
from receiver.service import Service, create_service_app, open_service_without_metrics
from receiver.settings import load_receiver_settings
from submitter import log

gc.enable()

RESERVE_S = 2.0
"""The part of a function's timeout that is kept for its response."""

TICKS = ("aws.scheduler", "aws.events")


class Function(msgspec.Struct, frozen=True):
    """The state that a process keeps between invocations."""

    service: Service
    app: Starlette
    loop: asyncio.AbstractEventLoop


@cache
def function() -> Function:
    """Open the service from the environment, once; raise InvalidSettings with every problem."""
    gc.disable()
    try:
        settings = load_receiver_settings()
        log.configure(settings.log or "json")
        service = open_service_without_metrics(settings)
        return Function(service, create_service_app(service), asyncio.new_event_loop())
    finally:
        gc.enable()


def handler(event: Mapping[str, Any], context: Any) -> dict[str, Any] | None:
    """Handle one Lambda event within the remaining time."""
    opened = function()
    budget_s = max(0.1, context.get_remaining_time_in_millis() / 1000 - RESERVE_S)
    return opened.loop.run_until_complete(_handle(opened, event, budget_s))


async def _handle(opened: Function, event: Mapping[str, Any], budget_s: float) -> dict[str, Any] | None:
    request = read_http(event)
    if request is not None:
        return await _answer(opened.app, request)
    if event.get("source") in TICKS:
        counts = dict(await opened.service.tick(budget_s))
        log.Logger("service").info("tick.done", **counts)
        return counts
    records = event.get("Records", ())
    if records and all(record.get("eventSource") == "aws:dynamodb" for record in records):
        _note_stored(opened.service, [record["dynamodb"]["Keys"] for record in records])
        await opened.service.worker.deliver_within(budget_s)
        return {"batchItemFailures": []}  # undelivered events stay due for the next tick
    raise ValueError("unknown event: it is not HTTP, an EventBridge schedule or a DynamoDB stream")


def _note_stored(service: Service, keys: list[dict[str, Any]]) -> None:
    """Pass the stored keys to the ledger, because the stream may be ahead of the index."""
    from submitter.ledger.dynamodb.ledger import DynamoLedger

    if isinstance(service.ledger, DynamoLedger):
        service.ledger.note_stored(keys)


async def _answer(app: Starlette, request: FunctionRequest) -> dict[str, Any]:
    """Run the app for one request, and return its response."""
    bodies = [request.body]
    status, headers, body = 500, list[tuple[bytes, bytes]](), b""

    async def receive() -> dict[str, Any]:
        if bodies:
            return {"type": "http.request", "body": bodies.pop(), "more_body": False}
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        nonlocal status, headers, body
        if message["type"] == "http.response.start":
            status, headers = message["status"], list(message["headers"])
        else:
            body += message.get("body", b"")

    await app(request.scope, receive, send)
    return write_http(request, status, headers, body)
