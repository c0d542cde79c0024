"""Listens to a vendor that tells of its tasks by a stream of Server-Sent Events: one connection an account.

The stream repeats nothing. So what may have ended while nobody listened is asked about as soon
as somebody listens again, and an event that overtakes the answer to create is held until that is
stored. Polling stands behind all of this.
"""

import asyncio
from typing import Protocol

import httpx
import structlog
from httpx_sse import EventSource, SSEError

from submitter.callback_url import redact_body
from submitter.clock import Clock
from submitter.errors import LedgerUnavailable, Unintelligible
from submitter.http import VendorHttp
from submitter.ledger.base import Ledger, Quarantined
from submitter.observe import observe
from submitter.schedule import OUTAGE_BACKOFF
from submitter.task import Report
from submitter.vendors.base import Streams, Vendor

SILENCE_S = 45.0
"""A stream that says nothing for so long is dead: a comment comes every 15 s (Oxen.ai)."""
STEADY_S = 60.0
"""Only a stream that lasted so long is opened again at once: each opening asks about every open task."""
HOLD_S = 120.0
HELD_MAX = 10_000

log = structlog.get_logger("listen")


class StreamingVendor(Vendor, Streams, Protocol):
    """A vendor with a stream."""


class Listener:
    """Keeps one vendor's stream open, and applies what it says."""

    def __init__(
        self, ledger: Ledger, vendor: StreamingVendor, http: VendorHttp, clock: Clock, *, silence_s: float = SILENCE_S
    ) -> None:
        self._ledger = ledger
        self._vendor = vendor
        self._http = http
        self._clock = clock
        self._silence_s = silence_s
        self._held: dict[str, tuple[Report, float]] = {}  # by the vendor's id, and until when

    async def run(self) -> None:
        """Listen until cancelled; reconnect with backoff."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._apply_held())
            attempt = 0
            while True:
                begun_s = self._clock.now_s()
                try:
                    await self._listen()
                    reason = "it was closed"
                except (httpx.HTTPError, httpx.StreamError, SSEError, LedgerUnavailable) as error:
                    reason = str(error) or type(error).__name__
                except Exception as error:
                    log.exception("stream.failed", vendor=self._vendor.name)
                    reason = type(error).__name__
                attempt = 0 if self._clock.now_s() - begun_s >= STEADY_S else attempt + 1
                delay_s = OUTAGE_BACKOFF.delay_s(attempt - 1, self._clock.chance()) if attempt else 0
                log.warning("stream.ended", vendor=self._vendor.name, reason=reason, again_in_s=round(delay_s, 1))
                await asyncio.sleep(delay_s)

    async def _listen(self) -> None:
        request = self._vendor.stream(self._clock.now_s())
        async with self._http.stream(request, silence_s=self._silence_s) as response:
            if response.status_code != 200:
                raise SSEError(f"HTTP {response.status_code}; `kling-relay doctor` tells more")
            # It has begun: what is told from now on is heard. What was told before may be lost.
            asked = await self._ledger.hasten(self._vendor.name, self._clock.now_ms())
            log.info("stream.opened", vendor=self._vendor.name, asked_about=asked)
            async for event in EventSource(response).aiter_sse():
                await self._read(event.event, event.data)

    async def _read(self, name: str, data: str) -> None:
        now_s = self._clock.now_s()
        try:
            report = self._vendor.read_event(name, data, now_s)
        except Unintelligible as reason:
            body = redact_body(data.encode(errors="replace"))
            await self._ledger.quarantine(
                Quarantined("", self._vendor.name, self._clock.now_ms(), f"event {name}: {reason}", body)
            )
            log.warning("stream.quarantined", vendor=self._vendor.name, reason=str(reason))
            return
        if report is None or report.task_id is None or await self._apply(report):
            return
        if len(self._held) < HELD_MAX:  # the account's other generations share the stream
            self._held[report.task_id] = (report, now_s + HOLD_S)

    async def _apply(self, report: Report) -> bool:
        """Apply a report to its task; return False when the ledger knows no such task."""
        found = await self._ledger.by_task_ids(self._vendor.name, [report.task_id or ""])
        for task in found:
            await observe(self._ledger, task.external_task_id, report, self._clock.now_ms(), source="stream")
        return bool(found)

    async def _apply_held(self) -> None:
        """Apply what overtook the answer to create, once that is stored."""
        while True:
            try:
                mark = self._ledger.mark()
                for id, (report, until_s) in list(self._held.items()):
                    if await self._apply(report) or self._clock.now_s() >= until_s:
                        del self._held[id]
                await self._ledger.changed(mark, 1.0)
            except LedgerUnavailable as error:
                log.error("stream.stalled", vendor=self._vendor.name, reason=str(error))
                await asyncio.sleep(1.0)
