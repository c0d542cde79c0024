"""The receiver on AWS Lambda: callbacks behind a public URL, the tick of a schedule, a stream's wake-up.

Handler: `receiver.aws_lambda.handler`. What an invocation is, its event says: HTTP (see
`aws_http`), a schedule of EventBridge (delivers and polls), or a stream of DynamoDB (delivers
what was just stored). Each leaves some of its time unused, and nothing runs behind an answer.
"""

# Looking for garbage among modules takes a tenth of a cold start, and finds none.
import gc

gc.disable()

import asyncio
from collections.abc import Mapping
from functools import cache
from typing import Any

import msgspec
import structlog
from starlette.applications import Starlette

from receiver import log
from receiver.aws_http import FunctionRequest, read_http, write_http
from receiver.service import Service, make_app, open_function
from receiver.settings import load_receiver_settings

gc.enable()

LEFT_S = 2.0
"""Left of a function's time, to answer in."""

TICKS = ("aws.scheduler", "aws.events")


class Function(msgspec.Struct, frozen=True):
    """What one process keeps from one invocation to the next."""

    service: Service
    app: Starlette
    loop: asyncio.AbstractEventLoop


@cache
def function() -> Function:
    """Open the service, from the environment; raise InvalidSettings with every problem."""
    gc.disable()
    try:
        settings = load_receiver_settings()
        log.configure(settings.log or "json")
        service = open_function(settings)
        return Function(service, make_app(service), asyncio.new_event_loop())
    finally:
        gc.enable()


def handler(event: Mapping[str, Any], context: Any) -> dict[str, Any] | None:
    """Do what an event asks for, within the time that is left."""
    opened = function()
    budget_s = max(0.1, context.get_remaining_time_in_millis() / 1000 - LEFT_S)
    return opened.loop.run_until_complete(_handle(opened, event, budget_s))


async def _handle(opened: Function, event: Mapping[str, Any], budget_s: float) -> dict[str, Any] | None:
    request = read_http(event)
    if request is not None:
        return await _answer(opened.app, request)
    if event.get("source") in TICKS:
        counts = dict(await opened.service.tick(budget_s))
        structlog.get_logger("service").info("tick.done", **counts)
        return counts
    records = event.get("Records", ())
    if records and all(record.get("eventSource") == "aws:dynamodb" for record in records):
        _note(opened.service, [record["dynamodb"]["Keys"] for record in records])
        await opened.service.worker.deliver_within(budget_s)
        return {"batchItemFailures": []}  # what is not delivered is due, and the tick's
    raise ValueError("this event is neither HTTP, nor a schedule's, nor a DynamoDB stream's")


def _note(service: Service, keys: list[dict[str, Any]]) -> None:
    """Tell the ledger what was stored: the stream may be ahead of the index."""
    from submitter.ledger.dynamodb import DynamoLedger

    if isinstance(service.ledger, DynamoLedger):
        service.ledger.note_stored(keys)


async def _answer(app: Starlette, request: FunctionRequest) -> dict[str, Any]:
    """Run the app for one request, to its end."""
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
