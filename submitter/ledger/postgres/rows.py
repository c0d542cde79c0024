"""Converts tasks, events and deliveries to PostgreSQL rows, and back."""

from collections.abc import Iterable, Sequence
from typing import Any

import asyncpg
import msgspec

from submitter.event import Event
from submitter.ledger.base import Delivery, Record, Subscription
from submitter.task import Task

_tasks = msgspec.json.Decoder(Task)
Rows = list[tuple[Any, ...]]


def record_rows(records: Sequence[Record]) -> tuple[Rows, Rows, Rows]:
    """Return records as rows of the tables tasks, events and deliveries."""
    tasks: Rows = []
    events: Rows = []
    deliveries: Rows = []
    for record in records:
        vendor, task_id, status, is_open, _, doc = columns_of(record.task)
        id, created_at_ms = record.task.external_task_id, record.task.created_at_ms
        tasks.append((id, vendor, task_id, status, is_open, created_at_ms, record.poll_at_ms, doc))
        events.extend(event_row(event) for event in record.events)
        deliveries.extend(
            (id, d.event.sequence, d.hook, d.state, d.attempts, d.due_at_ms, d.last_error) for d in record.deliveries
        )
    return tasks, events, deliveries


def read_task(row: asyncpg.Record) -> Task:
    """Return the task in a row's `doc`."""
    return _tasks.decode(row["doc"])


def columns_of(task: Task) -> tuple[str, str | None, str, bool, int | None, str]:
    """Return a task's columns vendor, task_id, status, is_open, poll_at_ms, doc."""
    doc = msgspec.json.encode(task).decode()
    return task.vendor, task.task_id, task.status.value, task.is_open, task.poll_at_ms, doc


def event_row(event: Event) -> tuple[str, int, str, str, int, str]:
    """Return an event's columns external_task_id, sequence, id, type, time_ms, body."""
    return event.external_task_id, event.sequence, event.id, event.type, event.time_ms, event.body.decode()


def transposed(rows: Sequence[tuple[Any, ...]], width: int) -> list[list[Any]]:
    """Return rows as `width` columns, the arguments of `unnest`."""
    return [[row[column] for row in rows] for column in range(width)]


def capacities(subscriptions: Sequence[Subscription]) -> list[list[Any]]:
    """Return the subscriptions as the columns hook, capacity, ordered."""
    return transposed(
        [(subscription.hook, max(subscription.capacity, 0), subscription.ordered) for subscription in subscriptions], 3
    )


def read_tasks(rows: Iterable[asyncpg.Record]) -> list[Task]:
    """Return the tasks in the rows' `doc`."""
    return [read_task(row) for row in rows]


def read_event(row: asyncpg.Record) -> Event:
    """Return the event in a row."""
    body = row["body"].encode()
    return Event(row["event_id"], row["type"], row["external_task_id"], row["sequence"], row["time_ms"], body)


def read_delivery(row: asyncpg.Record) -> Delivery:
    """Return the delivery in a row, with its event."""
    return Delivery(
        row["id"], row["hook"], read_event(row), row["state"], row["attempts"], row["due_at_ms"], row["last_error"]
    )
