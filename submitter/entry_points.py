"""Entry points: the plugins that other installed packages add."""

import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint


def entry_points_of(group: str) -> "Sequence[EntryPoint]":
    """Return the entry points of `group`.

    `importlib.metadata` takes more of a serverless function's cold start than all modules that call
    this. So it is imported only where a package's `entry_points.txt` contains the group's name.
    """
    if not any(map(os.path.isfile, sys.path)) and not any(group in listed for listed in _lists()):
        return ()  # an archive on the path is left to importlib.metadata, which looks into it
    from importlib.metadata import entry_points

    return tuple(entry_points(group=group))


def _lists() -> Iterator[str]:
    """Yield the text of the installed packages' `entry_points.txt`."""
    for folder in sys.path:
        for name in os.listdir(folder or ".") if os.path.isdir(folder or ".") else ():
            path = f"{folder or '.'}/{name}/entry_points.txt"
            if name.endswith((".dist-info", ".egg-info")) and os.path.isfile(path):
                with open(path, errors="replace") as file:
                    yield file.read()
