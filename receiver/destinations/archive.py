"""Archives result videos in an object store or a directory, before their URLs expire.

URL: `archive:s3://bucket/prefix`, `archive:gs://...`, `archive:az://...` or `archive:/a/directory`.

On `task.succeed` each video is downloaded and stored as `<external_task_id>/<number>.mp4` (and
`<number>-watermark.mp4`). Its location and SHA-256 are recorded in the task, which emits `task.archived`.
Other events are acknowledged and ignored.
Delivered: all copies are stored and recorded. A repeated copy overwrites the same key. A failed copy is retried by
the hook's schedule, and becomes a dead letter at its end.

Object stores are written with obstore. The package for AWS Lambda does not contain it; S3 is then written with boto3.
"""

import asyncio
import hashlib
import os
import shutil
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from receiver.destinations.base import invalid_hook
from receiver.destinations.outcome import Outcome, failed_outcome
from receiver.hook import TEST, Hook
from submitter.clock import Clock
from submitter.event import Event
from submitter.ledger.base import Tasks
from submitter.media.download import CannotFetch, download
from submitter.media.store import directory_of
from submitter.observation import Archived
from submitter.task import ArchivedCopy, TaskStatus
from submitter.transition import transition

StoreFile = Callable[[Path, str], Awaitable[str]]
"""Stores a file under a key; returns its URL."""

VIDEO_TYPE = "video/mp4"
PROBE_KEY = "kling-relay-probe.txt"


class Archive:
    """One object store prefix or directory."""

    def __init__(self, put: StoreFile, allow_hosts: frozenset[str], max_mb: int) -> None:
        self._put = put
        self._max_bytes = max_mb * 1024 * 1024
        self._allow_hosts = allow_hosts
        self._ledger: Tasks | None = None
        self._clock = Clock()

    def use(self, ledger: Tasks, clock: Clock) -> None:
        """Set the ledger in which copies are recorded."""
        self._ledger, self._clock = ledger, clock

    async def send(self, event: Event, now_s: float) -> Outcome:
        if event.type == TEST:
            reason = await self.reach()
            return Outcome(reason is None, reason or f"wrote {PROBE_KEY}")
        if event.type != f"task.{TaskStatus.SUCCEED.value}" or self._ledger is None:
            return Outcome(True, "nothing to archive")
        try:
            task = await self._ledger.get(event.external_task_id)
            copies: dict[str, ArchivedCopy] = {}
            for number, video in enumerate(task.videos):
                copies[video.url] = await self._copy(video.url, f"{task.external_task_id}/{number}.mp4")
                if video.watermark_url is not None:
                    key = f"{task.external_task_id}/{number}-watermark.mp4"
                    copies[video.watermark_url] = await self._copy(video.watermark_url, key)
            archived = Archived(copies)
            await self._ledger.apply(
                event.external_task_id, lambda current: transition(current, archived, self._clock.now_ms())
            )
        except CannotFetch as error:
            return Outcome(False, str(error)[:500])
        except Exception as error:  # noqa: BLE001 - each store's library raises its own errors
            return failed_outcome(error)
        return Outcome(True, f"{len(copies)} files archived")

    async def _copy(self, url: str, key: str) -> ArchivedCopy:
        with tempfile.TemporaryDirectory(prefix="kling-relay-") as folder:
            path = Path(folder) / "result"
            await download(url, path, self._allow_hosts, self._max_bytes)
            digest = await asyncio.to_thread(_digest, path)
            return ArchivedCopy(await self._put(path, key), digest)

    async def reach(self) -> str | None:
        with tempfile.TemporaryDirectory(prefix="kling-relay-") as folder:
            path = Path(folder) / "probe"
            path.write_bytes(b"kling-relay can write here\n")
            try:
                await self._put(path, PROBE_KEY)
            except Exception as error:  # noqa: BLE001 - as above
                return failed_outcome(error).answer
        return None

    async def close(self) -> None:
        """Do nothing: no connection is kept open."""


def open(hook: Hook, allow_hosts: frozenset[str]) -> Archive:
    """Return the destination of a hook; raise InvalidSettings for an invalid URL."""
    url = hook.url.removeprefix("archive:")
    directory = directory_of(url)
    if directory is not None:
        if not Path(directory).is_absolute():
            raise invalid_hook(hook, "url", repr(hook.url), "archive:/an/absolute/directory", "Use an absolute path.")
        return Archive(_store_in_directory(Path(directory)), allow_hosts, hook.max_mb)
    try:
        return Archive(_store_with_obstore(url), allow_hosts, hook.max_mb)
    except ImportError:
        if not url.startswith("s3://"):
            raise
        return Archive(_store_with_boto3(url), allow_hosts, hook.max_mb)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        remedy = "Use archive:s3://bucket/prefix, gs://... or az://..."
        raise invalid_hook(hook, "url", repr(hook.url), reason, remedy) from error


def _store_in_directory(directory: Path) -> StoreFile:
    def copy(path: Path, key: str) -> str:
        target = directory / key
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.{os.getpid()}.part")
        shutil.copyfile(path, part)
        part.replace(target)
        return target.as_uri()

    return lambda path, key: asyncio.to_thread(copy, path, key)


def _store_with_obstore(url: str) -> StoreFile:
    import obstore
    from obstore.store import from_url

    store: Any = from_url(url)

    async def put(path: Path, key: str) -> str:
        await obstore.put_async(store, key, path, attributes={"Content-Type": VIDEO_TYPE})
        return f"{url.rstrip('/')}/{key}"

    return put


def _store_with_boto3(url: str) -> StoreFile:
    import boto3

    parts = urlsplit(url)
    client, prefix = boto3.client("s3"), parts.path.strip("/")

    def put(path: Path, key: str) -> str:
        full_key = f"{prefix}/{key}" if prefix else key
        client.upload_file(str(path), parts.netloc, full_key, ExtraArgs={"ContentType": VIDEO_TYPE})
        return f"s3://{parts.netloc}/{full_key}"

    return lambda path, key: asyncio.to_thread(put, path, key)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
