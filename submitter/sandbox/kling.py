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
    ContentV2,
    CreateV1,
    CreateV2,
    ListV2,
    OptionsV2,
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
    elements: frozenset[str] | None = None
    """The ids in the account's element library; None accepts any."""

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

    def unknown(self, method: str, path: str, *, is_path_known: bool) -> Refusal:
        if is_path_known:
            return CodedRefusal(404, 1202, f"method {method} is not supported")
        return CodedRefusal(404, 1203, f"resource {path} does not exist")

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
        body = await self.body(request, CreateV2)
        options = body.options or OptionsV2()
        by_type: dict[str, list[ContentV2]] = {}
        for content in body.contents:
            by_type.setdefault(content.type, []).append(content)
        prompt, image, video = (by_type.get(name, [ContentV2(name)])[0] for name in ("prompt", "image", "video"))
        render_request = RenderRequest(
            model=model,
            prompt=prompt.text,
            image=image.url,
            video=video.url,
            orientation=body.settings.character_orientation,
            sound=body.settings.audio == "original",
            resolution=body.settings.resolution,
            watermark=options.watermark_info is not None and options.watermark_info.enabled,
            callback_url=options.callback_url,
            external_id=options.external_task_id or None,
        )
        elements = [str(one.element_id) for one in by_type.get("element", [])]
        return created_v2(await self._create(render_request, elements, 2, RULES_V2))

    async def _create_v1(self, request: Request) -> dict[str, Any]:
        body = await self.body(request, CreateV1)
        render_request = RenderRequest(
            model={"kling-v3": "3.0", "kling-v2-6": "2.6"}[body.model_name],
            prompt=body.prompt,
            image=body.image_url,
            video=body.video_url,
            orientation=body.character_orientation,
            sound=body.keep_original_sound == "yes",
            resolution="720p" if body.mode == "std" else "1080p",
            watermark=body.watermark_info is not None and body.watermark_info.enabled,
            callback_url=body.callback_url,
            external_id=body.external_task_id or None,
        )
        elements = [str(one.element_id) for one in body.element_list or []]
        job = await self._create(render_request, elements, 1, RULES_V1)
        return {
            "task_id": job.id,
            "task_info": {"external_task_id": job.request.external_id or ""},
            "task_status": job.status,
            "task_status_msg": job.message,
            "created_at": job.created_ms,
            "updated_at": job.updated_ms,
        }

    async def _create(
        self, render_request: RenderRequest, elements: list[str], api_version: int, rules: MediaRules
    ) -> Job:
        if len(elements) > 1 or (elements and (render_request.orientation != "video" or render_request.model != "3.0")):
            raise Refusal("invalid", "at most one element, of 3.0, and only with character_orientation video")
        unknown = [id for id in elements if self.elements is not None and id not in self.elements]
        if unknown:
            raise Refusal("invalid", f"element {unknown[0]} does not exist")
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
        body = await self.body(request, ListV2)
        start = int(body.start_time or self.clock.now_ms() - 30 * 86_400_000)
        end = int(body.end_time or self.clock.now_ms() + 1)
        limit = body.limit
        wanted = {value for one in body.filters if one.key == "status" for value in one.values}
        rows = [
            job for job in self.jobs.values() if start <= job.created_ms <= end and (not wanted or job.status in wanted)
        ]
        first = int(body.cursor or 0)
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
        given = [request.query_params.get(name, default) for name, default in (("pageNum", "1"), ("pageSize", "30"))]
        page, size = (int(value) if value.isdecimal() and len(value) < 10 else 0 for value in given)
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
