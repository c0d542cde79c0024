"""Backoff and poll policies as values. Pure; randomness is passed in as a number from 0 to 1."""

import hashlib

import msgspec


class Backoff(msgspec.Struct, frozen=True, array_like=True):
    """Exponential backoff: wait `first_s` seconds, then `factor` times longer each time, up to `max_s` seconds."""

    first_s: float
    factor: float
    max_s: float

    def delay_s(self, attempt: int, chance: float = 0.5) -> float:
        """Return the seconds to wait after `attempt` (0 is the first) failed.

        `chance` (0 to 1) adds jitter: the delay is 75 % to 125 % of the nominal one.
        """
        delay = self.first_s
        for _ in range(min(attempt, 64)):  # clamped in each step: 2.0 ** 2000 overflows
            delay = min(delay * self.factor, self.max_s)
            if delay >= self.max_s:
                break
        return min(delay, self.max_s) * (0.75 + chance / 2)


class PollPolicy(msgspec.Struct, frozen=True, array_like=True):
    """When a task is polled after its last report or poll, in seconds.

    `while_expected` applies while a callback is expected; `while_unexpected` if none is (no callback URL,
    a report that needs confirmation, a submission with an unknown outcome). The task is abandoned
    `abandon_after_s` after its first send.
    """

    while_expected: Backoff
    while_unexpected: Backoff
    abandon_after_s: float


def spread(key: str) -> float:
    """Return a number from 0 to 1 derived from `key`: deterministic jitter that spreads the polls of many tasks."""
    return hashlib.blake2b(key.encode(), digest_size=1).digest()[0] / 255


SLOT_BACKOFF = Backoff(first_s=1, factor=2, max_s=60)
"""After 429/1302 and 429/1303: "exponential backoff from 1 s" (Kling's error table)."""

OUTAGE_BACKOFF = Backoff(first_s=2, factor=2, max_s=60)
"""After a temporary refusal other than 429, a failed connection or a broken event stream."""

DELAY_MAX_S = 30 * 86_400
"""The longest delay of a poll or an attempt: what is due much later was stored while a clock was wrong."""

LOOK_FOR_S = (0.0, 2.0, 3.0, 5.0)
"""Pauses before each lookup of a task whose create was not answered: a task absent for 10 s does not exist."""
