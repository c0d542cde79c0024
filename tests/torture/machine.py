"""The state machine: any order of what submitters, receivers, pollers, workers and people do to one ledger.

Few ids, hooks, vendors and owners, so that they meet. Each step runs on the ledger and on its model
(`checked_ledger`); then everything is read back and compared.
"""

from collections import Counter
from collections.abc import Callable

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from submitter.ledger.base import Settlement, Subscription
from submitter.task import TaskStatus
from tests.torture.checked_ledger import CheckedLedger
from tests.torture.comparison import Broken
from tests.torture.engines import Store
from tests.torture.observations import REPORTED, START_MS, VENDORS, Seen, observations, report

IDS = st.sampled_from(["a", "b", "c"])
HANDLES = st.integers(0, 1)
CAPACITIES = st.tuples(*[st.sampled_from([3, 1, 2, 0])] * 3)
LEASES = st.sampled_from([1_000, 60_000])
INDEX = st.integers(0, 9)
HOOKS = [
    Subscription("all", None, "endpoint-1", 0),
    Subscription("ends", frozenset({"task.succeed", "task.failed", "task.archived"}), "endpoint-1", 0),
    Subscription("bus", None, "endpoint-1", 0, ordered=True),
]
HOOK_NAMES = st.sampled_from([hook.hook for hook in HOOKS])
OUTCOMES = ["done", "done", "done", "due", "due now", "dead", "gone", "done and gone"]
A_DAY_MS = 86_400_000
COPIES_MAX = 2  # a copy ends every claim that is held, and is slow
CLAIMS_MAX = 200
"""More claims than an example can have deliveries."""


