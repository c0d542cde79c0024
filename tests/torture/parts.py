"""The parts of `make torture`, and what a round of a part returns."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import msgspec


class Round(msgspec.Struct):
    """One round: what was done and seen (`counts`), and each broken promise in a sentence (`findings`).

    A count whose name begins with `max ` is combined with others by its maximum, every other one by its sum.
    """

    counts: Counter[str] = msgspec.field(default_factory=Counter)
    findings: list[str] = msgspec.field(default_factory=list)

    def add(self, other: "Round") -> None:
        """Include another round."""
        for name, count in other.counts.items():
            mine = self.counts[name]
            self.counts[name] = max(mine, count) if name.startswith("max ") else mine + count
        self.findings += other.findings


Part = Callable[[int, Path], Round]
"""Runs one round with a seed, in an empty folder. The same seed makes the same choices."""


class Missing(Exception):
    """A part cannot run on this machine; the reason says what is missing."""
