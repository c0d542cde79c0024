"""What vendors call: callbacks, health, metrics, tick. Commits before it answers; tells nobody else.

The callback's endpoint is plain ASGI ahead of the router, since it is called a thousand times
for each call of any other. Everything it needs is passed in: importing this module loads no
worker, no HTTP client and no command line.
"""

import asyncio
import hmac
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
import structlog
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from receiver.callback import Verify
from submitter.callback_url import check, redact_body
from submitter.clock import Clock
from submitter.errors import (
    RelayError,
    TaskNotFound,
    Unintelligible,
    UrlUnknown,
)
from submitter.ledger.base import Ledger, Quarantined
from submitter.task import Doubted, Report, Task, TaskStatus, Transition, transition

if TYPE_CHECKING:
    from submitter.request import MotionControl

BODY_LIMIT = 64 * 1024
READ_TIMEOUT_S = 10.0
TICK_BUDGET_S = 20.0
TICK_BUDGET_MAX_S = 900.0  # as long as a function may run
_TOO_SLOW = "the body is too slow"
PREFIX = "/callbacks/"
ASYNCAPI = Path(__file__).with_name("asyncapi.yaml")
"""What hooks are told, described for machines (AsyncAPI 3)."""

log = structlog.get_logger("receiver")


class Metrics(Protocol):
    """What the receiver counts."""

    def callback(self, vendor: str, result: str) -> None:
        """Count a callback by its result."""
        ...

    def render(self, counts: Mapping[str, int]) -> bytes:
        """Return the Prometheus text, with the ledger's own counts."""
        ...


Tick = Callable[[float], Awaitable[Mapping[str, int]]]
Tell = Callable[[], Awaitable[None]]
Submit = Callable[["MotionControl"], Awaitable[Task]]
Lifespan = Callable[[Starlette], AbstractAsyncContextManager[None]]


