"""DynamoDB table design: keys, items and indexes; converts values to items, and back. Pure.

One table. A task's items share the partition `T#<external_task_id>`:

    sk                    item                      queue (index `due`)       list (index `newest`)
    task                  the task: doc, version    -                         tasks#<shard>
    e#<sequence>          an event                  outbox#<shard>, until     -
                                                    its deliveries exist
    d#<hook>#<sequence>   a delivery, with a copy   due#<hook>#<shard> or     deliveries#<shard>
                          of its event              dead#<hook>#<shard>
    q#<digest>            a quarantined body        -                         quarantine#<shard>

Other partitions:

    pk                    sk                        item
    open#<shard>          <vendor>#<task>           an open task, or one with a poll: queue poll#<shard>
    V#<vendor>#<task_id>  task                      pointer from the vendor's task id to the task
    gate#<vendor>         gate                      optimistic lock for reservations with a limit
    hooks                 hook#<hook>, disabled#<hook>, paused#<hook>

Both indexes are sparse: an item without `queue` (or `list`) is not in them. `due` holds keys only,
`newest` also the attributes that it is filtered by. A task's shard is computed from a hash of its id
and stored with it. Shards spread an index's writes over several partitions.

A write is billed by each KB of the item that is begun, twice in a transaction. So the long texts (a task's `doc`, an
event's `body`) are compressed. Earlier versions stored them as strings, which are still read.
"""

import hashlib
import zlib
from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from submitter.event import Event
from submitter.ledger.base import Delivery, DeliveryState, Quarantined
from submitter.task import SETTLED, Task, TaskStatus

Item = dict[str, Any]
"""An item in DynamoDB JSON: {"name": {"S": "text"}, ...}."""

DAY_S = 86_400
PACK_FROM_BYTES = 400  # shorter texts save no KB

_tasks = msgspec.json.Decoder(Task)


def text(value: str) -> Item:
    """Return a string attribute."""
    return {"S": value}


def packed(content: bytes) -> Item:
    """Return UTF-8 text as an attribute: a string, or raw DEFLATE from PACK_FROM_BYTES."""
    if len(content) < PACK_FROM_BYTES:
        return text(content.decode())
    return {"B": b64encode(zlib.compress(content, wbits=-zlib.MAX_WBITS)).decode()}


def unpacked(attribute: Item) -> bytes:
    """Return the text of a `packed` attribute."""
    if "S" in attribute:
        return bytes(attribute["S"].encode())
    return zlib.decompress(b64decode(attribute["B"]), -zlib.MAX_WBITS)


def number(value: int) -> Item:
    """Return an integer attribute."""
    return {"N": str(value)}


def sortable(ms: int) -> str:
    """Return Unix milliseconds as a string that sorts by time."""
    return f"{ms:015d}"


def shard_of(external_task_id: str, shards: int) -> int:
    """Return the shard of a new task."""
    return int.from_bytes(hashlib.sha256(external_task_id.encode()).digest()[:4]) % shards


def key(pk: str, sk: str) -> Item:
    """Return an item's primary key."""
    return {"pk": text(pk), "sk": text(sk)}


def task_partition(external_task_id: str) -> str:
    """Return the partition key of a task's items."""
    return f"T#{external_task_id}"


def key_of(item: Item) -> Item:
    """Return the primary key of an item or of an index entry."""
    return {"pk": item["pk"], "sk": item["sk"]}


def task_key(external_task_id: str) -> Item:
    """Return the key of a task."""
    return key(task_partition(external_task_id), "task")


def gate_key(vendor: str) -> Item:
    """Return the key of a vendor's gate: the optimistic lock of its reservations with a limit."""
    return key(f"gate#{vendor}", "gate")


def delivery_key(delivery: Delivery) -> Item:
    """Return the key of a delivery."""
    event = delivery.event
    return key(task_partition(event.external_task_id), f"d#{delivery.hook}#{event.sequence:010d}")


def event_key(event: Event) -> Item:
    """Return the key of an event."""
    return key(task_partition(event.external_task_id), f"e#{event.sequence:010d}")


def open_task_key(task: Task, shard: int) -> Item:
    """Return the key of a task's open-task item."""
    return key(f"open#{shard}", f"{task.vendor}#{task.external_task_id}")


def pointer_key(vendor: str, task_id: str) -> Item:
    """Return the key of the pointer from a vendor's task id."""
    return key(f"V#{vendor}#{task_id}", "task")


