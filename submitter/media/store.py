"""The media store: publishes local files under a URL, since vendors accept no uploads.

Two kinds: a directory that `serve` publishes under capability URLs at `/media/...`, and an object store
that obstore supports (S3, GCS, Azure), with presigned URLs. A file is stored under its SHA-256, so that
the same file is uploaded only once.
"""

import asyncio
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from submitter.callback_url import KeyRing, mint
from submitter.clock import Clock
from submitter.errors import InvalidSettings, Problem
from submitter.extras import install_command

URL_LIVES_S = 86400
"""A task waits in a vendor's queue for at most some hours before the vendor fetches its media."""


class MediaStore(Protocol):
    """Publishes local media."""

    async def publish(self, path: Path, sha256: str, format: str) -> str:
        """Store the file and return a URL that is valid for URL_LIVES_S seconds; raise InvalidSettings."""
        ...


class DirectoryStore:
    """A local directory that `serve` publishes."""

    def __init__(self, directory: Path, public_url: str, ring: KeyRing, clock: Clock) -> None:
        self._directory = directory
        self._public_url = public_url
        self._ring = ring
        self._clock = clock

    async def publish(self, path: Path, sha256: str, format: str) -> str:
        name = f"{sha256}.{format}"
        try:
            await asyncio.to_thread(self._copy, path, self._directory / name)
        except OSError as error:
            raise _problem(str(self._directory), str(error), "Make the directory writable.") from error
        token = mint(self._ring, "media", name, int(self._clock.now_s()) + URL_LIVES_S)
        return f"{self._public_url.rstrip('/')}/media/{name}/{token}"

    def _copy(self, path: Path, target: Path) -> None:
        if target.exists():
            return
        self._directory.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.{self._clock.new_id()}.part")
        shutil.copyfile(path, part)
        part.replace(target)


class ObjectStore:
    """A bucket, through obstore. Credentials come from the environment variables of its cloud."""

    def __init__(self, store: Any, url: str) -> None:
        self._store = store
        self._url = url

    async def publish(self, path: Path, sha256: str, format: str) -> str:
        import obstore
        from obstore.exceptions import BaseError

        key = f"kling-relay/{sha256}.{format}"
        try:
            try:
                await obstore.head_async(self._store, key)
            except FileNotFoundError:
                kind = "image" if format in ("png", "jpeg") else "video"
                await obstore.put_async(self._store, key, path, attributes={"Content-Type": f"{kind}/{format}"})
            return str(await obstore.sign_async(self._store, "GET", key, timedelta(seconds=URL_LIVES_S)))
        except (BaseError, OSError) as error:
            reason = str(error).partition("\n")[0][:300]
            raise _problem(self._url, reason, "Check the bucket, its region and the credentials.") from error


def open_media_store(url: str, *, public_url: str | None, ring: KeyRing | None, clock: Clock) -> MediaStore:
    """Open a media store: a directory, or `s3://`, `gs://`, `az://` with bucket and prefix; raise InvalidSettings."""
    if directory_of(url) is not None:
        if public_url is None or ring is None:
            raise _problem(
                url,
                "a directory is published by `serve`, which needs KLING_RELAY_PUBLIC_URL and KLING_RELAY_KEYS",
                "Set both, or use an object store.",
            )
        return DirectoryStore(Path(directory_of(url) or ""), public_url, ring, clock)
    try:
        from obstore.store import from_url
    except ImportError:
        raise _problem(url, "needs the extra `storage`", f"Install it: {install_command('storage')}.") from None
    try:
        return ObjectStore(from_url(url), url)
    except Exception as error:
        raise _problem(url, str(error).splitlines()[0], "Use s3://bucket/prefix, gs://... or az://...") from error


def directory_of(url: str | None) -> str | None:
    """Return the directory of a media store's URL; None for an object store, and for no store."""
    if url is None:
        return None
    parts = urlsplit(url)
    if parts.scheme == "file":
        return parts.path
    return url if "://" not in url else None


def _problem(url: str, limit: str, remedy: str) -> InvalidSettings:
    return InvalidSettings([Problem("KLING_RELAY_MEDIA_STORE", repr(url.partition("?")[0]), limit, remedy)])
