"""Classifies a vendor's errors: remedy, retryable, eligible for failover, ambiguous for a create. Pure."""

import re

import msgspec

from submitter.callback_url import redact
from submitter.errors import SubmissionUnknown, VendorRefused
from submitter.vendors.base import HttpAnswer

RETRY_AFTER_MAX_S = 300.0
"""The longest wait that a vendor's Retry-After is followed for, in seconds."""


class Rule(msgspec.Struct, frozen=True):
    """The classification of one error of a vendor.

    `retryable`: the same request may succeed later without human action. `failover`: another vendor may
    accept it. `ambiguous`: in answer to a create, it leaves open whether a task was created. `duplicate`:
    the vendor has a task with this external_task_id already.
    """

    remedy: str
    retryable: bool = False
    failover: bool = False
    ambiguous: bool = False
    duplicate: bool = False


def rule_of(status: int, name: str) -> Rule:
    """Return the rule of an HTTP status, for errors without a known error code."""
    match status:
        case 401:
            return Rule(f"Check {name.upper()}_API_KEY.", failover=True)
        case 402:
            return Rule(f"The balance at {name} is used up. Top it up.", failover=True)
        case 403:
            return Rule(f"This key has no permission for this model. Request it from {name}.", failover=True)
        case 404:
            return Rule(f"Check {name.upper()}_BASE_URL.")
        case 408:
            return Rule("The vendor timed out. Try again later.", retryable=True, ambiguous=True)
        case 429:
            return Rule("Too many requests. It is retried automatically.", retryable=True)
        case _ if status >= 500 or status < 400:  # a 2xx or 3xx that is no success is just as ambiguous
            return Rule(f"{name} has an outage. Try again later.", retryable=True, ambiguous=True)
    return Rule("Correct the request, and submit it with a new id.")


def refusal(
    name: str, answer: HttpAnswer, rule: Rule, *, code: str, message: str, request_id: str | None = None
) -> VendorRefused:
    """Return the exception for a vendor's error answer."""
    retry_after = answer.headers.get("retry-after", "")
    return VendorRefused(
        name,
        http_status=answer.status,
        code=code,
        message=redact(message)[:500],
        remedy=rule.remedy,
        retryable=rule.retryable,
        failover=rule.failover,
        duplicate=rule.duplicate,
        request_id=request_id,
        retry_after_s=min(float(retry_after), RETRY_AFTER_MAX_S) if re.fullmatch("[0-9]{1,9}", retry_after) else None,
    )


def refused_create(refused: VendorRefused, rule: Rule) -> VendorRefused | SubmissionUnknown:
    """Return the exception for a refused create: VendorRefused, or SubmissionUnknown if it is ambiguous."""
    if rule.ambiguous:
        return SubmissionUnknown(f"{refused.vendor} may have created the task: {refused}", refused)
    return refused