def task_item(task: Task, *, version: int, write_id: str, shard: int, ttl_s: int | None) -> Item:
    """Return a task's item. A writer whose response was lost recognises its write by `write_id`."""
    id = task.external_task_id
    item = {
        **task_key(id),
        "doc": packed(msgspec.json.encode(task)),
        "version": number(version),
        "by": text(write_id),
        "shard": number(shard),
        "vendor": text(task.vendor),
        "status": text(task.status.value),
        "list": text(f"tasks#{shard}"),
        "made": text(f"{sortable(task.created_at_ms)}#{id}"),
    }
    if ttl_s is not None and task.status in SETTLED:
        item["ttl"] = number(task.updated_at_ms // 1000 + ttl_s)
    return item


def read_task(item: Item) -> Task:
    """Return the task in an item. Before `refused` was a status, a refused task was `created` with a flag."""
    doc = unpacked(item["doc"])
    task = _tasks.decode(doc)
    if task.status is TaskStatus.CREATED and b'"refused":true' in doc:
        return msgspec.structs.replace(task, status=TaskStatus.REFUSED)
    return task


def open_task_item(task: Task, shard: int, poll_at_ms: int | None) -> Item | None:
    """Return a task's open-task item, or None for a task that is neither open nor polled."""
    if not task.is_open and poll_at_ms is None:
        return None
    item = {**open_task_key(task, shard), "id": text(task.external_task_id), "status": text(task.status.value)}
    if task.is_open:
        item["open"] = text("yes")
    if task.task_id is not None:
        item["known"] = text("yes")
    if poll_at_ms is not None:
        item |= {"queue": text(f"poll#{shard}"), "at": text(sortable(poll_at_ms))}
    return item


def pointer_item(task: Task, ttl_s: int | None) -> Item | None:
    """Return the pointer from the vendor's task id, or None while that is unknown.

    It expires `ttl_s` after the task's deadline: no callback is expected later.
    """
    if task.task_id is None:
        return None
    item = {**pointer_key(task.vendor, task.task_id), "id": text(task.external_task_id)}
    return item if ttl_s is None else item | {"ttl": number(task.abandon_at_ms // 1000 + ttl_s)}


def event_item(event: Event, shard: int, *, in_outbox: bool = True) -> Item:
    """Return an event's item, in the outbox or not."""
    item = {**event_key(event), **_event_fields(event)}
    if in_outbox:
        item |= {"queue": text(f"outbox#{shard}"), "at": text(f"{sortable(event.time_ms)}#{event.sequence:010d}")}
    return item


def _event_fields(event: Event) -> Item:
    return {
        "id": text(event.id),
        "type": text(event.type),
        "task": text(event.external_task_id),
        "sequence": number(event.sequence),
        "time": number(event.time_ms),
        "body": packed(event.body),
    }


def read_event(item: Item) -> Event:
    """Return the event in an event's or a delivery's item."""
    return Event(
        item["id"]["S"],
        item["type"]["S"],
        item["task"]["S"],
        int(item["sequence"]["N"]),
        int(item["time"]["N"]),
        unpacked(item["body"]),
    )


def delivery_item(delivery: Delivery, shard: int, ttl_at_s: int | None = None) -> Item:
    """Return a delivery's item, with a copy of its event."""
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
        "made": text(listing_key(event)),
    }
    if delivery.state != "done":
        at = sortable(delivery.due_at_ms) if delivery.state == "due" else listing_key(event)
        item |= {"queue": text(delivery_queue(delivery.hook, delivery.state, shard)), "at": text(at)}
    return item if ttl_at_s is None else item | {"ttl": number(ttl_at_s)}


def listing_key(event: Event) -> str:
    """Return the sort key of an event's deliveries in the index `newest`."""
    return f"{sortable(event.time_ms)}#{event.external_task_id}#{event.sequence:010d}"


def delivery_queue(hook: str, state: DeliveryState, shard: int) -> str:
    """Return the queue in the index `due` of a hook's due or dead deliveries."""
    return f"{state}#{hook}#{shard}"


def read_delivery(item: Item) -> Delivery:
    """Return the delivery in an item. Its id is derived from the event and the hook."""
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
    """Return the quarantined body in an item."""
    return Quarantined(
        item["task"]["S"],
        item["vendor"]["S"],
        int(item["received"]["N"]),
        item["reason"]["S"],
        msgspec.convert(item["body"]["B"], bytes),
        int(item["times"]["N"]),
    )


def table_of(name: str) -> dict[str, Any]:
    """Return the parameters of CreateTable."""
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
