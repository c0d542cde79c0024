"""The task state machine: what an observation (a report, a lease, a refusal, ...) changes in a task. Pure.

Invariants: a task's rank never decreases, except that a refused task may be sent again, or exist after
all; `succeed` and `failed` are final; a report without news changes nothing; `abandoned` is left only by a
final report of the vendor. Time is passed in, in Unix milliseconds.

A task at the vendor is adopted only if it can be ours: a create may have left, and the vendor states that
it created its task after that first send. Otherwise the id was used before, by someone else's task.
A create that got no clear answer is remembered, whatever becomes of the ones that follow: it may still make
a task. Only the owner of the lease to send records the outcome of a create.
"""

from collections.abc import Callable

import msgspec
from msgspec.structs import replace

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
from submitter.results import lacks_watermark, renewed, with_copies
from submitter.schedule import spread
from submitter.task import (
    NOT_ANSWERED,
    RANK,
    RAW_MAX,
    SENDABLE,
    SETTLED,
    TERMINAL,
    ArchivedCopy,
    Charge,
    RefusedBy,
    Task,
    TaskStatus,
    Video,
    is_leased,
    is_sendable,
    may_send,
    refusals_of,
)

ADOPTION_SKEW_MS = 60_000
"""How far the vendor's clock may be behind ours when a task that was found by our id is adopted."""

UNCONFIRMED_AGAIN_MS = 5_000
"""How soon a task is polled for another unconfirmed report."""

LATE_POLLS = 10
"""How often a report that came after its task was settled is asked about at most."""

USED_BEFORE = (
    "the vendor has a task with this id that was created before this one was sent: the id was used before,"
    " and no task of this request was created"
)


class Transition(msgspec.Struct, frozen=True):
    """The task after an observation, and the type of the event to emit (`task.<status>`), if any."""

    task: Task
    event_type: str | None = None


Decide = Callable[[Task], Transition | None]


def transition(task: Task, observation: Observation, now_ms: int) -> Transition | None:
    """Return the task after `observation` at `now_ms`, with the event to emit; None if nothing changes."""
    match observation:
        case Report():
            return _reported(task, observation, now_ms)
        case Adopted(report):
            return _adopted(task, report, now_ms)
        case Archived(copies):
            return _archived(task, copies, now_ms)
        case SendLease():
            return _leased(task, observation, now_ms)
        case CreateRefused() | CreateUnclear() | FailedOver() | OutcomeUnknown():
            is_owner = task.status in NOT_ANSWERED and task.lease_owner == observation.lease_owner
            return _create_outcome(task, observation, now_ms) if is_owner else None
        case NoAnswer(message, is_absent):
            if task.status in SETTLED and not is_absent:
                return _settled_without_answer(task, now_ms)
            return _no_news(task, message, now_ms)
        case Unconfirmed():
            return _unconfirmed(task, observation, now_ms)


def is_about(task: Task, report: Report) -> bool:
    """Return whether a report is about this task, and not about another one with the same external_task_id."""
    return report.task_id == task.task_id if task.task_id is not None else not _predates(task, report)


def _predates(task: Task, report: Report) -> bool:
    created_at_ms = report.created_at_ms
    return created_at_ms is not None and created_at_ms < task.ours_after_ms - ADOPTION_SKEW_MS


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
    if task.task_id is None and report.source in ASKED:
        return _found_by_our_id(task, report, now_ms)
    return _news(task, report, now_ms)


def _found_by_our_id(task: Task, report: Report, now_ms: int) -> Transition | None:
    """Adopt the vendor's task with our id if it can be ours; see the head of this module."""
    if not task.may_have_been_sent:
        return _no_news(task, "", now_ms)
    if report.created_at_ms is None:
        return _no_news(task, "the vendor has a task with this id, and does not state when it was created", now_ms)
    if _predates(task, report):
        if task.status not in NOT_ANSWERED:
            return _settled_without_news(task, None, now_ms)
        return _enter(_all_answered(task), TaskStatus.REFUSED, now_ms, message=USED_BEFORE)
    return _news(task, report, now_ms)


