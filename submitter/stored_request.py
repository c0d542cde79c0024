"""Converts a request to its stored form and back: to detect id conflicts, and to submit it again."""

import msgspec

from submitter.errors import InvalidRequest, Problem
from submitter.media.probe import Medium, digest
from submitter.request import MotionControl
from submitter.task import Task

_TEXT_FIELDS = ("character_orientation", "model", "prompt", "negative_prompt")


def to_stored(request: MotionControl, image: Medium, video: Medium) -> dict[str, str]:
    """Return a request as the ledger stores it: media as URL or digest, plus the path of a local file."""
    stored = {name: str(getattr(request, name)) for name in _TEXT_FIELDS}
    stored |= {
        "vendor": ",".join(request.vendors),
        "mode": request.mode or "",
        "keep_original_sound": "yes" if request.keep_original_sound else "no",
        "element_id": request.element_id or "",
        **({"element": msgspec.json.encode(request.element).decode()} if request.element else {}),
        "watermark": "yes" if request.watermark else "no",
    }
    for medium in (image, video):
        stored[medium.field] = digest(medium)
        if medium.path is not None:
            stored[f"{medium.field}_file"] = str(medium.path)
    return stored


def differences(stored: Task, submitted: Task) -> list[str]:
    """Return the names of the fields in which two requests differ; the paths of their files do not count."""
    names = {*stored.request, *submitted.request} - {"image_file", "video_file"}
    different = sorted(name for name in names if stored.request.get(name, "") != submitted.request.get(name, ""))
    if stored.metadata != submitted.metadata:
        different.append("metadata")
    return different


def to_request(task: Task, external_task_id: str, metadata: dict[str, str]) -> MotionControl:
    """Return a task's stored request with this id and metadata; raise InvalidRequest if its media were not stored."""
    stored = task.request
    media: dict[str, str] = {}
    for field in ("image", "video"):
        media[field] = stored.get(f"{field}_file") or stored.get(field, "")
        if media[field].startswith("sha256:"):
            raise InvalidRequest(
                [Problem(field, "base64, which is not stored", "a URL or a file", "Submit the whole request again.")]
            )
    return MotionControl(
        **media,
        **{name: stored[name] for name in _TEXT_FIELDS},
        mode=stored["mode"] or None,
        keep_original_sound=stored["keep_original_sound"] == "yes",
        element_id=stored["element_id"] or None,
        element=msgspec.json.decode(stored["element"]) if "element" in stored else None,
        watermark=stored["watermark"] == "yes",
        external_task_id=external_task_id,
        metadata=metadata,
        vendor=stored["vendor"],
    )
