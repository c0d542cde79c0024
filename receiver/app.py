"""The HTTP endpoints: callbacks, task requests, tick, health, metrics, published media.

A callback is committed before it is answered; hooks are notified elsewhere. The callback endpoint
runs before the router, because it gets far more requests than any other. Importing this module loads
no worker, no HTTP client and no command line: endpoints get their dependencies as arguments.
"""

import asyncio
import hmac
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Protocol

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from receiver.callbacks import BODY_LIMIT, READ_TIMEOUT_S, CallbackEndpoint, CallbackMetrics, Notify, path_of
from receiver.problem import problem, problem_of
from receiver.verification import Verifier
from submitter.callback_url import check
from submitter.clock import Clock
from submitter.errors import LedgerUnavailable, RelayError
from submitter.ledger.base import Ledger
from submitter.log import Logger

TICK_BUDGET_S = 20.0
TICK_BUDGET_MAX_S = 900.0  # the longest timeout of a Lambda function
READY_FOR_S = 1.0
READY_TIMEOUT_S = 8.0
PREFIX = "/callbacks/"
log = Logger("receiver")

ASYNCAPI = Path(__file__).with_name("asyncapi.yaml")
"""The AsyncAPI 3 document of the events that hooks receive."""


class ReceiverMetrics(CallbackMetrics, Protocol):
    """The receiver's metrics."""

    def render(self, counts: Mapping[str, int]) -> bytes:
        """Return the metrics in Prometheus text format, including the ledger's counts."""
        ...


NOT_WORKING = (
    "Callbacks are stored, but hooks get no event and no vendor is polled. An app that is mounted in another one"
    " needs its lifespan: run `app.router.lifespan_context(app)` inside the outer app's lifespan."
)

Tick = Callable[[float], Awaitable[Mapping[str, int]]]
Endpoint = Callable[[Request], Awaitable[Response]]
Lifespan = Callable[[Starlette], AbstractAsyncContextManager[None]]


def create_app(
    ledger: Ledger,
    verifier: Verifier,
    *,
    tick: Tick | None = None,
    tick_token: str | None = None,
    clock: Clock | None = None,
    metrics: ReceiverMetrics | None = None,
    media: Path | None = None,
    body_limit: int = BODY_LIMIT,
    read_timeout_s: float = READ_TIMEOUT_S,
    lifespan: Lifespan | None = None,
    notify: Notify | None = None,
    task_requests: Endpoint | None = None,
    is_working: Callable[[], bool] = lambda: True,
) -> Starlette:
    """Create the receiver's ASGI app.

    `tick(budget_s)` does bounded work for `POST /tick`, which is off without `tick_token`.
    `notify` is awaited after a change is durable and before the callback is answered: it notifies
    hooks on platforms that run nothing after a response. `task_requests` handles `/events`, which is
    off without it. `media` is a directory whose files are published at unguessable URLs. `is_working`
    returns whether what must run beside the app does, so that the app is ready.
    """
    clock = clock or Clock()

    async def healthz(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

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

    async def on_error(request: Request, error: Exception) -> Response:
        response = problem_of(error)
        if response.status_code >= 500:  # the answer names no file and no host: the operator finds them here
            log.error("request.failed", path=request.url.path, reason=str(error))
        return response

    app = _Receiver(
        routes=[
            Route("/healthz", healthz),
            Route("/readyz", _readiness(ledger, clock, is_working)),
            Route("/metrics", show_metrics),
            Route("/asyncapi.yaml", show_asyncapi),
            Route("/tick", do_tick, methods=["POST"]),
            Route("/media/{name}/{token}", _media_endpoint(verifier, media, clock)),
            Route("/events", task_requests or _events_are_off, methods=["POST", "OPTIONS"]),
        ],
        exception_handlers={RelayError: on_error, HTTPException: _on_http_error},
        lifespan=lifespan,
    )
    app.callbacks = CallbackEndpoint(ledger, verifier, clock, metrics, body_limit, read_timeout_s, notify)
    app.is_working = is_working
    return app


def _readiness(ledger: Ledger, clock: Clock, is_working: Callable[[], bool]) -> Endpoint:
    """Return the endpoint that answers whether callbacks can be stored now: it commits a write."""
    until_s, failure = 0.0, ""
    checking = asyncio.Lock()  # anyone may ask, and each check is a write: one at a time, and its result is kept

    async def check() -> str:
        try:
            async with clock.timeout(READY_TIMEOUT_S):
                await ledger.check_write()
        except TimeoutError:
            return f"no write was possible within {READY_TIMEOUT_S:g} s"
        except LedgerUnavailable as error:
            return str(error)
        return ""

    async def readyz(request: Request) -> Response:
        nonlocal until_s, failure
        if not is_working():
            return problem(503, "the app's lifespan did not run", NOT_WORKING)
        async with checking:
            if clock.monotonic_s() >= until_s:
                failure = await check()
                until_s = clock.monotonic_s() + READY_FOR_S
        if failure:
            raise LedgerUnavailable(failure)
        return JSONResponse({"status": "ready"})

    return readyz


async def _on_http_error(request: Request, error: Exception) -> Response:
    """Answer an unknown path or method as every other error is answered."""
    assert isinstance(error, HTTPException)
    response = problem(error.status_code, error.detail, "receiver/README.md lists the endpoints and their methods.")
    response.headers.update(error.headers or {})
    return response


def _media_endpoint(verifier: Verifier, media: Path | None, clock: Clock) -> Endpoint:
    """Return the endpoint of published files."""

    async def show_media(request: Request) -> Response:
        name, token = request.path_params["name"], request.path_params["token"]
        check(verifier.ring, "media", name, token, clock.now_s())
        path = None if media is None else media / name
        if path is None or not path.is_file():  # the token signs the name, so it is no path
            return problem(404, "no such file", "It was removed from the media store.")
        return FileResponse(path)

    return show_media


async def _events_are_off(request: Request) -> Response:
    return problem(404, "events are off", "Set KLING_RELAY_EVENTS_TOKEN to turn them on.")


def _refuse_tick(request: Request, token: str | None) -> Response | None:
    """Return the error response for a tick that is off, unauthorized or malformed, or None."""
    if token is None:
        return problem(404, "tick is off", "Set KLING_RELAY_TICK_TOKEN to turn it on.")
    if not hmac.compare_digest(request.headers.get("authorization", "").encode(), f"Bearer {token}".encode()):
        return problem(401, "invalid tick token", "Send `Authorization: Bearer <KLING_RELAY_TICK_TOKEN>`.")
    if _read_budget(request) is None:
        return problem(400, "invalid budget_s", f"Set it to more than 0 and at most {TICK_BUDGET_MAX_S:g} seconds.")
    return None


def _read_budget(request: Request) -> float | None:
    """Return the tick's budget in seconds, or None when `budget_s` is not a number in range."""
    value = request.query_params.get("budget_s", f"{TICK_BUDGET_S:g}")
    if not value.replace(".", "", 1).isdecimal() or not 0 < float(value) <= TICK_BUDGET_MAX_S:
        return None
    return float(value)


class _Receiver(Starlette):
    """Starlette with a shortcut: callbacks bypass the router."""

    callbacks: CallbackEndpoint
    is_working: Callable[[], bool]
    had_requests = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self.had_requests and scope["type"] == "http":
            self.had_requests = True
            if not self.is_working():
                log.error("lifespan.missing", reason=NOT_WORKING)
        if scope["type"] == "http" and path_of(scope).startswith(PREFIX):
            await self.callbacks(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)
