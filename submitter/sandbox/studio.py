"""Media pipeline of the stand-ins: downloads and validates the inputs of a create, renders its result."""

import asyncio
import base64
import binascii
import hashlib
from typing import Any, Literal, NamedTuple

import httpx
import msgspec

from submitter.sandbox.media import MediaInfo, NotMedia, inspect, render
from submitter.web_address import why_not_web

MEGABYTE = 1024 * 1024

RefusalKind = Literal[
    "key", "invalid", "absent", "balance", "permission", "capacity", "rate", "maintenance", "outage"
]  # fmt: skip


class Refusal(Exception):
    """A refused request. Each vendor has its own status and code for each `kind`."""

    def __init__(self, kind: RefusalKind, message: str) -> None:
        self.kind, self.message = kind, message
        super().__init__(message)


class RenderRequest(msgspec.Struct, kw_only=True):
    """A create request in vendor-neutral form. `limit_s` is the longest result, in seconds."""

    model: str = "3.0"
    prompt: str = ""
    image: Any
    video: Any
    orientation: Any
    sound: bool = True
    resolution: str = "720p"
    watermark: bool = False
    callback_url: str | None = None
    external_id: str | None = None
    limit_s: float = 30


class MediaRules(NamedTuple):
    """A vendor's media limits: sizes in MB, sides in pixels, durations in seconds by orientation."""

    image_mb: int = 50
    image_max: int | None = None
    image_inline: bool = True
    video_mb: int = 100
    video_min: int = 340
    video_max: int | None = 3850
    longest_s: float = 30
    longest_by_image_s: float = 10


class Studio:
    """Downloads, validates and renders. Results are cached: equal inputs are inspected and rendered once."""

    def __init__(self) -> None:
        self._rendered: dict[tuple[object, ...], asyncio.Future[tuple[bytes, float]]] = {}
        self._inspected: dict[str, MediaInfo] = {}
        self._client = httpx.AsyncClient(timeout=15, trust_env=False)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def check(self, request: RenderRequest, rules: MediaRules) -> tuple[bytes, bytes]:
        """Return the bytes of image and video; raise Refusal when they break the vendor's limits."""
        if request.orientation not in ("image", "video"):
            raise Refusal("invalid", "character_orientation must be image or video")
        if not isinstance(request.prompt, str) or len(request.prompt) > 2500:
            raise Refusal("invalid", "prompt is longer than 2500 characters")
        image = await self._fetch("image", request.image, inline=rules.image_inline, limit=rules.image_mb * MEGABYTE)
        video = await self._fetch("video", request.video, inline=False, limit=rules.video_mb * MEGABYTE)
        info = await self._media_info("image", image)
        if not info.format.startswith(("png", "jpeg", "mjpeg", "image2")):
            raise Refusal("invalid", f"image format {info.format} is not supported")
        sides = sorted((info.width, info.height))
        if sides[0] < 300 or sides[1] > (rules.image_max or sides[1]) or sides[1] > 2.5 * sides[0]:
            raise Refusal("invalid", f"image of {info.width} x {info.height} is outside the limits")
        info = await self._media_info("video", video)
        sides = sorted((info.width, info.height))
        too_big = rules.video_max is not None and sides[1] > rules.video_max
        if "mp4" not in info.format or sides[0] < rules.video_min or too_big:
            raise Refusal("invalid", f"video {info.format} of {info.width} x {info.height} is outside the limits")
        longest = rules.longest_s if request.orientation == "video" else rules.longest_by_image_s
        if not 3 <= round(info.duration_s, 1) <= longest:
            raise Refusal("invalid", f"video of {info.duration_s:.1f} s is outside 3..{longest:g} s")
        return image, video

    async def _fetch(self, field: str, value: Any, *, inline: bool, limit: int) -> bytes:
        if not isinstance(value, str) or not value:
            raise Refusal("invalid", f"{field} is required")
        if value.startswith(("http://", "https://")):
            wrong = why_not_web(value)
            if wrong is not None:
                raise Refusal("invalid", f"{field} is no URL that can be opened: {wrong}")
            try:
                answer = await self._client.get(value)
            except httpx.HTTPError as error:
                raise Refusal("invalid", f"{field} cannot be fetched: {error}") from error
            if not answer.is_success:
                raise Refusal("invalid", f"{field} cannot be fetched: its server answered HTTP {answer.status_code}")
            data = answer.content
        else:
            try:
                data = base64.b64decode(value, validate=True) if inline else b""
            except binascii.Error:
                data = b""
            if not data:
                kinds = "a URL or raw base64" if inline else "a URL"
                raise Refusal("invalid", f"{field} must be {kinds}")
        if len(data) > limit:
            raise Refusal("invalid", f"{field} is larger than {limit // MEGABYTE} MB")
        return data

    async def _media_info(self, field: str, data: bytes) -> MediaInfo:
        digest = hashlib.sha256(data).hexdigest()
        if digest not in self._inspected:
            try:
                self._inspected[digest] = await asyncio.to_thread(inspect, data)
            except NotMedia as error:
                raise Refusal("invalid", f"{field} cannot be read: {error}") from error
        return self._inspected[digest]

    async def render(self, request: RenderRequest, image: bytes, video: bytes) -> tuple[bytes, float]:
        """Return the result as an MP4, and its duration in seconds."""
        digests = hashlib.sha256(image).hexdigest(), hashlib.sha256(video).hexdigest()
        key = (*digests, request.limit_s, request.resolution, request.sound)
        if key not in self._rendered:
            rendering = asyncio.to_thread(
                render, image, video, resolution=request.resolution, sound=request.sound, limit_s=request.limit_s
            )
            self._rendered[key] = asyncio.ensure_future(rendering)
        return await asyncio.shield(self._rendered[key])
