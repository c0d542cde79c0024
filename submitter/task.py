"""A task, and the only law by which it changes.

The law: a task's rank never falls; nothing leaves `succeed` or `failed`; a report that says
nothing new changes nothing; `abandoned` is left only for a terminal report of the vendor.

    rank 0  created             reserved here; not yet known to the vendor
    rank 1  submission_unknown  sent, never answered: nobody knows whether it is billed
    rank 2  submitted           the vendor has it
    rank 3  processing          the vendor works on it
    rank 4  abandoned           we stopped waiting
    rank 5  succeed | failed    the vendor's last word

Pure: time is passed in, in Unix milliseconds.
"""

from collections.abc import Callable
from enum import StrEnum
from typing import Literal

import msgspec
from msgspec.structs import replace

from submitter.schedule import Patience, spread


class TaskStatus(StrEnum):
    """Kling's words (API v1), and two of ours: submission_unknown and abandoned."""

    CREATED = "created"
    SUBMISSION_UNKNOWN = "submission_unknown"
    SUBMITTED = "submitted"
    PROCESSING = "processing"
    ABANDONED = "abandoned"
    SUCCEED = "succeed"
    FAILED = "failed"


RANK: dict[TaskStatus, int] = {
    TaskStatus.CREATED: 0,
    TaskStatus.SUBMISSION_UNKNOWN: 1,
    TaskStatus.SUBMITTED: 2,
    TaskStatus.PROCESSING: 3,
    TaskStatus.ABANDONED: 4,
    TaskStatus.SUCCEED: 5,
    TaskStatus.FAILED: 5,
}

NOT_ANSWERED = frozenset({TaskStatus.CREATED, TaskStatus.SUBMISSION_UNKNOWN})
"""Where the vendor has not said that it has the task."""

TERMINAL = frozenset({TaskStatus.SUCCEED, TaskStatus.FAILED})
SETTLED = TERMINAL | {TaskStatus.ABANDONED}
"""Where a waiting user is answered: the vendor's last word, or ours."""


class Copied(msgspec.Struct, frozen=True):
    """A copy of a result: where it is, and the SHA-256 of its bytes (hexadecimal)."""

    url: str
    sha256: str


class Video(msgspec.Struct, frozen=True):
    """One result. `duration` in seconds; `expires_at_ms` is when its URL dies, by the vendor's rule.

    `archived` and `archived_watermark` are our copies of what the two URLs lead to, once they are made.
    """

    url: str
    watermark_url: str | None = None
    duration: float | None = None
    expires_at_ms: int | None = None
    archived: "Copied | None" = None
    archived_watermark: "Copied | None" = None


class Charge(msgspec.Struct, frozen=True):
    """What the vendor took: `unit` (of a resource pack), `cash` or `credit`. Amounts are decimal strings."""

    kind: str
    amount: str
    currency: str | None = None
    list_price: str | None = None


class Tried(msgspec.Struct, frozen=True, array_like=True):
    """A vendor that surely made no task of a request, and why the request went to another."""

    vendor: str
    reason: str


class Task(msgspec.Struct, frozen=True, omit_defaults=True):
    """One task as the ledger keeps it.

    `request` is what was asked for (inline media as a digest); `tried` are the vendors that
    refused it before `vendor`. `is_told` says whether the vendor was asked to report by itself
    (a callback, an event stream), `was_told` whether it did. `sender` holds the right to send the
    create request until `sending_until_ms`; `begun` says that one may have left, and is not
    surely refused. `poll_at_ms` is when the vendor is asked next; None is never. `doubted` is set
    by a report that is not believed before a poll confirms it.
    """

    external_task_id: str
    vendor: str
    status: TaskStatus
    created_at_ms: int
    updated_at_ms: int
    patience: Patience
    request: dict[str, str] = {}
    metadata: dict[str, str] = {}
    task_id: str | None = None
    status_message: str = ""
    videos: tuple[Video, ...] = ()
    cost: tuple[Charge, ...] = ()
    sequence: int = 0
    tried: tuple[Tried, ...] = ()
    is_told: bool = True
    was_told: bool = False
    sender: str | None = None
    sending_until_ms: int = 0
    begun: bool = False
    refused: bool = False
    doubted: bool = False
    polls: int = 0
    poll_at_ms: int | None = None

    @property
    def abandon_at_ms(self) -> int:
        """When we stop waiting for this task."""
        return self.created_at_ms + int(self.patience.abandon_after_s * 1000)


Source = Literal["create", "callback", "stream", "poll"]


class Report(msgspec.Struct, frozen=True):
    """What the vendor said of a task: the answer to create, a callback's body, an event of its
    stream, or a query's answer. `unfinished` is an end that has no result yet: it is asked about again.
    """

    source: Source
    status: TaskStatus
    task_id: str | None = None
    external_task_id: str | None = None
    message: str = ""
    videos: tuple[Video, ...] = ()
    cost: tuple[Charge, ...] = ()
    unfinished: bool = False


