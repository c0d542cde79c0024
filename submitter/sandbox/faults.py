"""What the sandbox does wrong on demand. Rates are from 0 to 1, drawn for each create or callback."""

import random
from typing import Literal

import msgspec


class Faults(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The faults that are on. Set by flags, or by `POST /sandbox/faults` with any of these fields.

    Callbacks and streams: `drop` loses one report, `repeat` sends one twice, `reorder` sends a
    task's end before its beginning, `forge` sends false ones beside the true (a wrong URL, and a
    wrong signature), `delay_s` holds each back, `hang_up` closes the stream after an event.
    Create: `create_late` answers `late_s` after accepting, `create_5xx` answers 500 after
    accepting, `create_never` accepts and does not answer; `refuse` names why every create is
    refused: balance, permission, capacity, rate or maintenance. Results: `no_url` succeeds
    without one, `fail` fails with `fail_reason`, `forget` drops a finished task (queries for it
    get 404), `expire_s` is how long a result can be fetched.
    """

    drop: float = 0
    repeat: float = 0
    reorder: float = 0
    forge: float = 0
    delay_s: float = 0
    create_late: float = 0
    late_s: float = 5
    create_5xx: float = 0
    create_never: float = 0
    refuse: Literal["", "balance", "permission", "capacity", "rate", "maintenance"] = ""
    no_url: float = 0
    fail: float = 0
    forget: float = 0
    hang_up: float = 0
    fail_reason: str = "the reference video shows no person"
    expire_s: float = 30 * 86400
    seed: int = 1


class Dice:
    """Draws by rates, repeatably."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)  # noqa: S311 - repeatable on purpose

    def falls(self, rate: float) -> bool:
        """Draw once with probability `rate`."""
        return rate > 0 and self._random.random() < rate
