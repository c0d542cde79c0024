"""Values as DynamoDB's items, and back; the table's keys. Pure.

One table. All that belongs to a task shares its partition, `T#<external_task_id>`:

    sk                    item                      queue (index `due`)       list (index `newest`)
    task                  the task: doc, version                              tasks#<shard>
    e#<sequence>          an event                  outbox#<shard>, until     -
                                                    it is given to hooks
    d#<hook>#<sequence>   a delivery, whole with    due#<hook>#<shard> or     deliveries#<shard>
                          its event                 dead#<hook>#<shard>
    q#<digest>            a body in quarantine      -                         quarantine#<shard>

Beside it:

    pk                    sk                        item
    open#<shard>          <vendor>#<task>           a task that is open or is to be asked about: queue poll#<shard>
    V#<vendor>#<task_id>  task                      whose task that is
    gate#<vendor>         gate                      counts reservations with a limit: one at a time
    hooks                 hook#, disabled#, paused#<hook>

The two indexes hold keys only (`newest` also what it is filtered by), and are sparse. A shard is a
part of a hash of the task's id, kept with the task, so no partition gets all the writes.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from submitter.event import Event
from submitter.ledger.base import Delivery, DeliveryState, Quarantined
from submitter.task import SETTLED, Task

Item = dict[str, Any]
"""An item in DynamoDB's own JSON: {"name": {"S": "text"}, ...}."""

DAY_S = 86_400

_tasks = msgspec.json.Decoder(Task)


def text(value: str) -> Item:
    """Return a string as DynamoDB writes it."""
    return {"S": value}


def number(value: int) -> Item:
    """Return an integer as DynamoDB writes it."""
    return {"N": str(value)}


def moment(ms: int) -> str:
    """Return Unix milliseconds as a key that sorts."""
    return f"{ms:015d}"


def shard_of(external_task_id: str, shards: int) -> int:
    """Return the shard of a new task."""
    return int.from_bytes(hashlib.sha256(external_task_id.encode()).digest()[:4]) % shards


def key(pk: str, sk: str) -> Item:
    """Return an item's primary key."""
    return {"pk": text(pk), "sk": text(sk)}


def family(external_task_id: str) -> str:
    """Return the partition of a task."""
    return f"T#{external_task_id}"


def key_of(item: Item) -> Item:
    """Return an item's key, or an index's entry's."""
    return {"pk": item["pk"], "sk": item["sk"]}


def task_key(external_task_id: str) -> Item:
    """Return the key of a task."""
    return key(family(external_task_id), "task")


def gate_key(vendor: str) -> Item:
    """Return the key of a vendor's gate."""
    return key(f"gate#{vendor}", "gate")


def delivery_key(delivery: Delivery) -> Item:
    """Return the key of a delivery."""
    event = delivery.event
    return key(family(event.external_task_id), f"d#{delivery.hook}#{event.sequence:010d}")


def event_key(event: Event) -> Item:
    """Return the key of an event."""
    return key(family(event.external_task_id), f"e#{event.sequence:010d}")


def watch_key(task: Task, shard: int) -> Item:
    """Return the key under which a task is watched while it is open."""
    return key(f"open#{shard}", f"{task.vendor}#{task.external_task_id}")


def pointer_key(vendor: str, task_id: str) -> Item:
    """Return the key of what tells whose task a vendor's task is."""
    return key(f"V#{vendor}#{task_id}", "task")


def is_open(task: Task) -> bool:
    """Tell whether a task is between reservation and end."""
    return task.status not in SETTLED and not task.refused


