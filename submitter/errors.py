"""Every error of kling-relay, named by who acts next.

    RelayError
    ├── InvalidRequest        the caller: mend the request      (nothing was spent)
    ├── InvalidSettings       the operator: mend the settings   (nothing was spent)
    ├── IdConflict            the caller: choose another id     (nothing was spent)
    ├── TaskNotFound          the caller: look at the id
    ├── CallbackRefused       whoever called us: not authentic, no row was written
    │   ├── UrlUnknown        404
    │   ├── UrlExpired        403
    │   └── SignatureInvalid  401
    ├── Unintelligible        us: authentic, kept, asked about by a poll, answered 2xx
    ├── VendorRefused         the caller, or time: the task was surely not created
    ├── SubmissionUnknown     nobody: perhaps created, never repeated
    └── LedgerUnavailable     the operator: nothing was stored, the vendor may repeat (503)

A message says what happened, the value (never a secret) and the remedy.
"""

from collections.abc import Sequence
from typing import ClassVar

import msgspec


class Problem(msgspec.Struct, frozen=True):
    """Say what is wrong with one field, and how to mend it."""

    field: str
    value: str
    limit: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.field}: {self.value} ({self.limit}). {self.remedy}"


class RelayError(Exception):
    """The root of all errors that this project raises on purpose."""

    status: ClassVar[int] = 500
    """The HTTP status that the receiver answers when this error ends a request."""


class _Problems(RelayError):
    headline: ClassVar[str]

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join([self.headline, *(f"  - {problem}" for problem in self.problems)]))


class InvalidRequest(_Problems):
    """The request breaks the vendor's limits; nothing was sent."""

    status = 400
    headline = "the request was not sent:"


class InvalidSettings(_Problems):
    """The settings cannot be used; nothing was started."""

    headline = "the settings need mending:"


class IdConflict(RelayError):
    """The external_task_id belongs to another request; nothing was sent."""

    status = 409

    def __init__(self, external_task_id: str, fields: Sequence[str]) -> None:
        self.external_task_id = external_task_id
        self.fields = tuple(fields)
        super().__init__(
            f"external_task_id {external_task_id!r} already belongs to a request with another "
            f"{', '.join(fields)}; choose a new id for a new task, or repeat the first request exactly"
        )


class TaskNotFound(RelayError):
    """No task in the ledger has this external_task_id."""

    status = 404

    def __init__(self, external_task_id: str) -> None:
        self.external_task_id = external_task_id
        super().__init__(f"no task {external_task_id!r} in this ledger; `kling-relay tasks list` shows those that are")


class CallbackRefused(RelayError):
    """The callback is not authentic; no row was written for it."""

    status = 403


class UrlUnknown(CallbackRefused):
    """The callback's URL was not made by this relay."""

    status = 404


class UrlExpired(CallbackRefused):
    """The callback's URL was made by this relay and is past its time."""

    status = 403


class SignatureInvalid(CallbackRefused):
    """The body is not signed by the vendor's webhook secret, or too long ago."""

    status = 401


class Unintelligible(RelayError):
    """An authentic report that cannot be understood; it is kept and the vendor is asked."""

    status = 200


class VendorRefused(RelayError):
    """The vendor surely did not do what was asked; a create made no task and costs nothing.

    `retryable` tells whether the same request can succeed later without a person acting;
    `elsewhere`, whether another vendor may take it (no balance, no capacity, maintenance, not
    permitted). `retry_after_s` is the vendor's own wish in seconds, where it stated one. An
    `http_status` of 0 means that it was not reached at all.
    """

    status = 502

    def __init__(
        self,
        vendor: str,
        *,
        http_status: int,
        code: str,
        message: str,
        remedy: str,
        retryable: bool,
        elsewhere: bool = False,
        retry_after_s: float | None = None,
    ) -> None:
        self.vendor = vendor
        self.http_status = http_status
        self.code = code
        self.message = message
        self.remedy = remedy
        self.retryable = retryable
        self.elsewhere = elsewhere
        self.retry_after_s = retry_after_s
        super().__init__(
            f"{vendor} refused: {message or 'no reason given'} (HTTP {http_status}, code {code}). {remedy}"
        )

    def after(self, others: str) -> "VendorRefused":
        """Return this error, saying too who refused before."""
        self.args = (f"{self} Before, it was refused by {others}.",)
        return self


class SubmissionUnknown(RelayError):
    """A create was sent and nobody knows whether it made a task; it is never simply repeated.

    `refusal` is what the vendor answered, where its answer leaves open whether there is a task.
    """

    status = 502

    def __init__(self, message: str, refusal: VendorRefused | None = None) -> None:
        self.refusal = refusal
        super().__init__(message)


class LedgerUnavailable(RelayError):
    """The ledger cannot be read or written now; nothing was stored."""

    status = 503
