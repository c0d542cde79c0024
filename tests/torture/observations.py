"""What the state machine observes: reports and outcomes with few ids, vendors and owners, so that they meet."""

import msgspec
from hypothesis import strategies as st

from submitter.observation import (
    ASKED,
    PUSHED,
    Adopted,
    Archived,
    CreateRefused,
    CreateUnclear,
    FailedOver,
    NoAnswer,
    Observation,
    OutcomeUnknown,
    Report,
    SendLease,
    Unconfirmed,
)
from submitter.schedule import Backoff, PollPolicy
from submitter.task import ArchivedCopy, Task, TaskStatus, Video
from submitter.transition import Decide, Transition, is_about, transition
from tests.torture.model import TaskModel

START_MS = 1_781_080_800_000
POLL_POLICY = PollPolicy(Backoff(900, 1.5, 3600), Backoff(10, 1.5, 60), 86400)
POLL_LATEST_MS = 3_600_000 + 3_600_000 * 5 // 4
"""How long after its last change an open task is polled at the latest: the longest lease here, and a delay."""
VENDORS = ("kling", "novita")
OWNERS = ("me", "you")
VIDEO = Video("https://cdn.example.com/1.mp4")
ENDS = (TaskStatus.SUCCEED, TaskStatus.FAILED)
REPORTED = (TaskStatus.SUBMITTED, TaskStatus.PROCESSING, *ENDS)


class Seen(msgspec.Struct, frozen=True):
    """An observation whose times are relative to the time at which it is made. `age_ms`: of the vendor's task."""

    observation: Observation
    age_ms: int | None = None
    lease_ms: int = 0

    def at(self, now_ms: int) -> Observation:
        """Return the observation as it is made at `now_ms`."""
        match self.observation:
            case Report():
                return self._dated(self.observation, now_ms)
            case Adopted(report):
                return Adopted(self._dated(report, now_ms))
            case SendLease():
                return msgspec.structs.replace(self.observation, until_ms=now_ms + self.lease_ms)
            case _:
                return self.observation

    def _dated(self, report: Report, now_ms: int) -> Report:
        return report if self.age_ms is None else msgspec.structs.replace(report, created_at_ms=now_ms - self.age_ms)


def report(source: str, status: TaskStatus, task_id: str = "893", *, unfinished: bool = False) -> Report:
    videos = (VIDEO,) if status is TaskStatus.SUCCEED else ()
    made = Report("callback", status, task_id, videos=videos, unfinished=unfinished)
    return msgspec.structs.replace(made, source=source)


def new_task(id: str = "a", now_ms: int = START_MS, vendor: str = "kling", request: str = "x") -> Task:
    created = Task(id, vendor, TaskStatus.CREATED, now_ms, now_ms, POLL_POLICY, {"prompt": request})
    return msgspec.structs.replace(created, poll_at_ms=now_ms + 10_000)


AS_IT_IS = 0
"""The `absent_at_ms` of a person who has seen the task as it is."""


def new_model(id: str = "a", now_ms: int = START_MS, vendor: str = "kling", request: str = "x") -> TaskModel:
    return TaskModel(id, vendor, request, now_ms, int(POLL_POLICY.abandon_after_s * 1000), now_ms)


def observations() -> st.SearchStrategy[Seen]:
    owner, vendor = st.sampled_from(OWNERS), st.sampled_from(VENDORS)
    task_id = st.sampled_from(["893", "893", "893", "894"])
    ages = st.sampled_from([None, 0, 90_000, 7_200_000])
    unfinished = st.sampled_from([False, False, False, True])
    reports = st.builds(
        report,
        st.sampled_from([*PUSHED, *ASKED, "create"]),
        st.sampled_from(REPORTED),
        task_id,
        unfinished=unfinished,
    )
    flag = st.sampled_from([False, False, False, True])
    absent = st.sampled_from([None, None, None, AS_IT_IS, 1])
    leases = st.builds(SendLease, owner, st.just(0), st.booleans(), renews=flag, refused=flag, absent_at_ms=absent)
    outcomes = st.one_of(
        st.builds(CreateRefused, st.just("no balance"), owner),
        st.builds(CreateUnclear, owner),
        st.builds(OutcomeUnknown, st.just("no answer"), owner),
        st.builds(FailedOver, vendor, st.just(POLL_POLICY), st.sampled_from(["no balance", None]), owner),
    )
    others = st.one_of(
        st.builds(NoAnswer, st.just(""), st.booleans()),
        st.builds(Unconfirmed, st.sampled_from([None, "893", "894"])),
        st.just(Archived({VIDEO.url: ArchivedCopy("https://archive.example.com/1.mp4", "00")})),
    )
    adopted = st.builds(Adopted, st.builds(report, st.just("refresh"), st.sampled_from(REPORTED), task_id))
    return st.one_of(
        st.builds(Seen, reports, ages),
        st.builds(Seen, reports, ages),
        st.builds(Seen, leases, lease_ms=st.sampled_from([1000, 60_000, 3_600_000])),
        st.builds(Seen, outcomes),
        st.builds(Seen, others),
        st.builds(Seen, adopted, ages),
    )


def decide(seen: Seen, now_ms: int) -> Decide:
    """Return the decision as the receiver, the poller and the submitter make it."""
    observation = seen.at(now_ms)

    def decided(task: Task) -> Transition | None:
        if isinstance(observation, Report) and observation.source in PUSHED and not is_about(task, observation):
            return None  # quarantined by the receiver
        return transition(task, _about(observation, task.task_id, task.updated_at_ms), now_ms)

    return decided


def predict(task: TaskModel, seen: Seen, now_ms: int) -> str | None:
    """Change the model of a task as `decide` must change the task; return the type of the event, or None."""
    observation = seen.at(now_ms)
    if isinstance(observation, Report) and observation.source in PUSHED and not task.is_subject_of(observation):
        return None
    return task.observe(_about(observation, task.task_id, task.updated_ms), now_ms)


def _about(observation: Observation, task_id: str | None, updated_ms: int) -> Observation:
    """Return a query's answer with the id that was asked for, where one is known; a person's word with its time."""
    if isinstance(observation, SendLease) and observation.absent_at_ms == AS_IT_IS:
        return msgspec.structs.replace(observation, absent_at_ms=updated_ms)
    if isinstance(observation, Report) and observation.source in ASKED and task_id is not None:
        return msgspec.structs.replace(observation, task_id=task_id)
    return observation


def differences(task: TaskModel, stored: Task) -> dict[str, tuple[object, object]]:
    """Return the fields in which a stored task differs from its model: expected, found."""
    pairs: dict[str, tuple[object, object]] = {
        "status": (task.status, stored.status.value),
        "sequence": (task.sequence, stored.sequence),
        "vendor": (task.vendor, stored.vendor),
        "task_id": (task.task_id, stored.task_id),
        "lease_owner": (task.owner, stored.lease_owner),
        "lease_until_ms": (task.lease_until_ms, stored.lease_until_ms),
        "may_have_been_sent": (task.sent, stored.may_have_been_sent),
        "first_sent_at_ms": (task.first_sent_ms, stored.first_sent_at_ms),
        "unanswered_since_ms": (task.unanswered, stored.unanswered_since_ms),
        "polls": (task.polls, stored.polls),
        "is polled": (task.is_polled, stored.poll_at_ms is not None),
        "request": (task.request, stored.request["prompt"]),
    }
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
