"""Kling's API v2, the current one: the model is in the path. Pure.

Source: Kling API reference, motion control (current API), and live observations, as gathered in 2026.
"""

from collections.abc import Sequence
from typing import Any, ClassVar
from urllib.parse import quote

from submitter.request import Limits, MediaLimits
from submitter.task import Task
from submitter.vendors.base import CreateRequest, Findings, HttpAnswer, HttpRequest, Query
from submitter.vendors.kling.protocol import Kling, match_tasks, read_data

RESOLUTION = {"std": "720p", "pro": "1080p"}
PATH = {"kling-v3": "/motion-control/kling-3.0", "kling-v2-6": "/motion-control/kling-2.6"}
IDS_PER_QUERY = 20  # 21 are refused with 400/1201, seen live

LIMITS = Limits(
    source="Kling API reference, motion control (current API)",
    image=MediaLimits(
        formats=("png", "jpeg"),
        max_bytes=50 * 1024 * 1024,
        min_side=300,
        min_aspect=(2, 5),
        max_aspect=(5, 2),
    ),
    video=MediaLimits(formats=("mp4", "mov"), max_bytes=100 * 1024 * 1024, min_side=340, max_side=3850),
    durations_s={"video": (3, 30), "image": (3, 10)},
    prompt_chars=2500,
    models=("kling-v3", "kling-v2-6"),
    element_models=("kling-v3",),
    element_cited_as="<<<element_1>>>",  # seen in public client code
    watermark=True,
    inline_image=True,
    own_id=True,
    ids_per_query=IDS_PER_QUERY,
    url_lives="30 days",
)


class KlingV2(Kling, frozen=True):
    """The current API; accepts API keys only."""

    limits: ClassVar[Limits] = LIMITS

    def create(self, create: CreateRequest, now_s: float) -> HttpRequest:
        """Return `POST /motion-control/kling-3.0`, or `kling-2.6` by the request's model."""
        request = create.request
        contents: list[dict[str, str]] = [
            {"type": "image", "url": create.image},
            {"type": "video", "url": create.video},
        ]
        if request.prompt:
            contents.insert(0, {"type": "prompt", "text": request.prompt})
        if request.element_id is not None:
            contents.append({"type": "element", "element_id": request.element_id, "id": "element_1"})
        options: dict[str, Any] = {
            "external_task_id": create.external_task_id,
            "watermark_info": {"enabled": request.watermark},
        }
        if create.callback_url is not None:
            options["callback_url"] = create.callback_url
        body = {
            "contents": contents,
            "settings": {
                "character_orientation": request.character_orientation,
                "audio": "original" if request.keep_original_sound else "off",
                "resolution": RESOLUTION[create.mode],
            },
            "options": options,
        }
        return self._request("POST", PATH[request.model], now_s, body)

    def queries(self, tasks: Sequence[Task], now_s: float) -> list[Query]:
        """Return queries by `task_ids`, or by `external_task_ids` for tasks without one: a query accepts only one."""
        known = [task for task in tasks if task.task_id is not None]
        unknown = [task for task in tasks if task.task_id is None]
        queries = []
        for group, field in ((known, "task_ids"), (unknown, "external_task_ids")):
            for start in range(0, len(group), IDS_PER_QUERY):
                batch = tuple(group[start : start + IDS_PER_QUERY])
                ids = ",".join(quote(task.task_id or task.external_task_id, safe="") for task in batch)
                queries.append(Query(self._request("GET", f"/tasks?{field}={ids}", now_s), batch))
        return queries

    def read_query(self, query: Query, answer: HttpAnswer, now_s: float) -> Findings:
        """Parse the list of tasks; tasks are matched by id, not by position."""
        data = read_data(answer)
        reports, unreadable = match_tasks(query.tasks, data)
        absent = tuple(
            task.external_task_id
            for task in query.tasks
            if task.external_task_id not in reports and task.external_task_id not in unreadable
        )
        return Findings(reports, unreadable, absent)