def _news(task: Task, report: Report, now_ms: int) -> Transition | None:
    if report.unfinished or lacks_watermark(task, report):
        return _unfinished(task, report, now_ms)
    if report.source in PUSHED and not task.heard_from_vendor:
        task = replace(task, heard_from_vendor=True)
    # Before the answer to create, only an unconfirmed report can have stated an id: the answer replaces it.
    known = None if report.source == "create" and task.status in SENDABLE else task.task_id
    if RANK[report.status] > RANK[task.status] or task.status is TaskStatus.REFUSED:
        return _enter(
            task,
            report.status,
            now_ms,
            task_id=known or report.task_id,
            message=report.message or (_failover_message(task) if report.status is TaskStatus.SUBMITTED else ""),
            videos=report.videos,
            cost=report.cost or task.cost,
            raw=report.raw,
        )
    if report.source == "refresh" and report.status is task.status is TaskStatus.SUCCEED:
        return _renewed(task, report, now_ms)
    if task.status in SETTLED:
        return _settled_without_news(task, report, now_ms) if report.source in ASKED else None
    if report.source in ASKED:
        return _no_news(_with_raw(task, report), "", now_ms)
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


def _settled_without_news(task: Task, report: Report | None, now_ms: int) -> Transition | None:
    """Keep what a query found, and ask a few more times if a late report is still to be confirmed."""
    found = task
    if report is not None and task.task_id is None:
        found = replace(_with_raw(task, report), task_id=report.task_id)
    if task.poll_at_ms is not None:
        polls, backoff = task.polls + 1, task.poll_policy.while_unexpected
        delay_ms = int(backoff.delay_s(polls, spread(task.external_task_id)) * 1000)
        found = replace(found, polls=polls, poll_at_ms=now_ms + delay_ms)
        if polls >= LATE_POLLS:  # a report that no query confirms does not keep a refused task from being sent
            task_id = None if task.status is TaskStatus.REFUSED else found.task_id
            found = replace(found, poll_at_ms=None, task_id=task_id)
    return None if found is task else Transition(found)


def _settled_without_answer(task: Task, now_ms: int) -> Transition | None:
    """Ask again later about a report that came after the end; a failed query says nothing about it."""
    if task.poll_at_ms is None:
        return None
    delay_ms = int(task.poll_policy.while_expected.delay_s(0, spread(task.external_task_id)) * 1000)
    return Transition(replace(task, poll_at_ms=None if now_ms >= task.abandon_at_ms else now_ms + delay_ms))


def _adopted(task: Task, report: Report, now_ms: int) -> Transition | None:
    if task.status in TERMINAL or task.task_id not in (None, report.task_id) or is_leased(task, now_ms):
        return None
    adopted = replace(task, task_id=report.task_id, may_have_been_sent=True, updated_at_ms=now_ms)
    if task.status is TaskStatus.REFUSED:  # it starts again, with what the vendor has
        adopted = replace(adopted, status=TaskStatus.CREATED, first_sent_at_ms=now_ms)
    return _news(adopted, report, now_ms) or Transition(_with_raw(adopted, report))


def _renewed(task: Task, report: Report, now_ms: int) -> Transition | None:
    """Take over new URLs and the cost of a result, without an event."""
    new = renewed(task, report)
    return None if new == task else Transition(replace(_with_raw(new, report), updated_at_ms=now_ms))


def _with_raw(task: Task, report: Report) -> Task:
    return replace(task, raw=report.raw[:RAW_MAX] or task.raw)


def _create_outcome(
    task: Task, outcome: CreateRefused | CreateUnclear | FailedOver | OutcomeUnknown, now_ms: int
) -> Transition | None:
    match outcome:
        case CreateUnclear():
            return Transition(_with_unanswered(task))
        case OutcomeUnknown(message):
            return _outcome_unknown(_with_unanswered(task), message, now_ms)
        case CreateRefused(message):
            return _enter(_with_refusal(task, task.vendor), TaskStatus.REFUSED, now_ms, message=message)
        case FailedOver(vendor, poll_policy, reason):
            refused_by = task.refused_by if reason is None else (*task.refused_by, RefusedBy(task.vendor, reason))
            moved = replace(task, vendor=vendor, poll_policy=poll_policy, refused_by=refused_by, updated_at_ms=now_ms)
            return Transition(_with_refusal(moved, vendor))


def _with_unanswered(task: Task) -> Task:
    """Remember that a create which left may still make a task, or has made one."""
    if not task.may_have_been_sent or task.vendor in task.unanswered_since_ms:
        return task
    return replace(task, unanswered_since_ms=task.unanswered_since_ms | {task.vendor: task.sent_after_ms})


def _with_refusal(task: Task, vendor: str) -> Task:
    """Take back that the last create may have been sent, unless an earlier one got no clear answer of `vendor`."""
    return replace(task, may_have_been_sent=vendor in task.unanswered_since_ms)


def _all_answered(task: Task) -> Task:
    """Forget the creates without a clear answer: they certainly made no task at this vendor."""
    others = {vendor: at_ms for vendor, at_ms in task.unanswered_since_ms.items() if vendor != task.vendor}
    return replace(task, may_have_been_sent=False, unanswered_since_ms=others)


