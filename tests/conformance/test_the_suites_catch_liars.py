"""Mutation tests of the conformance suites: wrong ledgers, destinations and vendors that the suites must catch."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from receiver.destinations.outcome import Outcome
from submitter.errors import SubmissionUnknown, Unintelligible, VendorRefused
from submitter.event import Event
from submitter.ledger.base import (
    Applied,
    Claimed,
    Delivery,
    Disabled,
    Quarantined,
    Record,
    Reserved,
    Settlement,
    Subscription,
)
from submitter.ledger.sqlite.ledger import SqliteLedger
from submitter.observation import Report
from submitter.task import Task, TaskStatus
from submitter.transition import Decide, Transition
from submitter.vendors.base import CreateRequest, Findings, HttpAnswer, HttpRequest, Query, Vendor
from submitter.vendors.novita import NOVITA_API
from submitter.vendors.rest import RestVendor
from tests.conformance.destinations import DistantPeer, DistantSuite
from tests.conformance.ledgers import LedgerSuite
from tests.conformance.vendors import VendorSuite


class ReservesTwice(SqliteLedger):
    async def reserve(self, task: Task, slots: int | None = None) -> Reserved | None:
        found = await super().reserve(task, slots)
        return None if found is None else Reserved(found.task, is_new=True)


class IgnoresSlots(SqliteLedger):
    async def reserve(self, task: Task, slots: int | None = None) -> Reserved | None:
        return await super().reserve(task)


class LosesEvents(SqliteLedger):
    async def events(self, external_task_id: str) -> list[Event]:
        return (await super().events(external_task_id))[:-1]


class GrantsEveryLease(SqliteLedger):
    """Reports every observation as applied."""

    async def apply(self, external_task_id: str, decide: Decide) -> Applied:
        applied = await super().apply(external_task_id, decide)
        return Applied(applied.task, applied.transition or Transition(applied.task))


class SwallowsErrors(SqliteLedger):
    async def apply(self, external_task_id: str, decide: Decide) -> Applied:
        try:
            return await super().apply(external_task_id, decide)
        except Exception:
            return Applied(await self.get("a"), None)


class ListsOldestFirst(SqliteLedger):
    async def tasks(self, **options: Any) -> list[Task]:
        return list(reversed(await super().tasks(**options)))


class LeasesNoPoll(SqliteLedger):
    async def claim_polls(self, now_ms: int, lease_ms: int, limit: int) -> Claimed[Task]:
        return await super().claim_polls(now_ms, 0, limit)


class LeasesNoDelivery(SqliteLedger):
    async def claim_deliveries(
        self, subscriptions: Sequence[Subscription], now_ms: int, lease_ms: int
    ) -> Claimed[Delivery]:
        return await super().claim_deliveries(subscriptions, now_ms, 0)


class IgnoresRoom(SqliteLedger):
    """Ignores a hook's capacity."""

    async def claim_deliveries(
        self, subscriptions: Sequence[Subscription], now_ms: int, lease_ms: int
    ) -> Claimed[Delivery]:
        unlimited = [msgspec.structs.replace(subscription, capacity=99) for subscription in subscriptions]
        return await super().claim_deliveries(unlimited, now_ms, lease_ms)


class BelievesTheLate(SqliteLedger):
    """Settles a delivery whose lease has been taken by another worker."""

    async def settle(self, delivery: Delivery, settlement: Settlement) -> bool:
        current = (await self.deliveries(hook=delivery.hook, state=None, limit=99))[-1]
        return await super().settle(msgspec.structs.replace(delivery, attempts=current.attempts), settlement)


class ForgetsWhy(SqliteLedger):
    """Drops the errors of deliveries."""

    async def settle(self, delivery: Delivery, settlement: Settlement) -> bool:
        return await super().settle(delivery, msgspec.structs.replace(settlement, error=""))