class Sending(msgspec.Struct, frozen=True):
    """`sender` holds the right to send the create request until `until_ms`, and `begins` to use it now.

    One that `renews` holds it already: a renewal that comes behind the end takes nothing anew.
    """

    sender: str
    until_ms: int
    begins: bool = False
    renews: bool = False


class Refused(msgspec.Struct, frozen=True):
    """The vendor surely made no task."""

    message: str


class Diverted(msgspec.Struct, frozen=True):
    """The request goes to `vendor`: the one before surely refused, for `reason` (None: it begins anew)."""

    vendor: str
    patience: Patience
    reason: str | None


class OutcomeUnknown(msgspec.Struct, frozen=True):
    """The create request was sent, and what became of it cannot be found out now."""

    message: str


class Unheard(msgspec.Struct, frozen=True):
    """The vendor was asked, and said nothing that can be used."""

    message: str = ""


class Doubted(msgspec.Struct, frozen=True):
    """A report came that must not be believed, or cannot be understood, before the vendor is asked.

    `task_id` is the vendor's, as the report has it: by it the vendor can be asked, even when the
    answer to create was lost. `by_vendor` is False when it was a person who made the report.
    """

    task_id: str | None = None
    by_vendor: bool = True


class Archived(msgspec.Struct, frozen=True):
    """Results were copied: the copies, by the URLs that they were fetched from."""

    copies: dict[str, Copied]


Observation = Archived | Report | Sending | Refused | Diverted | OutcomeUnknown | Unheard | Doubted


class Transition(msgspec.Struct, frozen=True):
    """The task as it becomes, and the event to emit (`task.<status>`), if it is one."""

    task: Task
    event_type: str | None = None


TELLING = ("callback", "stream")
"""The sources by which a vendor speaks without being asked."""

Decide = Callable[[Task], Transition | None]


def transition(task: Task, observation: Observation, now_ms: int) -> Transition | None:
    """Return what `observation` makes of `task` at `now_ms`, or None when it changes nothing."""
    match observation:
        case Report():
            return _reported(task, observation, now_ms)
        case Archived(copies):
            return _archived(task, copies, now_ms)
        case Sending():
            return _sending(task, observation, now_ms)
        case Refused(message):
            if task.status is not TaskStatus.CREATED:
                return None
            return Transition(
                replace(
                    task,
                    refused=True,
                    begun=False,
                    sender=None,
                    sending_until_ms=0,
                    status_message=message,
                    poll_at_ms=None,
                    updated_at_ms=now_ms,
                )
            )
        case Diverted(vendor, patience, reason):
            if task.status is not TaskStatus.CREATED:
                return None
            tried = task.tried if reason is None else (*task.tried, Tried(task.vendor, reason))
            moved = replace(task, vendor=vendor, patience=patience, tried=tried, begun=False, updated_at_ms=now_ms)
            return Transition(moved)
        case OutcomeUnknown(message):
            return _outcome_unknown(task, message, now_ms)
        case Unheard(message):
            return _unheard(task, message, now_ms)
        case Doubted(task_id, by_vendor):
            if task.status in TERMINAL:
                return None
            return Transition(
                replace(
                    task,
                    task_id=task.task_id or task_id,
                    doubted=True,
                    was_told=task.was_told or by_vendor,
                    polls=0,
                    poll_at_ms=now_ms,
                )
            )


def may_send(task: Task, now_ms: int) -> bool:
    """Tell whether nobody holds the right to send this task's create request now."""
    return task.status in NOT_ANSWERED and (task.sender is None or task.sending_until_ms <= now_ms)


def next_poll_ms(task: Task, now_ms: int) -> int:
    """Return when to ask the vendor about `task`, which was heard of, or asked about, at `now_ms`.

    Between two moments: the silence that is usual while the vendor is expected to tell, or the quicker
    schedule while none is; longer with each poll that brought nothing; never past the deadline.
    """
    patience = task.patience
    expected = task.is_told and not task.doubted and task.status is not TaskStatus.SUBMISSION_UNKNOWN
    backoff = patience.silence if expected else patience.asking
    delay_s = backoff.delay_s(task.polls, spread(task.external_task_id))
    return min(now_ms + int(delay_s * 1000), max(task.abandon_at_ms, now_ms))


def _reported(task: Task, report: Report, now_ms: int) -> Transition | None:
    abandoned = task.status is TaskStatus.ABANDONED
    if report.unfinished:
        return _unfinished(task, report, now_ms)
    if report.source in TELLING and not task.was_told:
        task = replace(task, was_told=True)
    if RANK[report.status] > RANK[task.status]:
        return _become(
            task,
            report.status,
            now_ms,
            task_id=task.task_id or report.task_id,
            message=report.message or (_how_it_got_there(task) if report.status is TaskStatus.SUBMITTED else ""),
            videos=report.videos,
            cost=report.cost or task.cost,
        )
    if task.status in TERMINAL or abandoned:
        return None
    if report.source == "poll":
        return _unheard(task, "", now_ms)
    if report.source == "create" and (task.task_id is None or task.sender is not None):
        # A callback overtook the answer to create: only the submission's own fields are new.
        return Transition(
            replace(
                task,
                task_id=task.task_id or report.task_id,
                sender=None,
                sending_until_ms=0,
                updated_at_ms=now_ms,
            )
        )
    return None


