"""Named steps at which a process is killed: wrappers that a child process puts around methods before it starts.

The product contains none of them, so they cost nothing in production.
"""

import functools
import inspect
import os
import signal
from collections.abc import Callable
from importlib import import_module
from typing import Any, Literal

import msgspec


class Step(msgspec.Struct, frozen=True):
    """An instant before or after a call of `method`, which is `module:Class.method` or `module:function`."""

    when: Literal["before", "after"]
    method: str


_LEDGERS = ("submitter.ledger.sqlite.ledger:SqliteLedger", "submitter.ledger.postgres.ledger:PostgresLedger")


def _ledger(when: Literal["before", "after"], method: str) -> tuple[Step, ...]:
    return tuple(Step(when, f"{ledger}.{method}") for ledger in _LEDGERS)


IN_TRANSACTION = (
    Step("after", "submitter.ledger.sqlite.ledger:_apply_all"),
    Step("after", "submitter.ledger.postgres.ledger:PostgresLedger._apply_once"),
)
SUBMITTER: dict[str, tuple[Step, ...]] = {
    "before the row is reserved": _ledger("before", "reserve"),
    "after the row is reserved": _ledger("after", "reserve"),
    "before a state is stored": _ledger("before", "apply"),
    "within the transaction": IN_TRANSACTION,
    "after a state is stored": _ledger("after", "apply"),
    "before create is sent": (Step("before", "submitter.http:VendorHttp.run"),),
    "after create is answered": (Step("after", "submitter.http:VendorHttp.run"),),
}
RECEIVER: dict[str, tuple[Step, ...]] = {
    "after a callback is read": (Step("after", "receiver.callbacks:CallbackEndpoint._read"),),
    "before a callback is stored": _ledger("before", "apply"),
    "within the transaction": IN_TRANSACTION,
    "after a callback is stored": _ledger("after", "apply"),
    "before a callback is answered": (Step("after", "receiver.callbacks:CallbackEndpoint._accept"),),
    "after deliveries are claimed": _ledger("after", "claim_deliveries"),
    "before an event is sent": (Step("before", "receiver.destinations.http:post"),),
    "after an event is sent": (Step("after", "receiver.destinations.http:post"),),
    "before a delivery is settled": _ledger("before", "settle"),
    "after a delivery is settled": _ledger("after", "settle"),
    "after polls are claimed": _ledger("after", "claim_polls"),
    "before a poll is sent": (Step("before", "submitter.http:VendorHttp.run"),),
    "after a poll is answered": (Step("after", "submitter.http:VendorHttp.run"),),
    "after a poll is stored": (Step("after", "receiver.poller:observe"),),
    "after a result is downloaded": (Step("after", "receiver.destinations.archive:download"),),
    "before an archived copy is recorded": (Step("after", "receiver.destinations.archive:Archive._copy"),),
    "after an archived copy is recorded": (Step("after", "receiver.destinations.archive:Archive.send"),),
}


def kill_at(steps: tuple[Step, ...], nth: int) -> None:
    """Kill this process by SIGKILL when one of these steps is reached for the `nth` time."""
    left = nth

    def reached() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    for step in steps:
        module_name, _, path = step.method.partition(":")
        owner: Any = import_module(module_name)
        *parents, name = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        setattr(owner, name, _wrapped(getattr(owner, name), step.when, reached))


def _wrapped(method: Callable[..., Any], when: str, reached: Callable[[], None]) -> Callable[..., Any]:
    if inspect.iscoroutinefunction(method):

        @functools.wraps(method)
        async def run_async(*arguments: Any, **named: Any) -> Any:
            if when == "before":
                reached()
            result = await method(*arguments, **named)
            if when == "after":
                reached()
            return result

        return run_async

    @functools.wraps(method)
    def run(*arguments: Any, **named: Any) -> Any:
        if when == "before":
            reached()
        result = method(*arguments, **named)
        if when == "after":
            reached()
        return result

    return run
