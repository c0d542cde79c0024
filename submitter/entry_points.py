"""Entry points: the plugins that other installed packages add."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

LISTS = ("*.dist-info/entry_points.txt", "*.egg-info/entry_points.txt")


def entry_points_of(group: str) -> "Sequence[EntryPoint]":
    """Return the entry points of `group`.

    `importlib.metadata` takes more of a serverless function's cold start than all modules that call
    this. So it is imported only where a package's `entry_points.txt` contains the group's name.
    """
    folders = [Path(entry) for entry in sys.path]
    if not any(folder.is_file() for folder in folders):  # only importlib.metadata looks into archives
        lists = (path for folder in folders if folder.is_dir() for pattern in LISTS for path in folder.glob(pattern))
        if not any(group in path.read_text(errors="replace") for path in lists):
            return ()
    from importlib.metadata import entry_points

    return tuple(entry_points(group=group))
