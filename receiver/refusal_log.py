"""Limits the log lines of callbacks that changed nothing: the first of each result in an interval, then a count. Pure.

A flood would fill the disk, and its lines cost more time than its answers. The metrics count every callback.
"""

from collections import Counter

LINES = 20
"""Lines of each result in an interval."""

INTERVAL_S = 10.0


class RefusalLog:
    """Decides which callbacks get a line. Times are seconds of a monotonic clock."""

    def __init__(self) -> None:
        self._ends_s = 0.0
        self._seen: Counter[str] = Counter()

    def is_over(self, now_s: float) -> bool:
        """Return whether no interval is under way."""
        return now_s >= self._ends_s

    def begin(self, now_s: float) -> None:
        """Begin an interval."""
        self._ends_s = now_s + INTERVAL_S

    def admits(self, result: str) -> bool:
        """Count a callback with this result; return whether it gets a line."""
        self._seen[result] += 1
        return self._seen[result] <= LINES

    def end(self) -> dict[str, int]:
        """End the interval; return how many callbacks of each result got no line in it."""
        self._ends_s = 0.0
        unlogged = {result: count - LINES for result, count in self._seen.items() if count > LINES}
        self._seen.clear()
        return unlogged
