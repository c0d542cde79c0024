"""Whether a hook that fails and fails is left alone for a while. Pure.

    closed ── FAILURES in a row ──▶ open ── after a pause ──▶ one probe ── delivered ──▶ closed
                                     ▲                             └── failed: a longer pause ──┐
                                     └──────────────────────────────────────────────────────────┘

While it is open nothing is attempted, so that an outage uses up no event's schedule.
"""

import msgspec

from submitter.schedule import Backoff

FAILURES = 10
PAUSE = Backoff(first_s=5, factor=2, max_s=300)


class Breaker(msgspec.Struct, frozen=True):
    """One hook's breaker: `failures` in a row, how often it `opened` since the last success, and until when."""

    failures: int = 0
    opened: int = 0
    until_s: float | None = None

    def room(self, room: int, sending: int, now_s: float) -> int:
        """Return how many of `room` attempts may begin while `sending` are under way."""
        if self.until_s is None:
            return room
        return min(room, 1) if now_s >= self.until_s and sending == 0 else 0

    def after(self, *, is_delivered: bool, now_s: float, chance: float) -> "Breaker":
        """Return the breaker after an attempt's end at `now_s`; `chance` (0 to 1) spreads the pause."""
        if is_delivered:
            return Breaker()
        failures = self.failures + 1
        was_open_already = self.until_s is not None and now_s < self.until_s
        if failures < FAILURES or was_open_already:  # attempts that began before it opened still end
            return Breaker(failures, self.opened, self.until_s)
        return Breaker(failures, self.opened + 1, now_s + PAUSE.delay_s(self.opened, chance))
