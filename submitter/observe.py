"""Applies one observation to one task, and logs the change that it made."""

import structlog

from submitter.ledger.base import Ledger
from submitter.task import Observation, Task, transition

log = structlog.get_logger("task")


async def observe(ledger: Ledger, external_task_id: str, observation: Observation, now_ms: int, *, source: str) -> Task:
    """Apply `observation`, seen at `now_ms` by `source`, and return the task as it is now; raise TaskNotFound."""
    applied = await ledger.apply(external_task_id, lambda task: transition(task, observation, now_ms))
    task = applied.task
    if applied.transition is not None and applied.transition.event_type is not None:
        log.info(
            "task.changed",
            vendor=task.vendor,
            external_task_id=external_task_id,
            status=task.status.value,
            task_id=task.task_id,
            source=source,
        )
    return task
