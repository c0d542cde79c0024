"""Infers from recent tasks whether a vendor really sends callbacks. Pure."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from msgspec.structs import replace

from submitter.schedule import PollPolicy
from submitter.task import Task
from submitter.vendors.base import Streams

if TYPE_CHECKING:
    from submitter.settings import VendorSettings

RECENT_SUCCESSES = 5
"""How many of a vendor's newest successful tasks are examined."""


def sends_callbacks(successes: Sequence[Task]) -> bool:
    """Return whether to expect callbacks from a vendor, given its newest successful tasks.

    True without evidence, and if at least one task was reported by a callback; False if all were found by
    polls only. Tasks submitted without a callback URL are no evidence.
    """
    evidence = [task for task in successes if task.expects_callback]
    return not evidence or any(task.heard_from_vendor for task in evidence)


def poll_policy_for(settings: "VendorSettings", successes: Sequence[Task]) -> PollPolicy:
    """Return the poll policy of a new task: the vendor's, or faster polling if no callback is expected."""
    if settings.callbacks == "auto":
        is_expected = sends_callbacks(successes)
    else:
        is_expected = settings.callbacks or isinstance(settings.vendor, Streams)
    return (
        settings.poll_policy
        if is_expected
        else replace(settings.poll_policy, while_expected=settings.poll_policy.while_unexpected)
    )
