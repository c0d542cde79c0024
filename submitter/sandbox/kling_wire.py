"""Wire format of Kling's stand-in: tasks in both API generations, the error table, authentication."""

import base64
import hmac
import json
from decimal import ROUND_HALF_UP, Decimal
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from submitter.sandbox.base import API_KEY, Job
from submitter.sandbox.studio import Refusal

ACCESS_KEY, SECRET_KEY = "sandbox-access", "sandbox-secret"
RATES = {("3.0", "720p"): "0.9", ("3.0", "1080p"): "1.2", ("2.6", "720p"): "0.5", ("2.6", "1080p"): "0.8"}


CODES: dict[str, tuple[int, int]] = {
    "key": (401, 1002),
    "invalid": (400, 1201),
    "absent": (400, 1201),
    "balance": (429, 1102),
    "permission": (403, 1103),
    "capacity": (429, 1303),
    "rate": (429, 1302),
    "maintenance": (503, 5001),
    "outage": (500, 5000),
}


Digits = Annotated[str, Meta(pattern="^[0-9]+$")]


class WatermarkInfo(Struct):
    """Whether a watermarked copy is wanted."""

    enabled: bool = False


class ContentV2(Struct):
    """One input of a create (v2): a prompt, an image, a video or an element."""

    type: str
    text: str = ""
    url: str | None = None
    element_id: Digits | None = None
    id: str | None = None


class SettingsV2(Struct):
    """How to render (v2)."""

    character_orientation: Literal["image", "video"]
    audio: Literal["original", "off"] = "original"
    resolution: Literal["720p", "1080p"] = "720p"


class OptionsV2(Struct):
    """The callback and the own id of a create (v2)."""

    callback_url: str | None = None
    external_task_id: str | None = None
    watermark_info: WatermarkInfo | None = None


class CreateV2(Struct):
    """The body of a create of the current API (v2)."""

    contents: list[ContentV2]
    settings: SettingsV2
    options: OptionsV2 | None = None


class ElementV1(Struct):
    """A reference to an element (v1): a 64-bit number."""

    element_id: int


class CreateV1(Struct):
    """The body of a create of the older API (v1)."""

    image_url: str
    video_url: str
    character_orientation: Literal["image", "video"]
    mode: Literal["std", "pro"]
    model_name: Literal["kling-v2-6", "kling-v3"] = "kling-v2-6"
    prompt: str = ""
    keep_original_sound: Literal["yes", "no"] = "yes"
    element_list: list[ElementV1] | None = None
    watermark_info: WatermarkInfo | None = None
    callback_url: str | None = None
    external_task_id: str | None = None


class FilterV2(Struct):
    """A filter of a task list (v2)."""

    key: Literal["status", "product_type"]
    values: list[str]


class ListV2(Struct):
    """The body of `POST /tasks` (v2). Times are Unix milliseconds, as text."""

    start_time: Digits | None = None
    end_time: Digits | None = None
    cursor: Annotated[str, Meta(pattern="^[0-9]*$")] = ""
    limit: Annotated[int, Meta(ge=1, le=500)] = 100
    filters: list[FilterV2] = msgspec.field(default_factory=list)


class CodedRefusal(Refusal):
    """A refusal with Kling's HTTP status and error code."""

    def __init__(self, http_status: int, code: int, message: str) -> None:
        super().__init__("invalid", message)
        self.http_status, self.code = http_status, code


def element(job: Job, url: str) -> dict[str, Any]:
    """Return a task in the form of the current API (v2), for queries and callbacks."""
    element: dict[str, Any] = {
        "id": job.id,
        "status": job.status,
        "message": job.message,
        "create_time": job.created_ms,
        "update_time": job.updated_ms,
        "external_id": job.request.external_id or "",
        "outputs": [],
        "billing": [],
    }
    if job.status == "succeeded":
        output = {"type": "video", "id": f"{job.id}-1", "duration": f"{job.duration_s:.3f}"}
        if job.has_url:
            output["url"] = url
        if job.request.watermark:
            output["watermark_url"] = f"{url}?watermark=1"
        element["outputs"] = [output]
        element["billing"] = [{"charge_type": "unit", "amount": units(job), "package_type": "video"}]
    return element


def callback_v1(job: Job, url: str) -> dict[str, Any]:
    """Return a task as the body of a callback of the older API (v1)."""
    body: dict[str, Any] = {
        "task_id": job.id,
        "task_status": "succeed" if job.status == "succeeded" else job.status,
        "task_status_msg": job.message,
        "created_at": job.created_ms,
        "updated_at": job.updated_ms,
        "task_info": {"external_task_id": job.request.external_id or ""},
        "task_result": {"images": [], "videos": []},
    }
    if job.status == "succeeded":
        video = {"id": f"{job.id}-1", "duration": f"{job.duration_s:.1f}"}
        if job.has_url:
            video["url"] = url
        body["task_result"]["videos"] = [video]
        body["final_unit_deduction"] = units(job)
    return body


def task_v1(job: Job, url: str) -> dict[str, Any]:
    """Return a task as the older API (v1) answers a query."""
    task = callback_v1(job, url)
    task["watermark_info"] = {"enabled": job.request.watermark}
    if job.request.watermark:
        for video in task["task_result"]["videos"]:
            video["watermark_url"] = f"{url}?watermark=1"
    return task


def units(job: Job) -> str:
    """Return the cost of a task in units: seconds, rounded half up, times the rate of its model and resolution."""
    seconds = Decimal(str(job.duration_s)).quantize(Decimal(1), ROUND_HALF_UP)
    return str(seconds * Decimal(RATES[job.request.model, job.request.resolution]))


def created_v2(job: Job) -> dict[str, Any]:
    """Return the answer of the current API (v2) to a create."""
    return {
        "id": job.id,
        "status": job.status,
        "message": job.message,
        "create_time": job.created_ms,
        "update_time": job.updated_ms,
        "external_id": job.request.external_id or "",
    }


def authenticate(authorization: str, takes_jwt: bool, now_s: float) -> None:
    """Raise CodedRefusal for a wrong Authorization header. Takes an API key or, if `takes_jwt`, a JWT (HS256)."""
    if not authorization:
        raise CodedRefusal(401, 1001, "Authorization is empty")
    scheme, _, token = authorization.partition(" ")
    if scheme != "Bearer":
        raise CodedRefusal(401, 1002, "Authorization is not valid")
    if token == API_KEY:
        return
    parts = token.split(".")
    if len(parts) != 3 or not takes_jwt:
        raise CodedRefusal(401, 1002, "Authorization is not valid")
    try:
        head, claims = (json.loads(_unbase64url(part)) for part in parts[:2])
        expected = hmac.digest(SECRET_KEY.encode(), f"{parts[0]}.{parts[1]}".encode(), "sha256")
        is_signed = hmac.compare_digest(expected, _unbase64url(parts[2])) and head["alg"] == "HS256"
        issuer, expires, begins = claims["iss"], float(claims["exp"]), float(claims["nbf"])
    except (ValueError, KeyError, TypeError) as error:
        raise CodedRefusal(401, 1002, "Authorization is not valid") from error
    if not is_signed or issuer != ACCESS_KEY:
        raise CodedRefusal(401, 1000, "signature is not valid")
    if begins > now_s:
        raise CodedRefusal(401, 1003, "Authorization is not valid yet")
    if expires < now_s:
        raise CodedRefusal(401, 1004, "Authorization has expired")


def _unbase64url(part: str) -> bytes:
    return base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))
