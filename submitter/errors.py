"""Every exception of kling-relay, by who has to act.

    RelayError
    ├── InvalidRequest        the caller: correct the request      (nothing was sent or charged)
    ├── InvalidSettings       the operator: correct the settings   (nothing was sent or charged)
    ├── IdConflict            the caller: use another id           (nothing was sent or charged)
    ├── TaskNotFound          the caller: check the id
    ├── CallbackRefused       the sender: the callback is not authentic, nothing was stored
    │   ├── UrlUnknown        404
    │   ├── UrlExpired        403
    │   └── SignatureInvalid  401
    ├── Unintelligible        the poller: an authentic report could not be parsed; it is quarantined, answered 2xx
    ├── VendorRefused         the caller, or a later retry: no task was created, nothing was charged
    ├── SubmissionUnknown     a callback, a poll or an operator: a task may exist, so it is not sent again
    ├── LedgerUnavailable     the operator: nothing was stored, the vendor may retry (503)
    ├── Overloaded            the sender: too many callbacks wait for the ledger, repeat this one later (503)
    └── CannotFetch           the caller: download the result again (in `submitter.media.download`)

A message states what happened, the value (never a secret) and the remedy.
"""

from collections.abc import Sequence
from typing import ClassVar

import msgspec


class Problem(msgspec.Struct, frozen=True):
    """One invalid field: its value, the limit that it breaks and the remedy."""

    field: str
    value: str
    limit: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.field}: {self.value} ({self.limit}). {self.remedy}"


class RelayError(Exception):
    """The base class of all exceptions that kling-relay raises on purpose."""

    status: int = 500
    """The HTTP status of the receiver's response to a request that raised this error."""


class _Problems(RelayError):
    headline: ClassVar[str]

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join([self.headline, *(f"  - {problem}" for problem in self.problems)]))


class InvalidRequest(_Problems):
    """The request is invalid or exceeds the vendor's limits; nothing was sent."""

    status = 400
    headline = "invalid request, nothing was sent:"


class InvalidSettings(_Problems):
    """The settings are missing or invalid; nothing was started."""

    headline = "invalid settings:"


class IdConflict(RelayError):
    """The idempotency key (`external_task_id`) belongs to another task; nothing was created or charged.

    `fields` are those in which the request in this ledger differs. `vendor` is set instead if the id was
    used before at that vendor, by a task that this ledger did not create.
    """

    status = 409

    def __init__(self, external_task_id: str, fields: Sequence[str] = (), *, vendor: str | None = None) -> None:
        self.external_task_id = external_task_id
        self.fields = tuple(fields)
        self.vendor = vendor
        if vendor is None:
            message = (
                f"already belongs to a request with a different {', '.join(fields)}. "
                "Use a new id for a new task, or repeat the first request exactly."
            )
        else:
            message = (
                f"was used before at {vendor}, for a task that this ledger did not create (another ledger of the "
                "same account, or a pruned task). Nothing was created or charged. Use a new id."
            )
        super().__init__(f"external_task_id {external_task_id!r} {message}")


class TaskNotFound(RelayError):
    """No task in the ledger has this external_task_id."""

    status = 404

    def __init__(self, external_task_id: str) -> None:
        self.external_task_id = external_task_id
        super().__init__(f"no task {external_task_id!r} in this ledger. `kling-relay tasks list` lists its tasks.")


class CallbackRefused(RelayError):
    """The callback is not authentic; nothing was stored."""

    status = 403


class UrlUnknown(CallbackRefused):
    """The callback URL was not issued by this relay."""

    status = 404


class UrlExpired(CallbackRefused):
    """The callback URL was issued by this relay and has expired."""

    status = 403


class SignatureInvalid(CallbackRefused):
    """The body is not signed with the vendor's webhook secret, or its signature is too old."""

    status = 401


class Unintelligible(RelayError):
    """An authentic report that could not be parsed; it is quarantined and the vendor is polled."""

    status = 200


class VendorRefused(RelayError):
    """The vendor definitely refused the request; a refused create made no task and costs nothing.

    `retryable`: the same request can succeed later without human action. `failover`: another vendor
    may accept it (no balance, no capacity, maintenance, missing permission). `duplicate`: the vendor
    has a task with this external_task_id already. `retry_after_s` is the vendor's Retry-After in
    seconds, if it sent one. `request_id` is what the vendor's support asks for. An `http_status` of 0
    means that the vendor was not reached. `status` is 503 if it is retryable, else 422.
    """

    def __init__(
        self,
        vendor: str,
        *,
        http_status: int,
        code: str,
        message: str,
        remedy: str,
        retryable: bool,
        failover: bool = False,
        duplicate: bool = False,
        retry_after_s: float | None = None,
        request_id: str | None = None,
    ) -> None:
        self.status = 503 if retryable else 422
        self.vendor = vendor
        self.http_status = http_status
        self.code = code
        self.message = message
        self.remedy = remedy
        self.retryable = retryable
        self.failover = failover
        self.duplicate = duplicate
        self.retry_after_s = retry_after_s
        self.request_id = request_id
        super().__init__(f"{vendor} refused: {self.reason}. {remedy}")

    @property
    def reason(self) -> str:
        """The vendor's words, with the HTTP status, the code and the request id."""
        answered = f"HTTP {self.http_status}, code {self.code}" if self.http_status else f"code {self.code}"
        request = f", request_id {self.request_id}" if self.request_id else ""
        return f"{self.message or 'no reason given'} ({answered}{request})"

    def after(self, others: str) -> "VendorRefused":
        """Return this error, with the earlier refusals added to its message."""
        self.args = (f"{self} Previously refused by {others}.",)
        return self


class SubmissionUnknown(RelayError):
    """A create was sent, and whether it created a task is unknown; it is never blindly sent again.

    `refusal` is the vendor's error, if it answered with one that leaves open whether a task exists.
    """

    status = 502

    def __init__(self, message: str, refusal: VendorRefused | None = None) -> None:
        self.refusal = refusal
        super().__init__(message)


class LedgerUnavailable(RelayError):
    """The ledger cannot be read or written at the moment; nothing was stored."""

    status = 503


class Overloaded(RelayError):
    """As many callbacks as are allowed wait for the ledger; this one was not stored, and can be repeated."""

    status = 503
