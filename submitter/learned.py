"""What the ledger's tasks teach about a vendor: whether it calls back. Pure."""

from collections.abc import Sequence

from msgspec.structs import replace

from submitter.schedule import Patience
from submitter.settings import VendorSettings
from submitter.task import Task
from submitter.vendors.base import Streams

WITNESSES = 5
"""How many of a vendor's newest successes are looked at."""


def calls_back(successes: Sequence[Task]) -> bool:
    """Tell whether the vendor is to be expected to tell of its tasks by itself.

    It is, until results were found by polls alone; and again once one of the newest was told.
    """
    witnesses = [task for task in successes if task.is_told]
    return not witnesses or any(task.was_told for task in witnesses)


def patience_with(settings: VendorSettings, successes: Sequence[Task]) -> Patience:
    """Return how long a new task of this vendor may be silent: less, when it will not tell by itself."""
    if settings.callbacks == "auto":
        tells = calls_back(successes)
    else:
        tells = settings.callbacks or isinstance(settings.vendor, Streams)
    return settings.patience if tells else replace(settings.patience, silence=settings.patience.asking)
