"""Listens to a vendor's event stream (Server-Sent Events), on one connection per account.

The stream replays nothing. So each time it opens, all open tasks of the vendor become due for a poll,
because their events may be lost. An event that arrives before the answer to create is held until that
answer is stored. Polling remains the fallback.
"""

import asyncio
from typing import Protocol

import httpx
from httpx_sse import EventSource, SSEError

from submitter.callback_url import redact_body
from submitter.clock import Clock
from submitter.errors import LedgerUnavailable, Unintelligible
from submitter.http import VendorHttp
from submitter.ledger.base import Quarantined, Tasks
from submitter.ledger.observe import observe
from submitter.log import Logger
from submitter.observation import Report
from submitter.schedule import OUTAGE_BACKOFF
from submitter.vendors.base import Streams, Vendor

SILENCE_S = 45.0
"""A stream without data for this long is dead: a keep-alive comment comes every 15 s (Oxen.ai)."""
STEADY_S = 60.0
"""Only a stream that lasted this long is reopened without backoff: each opening polls every open task."""
HOLD_S = 120.0
"""How long an event of an unknown task is held, for the answer to create to be stored."""
HELD_MAX = 10_000

log = Logger("listen")


class StreamingVendor(Vendor, Streams, Protocol):
    """A vendor with an event stream."""


class StreamListener:
    """Keeps one vendor's event stream open, and applies its events."""

    def __init__(
        self, ledger: Tasks, vendor: StreamingVendor, http: VendorHttp, clock: Clock, *, silence_s: float = SILENCE_S
    ) -> None:
        self._ledger = ledger
        self._vendor = vendor
        self._http = http
        self._clock = clock
        self._silence_s = silence_s
        self._held: dict[str, tuple[Report, float]] = {}  # by task_id: the report, and when it is dropped

    async def run(self) -> None:
        """Listen until cancelled; reconnect with backoff."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._apply_held())
            attempt = 0
            while True:
                started_s = self._clock.now_s()
                try:
                    await self._listen()
                    reason = "the vendor closed the stream"
                except (httpx.HTTPError, httpx.StreamError, SSEError, LedgerUnavailable) as error:
                    reason = str(error) or type(error).__name__
                except Exception as error:
                    log.exception("stream.failed", vendor=self._vendor.name)
                    reason = type(error).__name__
                attempt = 0 if self._clock.now_s() - started_s >= STEADY_S else attempt + 1
                delay_s = OUTAGE_BACKOFF.delay_s(attempt - 1, self._clock.chance()) if attempt else 0
                log.warning("stream.ended", vendor=self._vendor.name, reason=reason, retry_in_s=round(delay_s, 1))
                await self._clock.sleep(delay_s)

    async def _listen(self) -> None:
        request = self._vendor.stream(self._clock.now_s())
        async with self._http.stream(request, silence_s=self._silence_s) as response:
            if response.status_code != 200:
                raise SSEError(f"HTTP {response.status_code}. Run `kling-relay doctor`.")
            # From here on every event arrives. Earlier events may be lost, so poll all open tasks.
            made_due = await self._ledger.make_due(self._vendor.name, self._clock.now_ms())
            log.info("stream.opened", vendor=self._vendor.name, polls_due=made_due)
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
        if len(self._held) < HELD_MAX:  # the stream also has the account's tasks that are not ours
            self._held[report.task_id] = (report, now_s + HOLD_S)

    async def _apply(self, report: Report) -> bool:
        """Apply a report to its task; return False when the ledger has no such task."""
        found = await self._ledger.by_task_ids(self._vendor.name, [report.task_id or ""])
        for task in found:
            await observe(self._ledger, task.external_task_id, report, self._clock.now_ms(), source="stream")
        return bool(found)

    async def _apply_held(self) -> None:
        """Apply each held report once the ledger has its task; drop it after HOLD_S."""
        while True:
            try:
                version = self._ledger.version()
                for id, (report, until_s) in list(self._held.items()):
                    if await self._apply(report) or self._clock.now_s() >= until_s:
                        del self._held[id]
                await self._clock.wait_for_change(self._ledger, version, 1.0)
            except LedgerUnavailable as error:
                log.error("stream.stalled", vendor=self._vendor.name, reason=str(error))
                await self._clock.sleep(1.0)
