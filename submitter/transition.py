"""The task state machine: what an observation (a report, a lease, a refusal, ...) changes in a task. Pure.

Invariants: a task's rank never decreases; `succeed` and `failed` are final; a report without news
changes nothing; only a final report of the vendor leaves `abandoned`. Time is passed in, in Unix
milliseconds.
"""

from collections.abc import Callable
from typing import Literal

import msgspec
from msgspec.structs import replace

from submitter.schedule import PollPolicy, spread
from submitter.task import (
    NOT_ANSWERED,
    RANK,
    SETTLED,
    TERMINAL,
    ArchivedCopy,
    Charge,
    RefusedBy,
    Task,
    TaskStatus,
    Video,
    may_send,
    refusals_of,
)

Source = Literal["create", "callback", "stream", "poll"]


class Report(msgspec.Struct, frozen=True):
    """A vendor's report about a task: the answer to create, a callback, a stream event or a query's answer.

    `unfinished`: the vendor reports the end without a result yet, so the task is polled again.
    `is_test`: the vendor's console sent it to test a callback URL; no such task exists.
    """

    source: Source
    status: TaskStatus
    task_id: str | None = None
    external_task_id: str | None = None
    message: str = ""
    videos: tuple[Video, ...] = ()
    cost: tuple[Charge, ...] = ()
    unfinished: bool = False
    is_test: bool = False


class SendLease(msgspec.Struct, frozen=True):
    """The lease to send the create request: `lease_owner` holds it until `until_ms`.

    `begins`: the owner is about to send. `renews`: extend a lease that the owner still holds; a renewal
    that arrives after the lease was released does not take it again.
    """

    lease_owner: str
    until_ms: int
    begins: bool = False
    renews: bool = False


class CreateRefused(msgspec.Struct, frozen=True):
    """No task was created: the request was definitely refused, or not sent."""

    message: str


class FailedOver(msgspec.Struct, frozen=True):
    """The request moves to `vendor`: the previous one definitely refused for `reason`, or (None) it starts again."""

    vendor: str
    poll_policy: PollPolicy
    reason: str | None


class OutcomeUnknown(msgspec.Struct, frozen=True):
    """The create request was sent, and its outcome cannot be determined at the moment."""

    message: str


class NoAnswer(msgspec.Struct, frozen=True):
    """A poll returned nothing usable: no answer, an unreadable one, or a task that the vendor does not know."""

    message: str = ""


class Unconfirmed(msgspec.Struct, frozen=True):
    """A report that a poll must confirm first: it is unsigned, or could not be parsed.

    `task_id` is the vendor's id from the report: with it the vendor can be polled even if the answer
    to create was lost. `by_vendor` is False if a person made the report.
    """

    task_id: str | None = None
    by_vendor: bool = True


class Archived(msgspec.Struct, frozen=True):
    """Results were archived: the copies, by the URLs that they were downloaded from."""

    copies: dict[str, ArchivedCopy]


Observation = Archived | Report | SendLease | CreateRefused | FailedOver | OutcomeUnknown | NoAnswer | Unconfirmed


class Transition(msgspec.Struct, frozen=True):
    """The task after an observation, and the type of the event to emit (`task.<status>`), if any."""

    task: Task
    event_type: str | None = None


PUSHED = ("callback", "stream")
"""The sources that the vendor pushes; the others are answers to our requests."""

Decide = Callable[[Task], Transition | None]


def transition(task: Task, observation: Observation, now_ms: int) -> Transition | None:
    """Return the task after `observation` at `now_ms`, with the event to emit; None if nothing changes."""
    match observation:
        case Report():
            return _reported(task, observation, now_ms)
        case Archived(copies):
            return _archived(task, copies, now_ms)
        case SendLease():
            return _leased(task, observation, now_ms)
        case CreateRefused(message):
            if task.status is not TaskStatus.CREATED:
                return None
            return Transition(
                replace(
                    task,
                    refused=True,
                    may_have_been_sent=False,
                    lease_owner=None,
                    lease_until_ms=0,
                    status_message=message,
                    poll_at_ms=None,
                    updated_at_ms=now_ms,
                )
            )
        case FailedOver(vendor, poll_policy, reason):
            if task.status is not TaskStatus.CREATED:
                return None
            refused_by = task.refused_by if reason is None else (*task.refused_by, RefusedBy(task.vendor, reason))
            moved = replace(
                task,
                vendor=vendor,
                poll_policy=poll_policy,
                refused_by=refused_by,
                may_have_been_sent=False,
                updated_at_ms=now_ms,
            )
            return Transition(moved)
        case OutcomeUnknown(message):
            return _outcome_unknown(task, message, now_ms)
        case NoAnswer(message):
            return _no_news(task, message, now_ms)
        case Unconfirmed(task_id, by_vendor):
            if task.status in TERMINAL:
                return None
            return Transition(
                replace(
                    task,
                    task_id=task.task_id or task_id,
                    unconfirmed=True,
                    heard_from_vendor=task.heard_from_vendor or by_vendor,
                    polls=0,
                    poll_at_ms=now_ms,
                )
            )


def next_poll_ms(task: Task, now_ms: int) -> int:
    """Return when to poll the vendor for `task`, whose last report or poll was at `now_ms`.

    While a callback is expected, the policy's `while_expected` applies, otherwise the faster
    `while_unexpected`. The delay grows with each poll without news and never passes the deadline.
    """
    poll_policy = task.poll_policy
    expected = task.expects_callback and not task.unconfirmed and task.status is not TaskStatus.SUBMISSION_UNKNOWN
    backoff = poll_policy.while_expected if expected else poll_policy.while_unexpected
    delay_s = backoff.delay_s(task.polls, spread(task.external_task_id))
    return min(now_ms + int(delay_s * 1000), max(task.abandon_at_ms, now_ms))


