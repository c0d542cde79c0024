"""Kling's stand-in (mock server): both generations of its API (v1 and v2). Not Kling.

It is written from the documentation and shares no code with the adapter that it tests.
"""

import base64
import hmac
from collections.abc import Awaitable, Callable
from decimal import Decimal
from typing import Any, ClassVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from submitter.sandbox.base import Job, Notification, Sandbox
from submitter.sandbox.kling_wire import (
    CODES,
    CodedRefusal,
    authenticate,
    callback_v1,
    created_v2,
    element,
    task_v1,
    units,
)
from submitter.sandbox.studio import MediaRules, Refusal, RenderRequest

V1 = "/v1/videos/motion-control"
RULES_V2 = MediaRules()
RULES_V1 = MediaRules(image_mb=10, image_max=65536)


class KlingSandbox(Sandbox):
    """Kling's motion control API, with queries, account costs, and callbacks that it can sign."""

    name: ClassVar[str] = "kling"

    def routes(self) -> list[Route]:
        route = self._enveloped
        return [
            route("/motion-control/{model}", self._create_v2, "POST"),
            route("/tasks", self._query_v2, "GET"),
            route("/tasks", self._list_v2, "POST"),
            route(V1, self._create_v1, "POST"),
            route(V1, self._list_v1, "GET"),
            route(V1 + "/{id}", self._query_v1, "GET"),
            route("/account/costs", self._costs, "GET"),
        ]

    def refuse(self, refusal: Refusal) -> Response:
        status, code = CODES[refusal.kind]
        if isinstance(refusal, CodedRefusal):
            status, code = refusal.http_status, refusal.code
        self.counts[f"refused_{code}"] += 1
        body = {"code": code, "message": refusal.message, "request_id": f"sandbox-{self.new_id()}"}
        return JSONResponse(body, status)

    def authenticate(self, request: Request) -> None:
        takes_jwt = any(part in request.url.path for part in (V1, "/account/"))
        authenticate(request.headers.get("authorization", ""), takes_jwt, self.clock.now_s())

    def callback_body(self, job: Job) -> Any:
        url = self.result_url(job)
        return element(job, url) if job.api_version == 2 else callback_v1(job, url)

    def sign(self, content: bytes) -> dict[str, str]:
        headers = super().sign(content)
        if self.secret is None:
            return headers
        id, timestamp = self.new_id(), str(self.clock.now_ms() // 1000)
        key = base64.b64decode(self.secret.removeprefix("whsec_"))
        signature = base64.b64encode(hmac.digest(key, f"{id}.{timestamp}.".encode() + content, "sha256")).decode()
        return headers | {"webhook-id": id, "webhook-timestamp": timestamp, "webhook-signature": f"v1,{signature}"}

    async def send_forged(self, job: Job, notification: Notification, url: str) -> None:
        """Send forged callbacks: one to a wrong URL and, if callbacks are signed, one with a wrong signature."""
        await super().send_forged(job, notification, url)
        if self.secret:
            forged = notification.body.replace(notification.status.encode(), b"failed")
            headers = self.sign(forged) | {"webhook-signature": "v1," + base64.b64encode(bytes(32)).decode()}
            await self.post(job, "forged", url, forged, headers)

    def environ(self) -> dict[str, str]:
        return super().environ() | ({"KLING_WEBHOOK_SECRET": self.secret} if self.secret else {})

    def _enveloped(self, path: str, handler: Callable[[Request], Awaitable[Any]], method: str) -> Route:
        async def enveloped(request: Request) -> dict[str, Any]:
            self.counts[handler.__name__.strip("_")] += 1
            data = await handler(request)
            return {"code": 0, "message": "", "request_id": f"sandbox-{self.new_id()}", "data": data}

        return self.route(path, enveloped, method)

    # -- create -------------------------------------------------------------------------------

    async def _create_v2(self, request: Request) -> dict[str, Any]:
        model = {"kling-3.0": "3.0", "kling-2.6": "2.6"}.get(request.path_params["model"])
        if model is None:
            raise CodedRefusal(404, 1203, "model not found")
        body = await self.json(request)
        contents, settings, options = (body.get(name) or {} for name in ("contents", "settings", "options"))
        if not isinstance(contents, list):
            raise Refusal("invalid", "contents must be an array")
        by_type: dict[str, list[dict[str, Any]]] = {}
        for content in contents:
            by_type.setdefault(str(content.get("type")), []).append(content)
        audio, resolution = settings.get("audio", "original"), settings.get("resolution", "720p")
        if audio not in ("original", "off") or resolution not in ("720p", "1080p"):
            raise Refusal("invalid", "audio must be original or off, resolution 720p or 1080p")
        render_request = RenderRequest(
            model=model,
            prompt=(by_type.get("prompt") or [{}])[0].get("text", ""),
            image=(by_type.get("image") or [{}])[0].get("url"),
            video=(by_type.get("video") or [{}])[0].get("url"),
            orientation=settings.get("character_orientation"),
            sound=audio == "original",
            resolution=resolution,
            watermark=bool((options.get("watermark_info") or {}).get("enabled")),
            callback_url=options.get("callback_url"),
            external_id=options.get("external_task_id"),
        )
        elements = [one.get("element_id") for one in by_type.get("element", [])]
        return created_v2(await self._create(render_request, elements, 2, RULES_V2))

    async def _create_v1(self, request: Request) -> dict[str, Any]:
        body = await self.json(request)
        model = {"kling-v3": "3.0", "kling-v2-6": "2.6"}.get(body.get("model_name", "kling-v2-6"))
        mode, sound = body.get("mode"), body.get("keep_original_sound", "yes")
        if model is None or mode not in ("std", "pro") or sound not in ("yes", "no"):
            raise Refusal("invalid", "model_name, mode or keep_original_sound is not valid")
        elements = [one.get("element_id") for one in body.get("element_list") or []]
        if not all(isinstance(one, int) for one in elements):
            raise Refusal("invalid", "element_id must be a number")
        render_request = RenderRequest(
            model=model,
            prompt=body.get("prompt", ""),
            image=body.get("image_url"),
            video=body.get("video_url"),
            orientation=body.get("character_orientation"),
            sound=sound == "yes",
            resolution="720p" if mode == "std" else "1080p",
            watermark=bool((body.get("watermark_info") or {}).get("enabled")),
            callback_url=body.get("callback_url"),
            external_id=body.get("external_task_id"),
        )
        job = await self._create(render_request, elements, 1, RULES_V1)
        return {
            "task_id": job.id,
            "task_info": {"external_task_id": job.request.external_id or ""},
            "task_status": job.status,
            "created_at": job.created_ms,
            "updated_at": job.updated_ms,
        }

    async def _create(
        self, render_request: RenderRequest, elements: list[Any], api_version: int, rules: MediaRules
    ) -> Job:
        if render_request.external_id == "":
            raise Refusal("invalid", "external_task_id must not be empty")
        if len(elements) > 1 or (elements and (render_request.orientation != "video" or render_request.model != "3.0")):
            raise Refusal("invalid", "at most one element, of 3.0, and only with character_orientation video")
        render_request.limit_s = 30 if render_request.orientation == "video" else 10
        return await self.create(render_request, rules, api_version=api_version)

    # -- queries ------------------------------------------------------------------------------

    async def _query_v2(self, request: Request) -> list[dict[str, Any]]:
        given = [name for name in ("task_ids", "external_task_ids") if request.query_params.get(name)]
        if len(given) != 1:
            raise Refusal("invalid", "exactly one of task_ids and external_task_ids is required")
        ids = request.query_params[given[0]].split(",")
        if len(ids) > 20:
            raise Refusal("invalid", "at most 20 ids")
        table = self.jobs if given[0] == "task_ids" else self.by_external_id
        found = [table[id] for id in ids if id in table]
        self.count_query(found)
        return [element(job, self.result_url(job)) for job in found]

    async def _list_v2(self, request: Request) -> dict[str, Any]:
        body = await self.json(request)
        start = int(body.get("start_time") or self.clock.now_ms() - 30 * 86_400_000)
        end = int(body.get("end_time") or self.clock.now_ms() + 1)
        limit = min(int(body.get("limit") or 500), 500)
        wanted = {v for f in body.get("filters") or [] if f.get("key") == "status" for v in f.get("values", [])}
        rows = [
            job for job in self.jobs.values() if start <= job.created_ms <= end and (not wanted or job.status in wanted)
        ]
        first = int(body.get("cursor") or 0)
        page = rows[first : first + limit]
        more = first + limit < len(rows)
        return {
            "result": [element(job, self.result_url(job)) for job in page],
            "count": len(page),
            "next_cursor": str(first + limit) if more else "",
            "has_more": more,
        }

    async def _query_v1(self, request: Request) -> dict[str, Any]:
        id = request.path_params["id"]
        job = self.jobs.get(id) or self.by_external_id.get(id)
        if job is None:
            raise Refusal("absent", f"Task {id} not found")
        self.count_query([job])
        return task_v1(job, self.result_url(job))

    async def _list_v1(self, request: Request) -> list[dict[str, Any]]:
        page, size = (
            int(request.query_params.get(name, default)) for name, default in (("pageNum", 1), ("pageSize", 30))
        )
        if not 1 <= page <= 1000 or not 1 <= size <= 500:
            raise Refusal("invalid", "pageNum is 1..1000 and pageSize 1..500")
        newest = list(reversed(self.jobs.values()))[(page - 1) * size : page * size]
        self.count_query(newest)
        return [task_v1(job, self.result_url(job)) for job in newest]

    async def _costs(self, request: Request) -> dict[str, Any]:
        if not request.query_params.get("start_time") or not request.query_params.get("end_time"):
            raise Refusal("invalid", "start_time and end_time are required")
        spent = sum((Decimal(units(job)) for job in self.jobs.values() if job.status == "succeeded"), Decimal(0))
        pack = {
            "resource_pack_name": f"Sandbox-Video-10000Units-{self.slots}Con-1Months",
            "resource_pack_type": "decreasing_total",
            "total_quantity": "10000",
            "remaining_quantity": str(10000 - spent),
            "invalid_time": self.clock.now_ms() + 30 * 86_400_000,
            "status": "online",
        }
        return {"code": 0, "msg": "", "resource_pack_subscribe_infos": [pack]}