def _unconfirmed(task: Task, unconfirmed: Unconfirmed, now_ms: int) -> Transition | None:
    if task.status in TERMINAL:
        return None
    poll_at_ms = now_ms  # the first is polled for at once; more of them, perhaps a stranger's, only every few seconds
    if task.unconfirmed and task.poll_at_ms is not None:
        poll_at_ms = min(task.poll_at_ms, now_ms + UNCONFIRMED_AGAIN_MS)
    due = replace(
        task,
        task_id=task.task_id or unconfirmed.task_id,
        unconfirmed=True,
        heard_from_vendor=True,
        polls=0,
        poll_at_ms=poll_at_ms,
        raw=unconfirmed.raw[:RAW_MAX] or task.raw,
    )
    return Transition(due)


def _archived(task: Task, copies: dict[str, ArchivedCopy], now_ms: int) -> Transition | None:
    """Add copies to results that have none; the status stays `succeed`, the event is `task.archived`."""
    videos = with_copies(task.videos, copies)
    if task.status is not TaskStatus.SUCCEED or videos == task.videos:
        return None
    archived = replace(task, videos=videos, sequence=task.sequence + 1, updated_at_ms=now_ms)
    return Transition(archived, "task.archived")


def _unfinished(task: Task, report: Report, now_ms: int) -> Transition | None:
    if task.status in TERMINAL:
        return None
    if report.source in PUSHED:
        return transition(task, Unconfirmed(report.task_id, raw=report.raw), now_ms)
    doubtful = replace(_with_raw(task, report), unconfirmed=True)
    if task.status in SENDABLE:  # the vendor has it
        return _enter(doubtful, TaskStatus.PROCESSING, now_ms, message="", task_id=report.task_id, raw=report.raw)
    return _no_news(doubtful, "", now_ms)


def _failover_message(task: Task) -> str:
    """Return why the task is at this vendor; empty if no other vendor refused it."""
    return f"sent to {task.vendor} because it was refused by {refusals_of(task)}" if task.refused_by else ""


def _outcome_unknown(task: Task, message: str, now_ms: int) -> Transition:
    released = replace(task, lease_owner=None, lease_until_ms=0)
    if task.status is TaskStatus.SUBMISSION_UNKNOWN:
        return Transition(released)
    unknown = _enter(released, TaskStatus.SUBMISSION_UNKNOWN, now_ms, message=message)
    return replace(unknown, task=replace(unknown.task, poll_at_ms=_earliest_poll(task, unknown.task.poll_at_ms)))


def _leased(task: Task, lease: SendLease, now_ms: int) -> Transition | None:
    lease_owner, until_ms = lease.lease_owner, lease.until_ms
    if task.lease_owner != lease_owner and (lease.renews or not may_send(task, now_ms)):
        return None
    if not is_sendable(task) or (task.status is TaskStatus.REFUSED and lease.begins):
        return None  # a refused task starts again by a takeover, never by an owner who was stopped meanwhile
    if lease.absent_at_ms == task.updated_at_ms:
        task = _all_answered(task)
    elif task.lease_owner != lease_owner:  # another submitter's last create got no answer that is recorded
        task = _with_unanswered(task)
    if lease.refused:
        task = _with_refusal(task, task.vendor)
    restarts = task.status is TaskStatus.REFUSED
    if restarts:
        task = replace(task, status=TaskStatus.CREATED, status_message="", refused_by=(), raw="")
    if restarts or (lease.begins and not task.may_have_been_sent):
        task = replace(task, first_sent_at_ms=now_ms)
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
        return _settled_without_news(task, None, now_ms)
    if now_ms >= task.abandon_at_ms:
        reason = task.status_message or message or "the vendor reported no final status before the deadline"
        return _enter(task, TaskStatus.ABANDONED, now_ms, message=reason)
    if task.status is TaskStatus.CREATED and may_send(task, now_ms):
        if not task.may_have_been_sent:
            unsent = "the submitter stopped before a create was sent that the vendor took. Submit it again."
            return _enter(task, TaskStatus.REFUSED, now_ms, message=unsent)
        unknown = message or "the submitter stopped before create was answered, and the vendor has no such task (yet)"
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
    raw: str = "",
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
        polls=0,
        updated_at_ms=now_ms,
        raw=raw[:RAW_MAX] or task.raw,
    )
    poll_at_ms = None if status in SETTLED else next_poll_ms(entered, now_ms)
    return Transition(replace(entered, poll_at_ms=poll_at_ms), f"task.{status.value}")
