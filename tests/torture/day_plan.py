"""What goes wrong in a simulated day, and when: drawn by the seed before the day begins."""

import random

import msgspec

HOUR_S = 3600.0
DAY_S = 24 * HOUR_S
END_S = 3 * DAY_S
"""When a day is checked: two days later, when every schedule is over."""

VENDORS = {"kling": 0.85, "novita": 0.15}
"""The share of each vendor: one whose API takes our id and signs its callbacks, and one without either."""

SUBMITTERS = ("submitter-a", "submitter-b")

RATES = {
    "kling.vendor.test": {"503": 0.002, "lost_request": 0.002, "lost_answer": 0.004, "hangs": 0.001, "refused": 0.002},
    "relay.test": {"503": 0.003, "lost_request": 0.004, "lost_answer": 0.006, "hangs": 0.001, "unreachable": 0.002},
    "hooks.test": {"500": 0.004, "lost_request": 0.003, "lost_answer": 0.006, "hangs": 0.002, "unreachable": 0.001},
    "media.test": {"500": 0.001, "lost_answer": 0.001},
}
RATES["novita.vendor.test"] = RATES["kling.vendor.test"]
"""How often a request to a host meets which trouble, at any time of the day."""

Span = tuple[float, float]


class Restart(msgspec.Struct, frozen=True):
    """A process stops, killed or in order, `after_s` after its first request after `at_s`; then it is `down_s` down."""

    at_s: float
    after_s: float
    down_s: float
    is_killed: bool


class Order(msgspec.Struct, frozen=True):
    """A task that a user wants at `at_s`. `repeat_after_s`: submitted again, by mistake, with the same id.

    `waits`: the user waits for the result. `patience`: how often it is submitted again after an error.
    """

    id: str
    vendor: str
    at_s: float
    repeat_after_s: float | None
    waits: bool
    patience: int


class Plan(msgspec.Struct, frozen=True):
    """The day: `outages` by host or by hook, `jumps` of the receiver's clock, `restarts` by process, `paces`."""

    orders: list[Order]
    outages: dict[str, list[tuple[Span, str]]]
    jumps: list[tuple[Span, float]]
    restarts: dict[str, list[Restart]]
    paces_s: list[float]
    gone_at_s: float

    def trouble(self, place: str, at_s: float) -> str | None:
        """Return the trouble of an outage at this time."""
        return next((kind for span, kind in self.outages.get(place, ()) if span[0] <= at_s < span[1]), None)


def draw(seed: int, tasks: int) -> Plan:
    """Draw the plan of a day."""
    dice = random.Random(f"plan-{seed}")

    def span(low_s: float, high_s: float) -> Span:
        start_s = dice.uniform(0, DAY_S - high_s)
        return start_s, start_s + dice.uniform(low_s, high_s)

    def restarts(count: int, *more: Restart) -> list[Restart]:
        drawn = [
            Restart(
                at_s=dice.uniform(600, DAY_S),
                after_s=dice.uniform(0, 0.3),
                down_s=dice.uniform(1, 90),
                is_killed=dice.random() < 0.8,
            )
            for _ in range(count)
        ]
        return sorted([*drawn, *more], key=lambda one: one.at_s)

    hook_troubles = ("500", "503", "429", "hangs", "unreachable", "refused", "lost_answer")
    down = Restart(dice.uniform(HOUR_S, DAY_S - 2 * HOUR_S), 0.0, HOUR_S, is_killed=True)
    return Plan(
        orders=_orders(dice, tasks),
        outages={
            "kling.vendor.test": [
                (span(300, 1200), dice.choice(("503", "hangs", "500"))),
                (span(HOUR_S, 3 * HOUR_S), dice.choice(("refused", "unreachable"))),
                (span(60, 600), "lost_answer"),
            ],
            "novita.vendor.test": [(span(300, 1800), dice.choice(("503", "refused", "unreachable", "lost_answer")))],
            "flaky": [(span(300, 2 * HOUR_S), dice.choice(hook_troubles)) for _ in range(5)],
        },
        jumps=[(span(1200, 2400), sign * HOUR_S) for sign in (1, -1)],
        restarts={name: restarts(15) for name in SUBMITTERS} | {"receiver": restarts(15, down)},
        paces_s=[dice.uniform(20, 200) for _ in range(24)],
        gone_at_s=dice.uniform(6 * HOUR_S, 20 * HOUR_S),
    )


def _orders(dice: random.Random, tasks: int) -> list[Order]:
    """Draw the orders: most of them over the whole day, some of them within two minutes."""
    burst_s = dice.uniform(HOUR_S, DAY_S - HOUR_S)
    orders = []
    for number in range(tasks):
        (vendor,) = dice.choices(list(VENDORS), list(VENDORS.values()))
        at_s = burst_s + dice.uniform(0, 120) if dice.random() < 0.02 else dice.uniform(0, DAY_S)
        repeats = dice.random() < 0.04
        orders.append(
            Order(
                id=f"order-{number}",
                vendor=vendor,
                at_s=at_s,
                repeat_after_s=dice.choice((0.01, 5.0, 70.0, HOUR_S)) * dice.uniform(0.5, 2) if repeats else None,
                waits=dice.random() < 0.01,
                patience=0 if dice.random() < 0.1 else 40,
            )
        )
    return sorted(orders, key=lambda order: order.at_s)
