"""The composition root: builds the app and the worker from settings, for `serve`, uvicorn and Lambda.

The modules that poll vendors and notify hooks are imported on first use, so that a function that only
receives a callback starts without them.
"""

import gc
import logging
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response

from receiver.app import Lifespan, ReceiverMetrics, create_app
from receiver.settings import ReceiverSettings, load_receiver_settings
from receiver.verification import VendorCheck, Verifier
from submitter import log
from submitter.callback_url import KeyRing, redact
from submitter.clock import Clock
from submitter.ledger import Ledger, open_ledger
from submitter.media.store import directory_of
from submitter.vendors.registry import vendors
from submitter.web_address import without_password

if TYPE_CHECKING:
    from receiver.destinations.base import Destination
    from receiver.metrics import PrometheusMetrics
    from receiver.task_requests import TaskRequests
    from receiver.worker import Worker
    from submitter.http import VendorHttp
    from submitter.request import MotionControl
    from submitter.submit import Submitter
    from submitter.task import Task

_ACCESS_TOKEN = re.compile(r"(access_token=)[^&\s]+")
GC_THRESHOLDS = (20_000, 20, 100)


class Service:
    """One receiver's ledger, worker, submitter and connections. All but the ledger open on first use."""

    def __init__(
        self,
        settings: ReceiverSettings,
        ledger: Ledger,
        clock: Clock,
        metrics: "PrometheusMetrics | None",
        destinations: "Mapping[str, Destination] | None" = None,
    ) -> None:
        self.settings = settings
        self.ledger = ledger
        self.metrics = metrics
        self._clock = clock
        self._destinations = destinations
        self.is_working = False
        """Whether the app's lifespan runs, which starts the loops."""

    @cached_property
    def http(self) -> "VendorHttp":
        """HTTP connections to vendors."""
        from submitter.http import VendorHttp

        return VendorHttp()

    @cached_property
    def worker(self) -> "Worker":
        """Delivers events, polls vendors, listens to event streams."""
        from receiver.destinations.base import UsesLedger
        from receiver.dispatcher import Dispatcher
        from receiver.poller import Poller
        from receiver.stream_listener import StreamListener
        from receiver.worker import Worker
        from submitter.vendors.base import Streams

        hooks, common, ledger = self.settings.hooks, self.settings.common, self.ledger
        destinations = self._destinations or open_destinations(self.settings)
        for destination in destinations.values():
            if isinstance(destination, UsesLedger):
                destination.use(ledger, self._clock)
        dispatcher = Dispatcher(ledger, hooks, destinations, self._clock, self.metrics)
        poller = Poller(ledger, common.vendors, self.http, self._clock, self.metrics)
        listeners = [
            StreamListener(ledger, configured.vendor, self.http, self._clock)
            for configured in common.vendors.values()
            if isinstance(configured.vendor, Streams)
        ]
        return Worker(ledger, dispatcher, poller, listeners, clock=self._clock)

    @cached_property
    def submitter(self) -> "Submitter":
        """Submits the tasks that `/events` requests."""
        from submitter.submit import Submitter

        return Submitter(self.settings.common, self.ledger, clock=self._clock, metrics=self.metrics)

    async def answer_task_request(self, request: Request) -> Response:
        """Handle `/events`."""
        return await self._task_requests(request)

    @cached_property
    def _task_requests(self) -> "TaskRequests":
        from receiver.task_requests import TaskRequests

        assert self.settings.events_token is not None
        return TaskRequests(self.submit, self.ledger, self.settings.events_token, self.settings.common.vendors)

    async def submit(self, request: "MotionControl") -> "Task":
        """Submit a request, and return its task."""
        return (await self.submitter.submit(request)).task

    async def tick(self, budget_s: float) -> Mapping[str, int]:
        """Deliver due events and poll overdue tasks, for at most `budget_s` seconds; return the counts."""
        return await self.worker.tick(budget_s)

    async def notify(self) -> None:
        """Attempt the deliveries that are due now, for at most `deliver_budget_s` seconds."""
        await self.worker.deliver_within(self.settings.deliver_budget_s)

    async def close(self) -> None:
        """Stop the parts that were opened, and close the ledger."""
        opened = vars(self)
        if "worker" in opened:
            await self.worker.stop()
        if "http" in opened:
            await self.http.close()
        if "submitter" in opened:
            await self.submitter.close()  # closes the ledger too
        else:
            await self.ledger.close()


