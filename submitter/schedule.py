"""When to try again: policies as values. Pure; randomness comes in as a number from 0 to 1."""

import hashlib

import msgspec


class Backoff(msgspec.Struct, frozen=True, array_like=True):
    """Wait `first_s`, then `factor` times longer each time, up to `max_s` seconds."""

    first_s: float
    factor: float
    max_s: float

    def delay_s(self, attempt: int, chance: float = 0.5) -> float:
        """Return the seconds to wait after `attempt` (0 is the first) failed.

        `chance` (0 to 1) spreads the delay over 75 % to 125 % of its middle.
        """
        delay = self.first_s
        for _ in range(min(attempt, 64)):  # clamped before it is computed: 2.0 ** 2000 overflows
            delay = min(delay * self.factor, self.max_s)
            if delay >= self.max_s:
                break
        return min(delay, self.max_s) * (0.75 + chance / 2)


class Patience(msgspec.Struct, frozen=True, array_like=True):
    """How long one task may be silent before its vendor is asked, in seconds.

    `silence` counts while a callback is expected; `asking` while none is (no callback URL,
    a report that needs confirming, a submission whose outcome is unknown).
    """

    silence: Backoff
    asking: Backoff
    abandon_after_s: float


def spread(key: str) -> float:
    """Return a number from 0 to 1 that is always the same for `key`, to spread polls by task."""
    return hashlib.blake2b(key.encode(), digest_size=1).digest()[0] / 255


SLOT_BACKOFF = Backoff(first_s=1, factor=2, max_s=60)
"""After 429/1302 and 429/1303: "exponential backoff from 1 s" (Kling's error table)."""

OUTAGE_BACKOFF = Backoff(first_s=2, factor=2, max_s=60)
"""After a refusal to answer a query, or a create that surely was not sent."""

LOOK_FOR_S = (0.0, 2.0, 3.0, 5.0)
"""Pauses before each look for a task whose create was not answered: absent for ten seconds is absent."""
