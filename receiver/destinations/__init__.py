"""Where events go. A destination is picked by the scheme of a hook's URL, and imported when a hook uses it."""

from importlib import import_module
from typing import TYPE_CHECKING

from receiver.destinations.base import Destination

if TYPE_CHECKING:
    from receiver.hooks import Hook

SCHEMES: dict[str, str] = {
    "https": "receiver.destinations.http",
    "http": "receiver.destinations.http",
}


def open_destination(hook: "Hook", allow_hosts: frozenset[str]) -> Destination:
    """Open what a hook's URL leads to."""
    module = import_module(SCHEMES[hook.url.partition(":")[0]])
    destination: Destination = module.open(hook, allow_hosts)
    return destination
