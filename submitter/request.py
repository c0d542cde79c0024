"""The Motion Control request, with Kling's field names, and its validation against vendor limits. Pure.

Limits are data: each vendor's module holds its `Limits`, and no number appears anywhere else.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec.structs import replace

from submitter.errors import Problem
from submitter.safe_json import NUL

ID_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._~-]{0,127}")
"""The syntax of an external_task_id; it is used unescaped in the path of the callback URL."""

METADATA_BYTES = 4096
_RETRY = r"(.+)~([1-9][0-9]{0,5})"  # compiled when it is first needed, as in `web_address`
ELEMENT_BYTES = 16 * 1024
UNSUPPORTED_TEXT = ("not supported by this vendor", "Leave it out, or put it into the prompt.")


class MotionControl(msgspec.Struct, frozen=True, kw_only=True):
    """One Kling Motion Control request: the character of the image performs the motion of the video.

    `image` is a URL, a file or base64; `video` is a URL or a file (a file needs a media store).
    `character_orientation` (`image` or `video`) sets which of the two the character's orientation
    follows, and the allowed duration of the video. `mode` is `std` (720p) or `pro` (1080p); None
    selects the vendor's first mode. An element needs the orientation `video`: `element_id` names one of
    Kling's element library (kling-v3 only), `element` describes one for a vendor without such a library, as
    a JSON object that is passed on as it is. The prompt cites it by the vendor's `element_cited_as`.
    `external_task_id` is the idempotency key: submitting again with the same id creates no second
    task; the default is a new UUIDv7. `metadata` is returned in every event. `vendor` may list several
    vendors, comma-separated, for failover: a definite refusal that may not apply to the next vendor
    moves the request there.
    """

    image: str | Path
    video: str | Path
    character_orientation: str
    mode: str | None = None
    model: str = "kling-v3"
    prompt: str = ""
    negative_prompt: str = ""
    keep_original_sound: bool = True
    element_id: str | None = None
    element: dict[str, Any] | None = None
    watermark: bool = False
    external_task_id: str | None = None
    metadata: dict[str, str] = {}
    vendor: str = "kling"

    @property
    def vendors(self) -> tuple[str, ...]:
        """The vendors to try, in this order."""
        return tuple(dict.fromkeys(filter(None, (name.strip() for name in self.vendor.split(",")))))


class MediaLimits(msgspec.Struct, frozen=True):
    """A vendor's limits for an image or a video. Sides are in pixels; an aspect ratio is (width, height)."""

    formats: tuple[str, ...]
    max_bytes: int
    min_side: int
    max_side: int | None = None
    min_aspect: tuple[int, int] | None = None
    max_aspect: tuple[int, int] | None = None


class Limits(msgspec.Struct, frozen=True):
    """A vendor's limits and features: checked by preflight, listed by `kling-relay vendors`.

    `durations_s` are in seconds, by orientation. `inline_image`: the API accepts an image as base64, not
    only as a URL. `own_id`: the API stores the external_task_id and can be queried by it, so that a
    create whose answer was lost can be looked up. `ids_per_query`: tasks per query; None is unlimited.
    `url_lives` is how long a result's URL is valid, as text. `element_models` take an element of Kling's
    library, `element_object` an element as an object; `element_cited_as` is how a prompt refers to it.
    """

    source: str
    image: MediaLimits
    video: MediaLimits
    durations_s: dict[str, tuple[float, float]]
    prompt_chars: int
    models: tuple[str, ...]
    url_lives: str
    modes: tuple[str, ...] = ("std", "pro")
    prompt_required: bool = False
    negative_prompt_chars: int = 0
    element_models: tuple[str, ...] = ()
    element_object: bool = False
    element_cited_as: str = ""
    watermark: bool = False
    inline_image: bool = False
    own_id: bool = False
    ids_per_query: int | None = 1
    notes: tuple[str, ...] = ()


def ratio(aspect: tuple[int, int]) -> float:
    """Return width / height."""
    return aspect[0] / aspect[1]


def retry_id(external_task_id: str) -> str:
    """Return the id of the retry of a task: `order-42~2`, then `order-42~3`. The same task has the same one."""
    again = re.fullmatch(_RETRY, external_task_id)
    first, number = (again[1], int(again[2]) + 1) if again else (external_task_id, 2)
    id = f"{first}~{number}"
    return id if ID_PATTERN.fullmatch(id) else f"{hashlib.sha256(first.encode()).hexdigest()[:32]}~{number}"


def check_types(request: MotionControl) -> tuple[list[Problem], MotionControl]:
    """Return every problem of the fields' types, and the request with defaults in place of those fields."""
    problems: list[Problem] = []
    valid: dict[str, Any] = {}
    for field in msgspec.structs.fields(MotionControl):
        value = getattr(request, field.name)
        wrong = _wrong_type(field.name, value, field.type)
        if wrong is not None:
            problems.append(wrong)
            default = "" if field.default is msgspec.NODEFAULT else field.default
            valid[field.name] = {} if field.name == "metadata" else default
    return problems, replace(request, **valid)


def _wrong_type(name: str, value: Any, type_: Any) -> Problem | None:
    if name in ("image", "video"):
        expected = "a URL or a file" if name == "video" else "a URL, a file or base64"
        remedy = "Save it to a file, and pass its path." if isinstance(value, bytes) else "Pass it as text or a path."
        if not isinstance(value, str | Path):
            return _mistyped(name, value, expected, remedy)
        return _why_not_text(name, str(value))
    if name == "metadata" and isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str) or not isinstance(item, str):
                return _mistyped(f"metadata[{key!r}]", item, "text by text keys", f"Pass {str(item)!r:.80}.")
    try:
        msgspec.convert(value, type_)
    except (msgspec.ValidationError, AttributeError, RecursionError, TypeError) as error:
        return _mistyped(name, value, str(error), "Correct the type of this field.")
    return _why_not_text(name, value)


