"""One store under load: faults hit it one after the other, and the receiver must say so, lose nothing, and recover."""

import asyncio
import inspect
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Protocol

import msgspec
from starlette.applications import Starlette

from submitter.callback_url import KeyRing
from submitter.ledger import open_ledger
from submitter.sandbox.server import free_socket, listening
from tests.bench.servers import KEY, WEBHOOK_KEY, callback
from tests.road.many_processes import fill
from tests.torture.load import Damaged, Load, Stored, get, judge
from tests.torture.parts import Round
from tests.torture.receiver_process import ReceiverProcess
from tests.world import Inbox

RATE = 60.0
TASKS = 4000
"""More than are called back during a trial."""

NOT_READY_WITHIN_S = 10.0
"""A held lock is waited for before it is an error, and a ready answer is kept for a second."""
READY_WITHIN_S = 15.0
ARRIVE_WITHIN_S = 60.0
BETWEEN_S = 1.0

Step = Callable[[], Awaitable[None] | None]


class Fault(msgspec.Struct, frozen=True):
    """What happens to a store: how it begins and ends, and for how long.

    `stops_writes`: no callback can be stored meanwhile, so that the receiver must not be ready.
    `restarts`: it does not end before the receiver is restarted. `kills_by`: the signal by which the kernel may end
    the receiver, as it does a program whose mapped file can no longer be written; a service manager restarts it.
    """

    name: str
    begin: Step
    end: Step
    lasts_s: float
    stops_writes: bool = True
    restarts: bool = False
    restart_by: int = signal.SIGTERM
    kills_by: int | None = None


class Store(Protocol):
    """A store that a trial can break."""

    url: str
    """The ledger's URL, as the receiver gets it."""

    environ: dict[str, str]
    """What else the receiver needs to reach it."""

    async def read(self) -> Stored:
        """Return what it holds, without the product's code."""
        ...


class Trial:
    """A receiver, the load on it, and its hook."""

    def __init__(
        self, folder: Path, store: Store, sabotage: str = "", *, tasks: int = TASKS, rate: float = RATE
    ) -> None:
        self.done = Round()
        self._folder = folder
        self._store = store
        self.tasks = tasks
        self.inbox = Inbox(folder)
        self._hook_socket, hook_url = free_socket()
        self.hooks = f'[[hook]]\nname = "sink"\nurl = "{hook_url}/events"\ntimeout_s = 5\nconcurrency = 16\n'
        environ = store.environ | {"KLING_RELAY_LEDGER": store.url}
        self.receiver = ReceiverProcess(folder, environ, self.hooks, sabotage)
        ring = KeyRing.read(f"bench:{KEY}")
        self.load = Load(
            self.receiver.port, rate, lambda number, status: callback("b", number, status, ring, WEBHOOK_KEY)
        )

    async def run(self, faults: Sequence[Fault]) -> Round:
        """Let the faults hit the store, and compare all that was accepted, stored and delivered."""

        async def hit_all() -> None:
            for fault in faults:
                await self.hit(fault)

        return await self.run_during(hit_all)

    async def run_during(self, attack: Callable[[], Awaitable[None]]) -> Round:
        """Run the receiver, its hook and the load during an attack; compare what was accepted, stored and delivered."""
        await self._fill()
        try:
            async with self._running():
                await attack()
                await self.load.pause()
                arrived = await self._arrived()
                await self.receiver.stop()
            judge(self.done, self.load, await self._store.read(), arrived)
        except Damaged as error:
            self.done.findings.append(f"the store is damaged after {self.load.phase}: {error}")
        self.done.findings += [f"an event breaks asyncapi.yaml: {error}" for error in self.inbox.undescribed[:3]]
        self.receiver.judge_log(self.done)
        return self.done

    async def hit(self, fault: Fault) -> None:
        """Let one fault happen, and check what the receiver says of itself during and after it."""
        self.load.phase = fault.name
        self.load.may_be_unanswered = fault.kills_by is not None
        await _do(fault.begin)
        begun_s = time.monotonic()
        if fault.stops_writes:
            may_be_gone = fault.kills_by is not None
            await self._expect(fault.name, is_ready=False, within_s=NOT_READY_WITHIN_S, may_be_gone=may_be_gone)
        await asyncio.sleep(max(0.0, begun_s + fault.lasts_s - time.monotonic()))
        if fault.restarts:
            if (await get(self.receiver.port, "/readyz")).status == 200:
                self.done.findings.append(f"{fault.name}: the receiver is ready again, without a restart")
            await self.restart(fault.restart_by)
        await _do(fault.end)
        ended_with = self.receiver.ended_with
        if ended_with is not None:
            if ended_with != -(fault.kills_by or 0):
                self.done.findings.append(f"{fault.name}: the receiver ended with {ended_with}")
            self.done.counts["restarts by a service manager"] += 1
            await self.receiver.start()
        self.load.may_be_unanswered = False
        await self._expect(fault.name, is_ready=True, within_s=READY_WITHIN_S)
        self.load.phase = f"after {fault.name}"
        self.done.counts["faults"] += 1
        await asyncio.sleep(BETWEEN_S)

    async def restart(self, how: int = signal.SIGTERM, between: Callable[[], None] = lambda: None) -> None:
        """Stop the receiver, do what `between` does, and start it again at the same port."""
        self.load.may_be_unanswered = True
        await self.receiver.stop(how)
        between()
        await self.receiver.start()
        self.load.may_be_unanswered = False

    async def _expect(self, fault: str, *, is_ready: bool, within_s: float, may_be_gone: bool = False) -> None:
        end_s = time.monotonic() + within_s
        answers: Counter[int] = Counter()
        while time.monotonic() < end_s:
            answer = await get(self.receiver.port, "/readyz")
            is_known = answer.status in (200, 503) or (answer.status == 0 and may_be_gone)
            answers[answer.status] += 1
            if not is_known and answers[answer.status] == 1:
                shown = answer.body[:200].decode(errors="replace")
                self.done.findings.append(f"{fault}: /readyz answered {answer.status} {shown}")
            if (answer.status == 200) == is_ready:
                return
            await asyncio.sleep(0.1)
        state = "after it, /readyz did not become ready" if is_ready else "/readyz stayed ready"
        self.done.findings.append(f"{fault}: {state} within {within_s:g} s (answers: {dict(answers)})")

    async def _fill(self) -> None:
        ledger = open_ledger(self._store.url)
        await fill(ledger, "b", self.tasks)
        await ledger.close()

    @asynccontextmanager
    async def _running(self) -> AsyncIterator[None]:
        app: Starlette = self.inbox.app()
        async with listening(app, self._hook_socket):
            running = None
            try:
                await self.receiver.start()
                running = asyncio.create_task(self.load.run())
                await asyncio.sleep(BETWEEN_S)
                yield
            finally:
                if running is not None:
                    running.cancel()
                self.receiver.kill()

    async def _arrived(self) -> list[dict[str, object]]:
        """Return the hook's events, once it has every event that the store holds."""
        expected = {id for id, _, _ in (await self._store.read()).events}
        end_s = time.monotonic() + ARRIVE_WITHIN_S
        while not expected <= {event["id"] for event in self.inbox.events} and time.monotonic() < end_s:
            await asyncio.sleep(0.2)
        return self.inbox.events


async def _do(step: Step) -> None:
    result = step()
    if inspect.isawaitable(result):
        await result
