"""Runs a batch of decisions on tasks and collects the rows to store, for any engine. Pure."""

from collections.abc import Iterable, Mapping

import msgspec

from submitter.errors import TaskNotFound
from submitter.event import Event, event_of
from submitter.ledger.base import Applied
from submitter.task import Task
from submitter.transition import Decide

AppliedOrError = Applied | Exception


class Decided(msgspec.Struct):
    """The result of a batch: an outcome for each decision, the changed tasks by id, and their new events in order."""

    outcomes: list[AppliedOrError]
    changed: dict[str, Task]
    events: list[Event]


def decide_all(tasks: Mapping[str, Task], decisions: Iterable[tuple[str, Decide]]) -> Decided:
    """Call each decision in order; it gets its task as the decisions before it left it.

    An exception of a decision becomes its outcome and changes no task. A task that is missing in
    `tasks` becomes a TaskNotFound.
    """
    now = dict(tasks)
    decided = Decided([], {}, [])
    for external_task_id, decide in decisions:
        outcome = _decide(now.get(external_task_id), external_task_id, decide)
        decided.outcomes.append(outcome)
        if isinstance(outcome, Applied) and outcome.transition is not None:
            now[external_task_id] = decided.changed[external_task_id] = outcome.task
            event = event_of(outcome.transition)
            if event is not None:
                decided.events.append(event)
    return decided


def _decide(task: Task | None, external_task_id: str, decide: Decide) -> AppliedOrError:
    if task is None:
        return TaskNotFound(external_task_id)
    try:
        transition = decide(task)
    except Exception as error:  # noqa: BLE001 - returned to the caller that passed `decide`, and to no other
        return error
    return Applied(task if transition is None else transition.task, transition)
