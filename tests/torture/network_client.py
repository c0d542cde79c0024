"""A user's program on a bad network: submits tasks until each is accepted, and downloads each result.

Runs in a process that `tests.torture.children` starts. It repeats what a user may repeat: an error that says that it
may pass. Another error ends it with a traceback in its log, which is a finding.
"""

import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import structlog

SPREAD = 0.6
"""The share of the storm in which the tasks are submitted."""

log = structlog.get_logger("client")


class Work(msgspec.Struct, frozen=True):
    """What the program does: requests, spread over `storm_s` seconds, and the folder for their results."""

    requests: list[dict[str, Any]]
    storm_s: float
    folder: Path
    seed: int


def prepare(sabotage: Callable[[], None] | None) -> None:
    """Let the product wait for less than a second where it waits for up to minutes; then break it, if asked."""
    from receiver import delivery_policy, dispatcher, poller
    from submitter import create
    from submitter.http import VendorHttp
    from submitter.ledger.postgres import server
    from submitter.schedule import Backoff

    delivery_policy.PAUSE = Backoff(0.2, 1.5, 1)
    dispatcher.LEASE_MARGIN_S = 2
    poller.LEASE_S = 3
    setattr(create, "OUTAGE_BACKOFF", Backoff(0.1, 1.5, 0.5))  # noqa: B010 - which it imports
    create.STORE_DELAYS_S = (0.1, 0.2, 0.4, 0.8, 1.0)
    server.TIMEOUT_S = 2
    defaults = VendorHttp.__init__.__kwdefaults__
    assert defaults is not None
    defaults.update(connect_timeout_s=1, answer_timeout_s=0.8)
    if sabotage is not None:
        sabotage()


def work(given: Work) -> None:
    """Run the program."""
    from submitter.log import configure

    configure("json")
    asyncio.run(_work(given))


async def _work(given: Work) -> None:
    from submitter.ledger import open_ledger
    from submitter.settings import load_settings
    from submitter.submit import Submitter

    settings, draws = load_settings(), random.Random(given.seed)
    async with (
        Submitter(settings, open_ledger(settings.ledger), look_for_s=(0.0, 0.1, 0.3), sending_lease_s=3.0) as submitter,
        asyncio.TaskGroup() as group,
    ):
        for request in given.requests:
            starts_s = draws.uniform(0, SPREAD * given.storm_s)
            group.create_task(_one(submitter, request, starts_s, given.folder, draws))


async def _one(submitter: Any, request: dict[str, Any], starts_s: float, folder: Path, draws: random.Random) -> None:
    from submitter.errors import LedgerUnavailable, SubmissionUnknown, VendorRefused
    from submitter.media.download import CannotFetch, download
    from submitter.request import MotionControl
    from submitter.task import TaskStatus

    await asyncio.sleep(starts_s)
    submitted = None
    while True:
        try:
            submitted = submitted or await submitter.submit(MotionControl(**request))
            done = await submitted.result(timeout=5)
            if done.status is TaskStatus.SUCCEED:
                target = folder / f"{submitted.external_task_id}.mp4"
                await download(done.videos[0].url, target, frozenset({"127.0.0.1"}))
            return
        except (LedgerUnavailable, SubmissionUnknown, VendorRefused, CannotFetch, TimeoutError) as error:
            if not isinstance(error, TimeoutError):
                log.warning("client.repeats", kind=type(error).__name__, reason=str(error))
            await asyncio.sleep(draws.uniform(0.1, 0.5))
