"""Appends events to a JSON Lines file, with rotation: `file:///var/log/kling/events.jsonl?max_mb=100&keep=5`.

Event: one line with the whole CloudEvent (structured mode only).
Delivered: the line is written and fsynced. Concurrent events share one write and one fsync.
Order: a task's events are appended one after the other. Several processes can append to one file; a lock file
(`flock`) serializes them.
Limit: 1 GiB per event.
Rotation: before the file exceeds `max_mb` (MB), it is renamed to `events.jsonl.1`, that file to `.2`, and so on up
to `keep`.
"""

import asyncio
import fcntl
import os
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from receiver.destinations.base import invalid_hook
from receiver.destinations.batches import Batches, BatchLimits
from receiver.destinations.cloudevents import with_trace
from receiver.destinations.outcome import Outcome, failed_outcome
from receiver.hook import Hook
from submitter.event import Event

LIMITS = BatchLimits(event_bytes=1024 * 1024 * 1024, events=1000, request_bytes=1024 * 1024)


class FileDestination:
    """One file and its rotated predecessors."""

    def __init__(self, path: Path, max_bytes: int, keep: int) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._keep = keep
        self._batches = Batches(self._post, LIMITS)

    async def send(self, event: Event, now_s: float) -> Outcome:
        return await self._batches.send(event, now_s)

    async def _post(self, events: list[Event], now_s: float) -> list[Outcome]:
        try:
            await asyncio.to_thread(self._append, b"".join(with_trace(event) + b"\n" for event in events))
        except OSError as error:
            return [failed_outcome(error)] * len(events)
        return [Outcome(True, f"written to {self._path}")] * len(events)

    async def reach(self) -> str | None:
        directory = self._path.parent
        if not directory.is_dir() or not os.access(directory, os.W_OK):
            return f"{directory} is not a writable directory"
        return None

    async def close(self) -> None:
        await self._batches.close()

    def _append(self, lines: bytes) -> None:
        with self._path.with_name(f".{self._path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self._path.exists() and self._path.stat().st_size + len(lines) > self._max_bytes:
                self._rotate()
            with self._path.open("ab") as file:
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())

    def _rotate(self) -> None:
        for number in range(self._keep, 0, -1):
            older = self._path.with_name(f"{self._path.name}.{number}")
            newer = self._path.with_name(f"{self._path.name}.{number - 1}") if number > 1 else self._path
            if newer.exists():
                newer.replace(older)
        if self._keep == 0:
            self._path.unlink()


def open(hook: Hook, allow_hosts: frozenset[str]) -> FileDestination:
    """Return the destination of a hook, whose file need not exist; raise InvalidSettings for an invalid URL or mode."""
    parts, options = urlsplit(hook.url), parse_qs(hook.url.partition("?")[2])
    path = Path(unquote(parts.path))
    if parts.netloc or not path.is_absolute() or not path.name:
        raise invalid_hook(hook, "url", repr(hook.url), "file:///an/absolute/path.jsonl", "Use an absolute path.")
    if hook.mode != "structured":
        raise invalid_hook(hook, "mode", repr(hook.mode), "structured", "A line is the whole event: remove `mode`.")
    max_mb, keep = options.get("max_mb", ["100"])[0], options.get("keep", ["5"])[0]
    if not (max_mb.isdecimal() and keep.isdecimal() and int(max_mb)) or set(options) - {"max_mb", "keep"}:
        remedy = "Use only these options, with whole numbers; `max_mb` at least 1."
        raise invalid_hook(hook, "url", f"?{parts.query}", "?max_mb=100&keep=5", remedy)
    return FileDestination(path, int(max_mb) * 1_000_000, int(keep))
