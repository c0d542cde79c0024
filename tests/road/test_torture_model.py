"""`make torture`, part `model`, in short: the state machine agrees with its model, and catches wrong ledgers."""

from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from submitter.event import Event
from submitter.ledger.base import Claimed, Delivery, Quarantined, Settlement, Subscription
from submitter.ledger.sqlite.ledger import SqliteLedger
from submitter.task import RANK, Task, TaskStatus
from submitter.transition import Decide
from tests.conformance.aws_stand_ins import MINISTACK
from tests.conformance.brokers import is_listening
from tests.conformance.test_the_suites_catch_liars import (
    BelievesTheLate,
    CopiesHalf,
    CountsTheDead,
    ForgetsPauses,
    ForgetsWhy,
    GrantsEveryLease,
    HastensAll,
    IgnoresRoom,
    IgnoresSlots,
    KeepsNoOrder,
    LeasesNoDelivery,
    LeasesNoPoll,
    ListsOldestFirst,
    LosesEvents,
    NeverDisables,
    PrunesTheYoung,
    RemembersNoReason,
    ReservesTwice,
    StaysWhereItWas,
    SwallowsErrors,
)
from tests.conftest import needs
from tests.torture.engines import DynamoStore, PostgresStore, SqliteStore
from tests.torture.exploring import GENERATE, dynamodb, explore_store, short_sequences


def test_sqlite_agrees_with_the_model(tmp_path: Path) -> None:
    done = explore_store("SQLite", lambda: SqliteStore(tmp_path), 1, examples=20, steps=30)
    assert done.findings == []
    assert done.counts["steps on SQLite"] > 300


def test_short_sequences_of_observations_agree_with_the_model() -> None:
    assert short_sequences(3).findings == []


@pytest.mark.matrix
def test_postgresql_agrees_with_the_model() -> None:
    needs("PostgreSQL", is_there=is_listening(5432))
    assert explore_store("PostgreSQL", PostgresStore, 1, examples=10, steps=30).findings == []


@pytest.mark.matrix
@pytest.mark.xdist_group("aws")
def test_dynamodb_agrees_with_the_model(tmp_path: Path) -> None:
    needs("ministack (make install)", is_there=MINISTACK.exists())
    with dynamodb(tmp_path):
        assert explore_store("DynamoDB", DynamoStore, 1, examples=4, steps=20).findings == []


class LosesAnEventOfTheOutbox(SqliteLedger):
    """Takes an event out of the outbox without a delivery, as a worker that crashes between two transactions."""

    async def apply(self, external_task_id: str, decide: Decide) -> "object":  # type: ignore[override]
        applied = await super().apply(external_task_id, decide)
        if applied.task.sequence == 2:
            await self._write(lambda db: db.execute("UPDATE routed SET upto = (SELECT max(seq) FROM events)"))
        return applied


class CountsNoAttempts(SqliteLedger):
    """Stores no attempt, so that a late settle is taken for one of the present claim."""

    async def claim_deliveries(
        self, subscriptions: Sequence[Subscription], now_ms: int, lease_ms: int
    ) -> Claimed[Delivery]:
        claimed = await super().claim_deliveries(subscriptions, now_ms, lease_ms)
        await self._write(lambda db: db.execute("UPDATE deliveries SET attempts = min(attempts, 1)"))
        return claimed


class NeverClaimsAgain(SqliteLedger):
    """A lease that expires makes nothing due: what a crashed worker held is due for ever."""

    async def claim_deliveries(
        self, subscriptions: Sequence[Subscription], now_ms: int, lease_ms: int
    ) -> Claimed[Delivery]:
        claimed = await super().claim_deliveries(subscriptions, now_ms, lease_ms)
        items = [one for one in claimed.items if one.attempts == 1]
        return msgspec.structs.replace(claimed, items=items)


class SettlesWithoutAClaim(SqliteLedger):
    """Stores the outcome of a claim that was lost to another worker."""

    async def settle(self, delivery: Delivery, settlement: Settlement) -> bool:
        sql = "UPDATE deliveries SET attempts = ? WHERE id = ?"
        await self._write(lambda db: db.execute(sql, (delivery.attempts, delivery.id)))
        return await super().settle(delivery, settlement)


class PrunesTheDue(SqliteLedger):
    """Prunes ended tasks with what is still to be delivered."""

    async def prune(self, before_ms: int, limit: int) -> int:
        await self._write(lambda db: db.execute("DELETE FROM deliveries WHERE state = 'due'"))
        return await super().prune(before_ms, limit)


