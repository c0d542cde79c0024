"""The processes that `make torture` kills: a receiver (`kling-relay serve`) and a submitter.

They are forked from a process that has imported everything, so that they start in milliseconds.
"""

import asyncio
import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import msgspec

from tests.torture.steps import Step, kill_at

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["receiver.cli.main", "receiver.service", "receiver.server", "tests.torture.preload"])


class Kill(msgspec.Struct, frozen=True):
    """Where a child kills itself: at the `nth` time that it reaches one of the steps."""

    name: str
    steps: tuple[Step, ...]
    nth: int


def start_receiver(
    environ: Mapping[str, str],
    port: int,
    log: Path,
    *,
    kill: Kill | None,
    offset_ms: int,
    sabotage: Callable[[], None] | None = None,
) -> ForkServerProcess:
    """Run `kling-relay serve`, with a clock that is ahead of the real one by `offset_ms`.

    `sabotage` breaks the product in the child, to prove that the checks find it.
    """
    return start_process(_receive, environ, log, port, kill=kill, offset_ms=offset_ms, sabotage=sabotage)


def start_submitter(
    environ: Mapping[str, str], requests: Sequence[Mapping[str, Any]], log: Path, *, kill: Kill | None, offset_ms: int
) -> ForkServerProcess:
    """Submit requests at once, as a user's Python program does; the exit status is 0 once all are accepted."""
    return start_process(_submit, environ, log, list(requests), kill=kill, offset_ms=offset_ms)


def start_process(
    work: Callable[[Any], None],
    environ: Mapping[str, str],
    log: Path,
    given: Any,
    *,
    kill: Kill | None = None,
    offset_ms: int = 0,
    sabotage: Callable[[], None] | None = None,
) -> ForkServerProcess:
    """Run `work(given)` in a process whose output goes to `log`."""
    arguments = (work, dict(environ), log, kill, offset_ms, sabotage, given)
    process = _forks.Process(target=_child, args=arguments, daemon=True)
    process.start()
    return process


def _child(
    work: Callable[[Any], None],
    environ: dict[str, str],
    log: Path,
    kill: Kill | None,
    offset_ms: int,
    sabotage: Callable[[], None] | None,
    given: Any,
) -> None:
    os.environ.update(environ)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if offset_ms:
        _shift_clock(offset_ms)
    if kill is not None:
        kill_at(kill.steps, kill.nth)
    if sabotage is not None:
        sabotage()
    work(given)


def _shift_clock(offset_ms: int) -> None:
    from submitter.clock import Clock

    now_ms, now_s = Clock.now_ms, Clock.now_s
    setattr(Clock, "now_ms", lambda clock: now_ms(clock) + offset_ms)  # noqa: B010 - a method, by intent
    setattr(Clock, "now_s", lambda clock: now_s(clock) + offset_ms / 1000)  # noqa: B010


def _receive(port: int) -> None:
    from receiver.cli.main import main

    sys.argv = ["kling-relay", "serve", "--port", str(port)]
    main()


def _submit(requests: list[dict[str, Any]]) -> None:
    asyncio.run(_submit_all(requests))


async def _submit_all(requests: list[dict[str, Any]]) -> None:
    from submitter.ledger import open_ledger
    from submitter.request import MotionControl
    from submitter.settings import load_settings
    from submitter.submit import Submitter

    settings = load_settings()
    async with Submitter(
        settings, open_ledger(settings.ledger), look_for_s=(0.0, 0.05, 0.1), sending_lease_s=3.0
    ) as submitter:
        submitting = (submitter.submit(MotionControl(**request)) for request in requests)
        results = await asyncio.gather(*submitting, return_exceptions=True)
    refused = [str(result) for result in results if isinstance(result, BaseException)]
    if refused:
        sys.exit("\n".join(refused))