class NeverDisables(SqliteLedger):
    async def settle(self, delivery: Delivery, settlement: Settlement) -> bool:
        return await super().settle(delivery, msgspec.structs.replace(settlement, disable_endpoint=None))


class KeepsNoBytes(SqliteLedger):
    """Changes bytes of quarantined bodies."""

    async def quarantine(self, entry: Quarantined) -> None:
        await super().quarantine(msgspec.structs.replace(entry, body=entry.body.replace(b"\xff", b"?")))


class CountsTheDead(SqliteLedger):
    """Counts settled tasks too."""

    async def counts(self) -> dict[str, int]:
        ended = await self.tasks(status=TaskStatus.SUCCEED, limit=99)
        return {**await super().counts(), "task.succeed": len(ended)}


class SeesOnlyItself(SqliteLedger):
    """Does not notice changes by other processes."""

    def version(self) -> int:
        return 0

    async def wait_for_change(self, version: int, timeout_s: float | None) -> None:
        await super().wait_for_change(version, min(timeout_s or 1, 1))


class KnowsNoVendorsId(SqliteLedger):
    """Does not find tasks by the vendor's id."""

    async def by_task_ids(self, vendor: str, task_ids: Sequence[str]) -> list[Task]:
        return []


class StaysWhereItWas(SqliteLedger):
    """Counts a task at its first vendor after failover."""

    async def open_tasks(self, vendor: str) -> int:
        return int(vendor == "kling")


class HastensAll(SqliteLedger):
    """Makes the polls of another vendor's tasks due too."""

    async def make_due(self, vendor: str, now_ms: int) -> int:
        return await super().make_due(vendor, now_ms) + await super().make_due("kling", now_ms)


class KeepsNoOrder(SqliteLedger):
    """Ignores the order of deliveries."""

    async def claim_deliveries(
        self, subscriptions: Sequence[Subscription], now_ms: int, lease_ms: int
    ) -> Claimed[Delivery]:
        return await super().claim_deliveries(
            [msgspec.structs.replace(subscription, ordered=False) for subscription in subscriptions], now_ms, lease_ms
        )


class ForgetsPauses(SqliteLedger):
    async def pause(self, hook: str, until_ms: int | None, reason: str = "") -> None:
        return None


class CopiesHalf(SqliteLedger):
    """Copies tasks without their deliveries."""

    async def load(self, records: Sequence[Record]) -> None:
        await super().load([msgspec.structs.replace(record, deliveries=[]) for record in records])


class RemembersNoReason(SqliteLedger):
    """Drops the reason why a hook was disabled."""

    async def disabled(self) -> list[Disabled]:
        return [msgspec.structs.replace(entry, reason="") for entry in await super().disabled()]


class PrunesTheYoung(SqliteLedger):
    """Prunes tasks that are not old enough."""

    async def prune(self, before_ms: int, limit: int) -> int:
        return await super().prune(before_ms + 1, limit)


