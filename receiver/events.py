"""`POST /events`: a CloudEvent `task.requested` becomes a task. Off without KLING_RELAY_EVENTS_TOKEN.

As CloudEvents' HTTP Webhooks ask for it: the token comes as `Authorization: Bearer` or as the
query's `access_token`, and OPTIONS is the abuse-protection handshake (Event Grid's for CloudEvents
too). Event Grid's own schema has another handshake, a POST that is answered with its code. What
an event may say: see `submitter.requested`.

An answer 2xx says that the task is in the ledger; whoever gets another sends the event again,
which makes no second task.
"""

import asyncio
import hmac
from collections.abc import Callable
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from receiver.app import Submit
from submitter.errors import SubmissionUnknown
from submitter.event import task_data
from submitter.ledger.base import Ledger
from submitter.request import MotionControl
from submitter.requested import read_http
from submitter.task import Task

BODY_LIMIT = 1024 * 1024
BUDGET_S = 50.0  # less than a platform waits for an answer
RETRY_AFTER_S = 30

Problem = Callable[[int, str, str], Response]


class Events:
    """The endpoint. `problem` makes an answer of a status, a title and a detail."""

    def __init__(self, submit: Submit, ledger: Ledger, token: str, problem: Problem) -> None:
        self._submit = submit
        self._ledger = ledger
        self._token = token
        self._problem = problem

    async def __call__(self, request: Request) -> Response:
        """Answer a handshake, or submit what an event asks for."""
        if not hmac.compare_digest(_token_of(request).encode(), self._token.encode()):
            remedy = "Send `Authorization: Bearer <KLING_RELAY_EVENTS_TOKEN>`, or ?access_token=..."
            return self._problem(401, "wrong events token", remedy)
        if request.method == "OPTIONS":
            return _allow(request)
        body = await _read(request)
        if body is None:
            return self._problem(413, "body too long", f"At most {BODY_LIMIT} bytes: give media as URLs.")
        if request.headers.get("aeg-event-type") == "SubscriptionValidation":
            code = _validation_code(body)
            if code is None:
                return self._problem(400, "no validation code", "Event Grid sends data.validationCode.")
            return JSONResponse({"validationResponse": code})
        requests = read_http(request.headers, body)
        try:
            async with asyncio.timeout(BUDGET_S):
                # All of a batch come to their ends: nothing runs behind an answer.
                tasks = await asyncio.gather(*map(self._make, requests), return_exceptions=True)
        except TimeoutError:
            detail = f"No slot became free, or no vendor answered, in {BUDGET_S:g} s: send it again."
            response = self._problem(503, "not submitted yet", detail)
            response.headers["retry-after"] = str(RETRY_AFTER_S)
            return response
        errors = [task for task in tasks if isinstance(task, BaseException)]
        if errors:
            raise errors[0]
        return JSONResponse({"tasks": [task_data(task) for task in tasks if isinstance(task, Task)]}, 202)

    async def _make(self, request: MotionControl) -> Task:
        try:
            return await self._submit(request)
        except SubmissionUnknown:  # it is looked for here, and need not be sent again
            return await self._ledger.get(str(request.external_task_id))


def _token_of(request: Request) -> str:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token if scheme.lower() == "bearer" else request.query_params.get("access_token", "")


def _allow(request: Request) -> Response:
    """Answer the abuse-protection handshake: whoever knows the token may send, at any rate."""
    origin = request.headers.get("webhook-request-origin")
    headers = {"allow": "POST, OPTIONS"}
    if origin is not None:
        headers |= {"webhook-allowed-origin": origin, "webhook-allowed-rate": "*"}
    return Response(status_code=200, headers=headers)


async def _read(request: Request) -> bytes | None:
    """Return the body, or None when it is too long."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > BODY_LIMIT:
            return None
    return body


def _validation_code(body: bytes) -> str | None:
    try:
        code: Any = msgspec.json.decode(body)[0]["data"]["validationCode"]
    except (msgspec.DecodeError, LookupError, TypeError):
        return None
    return code if isinstance(code, str) else None
