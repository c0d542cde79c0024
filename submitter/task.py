"""A task as the ledger stores it: its status, its results, its cost, who may send it, when it is polled.

    rank 0  created             reserved in the ledger; the vendor does not have it yet
    rank 1  submission_unknown  no answer to create: a task may exist and be billed
    rank 2  submitted           accepted by the vendor
    rank 3  processing          being rendered by the vendor
    rank 4  abandoned           no final report before the deadline
            refused             the vendor certainly created no task
    rank 5  succeed | failed    the vendor's final report

`submitter.transition` decides how it changes. Pure. Times are Unix milliseconds.
"""

from enum import StrEnum

import msgspec

from submitter.schedule import PollPolicy


class TaskStatus(StrEnum):
    """Kling's statuses (API v1), and three of kling-relay: submission_unknown, abandoned and refused."""

    CREATED = "created"
    SUBMISSION_UNKNOWN = "submission_unknown"
    SUBMITTED = "submitted"
    PROCESSING = "processing"
    ABANDONED = "abandoned"
    REFUSED = "refused"
    SUCCEED = "succeed"
    FAILED = "failed"


RANK: dict[TaskStatus, int] = {
    TaskStatus.CREATED: 0,
    TaskStatus.SUBMISSION_UNKNOWN: 1,
    TaskStatus.SUBMITTED: 2,
    TaskStatus.PROCESSING: 3,
    TaskStatus.ABANDONED: 4,
    TaskStatus.REFUSED: 4,
    TaskStatus.SUCCEED: 5,
    TaskStatus.FAILED: 5,
}

NOT_ANSWERED = frozenset({TaskStatus.CREATED, TaskStatus.SUBMISSION_UNKNOWN})
"""The statuses in which the vendor has not confirmed that it has the task."""

SENDABLE = NOT_ANSWERED | {TaskStatus.REFUSED}
"""The statuses in which the create request may be sent: after a refusal it is sent again."""

TERMINAL = frozenset({TaskStatus.SUCCEED, TaskStatus.FAILED})
SETTLED = TERMINAL | {TaskStatus.ABANDONED, TaskStatus.REFUSED}
"""The statuses that end a wait: the vendor's final report, the deadline, or a refused create."""

LEASE_MAX_MS = 600_000
"""A lease to send that ends later than this from now was taken while a clock was wrong: it does not count."""

RAW_MAX = 16 * 1024
"""The most characters of a vendor's body that a task keeps."""


class ArchivedCopy(msgspec.Struct, frozen=True):
    """A copy of a result: its URL, and the SHA-256 of its bytes (hexadecimal)."""

    url: str
    sha256: str


class Video(msgspec.Struct, frozen=True):
    """One result. `duration` is in seconds; `expires_at_ms` is when its URLs expire, by the vendor's rule.

    `id` is the vendor's id of the video, which its other APIs take (extend, lip-sync, video-to-audio).
    `archived` and `archived_watermark` are the archived copies of `url` and `watermark_url`, if any.
    """

    url: str
    watermark_url: str | None = None
    duration: float | None = None
    expires_at_ms: int | None = None
    archived: "ArchivedCopy | None" = None
    archived_watermark: "ArchivedCopy | None" = None
    id: str | None = None


class Charge(msgspec.Struct, frozen=True):
    """One charge: `kind` is `unit` (of a resource pack), `cash` or `credit`; amounts are decimal strings.

    `source` is the balance or the pack that it was taken from, in the vendor's words.
    """

    kind: str
    amount: str
    currency: str | None = None
    list_price: str | None = None
    source: str | None = None


class RefusedBy(msgspec.Struct, frozen=True, array_like=True):
    """A vendor that definitely refused a task's request, and why the request failed over to another."""

    vendor: str
    reason: str


# Fields with another name in stored documents, so that ledgers written by earlier versions stay readable.
_STORED_AS = {
    "poll_policy": "patience",
    "expects_callback": "is_told",
    "heard_from_vendor": "was_told",
    "lease_owner": "sender",
    "lease_until_ms": "sending_until_ms",
    "may_have_been_sent": "begun",
    "unconfirmed": "doubted",
    "refused_by": "tried",
}


class Task(msgspec.Struct, frozen=True, omit_defaults=True, rename=_STORED_AS):
    """One task as the ledger stores it.

    `request` is the submitted request (inline media as a digest). `refused_by` lists the vendors
    that refused it before `vendor`. `expects_callback`: the vendor is expected to report by a
    callback or an event stream; `heard_from_vendor`: it has done so. `lease_owner` may send the
    create request until `lease_until_ms`; `may_have_been_sent`: a create may have left and was not
    definitely refused; `first_sent_at_ms`: when the first one left, since the task last started;
    `unanswered_since_ms`: by vendor, when the first one left that got no clear answer and may still make a
    task. `unconfirmed`: a poll must confirm a report first. `polls` counts the polls without news;
    `poll_at_ms` is the time of the next poll, None for never. `raw` is the last authentic body about the
    task, without secrets, cut off at RAW_MAX characters.
    """

    external_task_id: str
    vendor: str
    status: TaskStatus
    created_at_ms: int
    updated_at_ms: int
    poll_policy: PollPolicy
    request: dict[str, str] = {}
    metadata: dict[str, str] = {}
    task_id: str | None = None
    status_message: str = ""
    videos: tuple[Video, ...] = ()
    cost: tuple[Charge, ...] = ()
    sequence: int = 0
    refused_by: tuple[RefusedBy, ...] = ()
    expects_callback: bool = True
    heard_from_vendor: bool = False
    lease_owner: str | None = None
    lease_until_ms: int = 0
    may_have_been_sent: bool = False
    first_sent_at_ms: int | None = None
    unanswered_since_ms: dict[str, int] = {}
    unconfirmed: bool = False
    polls: int = 0
    poll_at_ms: int | None = None
    raw: str = ""

    @property
    def is_open(self) -> bool:
        """Whether the task occupies a slot at its vendor: it is reserved and not settled."""
        return self.status not in SETTLED

    @property
    def sent_after_ms(self) -> int:
        """When the task was first sent since it last started, else when it was reserved: deadlines count from it."""
        return self.created_at_ms if self.first_sent_at_ms is None else self.first_sent_at_ms

    @property
    def ours_after_ms(self) -> int:
        """The time before which no create left that can have made this task at its vendor."""
        return min(self.sent_after_ms, self.unanswered_since_ms.get(self.vendor, self.sent_after_ms))

    @property
    def abandon_at_ms(self) -> int:
        """The deadline after which the task is abandoned; it counts from the first send."""
        return self.sent_after_ms + int(self.poll_policy.abandon_after_s * 1000)


def may_send(task: Task, now_ms: int) -> bool:
    """Return whether the lease to send this task's create request can be taken at `now_ms`."""
    return is_sendable(task) and not is_leased(task, now_ms)


def is_sendable(task: Task) -> bool:
    """Return whether a create request may be sent: none was answered, or it was refused and no report denies that."""
    return task.status in SENDABLE and (task.status is not TaskStatus.REFUSED or task.task_id is None)


def is_leased(task: Task, now_ms: int) -> bool:
    """Return whether a submitter holds the lease to send this task's create request at `now_ms`."""
    return task.lease_owner is not None and now_ms < task.lease_until_ms <= now_ms + LEASE_MAX_MS


def refusals_of(task: Task) -> str:
    """Return the vendors that refused a task and their reasons, as text."""
    return "; ".join(f"{refused_by.vendor}: {refused_by.reason}" for refused_by in task.refused_by)