class DeliversTwice(SqliteLedger):
    """Makes the deliveries of the last event again, with other ids."""

    async def claim_deliveries(
        self, subscriptions: Sequence[Subscription], now_ms: int, lease_ms: int
    ) -> Claimed[Delivery]:
        def again(db: object) -> None:
            db.execute("DELETE FROM deliveries WHERE event_seq = (SELECT upto FROM routed)")  # type: ignore[attr-defined]
            db.execute("UPDATE routed SET upto = max(upto - 1, 0)")  # type: ignore[attr-defined]

        await self._write(again)
        return await super().claim_deliveries(subscriptions, now_ms, lease_ms)


class GivesEventsNewIds(SqliteLedger):
    """The id of an event differs from reader to reader."""

    async def events(self, external_task_id: str) -> list[Event]:
        found = await super().events(external_task_id)
        return [msgspec.structs.replace(event, id=f"{event.id}{id(self)}") for event in found]


class ForgetsAtRestart(SqliteLedger):
    """Answers reads from memory: another process sees none of the changes."""

    async def get_many(self, external_task_ids: Sequence[str]) -> list[Task]:
        known: dict[str, Task] = self.__dict__.setdefault("known", {})
        for task in await super().get_many(external_task_ids):
            known.setdefault(task.external_task_id, task)
        return [known[id] for id in external_task_ids if id in known]


class KeepsEveryBody(SqliteLedger):
    """Counts each body of the quarantine as another task's, so that none makes room."""

    async def quarantine(self, entry: Quarantined) -> None:
        row = (entry.external_task_id, entry.digest, entry.vendor, entry.received_at_ms, entry.reason, entry.body)
        sql = "INSERT OR REPLACE INTO quarantine VALUES (?, ?, ?, ?, ?, ?, 1)"
        await self._write(lambda db: db.execute(sql, row))


LIARS = [
    LosesAnEventOfTheOutbox,
    CountsNoAttempts,
    NeverClaimsAgain,
    SettlesWithoutAClaim,
    PrunesTheDue,
    DeliversTwice,
    GivesEventsNewIds,
    ForgetsAtRestart,
    KeepsEveryBody,
    pytest.param(BelievesTheLate, marks=pytest.mark.matrix),
    pytest.param(CopiesHalf, marks=pytest.mark.matrix),
    pytest.param(CountsTheDead, marks=pytest.mark.matrix),
    pytest.param(ForgetsPauses, marks=pytest.mark.matrix),
    pytest.param(ForgetsWhy, marks=pytest.mark.matrix),
    pytest.param(GrantsEveryLease, marks=pytest.mark.matrix),
    pytest.param(HastensAll, marks=pytest.mark.matrix),
    pytest.param(IgnoresRoom, marks=pytest.mark.matrix),
    pytest.param(IgnoresSlots, marks=pytest.mark.matrix),
    pytest.param(KeepsNoOrder, marks=pytest.mark.matrix),
    pytest.param(LeasesNoDelivery, marks=pytest.mark.matrix),
    pytest.param(LeasesNoPoll, marks=pytest.mark.matrix),
    pytest.param(ListsOldestFirst, marks=pytest.mark.matrix),
    pytest.param(LosesEvents, marks=pytest.mark.matrix),
    pytest.param(NeverDisables, marks=pytest.mark.matrix),
    pytest.param(PrunesTheYoung, marks=pytest.mark.matrix),
    pytest.param(RemembersNoReason, marks=pytest.mark.matrix),
    pytest.param(ReservesTwice, marks=pytest.mark.matrix),
    pytest.param(StaysWhereItWas, marks=pytest.mark.matrix),
    pytest.param(SwallowsErrors, marks=pytest.mark.matrix),
]


@pytest.mark.parametrize("liar", LIARS)
def test_a_wrong_ledger_is_caught(liar: type[SqliteLedger], tmp_path: Path) -> None:
    done = explore_store("SQLite", lambda: SqliteStore(tmp_path, liar), 1, examples=200, steps=40, phases=GENERATE)
    print(done.counts["examples on SQLite"], "\n".join(done.findings)[:300])
    assert len(done.findings) == 1


def test_a_state_machine_that_leaves_a_final_status_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RANK, TaskStatus.FAILED, 3)
    findings = short_sequences(2).findings
    assert any("is final, and became" in finding for finding in findings)
