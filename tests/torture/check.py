"""The rules that no crash may break, checked against what the vendor, the hooks and the store have. Pure.

A state never goes back, but for a refused task, which starts again when it is submitted again.
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import msgspec

from tests.torture.store import Stored, StoredEvent, StoredTask

RANK = {
    "created": 0, "submission_unknown": 1, "submitted": 2, "processing": 3,
    "abandoned": 4, "refused": 4, "succeed": 5, "failed": 5,
}  # fmt: skip


class VendorTask(msgspec.Struct, frozen=True):
    """A task that the vendor created: its truth. `status` is succeed, failed or anything else while it works."""

    external_task_id: str
    task_id: str
    status: str


class Acknowledged(msgspec.Struct, frozen=True):
    """A callback that the receiver answered 2xx at `at_ms`, with the status that it reported."""

    external_task_id: str
    status: str
    at_ms: int


class Received(msgspec.Struct, frozen=True):
    """A request that an HTTP hook received: its `webhook-id`, and its body."""

    hook: str
    id: str
    body: bytes


class Seen(msgspec.Struct, frozen=True):
    """What everyone outside saw. `hooks` get every event; `archive` has the copies by their path, if there is one."""

    vendor: Sequence[VendorTask]
    acknowledged: Sequence[Acknowledged]
    received: Sequence[Received]
    hooks: Sequence[str]
    archive: Mapping[str, bytes] | None = None


def check(stored: Stored, seen: Seen) -> list[str]:
    """Return a sentence for each broken rule; an empty list if all hold. The store must be settled."""
    return [*_tasks(stored, seen), *_events(stored), *_acknowledged(stored, seen), *_hooks(stored, seen)]


def _tasks(stored: Stored, seen: Seen) -> Iterator[str]:
    created = Counter(task.external_task_id for task in seen.vendor)
    for id, count in created.items():
        if count > 1:
            yield f"the vendor has {count} tasks of {id}: it was paid for more than once"
    for theirs in seen.vendor:
        ours = stored.tasks.get(theirs.external_task_id)
        if ours is None:
            yield f"the vendor has {theirs.task_id} of {theirs.external_task_id}, and the ledger has no such task"
        elif (ours.task_id, ours.status) != (theirs.task_id, theirs.status):
            yield (
                f"{ours.external_task_id} is {ours.status} as {ours.task_id}, and at the vendor {theirs.status} as"
                f" {theirs.task_id}"
            )
        elif ours.status == "succeed" and seen.archive is not None:
            yield from _archived(ours, seen.archive)
    for id, task in stored.tasks.items():
        if id not in created and task.status not in ("refused", "created"):
            yield f"{id} is {task.status}, and the vendor has no such task"


def _archived(task: StoredTask, archive: Mapping[str, bytes]) -> Iterator[str]:
    content = archive.get(f"{task.external_task_id}/0.mp4")
    copy = task.doc["videos"][0].get("archived")
    if content is None or copy is None:
        yield f"{task.external_task_id} succeeded, and its result is not archived"
    elif hashlib.sha256(content).hexdigest() != copy["sha256"]:
        yield f"{task.external_task_id}'s archived copy is not what its SHA-256 says"


def _events(stored: Stored) -> Iterator[str]:
    by_task: dict[str, list[StoredEvent]] = defaultdict(list)
    for event in stored.events:
        by_task[event.external_task_id].append(event)
    for id, count in Counter(event.id for event in stored.events).items():
        if count > 1:
            yield f"{count} events have the id {id}"
    for id in set(by_task) - set(stored.tasks):
        yield f"there are events of {id}, and no such task"
    for id, task in stored.tasks.items():
        events = sorted(by_task[id], key=lambda event: event.sequence)
        if [event.sequence for event in events] != list(range(1, len(events) + 1)):
            yield f"the events of {id} have the sequences {[event.sequence for event in events]}"
        states = [event.type.removeprefix("task.") for event in events if event.type != "task.archived"]
        if not all(RANK[before] < RANK[after] or before == "refused" for before, after in pairwise(states)):
            yield f"{id} went through {states}"
        if (states[-1] if states else "created") != task.status:
            yield f"{id} is {task.status}, and its last event is {states[-1:]}"
        for event in events:
            body = json.loads(event.body)
            if (body["id"], body["subject"], body["type"]) != (event.id, id, event.type):
                yield f"the body of event {event.id} speaks of {body['type']} of {body['subject']}"


def _acknowledged(stored: Stored, seen: Seen) -> Iterator[str]:
    """A 2xx is a promise: the state that it reported, or a later one, was durable by then."""
    known: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for event in stored.events:
        known[event.external_task_id].append((event.time_ms, RANK.get(event.type.removeprefix("task."), 0)))
    for ack in seen.acknowledged:
        rank = RANK[ack.status]
        if not any(time_ms <= ack.at_ms and reached >= rank for time_ms, reached in known[ack.external_task_id]):
            yield f"the callback {ack.status} of {ack.external_task_id} was acknowledged at {ack.at_ms}, and is lost"


def _hooks(stored: Stored, seen: Seen) -> Iterator[str]:
    bodies = {event.id: event.body.encode() for event in stored.events}
    arrived: dict[str, set[str]] = {hook: set() for hook in seen.hooks}
    for request in seen.received:
        arrived[request.hook].add(request.id)
        if request.id not in bodies:
            yield f"hook {request.hook} got event {request.id}, which the ledger does not have"
        elif request.body != bodies[request.id]:
            yield f"hook {request.hook} got event {request.id} with another body than the stored one"
    for hook, ids in arrived.items():
        for id in bodies.keys() - ids:
            yield f"hook {hook} never got event {id}"
    deliveries = Counter((delivery.event_seq, delivery.hook) for delivery in stored.deliveries)
    for event in stored.events:
        for hook in seen.hooks:
            if deliveries[event.seq, hook] != 1:
                yield f"event {event.id} has {deliveries[event.seq, hook]} deliveries to hook {hook}"
    for delivery in stored.deliveries:
        if delivery.state != "done":
            yield f"delivery of event {delivery.event_seq} to {delivery.hook} is {delivery.state}"
