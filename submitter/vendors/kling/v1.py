"""Kling's API v1, the older one: the model is in the body. Pure.

Source: Kling API reference, motion control (older API), and live observations, as gathered in 2026.
Inferred: its list begins with the newest task, so that a search ends at rows older than the tasks that are
asked for.
"""

from collections.abc import Sequence
from typing import Any, ClassVar
from urllib.parse import quote

import msgspec

from submitter.errors import VendorRefused
from submitter.request import Limits
from submitter.task import Task
from submitter.vendors.base import CreateRequest, Findings, HttpAnswer, HttpRequest, Query
from submitter.vendors.kling import v2
from submitter.vendors.kling.protocol import Kling, created_ms, is_absence, match_tasks, read_data

PATH = "/v1/videos/motion-control"
PAGE = 500
LAST_PAGE = 1000
CLOCK_SKEW_MS = 300_000

LIMITS = msgspec.structs.replace(
    v2.LIMITS,
    source="Kling API reference, motion control (older API)",
    image=msgspec.structs.replace(v2.LIMITS.image, max_bytes=10 * 1024 * 1024, max_side=65536),
    ids_per_query=PAGE,
)


class KlingV1(Kling, frozen=True):
    """The older API; accepts API keys and key pairs."""

    limits: ClassVar[Limits] = LIMITS

    def create(self, create: CreateRequest, now_s: float) -> HttpRequest:
        """Return `POST /v1/videos/motion-control`."""
        request = create.request
        body: dict[str, Any] = {
            "model_name": request.model,
            "image_url": create.image,
            "video_url": create.video,
            "keep_original_sound": "yes" if request.keep_original_sound else "no",
            "character_orientation": request.character_orientation,
            "mode": create.mode,
            "watermark_info": {"enabled": request.watermark},
            "external_task_id": create.external_task_id,
        }
        if request.prompt:
            body["prompt"] = request.prompt
        if request.element_id is not None:
            body["element_list"] = [{"element_id": int(request.element_id)}]
        if create.callback_url is not None:
            body["callback_url"] = create.callback_url
        return self._request("POST", PATH, now_s, body)

    def queries(self, tasks: Sequence[Task], now_s: float) -> list[Query]:
        """Return a query by id for a single task, a query of the paginated list for several."""
        if not tasks:
            return []
        if len(tasks) == 1:
            id = quote(tasks[0].task_id or tasks[0].external_task_id, safe="")
            return [Query(self._request("GET", f"{PATH}/{id}", now_s), tuple(tasks))]
        return [self._page(tuple(tasks), 1, now_s)]

    def read_query(self, query: Query, answer: HttpAnswer, now_s: float) -> Findings:
        """Parse one task or a page of the list; v1 answers 400/1201 for an unknown task."""
        try:
            data = read_data(answer)
        except VendorRefused as refused:
            if len(query.tasks) == 1 and query.page == 1 and is_absence(refused):
                return Findings(absent=(query.tasks[0].external_task_id,))
            raise
        reports, unreadable = match_tasks(query.tasks, data)
        left = tuple(t for t in query.tasks if t.external_task_id not in reports | unreadable)
        is_list = len(query.tasks) > 1 or query.page > 1
        if left and is_list and isinstance(data, list) and len(data) >= PAGE and query.page < LAST_PAGE:
            # The newest tasks come first: the rest of the list is older than every task that is asked for.
            oldest_ms = min((ms for row in data if (ms := created_ms(row)) is not None), default=None)
            if oldest_ms is None or oldest_ms >= min(t.created_at_ms for t in left) - CLOCK_SKEW_MS:
                return Findings(reports, unreadable, more=(self._page(left, query.page + 1, now_s),))
        return Findings(reports, unreadable, tuple(task.external_task_id for task in left))

    def _page(self, tasks: tuple[Task, ...], page: int, now_s: float) -> Query:
        path = f"{PATH}?pageNum={page}&pageSize={PAGE}"
        return Query(self._request("GET", path, now_s), tasks, page)