def _reported(task: Task, report: Report, now_ms: int) -> Transition | None:
    abandoned = task.status is TaskStatus.ABANDONED
    if report.unfinished:
        return _unfinished(task, report, now_ms)
    if report.source in PUSHED and not task.heard_from_vendor:
        task = replace(task, heard_from_vendor=True)
    if RANK[report.status] > RANK[task.status]:
        return _enter(
            task,
            report.status,
            now_ms,
            task_id=task.task_id or report.task_id,
            message=report.message or (_failover_message(task) if report.status is TaskStatus.SUBMITTED else ""),
            videos=report.videos,
            cost=report.cost or task.cost,
        )
    if task.status in TERMINAL or abandoned:
        return None
    if report.source == "poll":
        return _no_news(task, "", now_ms)
    if report.source == "create" and (task.task_id is None or task.lease_owner is not None):
        # A callback arrived before the answer to create: only the id and the end of the lease are new.
        return Transition(
            replace(
                task,
                task_id=task.task_id or report.task_id,
                lease_owner=None,
                lease_until_ms=0,
                updated_at_ms=now_ms,
            )
        )
    return None


def _archived(task: Task, copies: dict[str, ArchivedCopy], now_ms: int) -> Transition | None:
    """Add copies to results that have none; the status stays `succeed`, the event is `task.archived`."""
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
    archived = replace(task, videos=videos, sequence=task.sequence + 1, updated_at_ms=now_ms)
    return Transition(archived, "task.archived")


def _unfinished(task: Task, report: Report, now_ms: int) -> Transition | None:
    if task.status in SETTLED:
        return None
    if report.source in PUSHED:
        return transition(task, Unconfirmed(report.task_id), now_ms)
    return _no_news(replace(task, unconfirmed=True), "", now_ms)


def _failover_message(task: Task) -> str:
    """Return why the task is at this vendor; empty if no other vendor refused it."""
    if not task.refused_by:
        return ""
    return f"sent to {task.vendor} because it was refused by {refusals_of(task)}"


def _outcome_unknown(task: Task, message: str, now_ms: int) -> Transition | None:
    if task.status not in NOT_ANSWERED:
        return None
    released = replace(task, lease_owner=None, lease_until_ms=0)
    if task.status is TaskStatus.SUBMISSION_UNKNOWN:
        return Transition(released)
    unknown = _enter(released, TaskStatus.SUBMISSION_UNKNOWN, now_ms, message=message)
    return replace(unknown, task=replace(unknown.task, poll_at_ms=_earliest_poll(task, unknown.task.poll_at_ms)))


def _leased(task: Task, lease: SendLease, now_ms: int) -> Transition | None:
    lease_owner, until_ms = lease.lease_owner, lease.until_ms
    if task.lease_owner != lease_owner and (lease.renews or not may_send(task, now_ms)):
        return None
    if task.status not in NOT_ANSWERED:
        return None
    if task.refused:  # a new start: the time since the refusal does not count towards the deadline
        task = replace(task, created_at_ms=now_ms, refused_by=())
    # If the submitter dies, a poll looks for the task soon after the lease expires.
    overdue_at_ms = min(
        until_ms + int(task.poll_policy.while_unexpected.max_s * 1000), max(task.abandon_at_ms, until_ms)
    )
    return Transition(
        replace(
            task,
            lease_owner=lease_owner,
            lease_until_ms=until_ms,
            may_have_been_sent=task.may_have_been_sent or lease.begins,
            refused=False,
            poll_at_ms=_earliest_poll(task, overdue_at_ms),
            updated_at_ms=now_ms,
        )
    )


def _earliest_poll(task: Task, poll_at_ms: int | None) -> int | None:
    """Return `poll_at_ms`, or the earlier poll that an unconfirmed report scheduled: sending never delays it."""
    if not task.unconfirmed or task.poll_at_ms is None or poll_at_ms is None:
        return poll_at_ms
    return min(task.poll_at_ms, poll_at_ms)


def _no_news(task: Task, message: str, now_ms: int) -> Transition | None:
    if task.status in SETTLED:
        return None
    if now_ms >= task.abandon_at_ms:
        reason = task.status_message or message or "the vendor reported no final status before the deadline"
        return _enter(task, TaskStatus.ABANDONED, now_ms, message=reason)
    if task.status is TaskStatus.CREATED and may_send(task, now_ms):
        unknown = message or "the submitter stopped before create was answered, and the vendor has no such task (yet)"
        if not task.may_have_been_sent:
            unknown = "the submitter stopped before the request was sent. Submit it again with the same id."
        return _enter(task, TaskStatus.SUBMISSION_UNKNOWN, now_ms, message=unknown)
    polled = replace(task, polls=task.polls + 1)
    return Transition(replace(polled, poll_at_ms=next_poll_ms(polled, now_ms)))


def _enter(
    task: Task,
    status: TaskStatus,
    now_ms: int,
    *,
    message: str,
    task_id: str | None = None,
    videos: tuple[Video, ...] = (),
    cost: tuple[Charge, ...] = (),
) -> Transition:
    entered = replace(
        task,
        status=status,
        status_message=message,
        task_id=task_id or task.task_id,
        videos=videos,
        cost=cost,
        sequence=task.sequence + 1,
        lease_owner=None,
        lease_until_ms=0,
        refused=False,
        polls=0,
        updated_at_ms=now_ms,
    )
    poll_at_ms = None if status in SETTLED else next_poll_ms(entered, now_ms)
    return Transition(replace(entered, poll_at_ms=poll_at_ms), f"task.{status.value}")
