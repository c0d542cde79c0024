"""Appends events to a file, one line each: `file:///var/log/kling/events.jsonl?max_mb=100&keep=5`.

A line is acknowledged once it is on the disk; what comes at once is synced once. At `max_mb` the
file is renamed to `events.jsonl.1`, that to `.2`, and so on up to `keep`. Several processes may
append to one file.
"""

import asyncio
import fcntl
import os
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from receiver.cloudevents import with_trace
from receiver.destinations.base import Outcome, failed, wrong
from receiver.destinations.batches import Batches, Limits
from receiver.hooks import Hook
from submitter.event import Event

LIMITS = Limits(event_bytes=1024 * 1024 * 1024, events=1000, request_bytes=1024 * 1024)


class FileDestination:
    """One file."""

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
            return [failed(error)] * len(events)
        return [Outcome(True, f"written to {self._path}")] * len(events)

    async def reach(self) -> str | None:
        folder = self._path.parent
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            return f"{folder} is no folder that can be written to"
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
    """Open a file, which need not exist yet."""
    parts, asked = urlsplit(hook.url), parse_qs(hook.url.partition("?")[2])
    path = Path(unquote(parts.path))
    if parts.netloc or not path.is_absolute() or not path.name:
        raise wrong(hook, "url", repr(hook.url), "file:///an/absolute/path.jsonl", "Give the whole path.")
    if hook.mode != "structured":
        raise wrong(hook, "mode", repr(hook.mode), "structured", "A line holds the whole event: leave `mode` out.")
    max_mb, keep = asked.get("max_mb", ["100"])[0], asked.get("keep", ["5"])[0]
    if not (max_mb.isdecimal() and keep.isdecimal() and int(max_mb)) or set(asked) - {"max_mb", "keep"}:
        raise wrong(hook, "url", f"?{parts.query}", "?max_mb=100&keep=5", "Give whole numbers, or leave them out.")
    return FileDestination(path, int(max_mb) * 1_000_000, int(keep))
