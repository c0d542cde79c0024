"""The CloudEvent of a task's transition (CloudEvents 1.0, JSON format). Pure.

The event id is deterministic, so that hooks can deduplicate: the same change has the same id in every
retry, at every hook and after every crash. It is a hash, since Standard Webhooks signs
`id.timestamp.body`: an id must not contain a dot, and an external_task_id may.
"""

import hashlib
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

import msgspec

from submitter.task import Task, Video
from submitter.transition import Transition

CONTENT_TYPE = "application/cloudevents+json"


class Event(msgspec.Struct, frozen=True):
    """One change of one task. `body` is the structured CloudEvent; its bytes never change."""

    id: str
    type: str
    external_task_id: str
    sequence: int
    time_ms: int
    body: bytes


@lru_cache(maxsize=4096)
def timestamp(ms: int) -> str:
    """Return Unix milliseconds as RFC 3339 in UTC."""
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def task_data(task: Task) -> dict[str, Any]:
    """Return a task as the `data` of its events and the output of `--json`."""
    return {
        "external_task_id": task.external_task_id,
        "task_id": task.task_id,
        "vendor": task.vendor,
        "status": task.status.value,
        "status_message": task.status_message,
        "videos": [
            {
                "id": video.id,
                "url": video.url,
                "watermark_url": video.watermark_url,
                "duration": video.duration,
                "expires_at": None if video.expires_at_ms is None else timestamp(video.expires_at_ms),
                **_copies(video),
            }
            for video in task.videos
        ],
        "cost": [
            {
                "kind": charge.kind,
                "amount": charge.amount,
                "currency": charge.currency,
                "list_price": charge.list_price,
                "source": charge.source,
            }
            for charge in task.cost
        ],
        "metadata": task.metadata,
        "created_at": timestamp(task.created_at_ms),
        "updated_at": timestamp(task.updated_at_ms),
    }


def _copies(video: Video) -> dict[str, str]:
    """Return the fields of a result's archived copies, if any."""
    fields: dict[str, str] = {}
    for name, copy in (("", video.archived), ("watermark_", video.archived_watermark)):
        if copy is not None:
            fields |= {f"archived_{name}url": copy.url, f"archived_{name}sha256": copy.sha256}
    return fields


def event_id(vendor: str, external_task_id: str, sequence: int) -> str:
    """Return the id of a task's `sequence`th event."""
    digest = hashlib.sha256(f"{vendor}\n{external_task_id}\n{sequence}".encode())
    return f"evt_{digest.hexdigest()[:32]}"


def cloud_event(*, id: str, type: str, task: Task, time_ms: int) -> bytes:
    """Return the structured CloudEvent of `type` for `task`.

    `sequence` is zero-padded, since the CloudEvents extension compares it as a string.
    """
    return msgspec.json.encode(
        {
            "specversion": "1.0",
            "id": id,
            "source": f"/kling-relay/{task.vendor}",
            "type": type,
            "subject": task.external_task_id,
            "time": timestamp(time_ms),
            "datacontenttype": "application/json",
            "sequence": f"{task.sequence:010d}",
            "data": task_data(task),
        }
    )


def with_raw(event: Event, raw: str) -> Event:
    """Return the event with `data.raw`: the last body that the vendor sent about the task, as text."""
    body = msgspec.json.decode(event.body)
    body["data"]["raw"] = raw
    return msgspec.structs.replace(event, body=msgspec.json.encode(body))


def event_of(transition: Transition) -> Event | None:
    """Return the event of a transition, or None if it emits none."""
    task = transition.task
    if transition.event_type is None:
        return None
    id = event_id(task.vendor, task.external_task_id, task.sequence)
    return Event(
        id=id,
        type=transition.event_type,
        external_task_id=task.external_task_id,
        sequence=task.sequence,
        time_ms=task.updated_at_ms,
        body=cloud_event(id=id, type=transition.event_type, task=task, time_ms=task.updated_at_ms),
    )