def create_app(
    ledger: Ledger,
    verify: Verify,
    *,
    tick: Tick | None = None,
    tick_token: str | None = None,
    clock: Clock | None = None,
    metrics: Metrics | None = None,
    media: Path | None = None,
    body_limit: int = BODY_LIMIT,
    read_timeout_s: float = READ_TIMEOUT_S,
    lifespan: Lifespan | None = None,
    tell: Tell | None = None,
    submit: Submit | None = None,
    events_token: str | None = None,
) -> Starlette:
    """Make the receiver.

    `tick(budget_s)` does bounded work for `POST /tick`, which is off without `tick_token`. `tell`
    is awaited after a change is durable and before it is answered: it tells the hooks, where
    nothing may run after the answer.
    `submit` makes tasks of what is sent to `/events`, which is off without `events_token`.
    `media` is a directory whose files are published under unguessable URLs.
    """
    clock = clock or Clock()

    async def healthz(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def readyz(request: Request) -> Response:
        await ledger.counts()
        return JSONResponse({"status": "ready"})

    async def show_metrics(request: Request) -> Response:
        if metrics is None:
            return PlainTextResponse("", 404)
        return Response(metrics.render(await ledger.counts()), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def show_asyncapi(request: Request) -> Response:
        return FileResponse(ASYNCAPI, media_type="application/yaml")

    async def do_tick(request: Request) -> Response:
        refusal = _refuse_tick(request, tick_token if tick else None)
        budget_s = _read_budget(request)
        if refusal is None and tick is not None and budget_s is not None:
            return JSONResponse(dict(await tick(budget_s)))
        assert refusal is not None
        return refusal

    async def show_media(request: Request) -> Response:
        name, token = request.path_params["name"], request.path_params["token"]
        check(verify.ring, "media", name, token, clock.now_s())
        path = None if media is None else media / name
        if path is None or not path.is_file():  # the name was signed by us: it is no path
            return problem(404, "no such file", "It was removed from the media store.")
        return FileResponse(path)

    async def on_error(request: Request, error: Exception) -> Response:
        return _problem_of(error)

    app = _Receiver(
        routes=[
            Route("/healthz", healthz),
            Route("/readyz", readyz),
            Route("/metrics", show_metrics),
            Route("/asyncapi.yaml", show_asyncapi),
            Route("/tick", do_tick, methods=["POST"]),
            Route("/media/{name}/{token}", show_media),
            Route("/events", _events(submit, ledger, events_token), methods=["POST", "OPTIONS"]),
        ],
        exception_handlers={RelayError: on_error},
        lifespan=lifespan,
    )
    app.callbacks = _Callbacks(ledger, verify, clock, metrics, body_limit, read_timeout_s, tell)
    return app


def _events(submit: Submit | None, ledger: Ledger, token: str | None) -> Callable[[Request], Awaitable[Response]]:
    async def take_events(request: Request) -> Response:
        if submit is None or token is None:
            return problem(404, "events are off", "Set KLING_RELAY_EVENTS_TOKEN to turn them on.")
        from receiver.events import Events  # a function that hears callbacks starts without it

        return await Events(submit, ledger, token, problem)(request)

    return take_events


def _refuse_tick(request: Request, token: str | None) -> Response | None:
    """Return why a tick is not done, or None."""
    if token is None:
        return problem(404, "tick is off", "Set KLING_RELAY_TICK_TOKEN to turn it on.")
    if not hmac.compare_digest(request.headers.get("authorization", "").encode(), f"Bearer {token}".encode()):
        return problem(401, "wrong tick token", "Send `Authorization: Bearer <KLING_RELAY_TICK_TOKEN>`.")
    if _read_budget(request) is None:
        return problem(400, "wrong budget", f"Give budget_s in seconds, at most {TICK_BUDGET_MAX_S:g}.")
    return None


def _read_budget(request: Request) -> float | None:
    """Return the seconds that a tick is given, or None for what is no such number."""
    asked = request.query_params.get("budget_s", f"{TICK_BUDGET_S:g}")
    if not asked.replace(".", "", 1).isdecimal() or not 0 < float(asked) <= TICK_BUDGET_MAX_S:
        return None
    return float(asked)


class _Receiver(Starlette):
    callbacks: "_Callbacks"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith(PREFIX):
            await self.callbacks(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


class _BodyRefused(Exception):
    """A body that is too long, or too slow, or broken off."""

    def __init__(self, status: int, title: str) -> None:
        self.status = status
        super().__init__(title)


class _Callbacks:
    """`POST /callbacks/{vendor}/{external_task_id}/{token}`."""

    def __init__(
        self,
        ledger: Ledger,
        verify: Verify,
        clock: Clock,
        metrics: Metrics | None,
        body_limit: int,
        read_timeout_s: float,
        tell: Tell | None,
    ) -> None:
        self._tell = tell
        self._ledger = ledger
        self._verify = verify
        self._clock = clock
        self._metrics = metrics
        self._body_limit = body_limit
        self._read_timeout_s = read_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        vendor = "unknown"
        try:
            parts = scope["path"][len(PREFIX) :].split("/")
            if len(parts) != 3:
                raise UrlUnknown("no such callback URL")
            self._verify.url(parts[0], parts[1], parts[2], self._clock.now_s())
            vendor = parts[0]
            if scope["method"] != "POST":
                raise _BodyRefused(405, "callbacks are sent by POST")
            headers: dict[bytes, bytes] = dict(scope["headers"])
            body = await self._read(headers, receive)
            result = await self._accept(vendor, parts[1], headers, body)
            if self._tell is not None and result == "applied":
                await self._tell()
        except (RelayError, _BodyRefused) as error:
            result = type(error).__name__ if isinstance(error, RelayError) else "BodyRefused"
            log.warning("callback.refused", vendor=vendor, reason=str(error))
            await _problem_of(error)(scope, receive, send)
        else:
            await send(_ANSWERS[result])
            await send(_END)
        if self._metrics is not None:
            self._metrics.callback(vendor, result)

    async def _read(self, headers: Mapping[bytes, bytes], receive: Receive) -> bytes:
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._body_limit:
            raise _BodyRefused(413, f"the body is longer than {self._body_limit} bytes")
        body: bytes = b""
        task = asyncio.current_task()
        assert task is not None
        timer = asyncio.get_running_loop().call_later(self._read_timeout_s, task.cancel, _TOO_SLOW)
        try:
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise _BodyRefused(400, "the body broke off")
                body += message.get("body", b"")
                if len(body) > self._body_limit:
                    raise _BodyRefused(413, f"the body is longer than {self._body_limit} bytes")
                if not message.get("more_body", False):
                    return body
        except asyncio.CancelledError as cancelled:
            if cancelled.args != (_TOO_SLOW,):
                raise
            task.uncancel()
            raise _BodyRefused(408, f"the body took longer than {self._read_timeout_s:g} s") from None
        finally:
            timer.cancel()

    async def _accept(self, vendor: str, id: str, headers: Mapping[bytes, bytes], body: bytes) -> str:
        """Verify, store, and return what became of it."""
        now_ms = self._clock.now_ms()
        try:
            report = self._verify.body(vendor, id, headers, body, now_ms / 1000)
        except Unintelligible as reason:
            return await self._keep(vendor, id, body, str(reason), now_ms)
        if report is None:
            log.info("callback.ignored", vendor=vendor, external_task_id=id)
            return "ignored"
        observation = self._verify.observation(vendor, report)

        def decide(task: Task) -> Transition | None:
            return transition(task, observation, now_ms) if _is_about(report, task, vendor) else None

        try:
            applied = await self._ledger.apply(id, decide)
        except TaskNotFound:
            if _is_console_test(report):
                log.info("callback.test", vendor=vendor)
                return "test"
            return await self._keep(vendor, id, body, "no such task in this ledger", now_ms)
        task = applied.task
        if not _is_about(report, task, vendor):
            return await self._keep(vendor, id, body, f"it is about {vendor}'s task {report.task_id}", now_ms)
        if applied.transition is None:
            log.info("callback.unchanged", vendor=vendor, external_task_id=id, status=report.status.value)
            return "unchanged"
        if applied.transition.event_type is None:
            log.info("callback.doubted", vendor=vendor, external_task_id=id, status=report.status.value)
            return "doubted"
        log.info("task.changed", vendor=vendor, external_task_id=id, status=task.status.value, source="callback")
        return "applied"

    async def _keep(self, vendor: str, id: str, body: bytes, reason: str, now_ms: int) -> str:
        """Quarantine a body, and have the vendor asked about its task."""
        await self._ledger.quarantine(Quarantined(id, vendor, now_ms, reason, redact_body(body)))
        with suppress(TaskNotFound):
            await self._ledger.apply(id, lambda task: transition(task, Doubted(), now_ms))
        log.warning("callback.quarantined", vendor=vendor, external_task_id=id, reason=reason)
        return "quarantined"


def _is_about(report: Report, task: Task, vendor: str) -> bool:
    """Tell whether a vendor's report is about this task of ours: it may be at another vendor by now."""
    return task.vendor == vendor and task.task_id in (None, report.task_id)


def _is_console_test(report: Report) -> bool:
    """Tell whether this is what Kling's console sends: `submitted`, for a task that nobody submitted."""
    return report.status is TaskStatus.SUBMITTED and report.external_task_id is None


def problem(status: int, title: str, detail: str) -> Response:
    """Return an RFC 9457 problem."""
    content = msgspec.json.encode({"type": "about:blank", "title": title, "status": status, "detail": detail})
    return Response(content, status, media_type="application/problem+json")


_TITLES = {
    400: "body refused",
    401: "signature invalid",
    403: "callback URL expired",
    404: "not found",
    405: "method not allowed",
    408: "body too slow",
    413: "body too long",
    503: "ledger unavailable",
}


def _problem_of(error: Exception) -> Response:
    status = error.status if isinstance(error, RelayError | _BodyRefused) else 500
    # A LedgerUnavailable names our own files: its reader is the operator, in the log.
    detail = "try again later" if status == 503 else str(error)
    return problem(status, _TITLES.get(status, "error"), detail)


RESULT_HEADER = b"kling-relay-result"
# The result stands in a header: an answer without a body is one write to the socket instead of two.
_ANSWERS: dict[str, dict[str, Any]] = {
    result: {
        "type": "http.response.start",
        "status": 200,
        "headers": [(RESULT_HEADER, result.encode()), (b"content-length", b"0")],
    }
    for result in ("applied", "unchanged", "doubted", "quarantined", "ignored", "test")
}
_END: dict[str, Any] = {"type": "http.response.body", "body": b""}