LIARS = [
    (CopiesHalf, "test_records_are_paged_and_loaded_into_an_empty_ledger"),
    (RemembersNoReason, "test_disable_is_visible_to_other_processes"),
    (PrunesTheYoung, "test_prune_deletes_old_ended_tasks_and_keeps_undelivered_ones"),
    (ForgetsPauses, "test_a_pause_is_visible_to_other_processes_until_it_ends"),
    (KeepsNoOrder, "test_an_ordered_hook_gets_the_events_of_a_task_one_at_a_time_in_sequence"),
    (KnowsNoVendorsId, "test_a_task_is_found_by_its_vendor_task_id"),
    (StaysWhereItWas, "test_failover_moves_a_task_to_the_slots_of_the_other_vendor"),
    (HastensAll, "test_make_due_makes_a_poll_due_for_each_open_task_of_a_vendor"),
    (ReservesTwice, "test_reserve_is_idempotent"),
    (IgnoresSlots, "test_reserve_never_exceeds_the_slots"),
    (LosesEvents, "test_a_state_change_and_its_event_are_stored_together"),
    (GrantsEveryLease, "test_a_send_lease_is_granted_to_one_submitter"),
    (SwallowsErrors, "test_an_exception_of_decide_is_raised_to_its_caller_only"),
    (ListsOldestFirst, "test_tasks_are_paged_newest_first"),
    (LeasesNoPoll, "test_a_poll_is_leased_to_one_worker_until_the_lease_expires"),
    (LeasesNoDelivery, "test_each_subscribed_hook_gets_one_delivery_per_event"),
    (LeasesNoDelivery, "test_an_expired_lease_is_claimed_again_and_a_late_settle_changes_nothing"),
    (IgnoresRoom, "test_a_hook_without_capacity_gets_nothing_and_delays_no_other"),
    (BelievesTheLate, "test_an_expired_lease_is_claimed_again_and_a_late_settle_changes_nothing"),
    (ForgetsWhy, "test_dead_letters_are_listed_and_replayed"),
    (NeverDisables, "test_a_gone_hook_is_disabled_until_replay_or_a_new_endpoint"),
    (KeepsNoBytes, "test_quarantine_stores_a_body_once_and_counts_its_repetitions"),
    (CountsTheDead, "test_counts_leave_out_ended_tasks"),
    (SeesOnlyItself, "test_wait_for_change_notices_another_process"),
]


@pytest.mark.parametrize(("liar", "promise"), LIARS, ids=lambda value: getattr(value, "__name__", ""))
async def test_a_ledger_that_breaks_a_promise_is_caught(liar: type[SqliteLedger], promise: str, tmp_path: Path) -> None:
    ledgers: list[SqliteLedger] = []

    def opened() -> SqliteLedger:
        ledgers.append(liar(tmp_path / "relay.db"))
        return ledgers[-1]

    def empty() -> SqliteLedger:
        ledgers.append(liar(tmp_path / "other.db"))
        return ledgers[-1]

    test = getattr(LedgerSuite(), promise)
    fixtures = {"opened": opened, "empty": empty}
    with pytest.raises((AssertionError, pytest.fail.Exception, ValueError)):
        await test(**{name: fixtures[name] for name in inspect.signature(test).parameters})
    for ledger in ledgers:
        await ledger.close()


class Liar:
    """A destination that reports every event as delivered and sends none; also its own peer."""

    def open(self, **settings: Any) -> "Liar":
        return self

    async def send(self, event: Event, now_s: float) -> Outcome:
        return Outcome(True, "")

    async def reach(self) -> str | None:
        return None

    async def close(self) -> None:
        return None

    async def arrived(self) -> list[str]:
        return []

    async def refuse(self) -> None:
        return None

    async def accept(self) -> None:
        return None

    async def away(self) -> None:
        return None

    async def back(self) -> None:
        return None


PROMISES = [name for name in dir(DistantSuite) if name.startswith("test_") and "never_used" not in name]


@pytest.mark.parametrize("promise", PROMISES)
async def test_a_destination_that_sends_nothing_is_caught(promise: str) -> None:
    peer: DistantPeer = Liar()
    with pytest.raises(AssertionError):
        await getattr(DistantSuite(), promise)(peer)


class Gullible(RestVendor, frozen=True):
    """Treats an unknown status as a failure."""

    def read_callback(self, body: bytes, now_s: float) -> Report | None:
        try:
            return super().read_callback(body, now_s)
        except Unintelligible:
            return Report("callback", TaskStatus.FAILED, "ca4ba8d8-2b6f-4f0c-9f4e-7b1d4f0f3a11")


class Crashing(RestVendor, frozen=True):
    """Assumes that every body has the documented structure."""

    def read_callback(self, body: bytes, now_s: float) -> Report | None:
        status = msgspec.json.decode(body)["payload"]["task"]["status"]
        return super().read_callback(body, now_s) if status else None


