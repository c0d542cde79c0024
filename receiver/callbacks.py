"""`POST /callbacks/{vendor}/{external_task_id}/{token}`: verify, commit, answer. The hot path, in plain ASGI.

A 2xx means that the task's new state and its event are durable. No vendor is called from here. Hooks
are notified elsewhere; on platforms that run nothing after a response, `notify` does it before.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any, Protocol

from starlette.types import Receive, Scope, Send

from receiver.problem import RequestRefused, problem_of
from receiver.refusal_log import INTERVAL_S, RefusalLog
from receiver.verification import Verifier
from submitter.callback_url import redact_body
from submitter.clock import Clock
from submitter.errors import LedgerUnavailable, Overloaded, RelayError, TaskNotFound, Unintelligible, UrlUnknown
from submitter.ledger.base import Quarantined, Tasks
from submitter.log import Logger
from submitter.observation import Unconfirmed
from submitter.task import Task
from submitter.transition import Transition, is_about, transition

BODY_LIMIT = 64 * 1024
READ_TIMEOUT_S = 10.0
_READ_TIMEOUT = "read timeout"
STORE_TIMEOUT_S = 10.0  # the vendor repeats a callback that is answered 503
_STORE_TIMEOUT = "store timeout"
STORING_MAX = 2000
"""Callbacks in the store at once. More would wait longer than their vendors do, and their bodies fill the memory."""


log = Logger("receiver")

Notify = Callable[[], Awaitable[None]]
"""Attempts the deliveries that are due now, within the request."""


class _deadline:  # noqa: N801 - a context manager; a third of the cost of asyncio.timeout
    """Raise `error()` if the block takes longer than `seconds`."""

    def __init__(self, seconds: float, mark: str, error: Callable[[], Exception]) -> None:
        self._seconds, self._mark, self._error = seconds, mark, error

    def __enter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._timer = asyncio.get_running_loop().call_later(self._seconds, task.cancel, self._mark)

    def __exit__(self, kind: object, raised: BaseException | None, trace: object) -> None:
        self._timer.cancel()
        if isinstance(raised, asyncio.CancelledError) and raised.args == (self._mark,):
            self._task.uncancel()
            raise self._error() from None


class CallbackMetrics(Protocol):
    """The callback endpoint's metrics."""

    def callback(self, vendor: str, result: str) -> None:
        """Count a callback by its result."""
        ...


