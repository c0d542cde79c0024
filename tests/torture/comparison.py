"""Reads a whole ledger through one process, and compares it with the model."""

import asyncio
from collections.abc import Iterable, Mapping, Sequence

from submitter.ledger import Ledger
from submitter.ledger.base import Subscription
from submitter.task import Task
from tests.torture.ledger_model import Key, LedgerModel, key_of
from tests.torture.observations import VENDORS, differences

MANY = 1_000
"""More of anything than an example can have."""


class Broken(AssertionError):
    """A ledger broke a promise; the message says which one."""


def check(what: str, found: object, expected: object) -> None:
    if found != expected:
        raise Broken(f"{what}: {found!r} instead of {expected!r}")


class Comparison:
    """Compares, and remembers the ids of deliveries: they never change."""

    def __init__(self) -> None:
        self._delivery_ids: dict[Key, int] = {}

    def forget(self, external_task_ids: Iterable[str]) -> None:
        """Forget the deliveries of pruned tasks."""
        gone = set(external_task_ids)
        self._delivery_ids = {key: id for key, id in self._delivery_ids.items() if key[1] not in gone}

    async def compare(
        self, ledger: Ledger, model: LedgerModel, stored: Mapping[str, Task], hooks: Sequence[Subscription]
    ) -> None:
        """Raise Broken for the first difference."""
        await asyncio.gather(
            _compare_tasks(ledger, model, stored),
            self._compare_deliveries(ledger, model),
            _compare_hooks(ledger, model, hooks),
            _compare_the_rest(ledger, model),
        )

    async def _compare_deliveries(self, ledger: Ledger, model: LedgerModel) -> None:
        found = await ledger.deliveries(hook=None, state=None, limit=MANY)
        shown = {key_of(one): _facts(one.state, one.attempts, one.due_at_ms, one.last_error) for one in found}
        check("deliveries of the same event to the same hook", len(found), len(shown))
        check("the deliveries", sorted(shown), sorted(model.deliveries))
        expected = {
            key: _facts(one.state, one.attempts, one.due_at_ms, shown[key][-1] if one.error is None else one.error)
            for key, one in model.deliveries.items()
        }
        for key, facts in expected.items():
            check(f"delivery {key} (state, attempts, due at, error)", shown[key], facts)
        for one in found:
            check(f"the id of delivery {key_of(one)}", one.id, self._delivery_ids.setdefault(key_of(one), one.id))


async def _compare_tasks(ledger: Ledger, model: LedgerModel, stored: Mapping[str, Task]) -> None:
    ids = sorted(model.tasks)
    tasks, all_ids, newest = await asyncio.gather(
        ledger.get_many(ids), ledger.ids(None, MANY), ledger.tasks(limit=MANY)
    )
    check("the stored tasks", {task.external_task_id: task for task in tasks}, dict(stored))
    check("the ids", sorted(all_ids), ids)
    order = sorted(stored.values(), key=lambda one: (one.created_at_ms, one.external_task_id), reverse=True)
    check("the newest tasks", newest, order)
    for id in ids:
        check(f"the fields of {id} (expected, found)", differences(model.tasks[id], stored[id]), {})
        check(f"the events of {id}", await ledger.events(id), model.events[id])
    for vendor in VENDORS:
        check(f"the open tasks of {vendor}", await ledger.open_tasks(vendor), model.open_tasks(vendor))


async def _compare_hooks(ledger: Ledger, model: LedgerModel, hooks: Sequence[Subscription]) -> None:
    for hook, state in zip(hooks, await ledger.hook_states(hooks), strict=True):
        reason = model.disabled[hook.hook][1] if model.is_disabled(hook) else None
        due, dead = (len(model.of_hook(hook.hook, one)) for one in ("due", "dead"))
        until_ms, why = model.paused.get(hook.hook, (0, None))
        found = (state.hook, state.due, state.dead, state.disabled, state.paused, state.paused_until_ms)
        check(f"the state of hook {hook.hook}", found, (hook.hook, due, dead, reason, why, until_ms))
    disabled = [(one.hook, (one.endpoint_fingerprint, one.reason)) for one in await ledger.disabled()]
    check("the disabled hooks", disabled, sorted(model.disabled.items()))


async def _compare_the_rest(ledger: Ledger, model: LedgerModel) -> None:
    counts = {name: count for name, count in (await ledger.counts()).items() if count}
    check("the counts", counts, model.counts())
    found = {(one.external_task_id, one.body): one.times for one in await ledger.quarantined(MANY)}
    expected = {(id, body): times for id, of in model.quarantine.items() for body, times in of.times.items()}
    check("the quarantine", found, expected)


def _facts(state: str, attempts: int, due_at_ms: int, error: str) -> tuple[str, int, int | None, str]:
    """Return what is promised of a delivery in its state."""
    return state, attempts, due_at_ms if state == "due" else None, "" if state == "done" else error