class Hopeful(RestVendor, frozen=True):
    """Treats every error answer to create as a definite refusal."""

    def read_create(self, answer: HttpAnswer) -> Report:
        try:
            return super().read_create(answer)
        except SubmissionUnknown as unknown:
            raise (unknown.refusal or unknown) from unknown


class Exact(RestVendor, frozen=True):
    """Does not accept numbers as strings."""

    def read_query(self, query: Query, answer: HttpAnswer, now_s: float) -> Findings:
        if b'"progress_percent":"' in answer.body:
            raise Unintelligible("a string")
        return super().read_query(query, answer, now_s)


class Strict(RestVendor, frozen=True):
    """Rejects unknown fields."""

    def read_callback(self, body: bytes, now_s: float) -> Report | None:
        if b"brand_new" in body:
            raise Unintelligible("an unknown field")
        return super().read_callback(body, now_s)


class Forgetful(RestVendor, frozen=True):
    """Sends no callback URL."""

    def create(self, create: CreateRequest, now_s: float) -> HttpRequest:
        return super().create(msgspec.structs.replace(create, callback_url=None), now_s)


class Talkative(RestVendor, frozen=True):
    """Shows its API key in repr()."""

    def __repr__(self) -> str:
        return f"Novita({self.api_key})"


class Careless(RestVendor, frozen=True):
    """Does not quote ids in URLs."""

    def queries(self, tasks: Sequence[Task], now_s: float) -> list[Query]:
        return [
            Query(HttpRequest("GET", f"{self.base_url}?task_id={task.task_id}", {}), (task,))
            for task in tasks
            if task.task_id
        ]


WRONG_VENDORS: list[tuple[type[RestVendor], str]] = [
    (Gullible, "test_a_vector_is_parsed_as_expected"),
    (Gullible, "test_an_unknown_status_is_unintelligible"),
    (Gullible, "test_a_missing_or_mistyped_field_never_changes_the_final_status"),
    (Crashing, "test_a_missing_or_mistyped_field_never_changes_the_final_status"),
    (Crashing, "test_any_callback_body_is_observed_quarantined_or_refused"),
    (Hopeful, "test_only_a_definite_refusal_is_a_refusal"),
    (Exact, "test_numbers_may_be_strings"),
    (Strict, "test_unknown_fields_are_ignored"),
    (Forgetful, "test_the_create_request_contains_every_field"),
    (Talkative, "test_the_create_request_contains_every_field"),
    (Careless, "test_every_task_is_in_one_query_and_ids_are_url_quoted"),
]


FAILURES = (AssertionError, KeyError, TypeError, VendorRefused, SubmissionUnknown, Unintelligible, msgspec.DecodeError)


@pytest.mark.parametrize(("wrong", "promise"), WRONG_VENDORS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_vendor_that_breaks_a_promise_is_caught(wrong: type[RestVendor], promise: str, tmp_path: Path) -> None:
    with pytest.raises((*FAILURES, pytest.fail.Exception)):
        run_one(wrong(NOVITA_API, "the-key", NOVITA_API.base_url), promise, tmp_path)
    run_one(RestVendor(NOVITA_API, "the-key", NOVITA_API.base_url), promise, tmp_path)  # the correct adapter passes


def run_one(adapter: Vendor, promise: str, tmp_path: Path) -> None:
    """Run one test of the suite with this adapter."""

    class Suite(VendorSuite):
        vendor = "novita"

        @classmethod
        def adapters(cls) -> list[Vendor]:
            return [adapter]

    run = getattr(Suite(), promise)
    wanted = list(inspect.signature(run).parameters)
    given: dict[str, Any] = {"adapter": adapter, "tmp_path": tmp_path, "count": 1_000}
    for vector in Suite.vectors().values() if "vector" in wanted else [None]:
        run(**{name: (vector if name == "vector" else given[name]) for name in wanted})
