"""Network faults by seed: links between the parts of a system, each a proxy whose weather changes every second."""

import asyncio
import math
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

import msgspec

from tests.torture.proxy import HEAD, HTML, LIES, PASS, FaultyProxy, Treatment

FAULTS = ("refuse", "cut_request", "cut", "reset", "slow", "lose")
CYCLE = ("clear", "outage", "storm", "storm")
"""What each link has before anything comes again, in an order by seed; about 2.4 s."""

REQUEST_MAX = 60
"""Bytes after which a request is cut at most: every request is longer."""

ANSWER_MAX = 30_000
"""Bytes after which an answer is cut at most; the median is in the middle of a small answer."""

FILM = b"\0\0\0\x18ftypmp42\0\0\0\0"
RESULT_LIES = (
    HEAD % (b"text/html", len(HTML)) + HTML,
    HEAD % (b"video/mp4", len(HTML)) + HTML,
    HEAD % (b"video/mp4", 0),
    HEAD % (b"video/mp4", 60_000) + FILM,
)
"""In place of a video: a page, a page that says it is a video, nothing, and less than announced."""

BUSY = b"<html><body>Bad gateway</body></html>"
HOOK_LIES = (b"HTTP/1.1 502 Bad Gateway\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(BUSY) + BUSY,)
"""A 2xx in place of a hook counts as delivered, as in all webhooks: nothing but its status acknowledges an event."""


class Link(msgspec.Struct, frozen=True):
    """One direction between two parts.

    `lies` answer in place of the other side, `later_lies` after the request has arrived there. `passes` is the share
    of a storm's connections that nothing happens to, and about every `loses_every_s` one answer is lost.
    """

    name: str
    lies: tuple[bytes, ...] = ()
    later_lies: tuple[bytes, ...] = ()
    passes: float = 0.4
    loses_every_s: float = 0.3

    def draw(self, draws: random.Random) -> Treatment:
        """Draw what happens to a connection in a storm."""
        if draws.random() < self.passes:
            return PASS
        kinds = [*FAULTS, *(["lie"] if self.lies else []), *(["lie_after"] if self.later_lies else [])]
        kind = draws.choice(kinds)
        if kind in ("lie", "lie_after"):
            return Treatment(kind, lie=draws.choice(self.lies if kind == "lie" else self.later_lies))
        if kind == "cut_request":
            return Treatment(kind, size=draws.randint(1, REQUEST_MAX))
        return Treatment(kind, size=int(math.exp(draws.uniform(0, math.log(ANSWER_MAX)))))


LINKS = (
    Link("submitter to vendor", LIES, LIES),
    Link("poller to vendor", LIES, LIES),
    Link("vendor to receiver", LIES, LIES),
    Link("receiver to first hook", HOOK_LIES, LIES),
    Link("receiver to second hook", HOOK_LIES, LIES),
    Link("media host", RESULT_LIES, RESULT_LIES),
    Link("submitter to ledger", passes=0.7, loses_every_s=0.8),
    Link("receiver to ledger", passes=0.7, loses_every_s=0.8),
)
"""The ledger's faults are fewer: all work passes through it, and should meet the other links' faults too."""


class Network:
    """The proxies of all links, by name."""

    def __init__(self, seed: int, proxies: Mapping[str, FaultyProxy]) -> None:
        self._seed = seed
        self._proxies = proxies

    def __getitem__(self, name: str) -> FaultyProxy:
        return self._proxies[name]

    async def storm(self, lasts_s: float, is_enough: Callable[[], bool]) -> None:
        """Let the weather of every link change for a while; then let every link pass everything.

        It lasts until `is_enough` (on a busy machine the work comes late), but not longer than four times `lasts_s`.
        """
        changing = [asyncio.create_task(self._change(link)) for link in LINKS]
        try:
            for _ in range(4):
                done, _ = await asyncio.wait(changing, timeout=lasts_s, return_when=asyncio.FIRST_EXCEPTION)
                for ended in done:
                    ended.result()
                if is_enough():
                    break
        finally:
            for one in changing:
                one.cancel()
            await asyncio.gather(*changing, return_exceptions=True)
        for proxy in self._proxies.values():
            proxy.heal()
            await proxy.listen()

    async def _change(self, link: Link) -> None:
        days, draws = random.Random(f"days {self._seed} {link.name}"), random.Random(f"{self._seed} {link.name}")
        proxy = self._proxies[link.name]
        forecast: list[str] = []
        while True:
            forecast = forecast or days.sample(CYCLE, len(CYCLE))
            weather, lasts_s = forecast.pop(), days.uniform(0.2, 1.0)
            if weather == "outage":
                await proxy.vanish()
                proxy.treated["outage"] += 1
            else:
                proxy.treat(partial(link.draw, draws) if weather == "storm" else _pass)
                await proxy.listen()
            end_s = asyncio.get_running_loop().time() + lasts_s
            while asyncio.get_running_loop().time() < end_s:
                if weather == "storm":
                    proxy.lose_answer()  # also of a connection that passes, and was kept
                await asyncio.sleep(link.loses_every_s * draws.uniform(0.3, 1.7))

    def counts(self) -> Counter[str]:
        """Return how many faults of each kind there were."""
        total: Counter[str] = Counter()
        for proxy in self._proxies.values():
            total.update({f"fault {kind}": count for kind, count in proxy.treated.items() if kind != "pass"})
        return total


def _pass() -> Treatment:
    return PASS


@asynccontextmanager
async def open_network(seed: int) -> AsyncIterator[Network]:
    """Open a proxy for each link, without faults yet."""
    async with AsyncExitStack() as stack:
        yield Network(seed, {link.name: await stack.enter_async_context(FaultyProxy()) for link in LINKS})
