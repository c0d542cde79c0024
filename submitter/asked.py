"""What is stored of a request, so that it can be compared and repeated."""

from submitter.errors import InvalidRequest, Problem
from submitter.media import Medium, digest
from submitter.request import MotionControl
from submitter.task import Task

_WORDS = ("character_orientation", "model", "prompt", "negative_prompt")


def asked_of(request: MotionControl, image: Medium, video: Medium) -> dict[str, str]:
    """Return a request as the ledger keeps it: media by their URL or digest, and where a file lay."""
    asked = {name: str(getattr(request, name)) for name in _WORDS}
    asked |= {
        "vendor": ",".join(request.vendors),
        "mode": request.mode or "",
        "keep_original_sound": "yes" if request.keep_original_sound else "no",
        "element_id": request.element_id or "",
        "watermark": "yes" if request.watermark else "no",
    }
    for medium in (image, video):
        asked[medium.field] = digest(medium)
        if medium.path is not None:
            asked[f"{medium.field}_file"] = str(medium.path)
    return asked


def differences(stored: Task, asked: Task) -> list[str]:
    """Return the names of the fields in which two requests differ, wherever their files lie."""
    names = {*stored.request, *asked.request} - {"image_file", "video_file"}
    different = sorted(name for name in names if stored.request.get(name, "") != asked.request.get(name, ""))
    if stored.metadata != asked.metadata:
        different.append("metadata")
    return different


def request_again(task: Task, external_task_id: str, metadata: dict[str, str]) -> MotionControl:
    """Return a stored request under another id; raise InvalidRequest when its media were not kept."""
    asked = task.request
    media: dict[str, str] = {}
    for field in ("image", "video"):
        media[field] = asked.get(f"{field}_file") or asked.get(field, "")
        if media[field].startswith("sha256:"):
            raise InvalidRequest(
                [Problem(field, "given as base64", "a URL or a file", "It was not kept: submit the request again.")]
            )
    return MotionControl(
        **media,
        **{name: asked[name] for name in _WORDS},
        mode=asked["mode"] or None,
        keep_original_sound=asked["keep_original_sound"] == "yes",
        element_id=asked["element_id"] or None,
        watermark=asked["watermark"] == "yes",
        external_task_id=external_task_id,
        metadata=metadata,
        vendor=asked["vendor"],
    )
