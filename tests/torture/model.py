"""A reference model of task state: what each observation does to a task. Pure; it calls no code of the product.

Written from the table of states and the rules in the design, and from the docstrings of `submitter.observation`.
The observations are the product's values; what they mean is decided here a second time.
"""

from dataclasses import dataclass, field, replace

from submitter.observation import (
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

RANK = {
    "created": 0,
    "submission_unknown": 1,
    "submitted": 2,
    "processing": 3,
    "abandoned": 4,
    "refused": 4,
    "succeed": 5,
    "failed": 5,
}
UNSENT = ("created", "submission_unknown")
ENDED = ("abandoned", "refused", "succeed", "failed")
FINAL = ("succeed", "failed")
SKEW_MS = 60_000  # how far the vendor's clock may be behind
LEASE_LIMIT_MS = 600_000  # a longer lease to send was taken by a wrong clock
LATE_QUESTIONS = 10  # polls for a report that came after the end


@dataclass
class TaskModel:
    """One task. `sent`: a create may have left; `unanswered`: since when, by vendor, one may still make a task."""

    id: str
    vendor: str
    request: str
    created_ms: int
    abandon_after_ms: int
    updated_ms: int
    status: str = "created"
    sequence: int = 0
    task_id: str | None = None
    owner: str | None = None
    lease_until_ms: int = 0
    sent: bool = False
    first_sent_ms: int | None = None
    unanswered: dict[str, int] = field(default_factory=dict)
    polls: int = 0
    is_polled: bool = True
    is_archived: bool = False

    @property
    def is_open(self) -> bool:
        return self.status not in ENDED

    @property
    def sent_after_ms(self) -> int:
        return self.created_ms if self.first_sent_ms is None else self.first_sent_ms

    def is_leased(self, now_ms: int) -> bool:
        return self.owner is not None and now_ms < self.lease_until_ms <= now_ms + LEASE_LIMIT_MS

    def is_older_than_ours(self, report: Report) -> bool:
        """Return whether the vendor's task in `report` was made before a create of this task can have left."""
        since_ms = min(self.sent_after_ms, self.unanswered.get(self.vendor, self.sent_after_ms))
        return report.created_at_ms is not None and report.created_at_ms < since_ms - SKEW_MS

    def is_subject_of(self, report: Report) -> bool:
        """Return whether a pushed report is about this task."""
        return report.task_id == self.task_id if self.task_id is not None else not self.is_older_than_ours(report)

    def observe(self, seen: Observation, now_ms: int) -> str | None:
        """Change the task; return the type of the event, or None."""
        match seen:
            case Report():
                return self._report(seen, now_ms)
            case Adopted(report):
                return self._adopt(report, now_ms)
            case Archived():
                return self._archive()
            case SendLease():
                return self._lease(seen, now_ms)
            case CreateRefused() | CreateUnclear() | FailedOver() | OutcomeUnknown():
                is_owner = self.status in UNSENT and self.owner == seen.lease_owner
                return self._outcome(seen) if is_owner else None
            case NoAnswer(is_absent=is_absent):
                return self._no_news(now_ms) if self.is_open or is_absent else self._no_answer(now_ms)
            case Unconfirmed(task_id):
                return self._doubt(task_id)

    def _report(self, report: Report, now_ms: int) -> str | None:
        if self.task_id is None and report.source in ("poll", "refresh"):
            if not self.sent or report.created_at_ms is None:
                return self._no_news(now_ms)
            if self.is_older_than_ours(report):  # the id was used before
                if self.status not in UNSENT:
                    return self._late_question()
                self.sent = False
                self.unanswered.pop(self.vendor, None)
                return self._enter("refused")
        return self._news(report, now_ms)

    def _news(self, report: Report, now_ms: int) -> str | None:
        if report.unfinished:
            return self._unfinished(report, now_ms)
        status, is_asked = report.status.value, report.source in ("poll", "refresh")
        if RANK[status] > RANK[self.status] or self.status == "refused":
            return self._enter(status, self._id_from(report))
        if not self.is_open:
            is_renewal = report.source == "refresh" and status == self.status == "succeed"
            return self._late_question(report) if is_asked and not is_renewal else None
        if is_asked:
            return self._no_news(now_ms)
        if report.source == "create":  # a callback came before the answer to create
            self.task_id = self.task_id or report.task_id
            self._release()
        return None

    def _id_from(self, report: Report) -> str | None:
        """Return the vendor's id: the one that is known, unless only an unconfirmed report stated it before create."""
        is_answer = report.source == "create" and self.status in (*UNSENT, "refused")
        return report.task_id if is_answer else self.task_id or report.task_id

    def _unfinished(self, report: Report, now_ms: int) -> str | None:
        if self.status in FINAL:
            return None
        if report.source in ("callback", "stream"):
            return self._doubt(report.task_id)
        if self.status in (*UNSENT, "refused"):
            return self._enter("processing", self._id_from(report))
        return self._no_news(now_ms)

    def _doubt(self, task_id: str | None) -> str | None:
        if self.status not in FINAL:
            self.task_id = self.task_id or task_id
            self.polls, self.is_polled = 0, True
        return None

    def _late_question(self, report: Report | None = None) -> str | None:
        """A query about an ended task: it is asked a few times, for as long as a late report waits to be confirmed."""
        if report is not None:
            self.task_id = self.task_id or report.task_id
        if self.is_polled:
            self.polls += 1
            if self.polls >= LATE_QUESTIONS:
                self.is_polled = False
                self.task_id = None if self.status == "refused" else self.task_id
        return None

    def _no_answer(self, now_ms: int) -> str | None:
        """A failed query about an ended task says nothing, and is repeated until the deadline."""
        if now_ms >= self.sent_after_ms + self.abandon_after_ms:
            self.is_polled = False
        return None

    def _no_news(self, now_ms: int) -> str | None:
        if not self.is_open:
            return self._late_question()
        if now_ms >= self.sent_after_ms + self.abandon_after_ms:
            return self._enter("abandoned")
        if self.status == "created" and not self.is_leased(now_ms):
            return self._enter("submission_unknown" if self.sent else "refused")
        self.polls += 1
        return None

    def _adopt(self, report: Report, now_ms: int) -> str | None:
        if self.status in FINAL or self.task_id not in (None, report.task_id) or self.is_leased(now_ms):
            return None
        self.task_id, self.sent = report.task_id, True
        if self.status == "refused":
            self.status, self.first_sent_ms = "created", now_ms
        return self._news(report, now_ms)

    def _archive(self) -> str | None:
        if self.status != "succeed" or self.is_archived:
            return None
        self.is_archived = True
        self.sequence += 1
        return "task.archived"

    def _lease(self, lease: SendLease, now_ms: int) -> str | None:
        is_owner = self.owner == lease.lease_owner
        is_taken_again = self.status == "refused" and self.task_id is None and not lease.begins
        is_sendable = self.status in UNSENT or is_taken_again
        if not is_sendable or not (is_owner or (not lease.renews and not self.is_leased(now_ms))):
            return None
        if lease.absent_at_ms == self.updated_ms:
            self.sent = False
            self.unanswered.pop(self.vendor, None)
        elif not is_owner:
            self._remember_unanswered()
        if lease.refused:
            self.sent = self.vendor in self.unanswered
        if self.status == "refused" or (lease.begins and not self.sent):
            self.first_sent_ms = now_ms
        if self.status == "refused":
            self.status = "created"
        self.owner, self.lease_until_ms, self.is_polled = lease.lease_owner, lease.until_ms, True
        self.sent = self.sent or lease.begins
        return None

    def _outcome(self, outcome: CreateRefused | CreateUnclear | FailedOver | OutcomeUnknown) -> str | None:
        match outcome:
            case CreateUnclear():
                self._remember_unanswered()
                return None
            case OutcomeUnknown():
                self._remember_unanswered()
                self._release()
                return None if self.status == "submission_unknown" else self._enter("submission_unknown")
            case CreateRefused():
                self.sent = self.vendor in self.unanswered
                return self._enter("refused")
            case FailedOver(vendor):
                self.vendor = vendor
                self.sent = vendor in self.unanswered
                return None

    def _remember_unanswered(self) -> None:
        if self.sent:
            self.unanswered.setdefault(self.vendor, self.sent_after_ms)

    def _release(self) -> None:
        self.owner, self.lease_until_ms = None, 0

    def _enter(self, status: str, task_id: str | None = None) -> str:
        self.status, self.task_id = status, task_id or self.task_id
        self.sequence += 1
        self.polls, self.is_polled, self.is_archived = 0, status not in ENDED, False
        self._release()
        return f"task.{status}"


def copy_of(task: TaskModel) -> TaskModel:
    return replace(task, unanswered=dict(task.unanswered))
