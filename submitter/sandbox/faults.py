"""Fault injection settings of the sandbox. A rate is a probability from 0 to 1, drawn per create or callback."""

import random
from typing import Annotated, Literal

import msgspec

Rate = Annotated[float, msgspec.Meta(ge=0, le=1)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e9)]


class Faults(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The active faults, set by `--fault NAME=VALUE` or by `POST /sandbox/faults` with any of these fields.

    Callbacks and streams: `drop` loses one, `repeat` sends one twice, `reorder` sends a task's end
    before its `processing`, `forge` sends forged ones besides the true one (with a wrong URL, and with
    a wrong signature), `delay_s` delays each by seconds, `hang_up` closes the stream after an event.
    Create: `create_late` answers `late_s` seconds after accepting, `create_5xx` answers 500 after
    accepting, `create_never` accepts and does not answer, `create_failed` accepts and answers that the
    task has failed already, with `fail_reason`, `refuse` refuses every create for a reason:
    balance, permission, capacity, rate or maintenance. Results: `no_url` succeeds without a URL,
    `fail` fails with `fail_reason`, `forget` removes an ended task (queries for it get 404),
    `expire_s` is how many seconds a result can be downloaded. `seed` makes the draws repeatable.
    """

    drop: Rate = 0
    repeat: Rate = 0
    reorder: Rate = 0
    forge: Rate = 0
    delay_s: Seconds = 0
    create_late: Rate = 0
    late_s: Seconds = 5
    create_5xx: Rate = 0
    create_never: Rate = 0
    create_failed: Rate = 0
    refuse: Literal["", "balance", "permission", "capacity", "rate", "maintenance"] = ""
    no_url: Rate = 0
    fail: Rate = 0
    forget: Rate = 0
    hang_up: Rate = 0
    fail_reason: str = "the reference video shows no person"
    expire_s: Seconds = 30 * 86400
    seed: int = 1


class Dice:
    """Seeded random draws: the same seed gives the same faults."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)  # noqa: S311 - repeatable, not for cryptography

    def happens(self, rate: float) -> bool:
        """Return True with probability `rate`; a rate of 0 draws nothing."""
        return rate > 0 and self._random.random() < rate
