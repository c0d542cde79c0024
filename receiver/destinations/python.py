"""Calls a user-defined Python function with each event: `python:package.module:function`.

Event: the argument is a dict, the structured CloudEvent. A coroutine function is awaited; any other function runs
in a thread.
Delivered: the function returned. An exception is a failure, which the hook's schedule retries.
Order: a task's events are passed one after the other.
"""

import asyncio
import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any

import msgspec

from receiver.destinations.base import invalid_hook
from receiver.destinations.cloudevents import with_trace
from receiver.destinations.outcome import Outcome, failed_outcome
from receiver.hook import Hook
from submitter.event import Event


class PythonDestination:
    """One function."""

    def __init__(self, function: Callable[[dict[str, Any]], Any]) -> None:
        self._function = function

    async def send(self, event: Event, now_s: float) -> Outcome:
        event_dict = msgspec.json.decode(with_trace(event))
        try:
            if inspect.iscoroutinefunction(self._function):
                await self._function(event_dict)
            else:
                await asyncio.to_thread(self._function, event_dict)
        except Exception as error:  # noqa: BLE001 - user code can raise anything
            return failed_outcome(error)
        return Outcome(True, "returned")

    async def reach(self) -> str | None:
        return None  # `open` has imported it

    async def close(self) -> None:
        return None


def open(hook: Hook, allow_hosts: frozenset[str]) -> PythonDestination:
    """Return the destination of a hook; raise InvalidSettings if its function cannot be imported."""
    module, colon, name = hook.url.removeprefix("python:").partition(":")
    if not module or not colon or not name:
        limit, remedy = "python:package.module:function", "Name the module and the function."
        raise invalid_hook(hook, "url", repr(hook.url), limit, remedy)
    try:
        function = getattr(import_module(module), name)
    except Exception as error:  # importing user code can raise anything
        reason = f"cannot be imported: {type(error).__name__}: {error}"
        remedy = "Check the names, and install the package where `serve` runs."
        raise invalid_hook(hook, "url", repr(hook.url), reason, remedy) from error
    if not callable(function):
        raise invalid_hook(hook, "url", repr(hook.url), f"{name} is a {type(function).__name__}", "Name a function.")
    return PythonDestination(function)
