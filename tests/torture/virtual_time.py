"""Virtual time: an event loop that jumps to the next timer, seeded clocks, and processes that can be killed.

Nothing waits and no thread runs, so a simulated day takes seconds. The order of all steps depends on nothing but the
program: with seeded randomness, two runs are the same.
"""

import asyncio
import contextvars
import random
import selectors
import uuid
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from typing import Any, TypeVar

from submitter.clock import Clock

T = TypeVar("T")
BASE_MS = 1_781_080_800_000
"""Unix milliseconds at the loop's time 0."""

_process: "contextvars.ContextVar[Process | None]" = contextvars.ContextVar("process", default=None)


class NothingLeft(Exception):
    """The loop waits for something that cannot happen: no callback is ready, and no timer is set."""


class _Jump(selectors.SelectSelector):
    """A selector that moves the time instead of waiting. There are no sockets."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise NothingLeft("no callback is ready, and no timer is set")
        self.now_s += max(0.0, timeout)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop in virtual time. Functions for a thread run at once, in the loop's thread."""

    def __init__(self) -> None:
        self._jump = _Jump()
        super().__init__(self._jump)
        self._clock_resolution = 1e-6  # two timers that differ by a rounding error are due together
        self.unhandled: list[str] = []
        """Errors that no code handled: exceptions that were never retrieved, failed callbacks."""
        self.set_task_factory(_create_task)
        self.set_exception_handler(_note_unhandled)

    def time(self) -> float:
        return self._jump.now_s

    def run_in_executor(  # type: ignore[override]
        self, executor: Executor | None, func: Callable[..., T], *args: Any
    ) -> "asyncio.Future[T]":
        future: asyncio.Future[T] = self.create_future()
        try:
            result = func(*args)
        except Exception as error:
            self.call_soon(_set, future, None, error)
        else:
            self.call_soon(_set, future, result, None)
        return future

    def _write_to_self(self) -> None:
        """Wake nothing: the loop never waits."""


def _set(future: "asyncio.Future[Any]", result: Any, error: Exception | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


def _note_unhandled(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    assert isinstance(loop, VirtualLoop)
    task = context.get("task") or context.get("future")
    if not isinstance(task, asyncio.Task) or task not in _KILLED:
        loop.unhandled.append(f"{context['message']}: {context.get('exception')!r} in {task!r}")


_KILLED: "weakref.WeakSet[asyncio.Task[Any]]" = weakref.WeakSet()
"""What these raise while they are cancelled is lost, as with a killed process."""


def _create_task(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> "asyncio.Task[Any]":
    """Create a task of the process in whose context it is created."""
    task = asyncio.Task(coroutine, loop=loop, **options)
    context = options.get("context")
    process = _process.get() if context is None else context.get(_process)
    if process is not None:
        process.tasks[task] = None
        task.add_done_callback(process.forget)
    return task


class Process:
    """The tasks that one process of the system would run. All tasks that they create belong to it too."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_dead = False
        self.tasks: dict[asyncio.Task[Any], None] = {}  # in the order of their creation
        self._context = contextvars.copy_context()
        self._context.run(_process.set, self)
        self._at_kill: list[Callable[[], None]] = []

    def start(self, coroutine: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
        """Run a coroutine as a task of this process."""
        return asyncio.get_running_loop().create_task(coroutine, context=self._context.copy())

    def forget(self, task: "asyncio.Task[Any]") -> None:
        """Remove a task that has ended."""
        self.tasks.pop(task, None)

    def at_kill(self, function: Callable[[], None]) -> None:
        """Call `function` when the process is killed, before any of its tasks notices."""
        self._at_kill.append(function)

    async def kill(self) -> None:
        """End every task. They may clean up, but reach nothing: neither the network nor the ledger."""
        self.is_dead = True
        for function in self._at_kill:
            function()
        while self.tasks:
            for task in list(self.tasks):
                _KILLED.add(task)
                task.cancel()
            await asyncio.sleep(0)


class SimulatedClock(Clock):
    """The loop's time, with an offset that can jump, and seeded randomness."""

    def __init__(self, loop: VirtualLoop, seed: str) -> None:
        self._loop = loop
        self._random = random.Random(seed)
        self.offset_s = 0.0

    def now_ms(self) -> int:
        return BASE_MS + int((self._loop.time() + self.offset_s) * 1000)

    def now_s(self) -> float:
        return BASE_MS / 1000 + self._loop.time() + self.offset_s

    def monotonic_s(self) -> float:
        return self._loop.time()

    def chance(self) -> float:
        return self._random.random()

    def new_id(self) -> str:
        high, low = self._random.getrandbits(12), self._random.getrandbits(62)
        return str(uuid.UUID(int=self.now_ms() << 80 | 0x7 << 76 | high << 64 | 0b10 << 62 | low))

    def new_key(self, size: int) -> bytes:
        return self._random.randbytes(size)
