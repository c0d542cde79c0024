"""Kling's stand-in: both generations of its API, as `vendors.md` has them. Not Kling.

It is written from the documentation and shares no code with the adapter that it tests.
"""

import asyncio
import base64
import binascii
import hashlib
import hmac
import itertools
import json
import time
from collections import Counter
from decimal import Decimal
from typing import Any, NamedTuple

import httpx
import structlog
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from submitter.sandbox.faults import Dice, Faults
from submitter.sandbox.kling_wire import (
    Job,
    Refusal,
    authenticate,
    callback_v1,
    created_v2,
    element,
    now_ms,
    task_v1,
    units,
)
from submitter.sandbox.media import Facts, NotMedia, inspect, render

MEGABYTE = 1024 * 1024
V1 = "/v1/videos/motion-control"

log = structlog.get_logger("sandbox")


class _Callback(NamedTuple):
    status: str
    body: bytes


class KlingSandbox:
    """The state of the stand-in and its routes."""

    def __init__(
        self,
        *,
        faults: Faults | None = None,
        pace_s: float = 1.0,
        slots: int = 5,
        secret: str | None = None,
    ) -> None:
        self.faults = faults or Faults()
        self.pace_s = pace_s
        self.slots = slots
        self.secret = secret
        self.base_url = ""
        self.jobs: dict[str, Job] = {}
        self.by_external: dict[str, Job] = {}
        self.counts: Counter[str] = Counter()
        self._dice = Dice(self.faults.seed)
        self._ids = itertools.count(time.time_ns() // 10)  # 18 digits, longer than 2^53, as Kling's are
        self._running: set[asyncio.Task[None]] = set()
        self._rendered: dict[tuple[str, ...], asyncio.Future[tuple[bytes, float]]] = {}
        self._inspected: dict[str, Facts] = {}
        self._client = httpx.AsyncClient(timeout=15, trust_env=False)

    def set_faults(self, faults: Faults) -> None:
        """Turn these faults on, and begin their dice anew."""
        self.faults, self._dice = faults, Dice(faults.seed)

    def routes(self) -> list[Route]:
        """Return the API's routes."""
        return [
            Route("/motion-control/{model}", self._guard(self._create_v2), methods=["POST"]),
            Route("/tasks", self._guard(self._query_v2), methods=["GET"]),
            Route("/tasks", self._guard(self._list_v2), methods=["POST"]),
            Route(V1, self._guard(self._create_v1, jwt=True), methods=["POST"]),
            Route(V1, self._guard(self._list_v1, jwt=True), methods=["GET"]),
            Route(V1 + "/{id}", self._guard(self._query_v1, jwt=True), methods=["GET"]),
            Route("/account/costs", self._guard(self._costs, jwt=True), methods=["GET"]),
            Route("/results/{id}.mp4", self._result, methods=["GET"]),
        ]

    async def close(self) -> None:
        """Stop every task."""
        for running in self._running:
            running.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        await self._client.aclose()

    # -- the door -----------------------------------------------------------------------------

    def _guard(self, handler: Any, *, jwt: bool = False) -> Any:
        async def guarded(request: Request) -> Response:
            request_id = f"sandbox-{next(self._ids)}"
            try:
                authenticate(request.headers.get("authorization", ""), jwt)
                self.counts[handler.__name__.strip("_")] += 1
                data = await handler(request)
                return JSONResponse({"code": 0, "message": "", "request_id": request_id, "data": data})
            except Refusal as refusal:
                self.counts[f"refused_{refusal.code}"] += 1
                body = {"code": refusal.code, "message": refusal.message, "request_id": request_id}
                return JSONResponse(body, refusal.http_status)

        return guarded

    # -- create -------------------------------------------------------------------------------

    async def _create_v2(self, request: Request) -> dict[str, Any]:
        model = {"kling-3.0": "3.0", "kling-2.6": "2.6"}.get(request.path_params["model"])
        if model is None:
            raise Refusal(404, 1203, "model not found")
        body = await _json(request)
        contents, settings, options = (body.get(name) or {} for name in ("contents", "settings", "options"))
        if not isinstance(contents, list):
            raise Refusal(400, 1201, "contents must be an array")
        by_type: dict[str, list[dict[str, Any]]] = {}
        for content in contents:
            by_type.setdefault(str(content.get("type")), []).append(content)
        elements = by_type.get("element", [])
        asked = {
            "model": model,
            "prompt": (by_type.get("prompt") or [{}])[0].get("text", ""),
            "image": (by_type.get("image") or [{}])[0].get("url"),
            "video": (by_type.get("video") or [{}])[0].get("url"),
            "elements": [one.get("element_id") for one in elements],
            "orientation": settings.get("character_orientation"),
            "sound": settings.get("audio", "original"),
            "resolution": settings.get("resolution", "720p"),
            "watermark": bool((options.get("watermark_info") or {}).get("enabled")),
            "callback_url": options.get("callback_url"),
            "external_id": options.get("external_task_id"),
        }
        if asked["sound"] not in ("original", "off") or asked["resolution"] not in ("720p", "1080p"):
            raise Refusal(400, 1201, "audio must be original or off, resolution 720p or 1080p")
        return created_v2(await self._create(asked, 2, image_mb=50, image_max=None))

    async def _create_v1(self, request: Request) -> dict[str, Any]:
        body = await _json(request)
        model = {"kling-v3": "3.0", "kling-v2-6": "2.6"}.get(body.get("model_name", "kling-v2-6"))
        mode, sound = body.get("mode"), body.get("keep_original_sound", "yes")
        if model is None or mode not in ("std", "pro") or sound not in ("yes", "no"):
            raise Refusal(400, 1201, "model_name, mode or keep_original_sound is not valid")
        elements = [one.get("element_id") for one in body.get("element_list") or []]
        if not all(isinstance(one, int) for one in elements):
            raise Refusal(400, 1201, "element_id must be a number")
        asked = {
            "model": model,
            "prompt": body.get("prompt", ""),
            "image": body.get("image_url"),
            "video": body.get("video_url"),
            "elements": elements,
            "orientation": body.get("character_orientation"),
            "sound": "original" if sound == "yes" else "off",
            "resolution": "720p" if mode == "std" else "1080p",
            "watermark": bool((body.get("watermark_info") or {}).get("enabled")),
            "callback_url": body.get("callback_url"),
            "external_id": body.get("external_task_id"),
        }
        job = await self._create(asked, 1, image_mb=10, image_max=65536)
        return {
            "task_id": job.id,
            "task_info": {"external_task_id": job.asked["external_id"] or ""},
            "task_status": job.status,
            "created_at": job.created_ms,
            "updated_at": job.updated_ms,
        }

    async def _create(self, asked: dict[str, Any], wire: int, *, image_mb: int, image_max: int | None) -> Job:
        if asked["external_id"] == "":
            raise Refusal(400, 1201, "external_task_id must not be empty")
        image, video = await self._check(asked, image_mb, image_max)
        # No await from here to the job's birth: two creates with one id must not both pass.
        if asked["external_id"] in self.by_external:
            raise Refusal(400, 1201, f"External_task_id {asked['external_id']} already exists")
        if sum(job.status in ("submitted", "processing") for job in self.jobs.values()) >= self.slots:
            raise Refusal(429, 1303, "parallel task over resource pack limit")
        job = Job(str(next(self._ids)), wire, asked)
        self.jobs[job.id] = job
        if asked["external_id"]:
            self.by_external[asked["external_id"]] = job
        self.counts["created"] += 1
        log.info("sandbox.created", task_id=job.id, external_task_id=asked["external_id"])
        running = asyncio.create_task(self._run(job, image, video))
        self._running.add(running)
        running.add_done_callback(self._running.discard)
        await self._answer_badly()
        return job

    async def _answer_badly(self) -> None:
        if self._dice.falls(self.faults.create_never):
            await asyncio.sleep(3600)
        if self._dice.falls(self.faults.create_late):
            await asyncio.sleep(self.faults.late_s)
        if self._dice.falls(self.faults.create_5xx):
            raise Refusal(500, 5000, "internal server error")

    async def _check(self, asked: dict[str, Any], image_mb: int, image_max: int | None) -> tuple[bytes, bytes]:
        orientation = asked["orientation"]
        if orientation not in ("image", "video"):
            raise Refusal(400, 1201, "character_orientation must be image or video")
        if len(asked["prompt"]) > 2500:
            raise Refusal(400, 1201, "prompt is longer than 2500 characters")
        if len(asked["elements"]) > 1 or (asked["elements"] and (orientation != "video" or asked["model"] != "3.0")):
            raise Refusal(400, 1201, "at most one element, of 3.0, and only with character_orientation video")
        image = await self._fetch("image", asked["image"], inline=True, limit=image_mb * MEGABYTE)
        video = await self._fetch("video", asked["video"], inline=False, limit=100 * MEGABYTE)
        facts = await self._facts("image", image)
        if not facts.format.startswith(("png", "jpeg", "mjpeg", "image2")):
            raise Refusal(400, 1201, f"image format {facts.format} is not supported")
        sides = sorted((facts.width, facts.height))
        if sides[0] < 300 or sides[1] > (image_max or sides[1]) or sides[1] > 2.5 * sides[0]:
            raise Refusal(400, 1201, f"image of {facts.width} x {facts.height} is outside the limits")
        facts = await self._facts("video", video)
        sides = sorted((facts.width, facts.height))
        if "mp4" not in facts.format or sides[0] < 340 or sides[1] > 3850:
            raise Refusal(400, 1201, f"video {facts.format} of {facts.width} x {facts.height} is outside the limits")
        longest = 30 if orientation == "video" else 10
        if not 3 <= round(facts.duration_s, 1) <= longest:
            raise Refusal(400, 1201, f"video of {facts.duration_s:.1f} s is outside 3..{longest} s")
        return image, video

    async def _fetch(self, field: str, value: Any, *, inline: bool, limit: int) -> bytes:
        if not isinstance(value, str) or not value:
            raise Refusal(400, 1201, f"{field} is required")
        if value.startswith(("http://", "https://")):
            try:
                answer = await self._client.get(value)
                answer.raise_for_status()
            except httpx.HTTPError as error:
                raise Refusal(400, 1201, f"{field} cannot be fetched: {error}") from error
            data = answer.content
        else:
            try:
                data = base64.b64decode(value, validate=True) if inline else b""
            except binascii.Error as error:
                raise Refusal(400, 1201, f"{field} is neither a URL nor raw base64") from error
        if not data or len(data) > limit:
            raise Refusal(400, 1201, f"{field} has {len(data)} bytes, at most {limit} are taken")
        return data

    async def _facts(self, field: str, data: bytes) -> Facts:
        digest = hashlib.sha256(data).hexdigest()
        if digest not in self._inspected:
            try:
                self._inspected[digest] = await asyncio.to_thread(inspect, data)
            except NotMedia as error:
                raise Refusal(400, 1201, f"{field} cannot be read: {error}") from error
        return self._inspected[digest]

    # -- the life of a task -------------------------------------------------------------------

    async def _run(self, job: Job, image: bytes, video: bytes) -> None:
        held: list[_Callback] = []
        reordered = self._dice.falls(self.faults.reorder)
        rendering = asyncio.create_task(self._render(job, image, video))
        await self._tell(job, held, hold=False)
        await asyncio.sleep(self.pace_s)
        self._turn(job, "processing")
        await self._tell(job, held, hold=reordered)
        await asyncio.sleep(2 * self.pace_s)
        job.result, job.duration_s = await rendering
        if self._dice.falls(self.faults.fail):
            job.message = self.faults.fail_reason
            self._turn(job, "failed")
        else:
            job.has_url = not self._dice.falls(self.faults.no_url)
            self._turn(job, "succeeded")
        await self._tell(job, held, hold=False)

    def _turn(self, job: Job, status: str) -> None:
        job.status = status
        job.updated_ms = max(now_ms(), job.updated_ms + 1)
        log.info("sandbox.task", task_id=job.id, status=status)

    async def _render(self, job: Job, image: bytes, video: bytes) -> tuple[bytes, float]:
        asked = job.asked
        key = (
            hashlib.sha256(image).hexdigest(),
            hashlib.sha256(video).hexdigest(),
            asked["orientation"],
            asked["resolution"],
            asked["sound"],
        )
        if key not in self._rendered:  # the same media are rendered once, however many tasks ask for them
            rendering = asyncio.to_thread(
                render,
                image,
                video,
                resolution=asked["resolution"],
                sound=asked["sound"] == "original",
                limit_s=30 if asked["orientation"] == "video" else 10,
            )
            self._rendered[key] = asyncio.ensure_future(rendering)
        return await asyncio.shield(self._rendered[key])

    async def _tell(self, job: Job, held: list["_Callback"], *, hold: bool) -> None:
        """Send the callback of the task's present status, and those that were held back for it."""
        url = job.asked["callback_url"]
        if not url:
            return
        body = json.dumps(element(job, self.base_url) if job.wire == 2 else callback_v1(job, self.base_url)).encode()
        told = _Callback(job.status, body)
        if hold:
            held.append(told)
            return
        for status, content in (told, *held):
            if self._dice.falls(self.faults.drop):
                self.counts["callbacks_dropped"] += 1
                continue
            for _ in range(2 if self._dice.falls(self.faults.repeat) else 1):
                if self.faults.delay_s:
                    await asyncio.sleep(self.faults.delay_s)
                await self._post(job, status, url, content, self._signed(content))
            if self._dice.falls(self.faults.forge):
                await self._forge(job, status, url, content)
        held.clear()

    async def _forge(self, job: Job, status: str, url: str, content: bytes) -> None:
        false = content.replace(status.encode(), b"failed")
        last = "A" if url[-1] != "A" else "B"
        await self._post(job, "forged", url[:-1] + last, false, self._signed(false))
        if self.secret:
            headers = self._signed(false) | {"webhook-signature": "v1," + base64.b64encode(bytes(32)).decode()}
            await self._post(job, "forged", url, false, headers)

    def _signed(self, content: bytes) -> dict[str, str]:
        headers = {"content-type": "application/json"}
        if self.secret is None:
            return headers
        id, timestamp = str(next(self._ids)), str(int(time.time()))
        key = base64.b64decode(self.secret.removeprefix("whsec_"))
        signature = base64.b64encode(hmac.digest(key, f"{id}.{timestamp}.".encode() + content, "sha256")).decode()
        return headers | {"webhook-id": id, "webhook-timestamp": timestamp, "webhook-signature": f"v1,{signature}"}

    async def _post(self, job: Job, status: str, url: str, content: bytes, headers: dict[str, str]) -> None:
        self.counts["callbacks"] += 1
        try:
            answer = await self._client.post(url, content=content, headers=headers)
            job.callbacks.append(f"{status}:{answer.status_code}")
        except httpx.HTTPError as error:  # Kling documents no retry, so there is none
            job.callbacks.append(f"{status}:{type(error).__name__}")

    # -- what is said of a task ---------------------------------------------------------------

    # -- queries ------------------------------------------------------------------------------

    async def _query_v2(self, request: Request) -> list[dict[str, Any]]:
        given = [name for name in ("task_ids", "external_task_ids") if request.query_params.get(name)]
        if len(given) != 1:
            raise Refusal(400, 1201, "exactly one of task_ids and external_task_ids is required")
        ids = request.query_params[given[0]].split(",")
        if len(ids) > 20:
            raise Refusal(400, 1201, "at most 20 ids")
        table = self.jobs if given[0] == "task_ids" else self.by_external
        found = [table[id] for id in ids if id in table]
        for job in found:
            job.queries += 1
        return [element(job, self.base_url) for job in found]

    async def _list_v2(self, request: Request) -> dict[str, Any]:
        body = await _json(request)
        start = int(body.get("start_time") or now_ms() - 30 * 86_400_000)
        end = int(body.get("end_time") or now_ms() + 1)
        limit = min(int(body.get("limit") or 500), 500)
        wanted = {v for f in body.get("filters") or [] if f.get("key") == "status" for v in f.get("values", [])}
        rows = [
            job for job in self.jobs.values() if start <= job.created_ms <= end and (not wanted or job.status in wanted)
        ]
        first = int(body.get("cursor") or 0)
        page = rows[first : first + limit]
        more = first + limit < len(rows)
        return {
            "result": [element(job, self.base_url) for job in page],
            "count": len(page),
            "next_cursor": str(first + limit) if more else "",
            "has_more": more,
        }

    async def _query_v1(self, request: Request) -> dict[str, Any]:
        id = request.path_params["id"]
        job = self.jobs.get(id) or self.by_external.get(id)
        if job is None:
            raise Refusal(400, 1201, f"Task {id} not found")
        job.queries += 1
        return task_v1(job, self.base_url)

    async def _list_v1(self, request: Request) -> list[dict[str, Any]]:
        page, size = (
            int(request.query_params.get(name, default)) for name, default in (("pageNum", 1), ("pageSize", 30))
        )
        if not 1 <= page <= 1000 or not 1 <= size <= 500:
            raise Refusal(400, 1201, "pageNum is 1..1000 and pageSize 1..500")
        newest = list(reversed(self.jobs.values()))[(page - 1) * size : page * size]
        for job in newest:
            job.queries += 1
        return [task_v1(job, self.base_url) for job in newest]

    async def _costs(self, request: Request) -> dict[str, Any]:
        if not request.query_params.get("start_time") or not request.query_params.get("end_time"):
            raise Refusal(400, 1201, "start_time and end_time are required")
        spent = sum((Decimal(units(job)) for job in self.jobs.values() if job.status == "succeeded"), Decimal(0))
        pack = {
            "resource_pack_name": f"Sandbox-Video-10000Units-{self.slots}Con-1Months",
            "resource_pack_type": "decreasing_total",
            "total_quantity": "10000",
            "remaining_quantity": str(10000 - spent),
            "invalid_time": now_ms() + 30 * 86_400_000,
            "status": "online",
        }
        return {"code": 0, "msg": "", "resource_pack_subscribe_infos": [pack]}

    async def _result(self, request: Request) -> Response:
        job = self.jobs.get(request.path_params["id"])
        if job is None or not job.result:
            return JSONResponse({"code": "NoSuchKey"}, 404)
        if now_ms() - job.updated_ms > self.faults.expire_s * 1000:
            return JSONResponse({"code": "AccessDenied", "message": "Request has expired"}, 403)
        return Response(job.result, media_type="video/mp4")


async def _json(request: Request) -> dict[str, Any]:
    try:
        body = await request.json()
    except (ValueError, ClientDisconnect) as error:
        raise Refusal(400, 1200, "the body is not JSON") from error
    if not isinstance(body, dict):
        raise Refusal(400, 1200, "the body is not an object")
    return body
