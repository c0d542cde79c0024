"""What other packages add, by entry points."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

LISTS = ("*.dist-info/entry_points.txt", "*.egg-info/entry_points.txt")


def entry_points_of(group: str) -> "Sequence[EntryPoint]":
    """Return the entry points of a group.

    The library that reads them costs a function's cold start more than all of our modules that
    are asked for them: it is loaded where some installed package speaks of the group.
    """
    folders = [Path(entry) for entry in sys.path]
    if not any(folder.is_file() for folder in folders):  # an archive is the library's to look into
        lists = (path for folder in folders if folder.is_dir() for pattern in LISTS for path in folder.glob(pattern))
        if not any(group in path.read_text(errors="replace") for path in lists):
            return ()
    from importlib.metadata import entry_points

    return tuple(entry_points(group=group))