class LedgerMachine(RuleBasedStateMachine):
    """The rules; a subclass has the store. `counts` outlives the examples."""

    new_store: Callable[[], Store]
    counts: Counter[str]

    def __init__(self) -> None:
        super().__init__()
        self.now_ms = START_MS
        self.copies, self.endpoints = 0, 1
        self.both = CheckedLedger(type(self).new_store(), HOOKS, self.counts)
        self.counts["examples"] += 1

    def teardown(self) -> None:
        try:
            if self.both.is_sound:
                self._deliver_everything()
        finally:
            self.both.close()

    @invariant()
    def everything_is_as_the_model_says(self) -> None:
        self.both.check_all()
        self.counts["steps"] += 1

    # -- tasks --------------------------------------------------------------------------------

    @initialize(id=IDS, statuses=st.lists(st.sampled_from(REPORTED), max_size=3))
    def begin(self, id: str, statuses: list[TaskStatus]) -> None:
        self.both.reserve(0, id, "kling", "x", None, self.now_ms)
        self.report(1, 0, statuses)

    @rule(
        which=HANDLES,
        id=IDS,
        vendor=st.sampled_from(VENDORS),
        request=st.sampled_from(["x", "y"]),
        slots=st.sampled_from([None, None, 1, 2]),
    )
    def reserve(self, which: int, id: str, vendor: str, request: str, slots: int | None) -> None:
        self.both.reserve(which, id, vendor, request, slots, self.now_ms)

    def _some_id(self, index: int) -> str:
        ids = sorted(self.both.model.tasks)
        return ids[index % len(ids)]

    @precondition(lambda self: self.both.model.tasks)
    @rule(which=HANDLES, index=INDEX, seen=st.lists(observations(), min_size=1, max_size=4))
    def observe(self, which: int, index: int, seen: list[Seen]) -> None:
        for one in seen:
            self.now_ms += 1
            self.both.apply(which, self._some_id(index), one, self.now_ms)
            self.counts["observations"] += 1
        if len(seen) == 1:
            self.both.refuse_decision(which, self._some_id(index))

    @precondition(lambda self: self.both.model.tasks)
    @rule(which=HANDLES, index=INDEX, seen=observations())
    def observe_again(self, which: int, index: int, seen: Seen) -> None:
        for handle in (which, 1 - which):
            self.both.apply(handle, self._some_id(index), seen, self.now_ms)

    @precondition(lambda self: self.both.model.tasks)
    @rule(index=INDEX, seen=st.tuples(observations(), observations()))
    def observe_at_once(self, index: int, seen: tuple[Seen, Seen]) -> None:
        self.both.apply_two(self._some_id(index), seen, self.now_ms)

    @precondition(lambda self: self.both.model.tasks)
    @rule(which=HANDLES, index=INDEX, statuses=st.lists(st.sampled_from(REPORTED), min_size=1, max_size=3))
    def report(self, which: int, index: int, statuses: list[TaskStatus]) -> None:
        self.observe(which, index, [Seen(report("callback", status)) for status in statuses])

    # -- polls --------------------------------------------------------------------------------

    @rule(which=HANDLES, lease_ms=LEASES, limit=st.sampled_from([1, 2, 10]))
    def claim_polls(self, which: int, lease_ms: int, limit: int) -> None:
        self.both.claim_polls(which, self.now_ms, lease_ms, limit)

    @rule(which=HANDLES, vendor=st.sampled_from(VENDORS))
    def make_due(self, which: int, vendor: str) -> None:
        self.both.make_due(which, vendor, self.now_ms)

    # -- deliveries ---------------------------------------------------------------------------

    @rule(which=HANDLES, capacities=CAPACITIES, lease_ms=LEASES)
    def claim_deliveries(self, which: int, capacities: tuple[int, ...], lease_ms: int) -> None:
        self.counts["deliveries claimed"] += self.both.claim(which, capacities, self.now_ms, lease_ms)

    @rule(capacities=CAPACITIES, lease_ms=LEASES)
    def claim_deliveries_at_once(self, capacities: tuple[int, ...], lease_ms: int) -> None:
        self.both.claim_two(capacities, self.now_ms, lease_ms)

    @rule(which=HANDLES, capacities=CAPACITIES)
    def claim_after_a_lease(self, which: int, capacities: tuple[int, ...]) -> None:
        """A worker is slow or crashes, and another one claims what it held; both may settle later."""
        for worker in (which, 1 - which):
            self.claim_deliveries(worker, capacities, 1_000)
            self.now_ms += 1_000
        if self.both.claims:
            self.settle(which, 0, ["done"])

    @precondition(lambda self: self.both.claims)
    @rule(which=HANDLES, index=INDEX, outcomes=st.lists(st.sampled_from(OUTCOMES), min_size=1, max_size=4))
    def settle(self, which: int, index: int, outcomes: list[str]) -> None:
        for outcome in outcomes[: len(self.both.claims)]:
            self._settle(which, index, outcome)

    def _settle(self, which: int, index: int, outcome: str) -> None:
        claim = self.both.claims.pop(index % len(self.both.claims))
        endpoint = next(hook.endpoint_fingerprint for hook in self.both.hooks if hook.hook == claim.delivery.hook)
        settlements = {
            "done": Settlement("done"),
            "due": Settlement("due", self.now_ms + 5_000, "HTTP 503"),
            "due now": Settlement("due", self.now_ms, "HTTP 429"),
            "dead": Settlement("dead", error="HTTP 400"),
            "gone": Settlement("dead", error="HTTP 410", disable_endpoint=endpoint),
            "done and gone": Settlement("done", error="HTTP 410", disable_endpoint=endpoint),
        }
        self.both.settle(which, claim, settlements[outcome])
        self.counts["settles"] += 1

    @rule(which=HANDLES, hook=HOOK_NAMES, id=st.none() | IDS)
    def replay(self, which: int, hook: str, id: str | None) -> None:
        self.both.replay(which, hook, self.now_ms, id)

    @rule(which=HANDLES, capacities=CAPACITIES, outcomes=st.lists(st.sampled_from(OUTCOMES), min_size=1, max_size=4))
    def work(self, which: int, capacities: tuple[int, ...], outcomes: list[str]) -> None:
        """A worker claims, sends, and settles each delivery in turn."""
        claimed = self.both.claim(which, capacities, self.now_ms, 60_000)
        self.counts["deliveries claimed"] += claimed
        for number in range(claimed):
            self._settle(which, len(self.both.claims) - claimed + number, outcomes[number % len(outcomes)])

    # -- maintenance --------------------------------------------------------------------------

    @rule(which=HANDLES, id=IDS, bodies=st.lists(st.integers(0, 7), min_size=1, max_size=8))
    def quarantine(self, which: int, id: str, bodies: list[int]) -> None:
        for body in bodies:
            self.now_ms += 1
            self.both.quarantine(which, id, b"\xff%d" % body, self.now_ms)

    @rule(
        which=HANDLES,
        is_delivered=st.booleans(),
        age_ms=st.sampled_from([-1, 0, 1, 60_000]),
        limit=st.sampled_from([100, 1]),
    )
    def prune(self, which: int, is_delivered: bool, age_ms: int, limit: int) -> None:
        if is_delivered:
            self._deliver_everything()
        before = len(self.both.model.tasks)
        self.both.prune(which, self.now_ms - age_ms, limit)
        self.counts["pruned"] += before - len(self.both.model.tasks)

    @rule(which=HANDLES, what=st.sampled_from(["restart", "pause", "resume", "move"]), hook=st.sampled_from(HOOKS))
    def change_the_surroundings(self, which: int, what: str, hook: Subscription) -> None:
        """A process starts again, a circuit breaker opens or closes, or a hook moves to another endpoint."""
        self.counts[what] += 1
        match what:
            case "restart":
                self.both.reopen(which)
            case "move":
                self.endpoints += 1
                self.both.move_hook(hook.hook, f"endpoint-{self.endpoints}")
            case _:
                self.both.pause(which, hook.hook, self.now_ms + 5_000 if what == "pause" else None)

    @precondition(lambda self: self.copies < COPIES_MAX and self.both.model.deliveries)
    @rule()
    def copy_to_another_store(self) -> None:
        self.both.move_to_copy(self.now_ms)
        self.copies += 1
        self.counts["copies"] += 1

    @rule(ms=st.sampled_from([1, 999, 1_000, 5_000, 60_000, 3_600_000, A_DAY_MS]))
    def pass_time(self, ms: int) -> None:
        self.now_ms += ms

    def _deliver_everything(self) -> None:
        """Every lease expires, and a worker that never fails delivers what is left: nothing may stay due."""
        self.now_ms += A_DAY_MS
        for number in range(CLAIMS_MAX):
            claimed = self.both.claim(number % 2, [3] * len(HOOKS), self.now_ms, 60_000)
            for claim in self.both.claims[len(self.both.claims) - claimed :]:
                self.both.settle(number % 2, claim, Settlement("done"))
            self.counts["deliveries claimed"] += claimed
            if not claimed:
                break
        left = [key for key, one in self.both.model.deliveries.items() if one.state == "due"]
        if left:
            raise Broken(f"due for ever: {left}")
        self.both.check_all()
