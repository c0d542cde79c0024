"""`POST /events`: submits a task for each CloudEvent `task.requested`. Off without KLING_RELAY_EVENTS_TOKEN.

Implements the CloudEvents HTTP Webhooks specification: the token comes as `Authorization: Bearer` or as
the query parameter `access_token`, and OPTIONS is the abuse-protection handshake (also Event Grid's, for
its CloudEvents schema). Event Grid's own schema has another handshake: a POST that is answered with its
validation code. For the fields of an event see `submitter.request_event`.

A 2xx means that the task is in the ledger. 503 asks the sender to repeat the event later, which creates no
second task. 400, 409 and 422 (refused by the vendor for good) are permanent: the sender's dead-letter path
takes the event.
"""

import asyncio
import hmac
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from receiver.problem import RETRY_AFTER_S, problem, problem_of, shown_to_strangers
from submitter.errors import InvalidRequest, Problem, RelayError, SubmissionUnknown
from submitter.event import task_data
from submitter.ledger.base import Tasks
from submitter.request import MotionControl
from submitter.request_event import read_http
from submitter.safe_json import NotJson, read_json
from submitter.task import Task, TaskStatus
from submitter.vendors.registry import limits_by_vendor

BODY_LIMIT = 1024 * 1024
READ_TIMEOUT_S = 10.0
BUDGET_S = 50.0  # less than the request timeouts of serverless platforms

Submit = Callable[[MotionControl], Awaitable[Task]]


class TaskRequests:
    """The endpoint. `submit` creates a task from a request; callers must present `token`.

    `vendors` are those with credentials, by name.
    """

    def __init__(self, submit: Submit, ledger: Tasks, token: str, vendors: Collection[str]) -> None:
        self._submit = submit
        self._ledger = ledger
        self._token = token
        self._vendors = vendors

    async def __call__(self, request: Request) -> Response:
        """Answer a handshake, or submit the tasks that the body requests."""
        if not hmac.compare_digest(_token_of(request).encode(), self._token.encode()):
            remedy = "Send `Authorization: Bearer <KLING_RELAY_EVENTS_TOKEN>`, or ?access_token=..."
            return problem(401, "invalid events token", remedy)
        if request.method == "OPTIONS":
            return _allow(request)
        try:
            async with asyncio.timeout(READ_TIMEOUT_S):
                body = await _read(request)
        except TimeoutError:
            return problem(408, "request timeout", f"Send the body within {READ_TIMEOUT_S:g} s.")
        except ClientDisconnect:
            return problem(400, "the client disconnected", "Send the whole body.")
        if body is None:
            return problem(413, "body too large", f"Send at most {BODY_LIMIT} bytes, with media as URLs.")
        if request.headers.get("aeg-event-type") == "SubscriptionValidation":
            code = _validation_code(body)
            if code is None:
                return problem(400, "no validation code", "Send data.validationCode, as Event Grid does.")
            return JSONResponse({"validationResponse": code})
        requests = read_http(request.headers, body, limits_by_vendor())
        try:
            async with asyncio.timeout(BUDGET_S):
                # Wait for the whole batch, even if one fails: serverless platforms run nothing after a response.
                tasks = await asyncio.gather(*map(self._submit_one, requests), return_exceptions=True)
        except TimeoutError:
            detail = f"No slot became free, or no vendor answered, within {BUDGET_S:g} s. Send the event again."
            response = problem(503, "not submitted yet", detail)
            response.headers["retry-after"] = str(RETRY_AFTER_S)
            return response
        errors = [
            (str(request.external_task_id), task)
            for request, task in zip(requests, tasks, strict=True)
            if isinstance(task, BaseException)
        ]
        if errors:  # 503 first: the sender must repeat the batch for the sake of what may succeed later
            first = min((error for _, error in errors), key=lambda error: getattr(error, "status", 500) != 503)
            if len(requests) == 1 or not isinstance(first, RelayError):
                raise first
            return _partly(first, errors, len(requests))
        return JSONResponse({"tasks": [task_data(task) for task in tasks if isinstance(task, Task)]}, 202)

    async def _submit_one(self, request: MotionControl) -> Task:
        missing = [name for name in request.vendors if name not in self._vendors]
        if missing:  # repeating the event is useless
            limit = f"a vendor with credentials at this receiver: {', '.join(self._vendors) or 'none'}"
            remedy = "Choose another vendor, or let the receiver's operator set the credentials of this one."
            raise InvalidRequest([Problem("data.vendor", repr(name), limit, remedy) for name in missing])
        try:
            return await self._submit(request)
        except SubmissionUnknown as unknown:
            task = await self._ledger.get(str(request.external_task_id))
            if task.status is TaskStatus.REFUSED:  # the vendor is being asked about a late report: it may be sent later
                unknown.status = 503
                raise
            return task  # it is in the ledger: the sender need not repeat


def _partly(first: RelayError, errors: Sequence[tuple[str, BaseException]], count: int) -> Response:
    """Return the response to a batch of which some events failed: what was submitted stays submitted."""
    failed = "\n".join(f"{id}: {shown_to_strangers(error)}" for id, error in errors)
    detail = f"{count - len(errors)} of {count} events were submitted. These were not:\n{failed}"
    return problem_of(first, detail)


def _token_of(request: Request) -> str:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token if scheme.lower() == "bearer" else request.query_params.get("access_token", "")


def _allow(request: Request) -> Response:
    """Answer the abuse-protection handshake: any caller with the token may send, at any rate."""
    origin = request.headers.get("webhook-request-origin")
    headers = {"allow": "POST, OPTIONS"}
    if origin is not None:
        headers |= {"webhook-allowed-origin": origin, "webhook-allowed-rate": "*"}
    return Response(status_code=200, headers=headers)


async def _read(request: Request) -> bytes | None:
    """Return the body, or None when it exceeds BODY_LIMIT."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > BODY_LIMIT:
            return None
    return body


def _validation_code(body: bytes) -> str | None:
    try:
        code: Any = read_json(body)[0]["data"]["validationCode"]
    except (NotJson, LookupError, TypeError):
        return None
    return code if isinstance(code, str) else None
