"""Apply an observation (callback, poll, answer to create) to a task, and log the change."""

from submitter.ledger.base import Tasks
from submitter.log import Logger
from submitter.observation import Observation, Report
from submitter.task import Task
from submitter.transition import transition

log = Logger("task")


def _request_id(observation: Observation) -> dict[str, str]:
    """Return the vendor's id of its answer, which its support asks for."""
    id = observation.request_id if isinstance(observation, Report) else None
    return {} if id is None else {"request_id": id}


async def observe(ledger: Tasks, external_task_id: str, observation: Observation, now_ms: int, *, source: str) -> Task:
    """Apply `observation` and return the task as it is now; raise TaskNotFound.

    `now_ms` is the time of the observation. `source` is only logged.
    """
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
            **_request_id(observation),
        )
    return task
