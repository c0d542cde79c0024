"""Every short sequence of observations through `transition`, against the model: nothing is left to chance."""

import itertools
from collections.abc import Iterable, Sequence

import msgspec

from submitter.observation import (
    Adopted,
    Archived,
    CreateRefused,
    CreateUnclear,
    FailedOver,
    NoAnswer,
    Observation,
    OutcomeUnknown,
    SendLease,
    Unconfirmed,
)
from submitter.task import ArchivedCopy, Task, TaskStatus
from submitter.transition import Transition
from tests.torture.model import FINAL, RANK, TaskModel, copy_of
from tests.torture.observations import (
    ENDS,
    POLL_LATEST_MS,
    POLL_POLICY,
    REPORTED,
    START_MS,
    VIDEO,
    Seen,
    decide,
    differences,
    new_model,
    new_task,
    predict,
    report,
)

ALPHABET: list[Seen] = [
    *(Seen(report("callback", status)) for status in REPORTED),
    *(Seen(report("poll", status), 0) for status in (TaskStatus.PROCESSING, TaskStatus.SUCCEED)),
    Seen(report("poll", TaskStatus.SUBMITTED), 7_200_000),
    Seen(report("callback", TaskStatus.SUCCEED, "894")),
    Seen(report("create", TaskStatus.SUBMITTED)),
    Seen(report("create", TaskStatus.SUCCEED, unfinished=True)),
    Seen(SendLease("me", 0, begins=True), lease_ms=60_000),
    Seen(SendLease("you", 0), lease_ms=60_000),
    Seen(CreateRefused("no balance", "me")),
    Seen(CreateUnclear("me")),
    Seen(OutcomeUnknown("no answer", "me")),
    Seen(FailedOver("novita", POLL_POLICY, "no balance", "me")),
    Seen(NoAnswer()),
    Seen(NoAnswer(is_absent=True)),
    Seen(Unconfirmed("893")),
    Seen(Adopted(report("refresh", TaskStatus.PROCESSING)), 0),
    Seen(Archived({VIDEO.url: ArchivedCopy("https://archive.example.com/1.mp4", "00")})),
]
A_SECOND_MS, A_DAY_MS = 1_000, 86_400_000
FINDINGS_MAX = 5


class Explored(msgspec.Struct):
    """How many transitions were checked, and what is wrong (only the first few)."""

    transitions: int = 0
    findings: list[str] = msgspec.field(default_factory=list)

    def note(self, path: Sequence[Seen], wrong: Iterable[str]) -> None:
        text = "; ".join(wrong)
        if text and len(self.findings) < FINDINGS_MAX:
            self.findings.append(f"after {[str(seen.observation) for seen in path]}: {text}")


def explore(length: int, alphabet: Sequence[Seen] = ALPHABET) -> Explored:
    """Check every sequence of up to `length` observations, a second apart and a day apart.

    After a day, leases to send have expired and the deadline has passed.
    """
    explored = Explored()
    for step_ms in (A_SECOND_MS, A_DAY_MS):
        layer: list[Node] = [((), new_task(), new_model())]
        for number in range(1, length + 1):
            now_ms = START_MS + number * step_ms
            layer = [_step(explored, node, seen, now_ms) for node in layer for seen in alphabet]
    return explored


Node = tuple[tuple[Seen, ...], Task, TaskModel]


def _step(explored: Explored, node: Node, seen: Seen, now_ms: int) -> Node:
    path, task, model = node
    expected = copy_of(model)
    event_type = predict(expected, seen, now_ms)
    moved = decide(seen, now_ms)(task)
    found = Transition(task) if moved is None else moved
    wrong = [
        f"{name} is {is_!r} instead of {want!r}" for name, (want, is_) in differences(expected, found.task).items()
    ]
    if found.event_type != event_type:
        wrong.append(f"the event is {found.event_type} instead of {event_type}")
    wrong += broken_rules(task, found, seen.observation, now_ms)
    again = decide(seen, now_ms)(found.task)
    if again is not None and again.event_type not in (None, "task.abandoned"):  # it may be the poll of the deadline
        wrong.append(f"its repetition changes the task to {again.task.status} with the event {again.event_type}")
    explored.transitions += 1
    explored.note((*path, seen), wrong)
    return (*path, seen), found.task, expected


def broken_rules(before: Task, moved: Transition, observation: Observation, now_ms: int) -> list[str]:
    """Return which rules of states a transition breaks; the rules need no model."""
    after, wrong = moved.task, []
    ranks = RANK[before.status.value], RANK[after.status.value]
    if before.status.value in FINAL and after.status is not before.status:
        wrong.append(f"{before.status} is final, and became {after.status}")
    if ranks[1] < ranks[0] and before.status is not TaskStatus.REFUSED:
        wrong.append(f"{before.status} fell back to {after.status}")
    if before.status is TaskStatus.ABANDONED and after.status not in (before.status, *ENDS):
        wrong.append(f"abandoned became {after.status}")
    if after.sequence != before.sequence + (moved.event_type is not None):
        wrong.append(f"the sequence went from {before.sequence} to {after.sequence} with event {moved.event_type}")
    is_restart = before.status is TaskStatus.REFUSED and isinstance(observation, SendLease | Adopted)
    if after.status is not before.status and moved.event_type is None and not is_restart:
        wrong.append(f"{before.status} became {after.status} without an event")
    if after.is_open and (after.poll_at_ms is None or after.poll_at_ms > now_ms + POLL_LATEST_MS):
        wrong.append(f"it is {after.status} and is polled at {after.poll_at_ms}: it could wait for ever")
    return wrong


def explore_orders(length: int) -> Explored:
    """Check that the order of a task's reports, some repeated or lost, never changes how it ends."""
    explored = Explored()
    for end in ENDS:
        life = (TaskStatus.SUBMITTED, TaskStatus.PROCESSING, end)
        reports = [report(source, status) for source in ("create", "callback", "stream") for status in life]
        for path in itertools.product(reports, repeat=length):
            if not any(one.status is end for one in path):
                continue
            task, types = new_task(), []
            for number, one in enumerate(path):
                moved = decide(Seen(one), START_MS + number)(task)
                explored.transitions += 1
                if moved is not None:
                    task = moved.task
                    types += [moved.event_type] if moved.event_type else []
            videos = (VIDEO,) if end is TaskStatus.SUCCEED else ()
            if (task.status, task.task_id, task.videos, types.count(f"task.{end.value}")) != (end, "893", videos, 1):
                explored.note([Seen(one) for one in path], [f"it is {task.status} after the events {types}"])
    return explored
