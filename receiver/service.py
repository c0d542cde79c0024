"""The composition root: settings to a running app, for `serve`, uvicorn's factory and functions' handlers.

What asks vendors and tells hooks is imported when it is first needed: a function that only hears a
callback starts without it.
"""

import gc
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
from starlette.applications import Starlette

from receiver import log
from receiver.app import Lifespan, Metrics, create_app
from receiver.callback import Door, Verify
from receiver.settings import ReceiverSettings, load_receiver_settings
from submitter.callback_url import KeyRing
from submitter.clock import Clock
from submitter.installed import vendors
from submitter.ledger import Ledger, open_ledger, shown
from submitter.media_store import directory_of

if TYPE_CHECKING:
    from receiver.metrics import PrometheusMetrics
    from receiver.worker import Worker
    from submitter.http import VendorHttp
    from submitter.request import MotionControl
    from submitter.submit import Submitter
    from submitter.task import Task

GC_THRESHOLDS = (20_000, 20, 100)


class Service:
    """Everything that runs behind one receiver."""

    def __init__(
        self, settings: ReceiverSettings, ledger: Ledger, clock: Clock, metrics: "PrometheusMetrics | None"
    ) -> None:
        self.settings = settings
        self.ledger = ledger
        self.metrics = metrics
        self._clock = clock

    @cached_property
    def http(self) -> "VendorHttp":
        """The vendors' connections."""
        from submitter.http import VendorHttp

        return VendorHttp()

    @cached_property
    def worker(self) -> "Worker":
        """What delivers and polls."""
        from receiver.delivery import Dispatcher
        from receiver.destinations import open_destination
        from receiver.destinations.base import UsesLedger
        from receiver.listen import Listener
        from receiver.poll import Poller
        from receiver.worker import Worker
        from submitter.vendors.base import Streams

        hooks, common, ledger = self.settings.hooks, self.settings.common, self.ledger
        destinations = {hook.name: open_destination(hook, common.allow_hosts) for hook in hooks}
        for destination in destinations.values():
            if isinstance(destination, UsesLedger):
                destination.use(ledger, self._clock)
        dispatcher = Dispatcher(ledger, hooks, destinations, self._clock, self.metrics)
        poller = Poller(ledger, common.vendors, self.http, self._clock, self.metrics)
        listeners = [
            Listener(ledger, configured.vendor, self.http, self._clock)
            for configured in common.vendors.values()
            if isinstance(configured.vendor, Streams)
        ]
        return Worker(ledger, dispatcher, poller, listeners)

    @cached_property
    def submitter(self) -> "Submitter":
        """What makes tasks of events."""
        from submitter.submit import Submitter

        return Submitter(self.settings.common, self.ledger, clock=self._clock)

    async def submit(self, request: "MotionControl") -> "Task":
        """Make a request a task, and return it as it is now."""
        return (await self.submitter.submit(request)).task

    async def tick(self, budget_s: float) -> Mapping[str, int]:
        """Deliver what is due and poll what is silent."""
        return await self.worker.tick(budget_s)

    async def tell(self) -> None:
        """Tell the hooks what is due now, as far as the settings' budget lasts."""
        await self.worker.deliver_within(self.settings.deliver_budget_s)

    async def close(self) -> None:
        """Stop what was opened, and close the ledger."""
        opened = vars(self)
        if "worker" in opened:
            await self.worker.stop()
        if "http" in opened:
            await self.http.close()
        if "submitter" in opened:
            await self.submitter.close()  # the ledger too
        else:
            await self.ledger.close()


def open_service(settings: ReceiverSettings, *, clock: Clock | None = None) -> Service:
    """Open the ledger; the rest is opened when it is first needed."""
    from receiver.metrics import PrometheusMetrics

    return Service(settings, open_ledger(settings.common.ledger), clock or Clock(), PrometheusMetrics())


def open_function(settings: ReceiverSettings) -> Service:
    """Open a service for a function, of which nobody reads the metrics."""
    return Service(settings, open_ledger(settings.common.ledger), Clock(), None)


def verify_of(settings: ReceiverSettings) -> Verify:
    """Return the proofs that callbacks must bring. Reading a callback takes no credentials, so that
    tasks of a vendor whose key was taken away are heard to their end.
    """
    settings.require_keys()
    doors = {}
    for name, setup in vendors().items():
        configured = settings.common.vendors.get(name)
        vendor = configured.vendor if configured else setup.reader
        doors[name] = Door(vendor, settings.secrets[name], settings.confirm[name])
    return Verify(settings.common.ring or KeyRing(()), doors)


def make_app(service: Service, *, lifespan: Lifespan | None = None, clock: Clock | None = None) -> Starlette:
    """Make the app before a service; whoever has no `lifespan` closes the service."""
    settings = service.settings
    media = directory_of(settings.common.media_store or "s3://none")
    metrics: Metrics | None = service.metrics
    return create_app(
        service.ledger,
        verify_of(settings),
        tick=service.tick,
        tick_token=settings.tick_token,
        clock=clock,
        metrics=metrics,
        media=None if media is None else Path(media),
        body_limit=settings.body_limit,
        lifespan=lifespan,
        tell=service.tell if settings.deliver == "inline" else None,
        submit=service.submit,
        events_token=settings.events_token,
    )


def build_app(settings: ReceiverSettings, *, clock: Clock | None = None) -> Starlette:
    """Make the whole service as one ASGI app, whose lifespan starts and stops the worker."""
    settings.require_keys()
    service = open_service(settings, clock=clock)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        if settings.deliver == "worker":
            service.worker.start()
        structlog.get_logger("service").info(
            "service.started",
            ledger=shown(settings.common.ledger),
            hooks=[hook.name for hook in settings.hooks],
            vendors=list(settings.common.vendors),
        )
        try:
            yield
        finally:
            await service.close()

    return make_app(service, lifespan=lifespan, clock=clock)


def settle_memory() -> None:
    """Tell the garbage collector that what exists now lives as long as the process.

    Called once a server's app is made: the collector then need not walk every module again and again.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)


def app() -> Starlette:
    """Make the app from the environment: `uvicorn --factory receiver.service:app`."""
    settings = load_receiver_settings()
    log.configure(settings.log)
    made = build_app(settings)
    settle_memory()
    return made
