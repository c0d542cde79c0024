"""Builds the create request for one vendor: callback URL, media as URL or base64."""

import base64

from submitter.callback_url import callback_url
from submitter.clock import Clock
from submitter.media.probe import Medium
from submitter.media.store import MediaStore, open_media_store
from submitter.preflight import Prepared
from submitter.request import mode_of
from submitter.settings import Settings
from submitter.vendors.base import CreateRequest, HttpRequest


class VendorRequests:
    """Builds create requests. Uploads local media to the media store when a request is built."""

    def __init__(self, settings: Settings, clock: Clock, media_store: MediaStore | None = None) -> None:
        self._settings = settings
        self._clock = clock
        self._media_store = media_store

    async def build(self, prepared: Prepared, vendor: str, *, callback: bool, publish: bool = True) -> HttpRequest:
        """Return the create request for `vendor`; without `publish`, local media are not uploaded.

        Raises InvalidSettings if a setting for the callback URL or for the upload is missing.
        """
        settings = self._settings.require_vendor(vendor)
        public = self._settings.require_callbacks() if callback and settings.callbacks else None
        now_s, id = self._clock.now_s(), prepared.external_task_id
        limits = settings.vendor.limits
        request = CreateRequest(
            request=prepared.request,
            mode=mode_of(prepared.request, limits),
            external_task_id=id,
            image=await self._medium(prepared, prepared.image, inline=limits.inline_image, publish=publish),
            video=await self._medium(prepared, prepared.video, inline=False, publish=publish),
            callback_url=None if public is None else callback_url(public[0], public[1], vendor, id, now_s),
        )
        return settings.vendor.create(request, now_s)

    async def _medium(self, prepared: Prepared, medium: Medium, *, inline: bool, publish: bool) -> str:
        """Return the medium's URL, or with `inline` its bytes as base64 without a prefix."""
        if medium.url is not None:
            return medium.url
        if inline:
            data = medium.inline if medium.inline is not None else (medium.path.read_bytes() if medium.path else b"")
            return base64.b64encode(data).decode()
        store = self._store() if publish else None
        if store is None or medium.path is None:
            return str(medium.path)
        sha256 = prepared.stored_request[medium.field].removeprefix("sha256:")
        return await store.publish(medium.path, sha256, prepared.formats.get(medium.field, "mp4"))

    def _store(self) -> MediaStore | None:
        if self._media_store is None and self._settings.media_store is not None:
            self._media_store = open_media_store(
                self._settings.media_store,
                public_url=self._settings.public_url,
                ring=self._settings.ring,
                clock=self._clock,
            )
        return self._media_store