def _why_not_text(name: str, value: Any) -> Problem | None:
    try:
        encoded = msgspec.json.encode(value)
    except (UnicodeEncodeError, TypeError, RecursionError) as error:
        return _mistyped(name, value, f"valid Unicode text: {error}", "Correct its encoding.")
    if NUL.search(encoded):
        return _mistyped(name, value, "text without NUL characters", "Remove them.")
    return None


def _mistyped(field: str, value: Any, limit: str, remedy: str) -> Problem:
    try:
        shown = f"{len(value)} bytes" if isinstance(value, bytes) else f"{value!a:.80}"
    except RecursionError:
        shown = "nested too deeply"
    return Problem(field, f"{shown} ({type(value).__name__})", limit, remedy)


def check_request(request: MotionControl, limits: Limits) -> list[Problem]:
    """Return every problem of the request's fields, whose types are right; `submitter.media.check` checks the media."""
    problems = [
        *_check_choice("character_orientation", request.character_orientation, ("image", "video")),
        *_check_choice("mode", mode_of(request, limits), limits.modes),
        *_check_choice("model", request.model, limits.models),
        *_check_length("prompt", request.prompt, limits.prompt_chars),
        *_check_length("negative_prompt", request.negative_prompt, limits.negative_prompt_chars),
        *_check_element(request, limits),
    ]
    if limits.prompt_required and not request.prompt.strip():
        problems.append(Problem("prompt", "none", "this vendor requires one", "Describe the scene."))
    if request.watermark and not limits.watermark:
        problems.append(Problem("watermark", "true", "not supported by this vendor", "Leave it out."))
    if request.external_task_id is not None and not ID_PATTERN.fullmatch(request.external_task_id):
        problems.append(
            Problem(
                "external_task_id",
                repr(request.external_task_id[:140]),
                "1 to 128 of A-Z a-z 0-9 . _ ~ -, the first a letter or digit",
                "Use another id, or leave it out to get a UUIDv7.",
            )
        )
    size = sum(len(key.encode()) + len(value.encode()) for key, value in request.metadata.items())
    if size > METADATA_BYTES:
        remedy = "Store a key that refers to your own record instead."
        problems.append(Problem("metadata", f"{size} bytes", f"at most {METADATA_BYTES}", remedy))
    return problems


def check_source(
    field: str, kind: Literal["url", "file", "inline"], limits: Limits, *, has_store: bool
) -> list[Problem]:
    """Return the problems of a medium's source: some vendors accept only URLs."""
    is_inlined = field == "image" and limits.inline_image
    if kind == "url" or is_inlined or (kind == "file" and has_store):
        return []
    value = "base64" if kind == "inline" else "a local file"
    store = "use a file and set KLING_RELAY_MEDIA_STORE" if kind == "inline" else "set KLING_RELAY_MEDIA_STORE"
    remedy = f"Use a URL, or {store} (a bucket, or a directory that `serve` publishes)."
    return [Problem(field, value, "a URL that the vendor can fetch", remedy)]


def mode_of(request: MotionControl, limits: Limits) -> str:
    """Return the request's mode; the default is the vendor's first mode."""
    return request.mode or limits.modes[0]


def suggest_vendors(problems: Sequence[Problem], by_vendor: Mapping[str, Sequence[Problem]]) -> list[Problem]:
    """Add to each problem's remedy the vendors without a problem in this field, given the problems `by_vendor`."""
    suggested = []
    for problem in problems:
        able = [name for name, others in by_vendor.items() if problem.field not in {other.field for other in others}]
        remedy = f"{problem.remedy} Or use {' or '.join(able)}, where this is valid." if able else problem.remedy
        suggested.append(replace(problem, remedy=remedy))
    return suggested


def _check_choice(field: str, value: str, choices: tuple[str, ...]) -> list[Problem]:
    if value in choices:
        return []
    return [Problem(field, f"{value!r:.80}", f"one of {', '.join(choices)}", f"Choose {' or '.join(choices)}.")]


def _check_length(field: str, text: str, most: int) -> list[Problem]:
    if len(text) <= most:
        return []
    limit, remedy = (f"at most {most}", "Shorten it.") if most else UNSUPPORTED_TEXT
    return [Problem(field, f"{len(text)} characters", limit, remedy)]


def _check_element(request: MotionControl, limits: Limits) -> list[Problem]:
    problems = []
    id, element = request.element_id, request.element
    if id is not None and not re.fullmatch(r"[0-9]{1,19}", id):
        remedy = "Copy the id from Kling's element library."
        problems.append(Problem("element_id", repr(id[:80]), "digits", remedy))
    if id is not None and request.model not in limits.element_models:
        allowed = ", ".join(limits.element_models) or "no model of this vendor"
        remedy = "Leave it out, or use another model."
        problems.append(Problem("element_id", f"with model {request.model}", f"supported by {allowed}", remedy))
    if element is not None and not limits.element_object:
        remedy = "Leave it out, or use element_id."
        problems.append(Problem("element", "an object", "not supported by this vendor", remedy))
    if element is not None and len(msgspec.json.encode(element)) > ELEMENT_BYTES:
        problems.append(Problem("element", "too large", f"at most {ELEMENT_BYTES} bytes", "Refer to media by URL."))
    for field in ("element_id", "element"):
        if getattr(request, field) is not None and request.character_orientation != "video":
            value = f"with character_orientation {request.character_orientation!r:.80}"
            remedy = f"Set character_orientation to 'video', or leave {field} out."
            problems.append(Problem(field, value, "only with 'video'", remedy))
    return problems
