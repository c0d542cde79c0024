"""What can be observed about a task: a vendor's report, a lease, a refusal, no answer, ... As values. Pure.

`submitter.transition` decides what an observation changes. Times are Unix milliseconds.
"""

from typing import Literal

import msgspec

from submitter.schedule import PollPolicy
from submitter.task import ArchivedCopy, Charge, TaskStatus, Video

Source = Literal["create", "callback", "stream", "poll", "refresh"]
"""How a report came: pushed by the vendor, or in answer to a create, a scheduled poll or a person's refresh."""

PUSHED = ("callback", "stream")
"""The sources that the vendor pushes."""

ASKED = ("poll", "refresh")
"""The sources that answer a query."""


class Report(msgspec.Struct, frozen=True):
    """A vendor's report about a task: the answer to create, a callback, a stream event or a query's answer.

    `unfinished`: the vendor reports the end without a result yet, so the task is polled again.
    `is_test`: the vendor's console sent it to test a callback URL; no such task exists. `created_at_ms`
    is when the vendor created its task, if it says so; `request_id` is what its support asks for; `raw` is
    the body.
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
    created_at_ms: int | None = None
    request_id: str | None = None
    raw: str = ""


class SendLease(msgspec.Struct, frozen=True):
    """The lease to send the create request: `lease_owner` holds it until `until_ms`.

    `begins`: the owner is about to send. `renews`: extend a lease that the owner still holds; a renewal
    that arrives after the lease was released does not take it again. `refused`: the owner's last create was
    refused for the time being. `absent_at_ms`: a person states that the vendor has no task of this request, as the
    row was (`updated_at_ms`) when that was found: a create that was sent since may still have made one.
    """

    lease_owner: str
    until_ms: int
    begins: bool = False
    renews: bool = False
    refused: bool = False
    absent_at_ms: int | None = None


class CreateRefused(msgspec.Struct, frozen=True):
    """The last create of `lease_owner` made no task: it was definitely refused, or not sent."""

    message: str
    lease_owner: str | None


class CreateUnclear(msgspec.Struct, frozen=True):
    """A create of `lease_owner` got no clear answer: whether it made a task is being looked up."""

    lease_owner: str | None


class FailedOver(msgspec.Struct, frozen=True):
    """`lease_owner` moves to `vendor`: the previous one refused for `reason`, or (None) the request starts again."""

    vendor: str
    poll_policy: PollPolicy
    reason: str | None
    lease_owner: str | None


class OutcomeUnknown(msgspec.Struct, frozen=True):
    """A create of `lease_owner` was sent, and its outcome cannot be determined at the moment."""

    message: str
    lease_owner: str | None


class NoAnswer(msgspec.Struct, frozen=True):
    """A poll returned nothing usable: no answer, an unreadable one, or (`is_absent`) a task that the vendor lacks."""

    message: str = ""
    is_absent: bool = False


class Unconfirmed(msgspec.Struct, frozen=True):
    """A report that a poll must confirm first: it is unsigned, or could not be parsed.

    `task_id` is the vendor's id from the report: with it the vendor can be polled even if the answer
    to create was lost.
    """

    task_id: str | None = None
    raw: str = ""


class Adopted(msgspec.Struct, frozen=True):
    """A person's decision: the vendor's task in `report` is this one."""

    report: Report


class Archived(msgspec.Struct, frozen=True):
    """Results were archived: the copies, by the URLs that they were downloaded from."""

    copies: dict[str, ArchivedCopy]


Observation = (
    Adopted
    | Archived
    | CreateRefused
    | CreateUnclear
    | FailedOver
    | NoAnswer
    | OutcomeUnknown
    | Report
    | SendLease
    | Unconfirmed
)