def task_item(task: Task, *, version: int, by: str, shard: int, ttl_s: int | None) -> Item:
    """Return a task. `by` names the write that made this version, so that its writer knows it again."""
    id = task.external_task_id
    item = {
        **task_key(id),
        "doc": text(msgspec.json.encode(task).decode()),
        "version": number(version),
        "by": text(by),
        "shard": number(shard),
        "vendor": text(task.vendor),
        "status": text(task.status.value),
        "list": text(f"tasks#{shard}"),
        "made": text(f"{moment(task.created_at_ms)}#{id}"),
    }
    if ttl_s is not None and task.status in SETTLED:
        item["ttl"] = number(task.updated_at_ms // 1000 + ttl_s)
    return item


def read_task(item: Item) -> Task:
    """Return the task of its item."""
    return _tasks.decode(item["doc"]["S"])


def watch_item(task: Task, shard: int, poll_at_ms: int | None) -> Item | None:
    """Return what is watched of a task, or None when there is nothing to."""
    if not is_open(task) and poll_at_ms is None:
        return None
    item = {**watch_key(task, shard), "id": text(task.external_task_id), "status": text(task.status.value)}
    if is_open(task):
        item["open"] = text("yes")
    if task.task_id is not None:
        item["known"] = text("yes")
    if poll_at_ms is not None:
        item |= {"queue": text(f"poll#{shard}"), "at": text(moment(poll_at_ms))}
    return item


def pointer_item(task: Task, ttl_s: int | None) -> Item | None:
    """Return what tells whose task the vendor's is, once its id is known. It is of use until the task's deadline."""
    if task.task_id is None:
        return None
    item = {**pointer_key(task.vendor, task.task_id), "id": text(task.external_task_id)}
    return item if ttl_s is None else item | {"ttl": number(task.abandon_at_ms // 1000 + ttl_s)}


def event_item(event: Event, shard: int, *, routed: bool = False) -> Item:
    """Return an event; until it was given to hooks it is in the outbox."""
    item = {
        **event_key(event),
        **_event_fields(event),
    }
    if not routed:
        item |= {"queue": text(f"outbox#{shard}"), "at": text(f"{moment(event.time_ms)}#{event.sequence:010d}")}
    return item


def _event_fields(event: Event) -> Item:
    return {
        "id": text(event.id),
        "type": text(event.type),
        "task": text(event.external_task_id),
        "sequence": number(event.sequence),
        "time": number(event.time_ms),
        "body": text(event.body.decode()),
    }


def read_event(item: Item) -> Event:
    """Return the event of its item, or of its delivery's."""
    return Event(
        item["id"]["S"],
        item["type"]["S"],
        item["task"]["S"],
        int(item["sequence"]["N"]),
        int(item["time"]["N"]),
        item["body"]["S"].encode(),
    )


def delivery_item(delivery: Delivery, shard: int, ttl_at_s: int | None = None) -> Item:
    """Return a delivery, with its event."""
    event = delivery.event
    item = {
        **delivery_key(delivery),
        **_event_fields(event),
        "hook": text(delivery.hook),
        "state": text(delivery.state),
        "attempts": number(delivery.attempts),
        "due": number(delivery.due_at_ms),
        "error": text(delivery.last_error),
        "list": text(f"deliveries#{shard}"),
        "made": text(made_of(event)),
    }
    if delivery.state != "done":
        at = moment(delivery.due_at_ms) if delivery.state == "due" else made_of(event)
        item |= {"queue": text(place_of(delivery.hook, delivery.state, shard)), "at": text(at)}
    return item if ttl_at_s is None else item | {"ttl": number(ttl_at_s)}


def made_of(event: Event) -> str:
    """Return the key by which an event's deliveries are listed."""
    return f"{moment(event.time_ms)}#{event.external_task_id}#{event.sequence:010d}"


def place_of(hook: str, state: DeliveryState, shard: int) -> str:
    """Return the queue of the index `due` where a hook's deliveries are that are due, or dead."""
    return f"{state}#{hook}#{shard}"


def read_delivery(item: Item) -> Delivery:
    """Return the delivery of its item. Its id is the same wherever it is read."""
    event, hook = read_event(item), item["hook"]["S"]
    digest = hashlib.sha256(f"{event.id}\n{hook}".encode()).digest()
    state: DeliveryState = item["state"]["S"]
    return Delivery(
        int.from_bytes(digest[:6]),
        hook,
        event,
        state,
        int(item["attempts"]["N"]),
        int(item["due"]["N"]),
        item["error"]["S"],
    )


def read_quarantined(item: Item) -> Quarantined:
    """Return the body in quarantine of its item."""
    return Quarantined(
        item["task"]["S"],
        item["vendor"]["S"],
        int(item["received"]["N"]),
        item["reason"]["S"],
        msgspec.convert(item["body"]["B"], bytes),
        int(item["times"]["N"]),
    )


def table_of(name: str) -> dict[str, Any]:
    """Return the table, as CreateTable asks for it."""
    filtered = {"ProjectionType": "INCLUDE", "NonKeyAttributes": ["vendor", "status", "hook", "state"]}
    return {
        "TableName": name,
        "BillingMode": "PAY_PER_REQUEST",
        "AttributeDefinitions": [
            {"AttributeName": name, "AttributeType": "S"} for name in ("pk", "sk", "queue", "at", "list", "made")
        ],
        "KeySchema": _keys("pk", "sk"),
        "GlobalSecondaryIndexes": [
            {"IndexName": "due", "KeySchema": _keys("queue", "at"), "Projection": {"ProjectionType": "KEYS_ONLY"}},
            {"IndexName": "newest", "KeySchema": _keys("list", "made"), "Projection": filtered},
        ],
    }


def _keys(partition: str, sort: str) -> Sequence[Mapping[str, str]]:
    return [{"AttributeName": partition, "KeyType": "HASH"}, {"AttributeName": sort, "KeyType": "RANGE"}]
