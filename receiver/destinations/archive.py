"""Copies results before their URLs die: `archive:s3://bucket/prefix`, `gs://`, `az://`, or `archive:/a/directory`.

Of a `task.succeed` each video is fetched, stored as `<external_task_id>/<number>.mp4` (and
`<number>-watermark.mp4`), and noted in the task with its SHA-256, which is the event
`task.archived`. Other events are acknowledged and do nothing. A copy that is made twice is the
same; one that cannot be made is tried by the hook's schedule, and a dead letter in the end.

Object stores go through obstore; on AWS Lambda, where it is left out of the package, through boto3.
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

from receiver.destinations.base import Outcome, failed, wrong
from receiver.hooks import TEST, Hook
from submitter.clock import Clock
from submitter.event import Event
from submitter.ledger.base import Ledger
from submitter.media import CannotFetch, download
from submitter.media_store import directory_of
from submitter.task import Archived, Copied, TaskStatus, transition

Put = Callable[[Path, str], Awaitable[str]]
"""Stores a file under a key, and returns where it is."""

KIND = "video/mp4"
PROBE = "kling-relay-probe.txt"


class Archive:
    """One place for results."""

    def __init__(self, put: Put, allow_hosts: frozenset[str]) -> None:
        self._put = put
        self._allow_hosts = allow_hosts
        self._ledger: Ledger | None = None
        self._clock = Clock()

    def use(self, ledger: Ledger, clock: Clock) -> None:
        """Take the ledger where copies are noted."""
        self._ledger, self._clock = ledger, clock

    async def send(self, event: Event, now_s: float) -> Outcome:
        if event.type == TEST:
            reason = await self.reach()
            return Outcome(reason is None, reason or f"{PROBE} is written there")
        if event.type != f"task.{TaskStatus.SUCCEED.value}" or self._ledger is None:
            return Outcome(True, "nothing to archive")
        try:
            task = await self._ledger.get(event.external_task_id)
            copies: dict[str, Copied] = {}
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
        except Exception as error:  # noqa: BLE001 - each store's library has errors of its own
            return failed(error)
        return Outcome(True, f"{len(copies)} files archived")

    async def _copy(self, url: str, key: str) -> Copied:
        with tempfile.TemporaryDirectory(prefix="kling-relay-") as folder:
            path = Path(folder) / "result"
            await download(url, path, self._allow_hosts)
            digest = await asyncio.to_thread(_digest, path)
            return Copied(await self._put(path, key), digest)

    async def reach(self) -> str | None:
        with tempfile.TemporaryDirectory(prefix="kling-relay-") as folder:
            path = Path(folder) / "probe"
            path.write_bytes(b"kling-relay can write here\n")
            try:
                await self._put(path, PROBE)
            except Exception as error:  # noqa: BLE001 - as above
                return failed(error).answer
        return None

    async def close(self) -> None:
        """Nothing is kept open."""


def open(hook: Hook, allow_hosts: frozenset[str]) -> Archive:
    """Open the place that a hook's URL names behind `archive:`."""
    url = hook.url.removeprefix("archive:")
    directory = directory_of(url)
    if directory is not None:
        if not Path(directory).is_absolute():
            raise wrong(hook, "url", repr(hook.url), "archive:/an/absolute/directory", "Give the whole path.")
        return Archive(_into_directory(Path(directory)), allow_hosts)
    try:
        return Archive(_into_store(url), allow_hosts)
    except ImportError:
        if not url.startswith("s3://"):
            raise
        return Archive(_into_s3(url), allow_hosts)
    except Exception as error:
        said = str(error).partition("\n")[0]
        raise wrong(
            hook, "url", repr(hook.url), said, "Use archive:s3://bucket/prefix, gs://... or az://..."
        ) from error


def _into_directory(directory: Path) -> Put:
    def copy(path: Path, key: str) -> str:
        target = directory / key
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.{os.getpid()}.part")
        shutil.copyfile(path, part)
        part.replace(target)
        return target.as_uri()

    return lambda path, key: asyncio.to_thread(copy, path, key)


def _into_store(url: str) -> Put:
    import obstore
    from obstore.store import from_url

    store: Any = from_url(url)

    async def put(path: Path, key: str) -> str:
        await obstore.put_async(store, key, path, attributes={"Content-Type": KIND})
        return f"{url.rstrip('/')}/{key}"

    return put


def _into_s3(url: str) -> Put:
    import boto3

    parts = urlsplit(url)
    client, prefix = boto3.client("s3"), parts.path.strip("/")

    def put(path: Path, key: str) -> str:
        whole = f"{prefix}/{key}" if prefix else key
        client.upload_file(str(path), parts.netloc, whole, ExtraArgs={"ContentType": KIND})
        return f"s3://{parts.netloc}/{whole}"

    return lambda path, key: asyncio.to_thread(put, path, key)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
