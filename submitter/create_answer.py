"""What the outcome of sending a create request means: created, certainly refused, or unknown."""

from submitter.errors import SubmissionUnknown, VendorRefused
from submitter.http import NotSent, Outcome, Unanswered
from submitter.observation import Report
from submitter.vendors.base import Vendor


def read_create(vendor: Vendor, outcome: Outcome) -> Report | VendorRefused | SubmissionUnknown:
    """Return what the outcome of sending a create means."""
    match outcome:
        case Unanswered(reason):
            return SubmissionUnknown(reason)
        case NotSent(reason):
            return _unreachable(vendor.name, reason)
    try:
        return vendor.read_create(outcome)
    except (SubmissionUnknown, VendorRefused) as error:
        return error


def _unreachable(vendor: str, reason: str) -> VendorRefused:
    return VendorRefused(
        vendor,
        http_status=0,
        code="unreachable",
        message=reason,
        remedy="Nothing was sent. Check the network and the base URL, then submit again.",
        retryable=True,
        failover=True,
    )


def limit_reached(vendor: str, parallel: int) -> VendorRefused:
    """Return the refusal by our limit of parallel tasks at a vendor."""
    return VendorRefused(
        vendor,
        http_status=0,
        code="parallel",
        message=f"the configured limit of {parallel} parallel tasks is reached",
        remedy="It is retried automatically.",
        retryable=True,
        failover=True,
    )