def path_of(scope: Scope) -> str:
    """Return the path within this app: without the root path that it is mounted or served at."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(f"{root}/") else path


class CallbackEndpoint:
    """The ASGI endpoint. It counts the result of every callback, and logs what changed and what was refused."""

    def __init__(
        self,
        ledger: Tasks,
        verifier: Verifier,
        clock: Clock,
        metrics: CallbackMetrics | None,
        body_limit: int,
        read_timeout_s: float,
        notify: Notify | None,
    ) -> None:
        self._notify = notify
        self._ledger = ledger
        self._verifier = verifier
        self._clock = clock
        self._metrics = metrics
        self._body_limit = body_limit
        self._read_timeout_s = read_timeout_s
        self._storing = 0
        self._refusals = RefusalLog()
        self._counting: asyncio.TimerHandle | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        vendor = "unknown"
        try:
            parts = path_of(scope).split("/")[2:]
            if len(parts) != 3:
                raise UrlUnknown("no such callback URL")
            self._verifier.url(parts[0], parts[1], parts[2], self._clock.now_s())
            vendor = parts[0]
            if scope["method"] != "POST":
                raise RequestRefused(405, "callbacks must use POST")
            headers: dict[bytes, bytes] = dict(scope["headers"])
            body = await self._read(headers, receive)
            result = await self._accept_in_time(vendor, parts[1], headers, body)
            if self._notify is not None and result == "applied":
                await self._notify()
        except (RelayError, RequestRefused) as error:
            result = type(error).__name__ if isinstance(error, RelayError) else "BodyRefused"
            if self._is_logged(result):
                log.warning("callback.refused", vendor=vendor, reason=str(error))
            await problem_of(error)(scope, receive, send)
        else:
            await send(_ANSWERS[result])
            await send(_END)
        if self._metrics is not None:
            self._metrics.callback(vendor, result)

    def _is_logged(self, result: str) -> bool:
        """Return whether a callback that changed nothing gets a line; those that get none are counted in one, later."""
        now_s = self._clock.monotonic_s()
        if self._refusals.is_over(now_s):
            if self._counting is not None:
                self._counting.cancel()  # it is late, and would end the new interval
            self._log_unlogged()
            self._refusals.begin(now_s)
            self._counting = asyncio.get_running_loop().call_later(INTERVAL_S, self._log_unlogged)
        return self._refusals.admits(result)

    def _log_unlogged(self) -> None:
        if unlogged := self._refusals.end():
            log.warning("callbacks.unlogged", **unlogged)

    async def _read(self, headers: Mapping[bytes, bytes], receive: Receive) -> bytes:
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._body_limit:
            raise RequestRefused(413, f"the body is longer than {self._body_limit} bytes")
        body: bytes = b""
        late = f"the body was not received within {self._read_timeout_s:g} s"
        with _deadline(self._read_timeout_s, _READ_TIMEOUT, lambda: RequestRefused(408, late)):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise RequestRefused(400, "the client disconnected before the end of the body")
                body += message.get("body", b"")
                if len(body) > self._body_limit:
                    raise RequestRefused(413, f"the body is longer than {self._body_limit} bytes")
                if not message.get("more_body", False):
                    return body

    async def _accept_in_time(self, vendor: str, id: str, headers: Mapping[bytes, bytes], body: bytes) -> str:
        """Do as `_accept` does; raise LedgerUnavailable if it takes too long. What is stored later stays stored.

        Raises Overloaded, before the signature is verified, if too many callbacks wait already.
        """
        if self._storing >= STORING_MAX:
            raise Overloaded(f"{STORING_MAX} callbacks wait for the ledger")
        self._storing += 1
        try:
            with _deadline(STORE_TIMEOUT_S, _STORE_TIMEOUT, lambda: LedgerUnavailable("the ledger took too long")):
                return await self._accept(vendor, id, headers, body)
        finally:
            self._storing -= 1

    async def _accept(self, vendor: str, id: str, headers: Mapping[bytes, bytes], body: bytes) -> str:
        """Verify a callback, store it, and return its result."""
        now_ms = self._clock.now_ms()
        try:
            report = self._verifier.body(vendor, id, headers, body, now_ms / 1000)
        except Unintelligible as reason:
            return await self._quarantine(vendor, id, body, str(reason), now_ms)
        if report is None:
            log.info("callback.ignored", vendor=vendor, external_task_id=id)
            return "ignored"
        if report.is_test:
            with suppress(TaskNotFound):  # or it is about a task whose id the vendor left out: then a poll decides
                await self._ledger.apply(id, lambda task: _perhaps_about(task, vendor, now_ms))
            log.info("callback.test", vendor=vendor)
            return "test"
        observation = self._verifier.observation(vendor, report)

        def is_ours(task: Task) -> bool:  # it may have failed over to another vendor, or have its id from a pruned one
            return task.vendor == vendor and is_about(task, report)

        def decide(task: Task) -> Transition | None:
            return transition(task, observation, now_ms) if is_ours(task) else None

        try:
            applied = await self._ledger.apply(id, decide)
        except TaskNotFound:
            return await self._quarantine(vendor, id, body, "the ledger has no such task", now_ms)
        task = applied.task
        if not is_ours(task):
            return await self._quarantine(vendor, id, body, f"about another task: {vendor} {report.task_id}", now_ms)
        if applied.transition is None:
            if self._is_logged("unchanged"):
                log.info("callback.unchanged", vendor=vendor, external_task_id=id, status=report.status.value)
            return "unchanged"
        if applied.transition.event_type is None:
            log.info("callback.unconfirmed", vendor=vendor, external_task_id=id, status=report.status.value)
            return "unconfirmed"
        log.info("task.changed", vendor=vendor, external_task_id=id, status=task.status.value, source="callback")
        return "applied"

    async def _quarantine(self, vendor: str, id: str, body: bytes, reason: str, now_ms: int) -> str:
        """Quarantine a body, and make its task due for a poll."""
        await self._ledger.quarantine(Quarantined(id, vendor, now_ms, reason, redact_body(body)))
        with suppress(TaskNotFound):
            await self._ledger.apply(id, lambda task: transition(task, Unconfirmed(), now_ms))
        log.warning("callback.quarantined", vendor=vendor, external_task_id=id, reason=reason)
        return "quarantined"


def _perhaps_about(task: Task, vendor: str, now_ms: int) -> Transition | None:
    """Make a task due for a poll if the vendor has not confirmed it yet; a test changes no other task."""
    is_unconfirmed = task.vendor == vendor and task.task_id is None
    return transition(task, Unconfirmed(), now_ms) if is_unconfirmed else None


RESULT_HEADER = b"kling-relay-result"
# The result is a header, because a response without a body takes one socket write instead of two.
_ANSWERS: dict[str, dict[str, Any]] = {
    result: {
        "type": "http.response.start",
        "status": 200,
        "headers": [(RESULT_HEADER, result.encode()), (b"content-length", b"0")],
    }
    for result in ("applied", "unchanged", "unconfirmed", "quarantined", "ignored", "test")
}
_END: dict[str, Any] = {"type": "http.response.body", "body": b""}