def _archived(task: Task, copies: dict[str, Copied], now_ms: int) -> Transition | None:
    """Note the copies of results that have none; the end stays what it is, and the event is one of its own."""
    videos = tuple(
        replace(
            video,
            archived=video.archived or copies.get(video.url),
            archived_watermark=video.archived_watermark or copies.get(video.watermark_url or ""),
        )
        for video in task.videos
    )
    if task.status is not TaskStatus.SUCCEED or videos == task.videos:
        return None
    noted = replace(task, videos=videos, sequence=task.sequence + 1, updated_at_ms=now_ms)
    return Transition(noted, "task.archived")


def _unfinished(task: Task, report: Report, now_ms: int) -> Transition | None:
    if task.status in SETTLED:
        return None
    if report.source in TELLING:
        return transition(task, Doubted(report.task_id), now_ms)
    return _unheard(replace(task, doubted=True), "", now_ms)


def _how_it_got_there(task: Task) -> str:
    """Say why a task is at this vendor, when others were tried before."""
    if not task.tried:
        return ""
    return f"sent to {task.vendor}, since it was refused by {refusals_of(task)}"


def refusals_of(task: Task) -> str:
    """Say which vendors refused a task, and why."""
    return "; ".join(f"{tried.vendor}: {tried.reason}" for tried in task.tried)


def _outcome_unknown(task: Task, message: str, now_ms: int) -> Transition | None:
    if task.status not in NOT_ANSWERED:
        return None
    released = replace(task, sender=None, sending_until_ms=0)
    if task.status is TaskStatus.SUBMISSION_UNKNOWN:
        return Transition(released)
    unknown = _become(released, TaskStatus.SUBMISSION_UNKNOWN, now_ms, message=message)
    return replace(unknown, task=replace(unknown.task, poll_at_ms=_sooner(task, unknown.task.poll_at_ms)))


def _sending(task: Task, sending: Sending, now_ms: int) -> Transition | None:
    sender, until_ms = sending.sender, sending.until_ms
    if task.sender != sender and (sending.renews or not may_send(task, now_ms)):
        return None
    if task.status not in NOT_ANSWERED:
        return None
    if task.refused:  # it begins anew: the days since the refusal do not count against its deadline
        task = replace(task, created_at_ms=now_ms, tried=())
    grown_old_ms = min(until_ms + int(task.patience.asking.max_s * 1000), max(task.abandon_at_ms, until_ms))
    return Transition(
        replace(
            task,
            sender=sender,
            sending_until_ms=until_ms,
            begun=task.begun or sending.begins,
            refused=False,
            poll_at_ms=_sooner(task, grown_old_ms),
            updated_at_ms=now_ms,
        )
    )


def _sooner(task: Task, poll_at_ms: int | None) -> int | None:
    """Return when to ask about a task that is doubted: what the vendor told is not put off by what we do."""
    if not task.doubted or task.poll_at_ms is None or poll_at_ms is None:
        return poll_at_ms
    return min(task.poll_at_ms, poll_at_ms)


def _unheard(task: Task, message: str, now_ms: int) -> Transition | None:
    if task.status in SETTLED:
        return None
    if now_ms >= task.abandon_at_ms:
        reason = task.status_message or message or "the vendor never reported an end"
        return _become(task, TaskStatus.ABANDONED, now_ms, message=reason)
    if task.status is TaskStatus.CREATED and may_send(task, now_ms):
        unknown = message or "its submitter ended before an answer came, and the vendor does not know it (yet)"
        if not task.begun:
            unknown = "its submitter ended before it was sent: submit it again under the same id"
        return _become(task, TaskStatus.SUBMISSION_UNKNOWN, now_ms, message=unknown)
    asked = replace(task, polls=task.polls + 1)
    return Transition(replace(asked, poll_at_ms=next_poll_ms(asked, now_ms)))


def _become(
    task: Task,
    status: TaskStatus,
    now_ms: int,
    *,
    message: str,
    task_id: str | None = None,
    videos: tuple[Video, ...] = (),
    cost: tuple[Charge, ...] = (),
) -> Transition:
    became = replace(
        task,
        status=status,
        status_message=message,
        task_id=task_id or task.task_id,
        videos=videos,
        cost=cost,
        sequence=task.sequence + 1,
        sender=None,
        sending_until_ms=0,
        refused=False,
        polls=0,
        updated_at_ms=now_ms,
    )
    poll_at_ms = None if status in SETTLED else next_poll_ms(became, now_ms)
    return Transition(replace(became, poll_at_ms=poll_at_ms), f"task.{status.value}")
