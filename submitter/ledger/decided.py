"""What many decisions make of some tasks: the rows to store, whatever stores them. Pure."""

from collections.abc import Iterable, Mapping

import msgspec

from submitter.errors import TaskNotFound
from submitter.event import Event, event_of
from submitter.ledger.base import Applied
from submitter.task import Decide, Task

Outcome = Applied | Exception


class Decided(msgspec.Struct):
    """Each decision's outcome, the tasks as they become, and the events of it, in their order."""

    outcomes: list[Outcome]
    changed: dict[str, Task]
    events: list[Event]


def decide_all(tasks: Mapping[str, Task], decisions: Iterable[tuple[str, Decide]]) -> Decided:
    """Call each decision, in order, with its task as the ones before have left it.

    What a decision raises is its own outcome and changes nothing.
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


def _decide(task: Task | None, external_task_id: str, decide: Decide) -> Outcome:
    if task is None:
        return TaskNotFound(external_task_id)
    try:
        transition = decide(task)
    except Exception as error:  # noqa: BLE001 - the caller's own error goes back to the caller alone
        return error
    return Applied(task if transition is None else transition.task, transition)
