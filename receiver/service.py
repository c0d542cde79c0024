"""The composition root: settings to a running app, for `serve`, uvicorn's factory and functions' handlers."""

import gc
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import structlog
from starlette.applications import Starlette

from receiver import log
from receiver.app import create_app
from receiver.callback import Door, Verify
from receiver.delivery import Dispatcher
from receiver.destinations import open_destination
from receiver.listen import Listener
from receiver.metrics import PrometheusMetrics
from receiver.poll import Poller
from receiver.settings import ReceiverSettings, load_receiver_settings
from receiver.worker import Worker
from submitter.callback_url import KeyRing
from submitter.clock import Clock
from submitter.http import VendorHttp
from submitter.installed import vendors
from submitter.ledger import Ledger, open_ledger, shown
from submitter.media_store import directory_of
from submitter.vendors.base import Streams

GC_THRESHOLDS = (20_000, 20, 100)


class Service(msgspec.Struct, frozen=True):
    """Everything that runs behind one receiver."""

    settings: ReceiverSettings
    ledger: Ledger
    worker: Worker
    http: VendorHttp
    metrics: PrometheusMetrics

    async def close(self) -> None:
        """Stop the worker and close the ledger."""
        await self.worker.stop()
        await self.http.close()
        await self.ledger.close()


def open_service(settings: ReceiverSettings, *, clock: Clock | None = None) -> Service:
    """Open the ledger, the destinations and the vendors' connections."""
    clock = clock or Clock()
    ledger = open_ledger(settings.common.ledger)
    http, metrics = VendorHttp(), PrometheusMetrics()
    destinations = {hook.name: open_destination(hook, settings.common.allow_hosts) for hook in settings.hooks}
    dispatcher = Dispatcher(ledger, settings.hooks, destinations, clock, metrics)
    poller = Poller(ledger, settings.common.vendors, http, clock, metrics)
    listeners = [
        Listener(ledger, configured.vendor, http, clock)
        for configured in settings.common.vendors.values()
        if isinstance(configured.vendor, Streams)
    ]
    return Service(settings, ledger, Worker(ledger, dispatcher, poller, listeners), http, metrics)


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


def build_app(settings: ReceiverSettings, *, clock: Clock | None = None) -> Starlette:
    """Make the whole service as one ASGI app, whose lifespan starts and stops the worker."""
    verify = verify_of(settings)
    service = open_service(settings, clock=clock)
    is_inline = settings.deliver == "inline"

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        if not is_inline:
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

    async def tick(budget_s: float) -> Mapping[str, int]:
        return await service.worker.tick(budget_s)

    async def tell() -> None:
        await service.worker.deliver_within(settings.deliver_budget_s)

    media = directory_of(settings.common.media_store or "s3://none")
    return create_app(
        service.ledger,
        verify,
        tick=tick,
        tick_token=settings.tick_token,
        clock=clock,
        metrics=service.metrics,
        media=None if media is None else Path(media),
        body_limit=settings.body_limit,
        lifespan=lifespan,
        tell=tell if is_inline else None,
    )


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