def open_destinations(settings: ReceiverSettings) -> "dict[str, Destination]":
    """Open the destination of every hook; raise InvalidSettings for one that cannot be used."""
    from receiver.destinations import open_destination

    return {hook.name: open_destination(hook, settings.common.allow_hosts) for hook in settings.hooks}


def open_service(settings: ReceiverSettings, *, clock: Clock | None = None, number: int | None = None) -> Service:
    """Open a service with Prometheus metrics; `number` is that of one of several processes, which share them."""
    from receiver.metrics import PrometheusMetrics

    destinations = open_destinations(settings)  # before the ledger: what is wrong with a hook is said at once
    ledger = open_ledger(settings.common.ledger)
    return Service(settings, ledger, clock or Clock(), PrometheusMetrics(number), destinations)


def open_service_without_metrics(settings: ReceiverSettings) -> Service:
    """Open a service for a serverless function, whose instances no Prometheus server can scrape."""
    return Service(settings, open_ledger(settings.common.ledger), Clock(), None)


def create_verifier(settings: ReceiverSettings) -> Verifier:
    """Create the verifier of callbacks; raise InvalidSettings without a key ring.

    It includes vendors without credentials: after an API key is removed, callbacks still end its tasks.
    """
    settings.require_keys()
    checks = {}
    for name, setup in vendors().items():
        configured = settings.common.vendors.get(name)
        vendor = configured.vendor if configured else setup.reader
        checks[name] = VendorCheck(vendor, settings.secrets[name], settings.confirm[name])
    return Verifier(settings.common.ring or KeyRing(()), checks)


def create_service_app(service: Service, *, lifespan: Lifespan | None = None, clock: Clock | None = None) -> Starlette:
    """Create the ASGI app of a service. Without a `lifespan`, the caller closes the service."""
    settings = service.settings
    media = directory_of(settings.common.media_store)
    metrics: ReceiverMetrics | None = service.metrics
    return create_app(
        service.ledger,
        create_verifier(settings),
        tick=service.tick,
        tick_token=settings.tick_token,
        clock=clock,
        metrics=metrics,
        media=None if media is None else Path(media),
        body_limit=settings.body_limit,
        lifespan=lifespan,
        notify=service.notify if settings.deliver == "inline" else None,
        task_requests=None if settings.events_token is None else service.answer_task_request,
        is_working=lambda: lifespan is None or settings.deliver == "inline" or service.is_working,
    )


def build_app(
    settings: ReceiverSettings, *, clock: Clock | None = None, number: int | None = None, polls: bool = True
) -> Starlette:
    """Create the app with its service. Its lifespan starts the worker, and closes the service.

    `number` is that of one of several processes on one socket. Without `polls` another of them polls vendors.
    """
    settings.require_keys()
    logging.getLogger("uvicorn.access").addFilter(_without_tokens)  # for servers that write an access log
    service = open_service(settings, clock=clock, number=number)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        if settings.deliver == "worker":
            service.worker.start(polls=polls)
        service.is_working = True
        log.Logger("service").info(
            "service.started",
            ledger=without_password(settings.common.ledger),
            hooks=[hook.name for hook in settings.hooks],
            vendors=list(settings.common.vendors),
        )
        try:
            yield
        finally:
            service.is_working = False
            await service.close()

    created = create_service_app(service, lifespan=lifespan, clock=clock)
    created.state.metrics = service.metrics
    return created


def _without_tokens(record: logging.LogRecord) -> bool:
    """Mask the tokens of callback and media URLs, and of `/events?access_token=`, in a line of an access log."""
    if isinstance(record.args, tuple):
        record.args = tuple(
            _ACCESS_TOKEN.sub(r"\1[hidden]", redact(value)) if isinstance(value, str) else value
            for value in record.args
        )
    return True


def freeze_garbage_collector() -> None:
    """Exempt all existing objects from garbage collection, and collect less often.

    Call it when a server's app is complete: modules live as long as the process, and need no traversal.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)


def app(settings: ReceiverSettings | None = None, *, number: int | None = None, polls: bool = True) -> Starlette:
    """Create the app from environment and relay.toml: `uvicorn --factory receiver.service:app`."""
    settings = settings or load_receiver_settings()
    log.configure(settings.log)
    created = build_app(settings, number=number, polls=polls)
    freeze_garbage_collector()
    return created
