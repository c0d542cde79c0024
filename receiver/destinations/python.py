"""Calls a function of the user's own: `python:package.module:function`.

It is given the event as a dict (the structured CloudEvent). A coroutine function is awaited, any
other runs in a thread. Returning is the acknowledgement; what it raises is a failure, and tried
again.
"""

import asyncio
import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any

import msgspec

from receiver.cloudevents import with_trace
from receiver.destinations.base import Outcome, failed, wrong
from receiver.hooks import Hook
from submitter.event import Event


class PythonDestination:
    """One function."""

    def __init__(self, function: Callable[[dict[str, Any]], Any]) -> None:
        self._function = function

    async def send(self, event: Event, now_s: float) -> Outcome:
        given = msgspec.json.decode(with_trace(event))
        try:
            if inspect.iscoroutinefunction(self._function):
                await self._function(given)
            else:
                await asyncio.to_thread(self._function, given)
        except Exception as error:  # noqa: BLE001 - it is the user's own code
            return failed(error)
        return Outcome(True, "returned")

    async def reach(self) -> str | None:
        return None  # it was imported when it was opened

    async def close(self) -> None:
        return None


def open(hook: Hook, allow_hosts: frozenset[str]) -> PythonDestination:
    """Import the function."""
    module, colon, name = hook.url.removeprefix("python:").partition(":")
    if not module or not colon or not name:
        raise wrong(hook, "url", repr(hook.url), "python:package.module:function", "Name module and function.")
    try:
        function = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        remedy = "Check the names, and that the package is installed where `serve` runs."
        raise wrong(hook, "url", repr(hook.url), f"cannot be imported: {error}", remedy) from error
    if not callable(function):
        raise wrong(hook, "url", repr(hook.url), f"{name} is a {type(function).__name__}", "Name a function.")
    return PythonDestination(function)
