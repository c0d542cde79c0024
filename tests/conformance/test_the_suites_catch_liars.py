"""The suites are proved: for each promise something that breaks it, and the test that notices."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from receiver.destinations.base import Outcome
from submitter.errors import SubmissionUnknown, Unintelligible, VendorRefused
from submitter.event import Event
from submitter.ledger.base import Applied, Claimed, Delivery, Disabled, Quarantined, Record, Reserved, Route, Settlement
from submitter.ledger.sqlite import SqliteLedger
from submitter.task import Decide, Report, Task, TaskStatus, Transition
from submitter.vendors.base import Findings, HttpAnswer, HttpRequest, Job, Query, Vendor
from submitter.vendors.novita import Novita
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
    async def claim_deliveries(self, routes: Sequence[Route], now_ms: int, lease_ms: int) -> Claimed[Delivery]:
        return await super().claim_deliveries(routes, now_ms, 0)


class IgnoresRoom(SqliteLedger):
    async def claim_deliveries(self, routes: Sequence[Route], now_ms: int, lease_ms: int) -> Claimed[Delivery]:
        roomy = [msgspec.structs.replace(route, room=99) for route in routes]
        return await super().claim_deliveries(roomy, now_ms, lease_ms)


class BelievesTheLate(SqliteLedger):
    async def settle(self, delivery: Delivery, settlement: Settlement) -> bool:
        current = (await self.deliveries(hook=delivery.hook, state=None, limit=99))[-1]
        return await super().settle(msgspec.structs.replace(delivery, attempts=current.attempts), settlement)


class ForgetsWhy(SqliteLedger):
    async def settle(self, delivery: Delivery, settlement: Settlement) -> bool:
        return await super().settle(delivery, msgspec.structs.replace(settlement, error=""))


class NeverDisables(SqliteLedger):
    async def settle(self, delivery: Delivery, settlement: Settlement) -> bool:
        return await super().settle(delivery, msgspec.structs.replace(settlement, disable_target=None))


class KeepsNoBytes(SqliteLedger):
    async def quarantine(self, entry: Quarantined) -> None:
        await super().quarantine(msgspec.structs.replace(entry, body=entry.body.replace(b"\xff", b"?")))


class CountsTheDead(SqliteLedger):
    async def counts(self) -> dict[str, int]:
        ended = await self.tasks(status=TaskStatus.SUCCEED, limit=99)
        return {**await super().counts(), "task.succeed": len(ended)}


class SeesOnlyItself(SqliteLedger):
    def mark(self) -> int:
        return 0

    async def changed(self, mark: int, timeout_s: float | None) -> None:
        await super().changed(mark, min(timeout_s or 1, 1))


class KnowsNoVendorsId(SqliteLedger):
    async def by_task_ids(self, vendor: str, task_ids: Sequence[str]) -> list[Task]:
        return []


class StaysWhereItWas(SqliteLedger):
    async def open_tasks(self, vendor: str) -> int:
        return int(vendor == "kling")


class HastensAll(SqliteLedger):
    async def hasten(self, vendor: str, now_ms: int) -> int:
        return await super().hasten(vendor, now_ms) + await super().hasten("kling", now_ms)


class KeepsNoOrder(SqliteLedger):
    async def claim_deliveries(self, routes: Sequence[Route], now_ms: int, lease_ms: int) -> Claimed[Delivery]:
        return await super().claim_deliveries(
            [msgspec.structs.replace(route, ordered=False) for route in routes], now_ms, lease_ms
        )


class ForgetsPauses(SqliteLedger):
    async def pause(self, hook: str, until_ms: int | None, reason: str = "") -> None:
        return None


class CopiesHalf(SqliteLedger):
    async def load(self, records: Sequence[Record]) -> None:
        await super().load([msgspec.structs.replace(record, deliveries=[]) for record in records])


class RemembersNoReason(SqliteLedger):
    async def disabled(self) -> list[Disabled]:
        return [msgspec.structs.replace(entry, reason="") for entry in await super().disabled()]


class PrunesTheYoung(SqliteLedger):
    async def prune(self, before_ms: int, limit: int) -> int:
        return await super().prune(before_ms + 1, limit)


LIARS = [
    (CopiesHalf, "test_whole_records_are_paged_and_loaded_into_an_empty_ledger"),
    (RemembersNoReason, "test_a_disabled_hook_can_be_noted"),
    (PrunesTheYoung, "test_pruning_takes_what_ended_long_ago_and_nothing_that_is_on_its_way"),
    (ForgetsPauses, "test_a_pause_is_seen_until_it_ends"),
    (KeepsNoOrder, "test_an_ordered_hook_gets_a_tasks_events_one_after_the_other"),
    (KnowsNoVendorsId, "test_a_task_is_found_by_the_vendors_id_for_it"),
    (StaysWhereItWas, "test_a_task_that_goes_to_another_vendor_counts_there"),
    (HastensAll, "test_a_vendors_open_tasks_can_all_be_made_due"),
    (ReservesTwice, "test_a_reservation_is_made_once"),
    (IgnoresSlots, "test_slots_are_never_overbooked"),
    (LosesEvents, "test_state_and_event_are_one"),
    (GrantsEveryLease, "test_a_lease_to_send_is_held_by_one"),
    (SwallowsErrors, "test_what_decide_raises_reaches_its_caller_alone"),
    (ListsOldestFirst, "test_tasks_are_paged_newest_first"),
    (LeasesNoPoll, "test_a_poll_is_claimed_by_one_until_its_lease_ends"),
    (LeasesNoDelivery, "test_an_event_goes_once_to_each_hook_that_wants_it"),
    (LeasesNoDelivery, "test_a_lost_delivery_is_claimed_again_and_the_late_end_of_the_first_counts_for_nothing"),
    (IgnoresRoom, "test_a_hook_without_room_gets_nothing_and_delays_no_other"),
    (BelievesTheLate, "test_a_lost_delivery_is_claimed_again_and_the_late_end_of_the_first_counts_for_nothing"),
    (ForgetsWhy, "test_dead_letters_are_kept_listed_and_replayed"),
    (NeverDisables, "test_a_hook_that_is_gone_is_disabled_until_it_is_replayed_or_moved"),
    (KeepsNoBytes, "test_a_body_in_quarantine_is_kept_once_and_counted"),
    (CountsTheDead, "test_counts_are_of_what_is_open"),
    (SeesOnlyItself, "test_a_change_by_another_process_is_seen"),
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
    """A peer, and a destination that says `delivered` of everything and sends nothing."""

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


class Gullible(Novita, frozen=True):
    """Takes a status that it does not know for a failure."""

    def read_callback(self, body: bytes, now_s: float) -> Report | None:
        try:
            return super().read_callback(body, now_s)
        except Unintelligible:
            return Report("callback", TaskStatus.FAILED, "ca4ba8d8-2b6f-4f0c-9f4e-7b1d4f0f3a11")


class Crashing(Novita, frozen=True):
    """Trusts the shape of what arrives."""

    def read_callback(self, body: bytes, now_s: float) -> Report | None:
        status = msgspec.json.decode(body)["payload"]["task"]["status"]
        return super().read_callback(body, now_s) if status else None


class Hopeful(Novita, frozen=True):
    """Takes every error of create for a refusal."""

    def read_create(self, answer: HttpAnswer) -> Report:
        try:
            return super().read_create(answer)
        except SubmissionUnknown as unknown:
            raise (unknown.refusal or unknown) from unknown


class Exact(Novita, frozen=True):
    """Reads numbers only as numbers."""

    def read_query(self, query: Query, answer: HttpAnswer, now_s: float) -> Findings:
        if b'"progress_percent":"' in answer.body:
            raise Unintelligible("a string")
        return super().read_query(query, answer, now_s)


class Strict(Novita, frozen=True):
    """Refuses fields that it does not know."""

    def read_callback(self, body: bytes, now_s: float) -> Report | None:
        if b"brand_new" in body:
            raise Unintelligible("an unknown field")
        return super().read_callback(body, now_s)


class Forgetful(Novita, frozen=True):
    """Sends no callback URL, and a fixed orientation."""

    def create(self, job: Job, now_s: float) -> HttpRequest:
        return super().create(msgspec.structs.replace(job, callback_url=None), now_s)


class Talkative(Novita, frozen=True):
    """Shows its key."""

    def __repr__(self) -> str:
        return f"Novita({self.api_key})"


class Careless(Novita, frozen=True):
    """Takes ids into URLs as they are."""

    def queries(self, tasks: Sequence[Task], now_s: float) -> list[Query]:
        return [
            Query(HttpRequest("GET", f"{self.base_url}?task_id={task.task_id}", {}), (task,))
            for task in tasks
            if task.task_id
        ]


WRONG_VENDORS: list[tuple[type[Novita], str]] = [
    (Gullible, "test_a_vector_means_what_it_says"),
    (Gullible, "test_a_status_that_is_not_known_is_no_end"),
    (Gullible, "test_a_field_that_is_missing_or_of_another_type_is_never_another_end"),
    (Crashing, "test_a_field_that_is_missing_or_of_another_type_is_never_another_end"),
    (Crashing, "test_whatever_arrives_is_an_observation_a_quarantine_or_a_refusal"),
    (Hopeful, "test_only_a_clear_no_is_a_no"),
    (Exact, "test_numbers_may_come_as_strings"),
    (Strict, "test_unknown_fields_change_nothing"),
    (Forgetful, "test_a_create_says_what_was_asked"),
    (Talkative, "test_a_create_says_what_was_asked"),
    (Careless, "test_every_task_is_in_one_query_and_ids_are_quoted"),
]


NOTICED = (AssertionError, KeyError, TypeError, VendorRefused, SubmissionUnknown, Unintelligible, msgspec.DecodeError)


@pytest.mark.parametrize(("wrong", "promise"), WRONG_VENDORS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_vendor_that_breaks_a_promise_is_caught(wrong: type[Novita], promise: str, tmp_path: Path) -> None:
    with pytest.raises((*NOTICED, pytest.fail.Exception)):
        hold_to(wrong("novita", "the-key", "https://api.novita.ai"), promise, tmp_path)
    hold_to(Novita("novita", "the-key", "https://api.novita.ai"), promise, tmp_path)  # the true one keeps it


def hold_to(adapter: Vendor, promise: str, tmp_path: Path) -> None:
    """Run one test of the suite with an adapter."""

    class Suite(VendorSuite):
        vendor = "novita"

        @classmethod
        def adapters(cls) -> list[Vendor]:
            return [adapter]

    run = getattr(Suite(), promise)
    wanted = list(inspect.signature(run).parameters)
    given: dict[str, Any] = {"adapter": adapter, "tmp_path": tmp_path}
    for vector in Suite.vectors().values() if "vector" in wanted else [None]:
        run(**{name: (vector if name == "vector" else given[name]) for name in wanted})
