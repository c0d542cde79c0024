"""The Motion Control request, with Kling's field names, and its validation against vendor limits. Pure.

Limits are data: each vendor's module holds its `Limits`, and no number appears anywhere else.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec
from msgspec.structs import replace

from submitter.errors import Problem

ID_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._~-]{0,127}")
"""The syntax of an external_task_id; it is used unescaped in the path of the callback URL."""

METADATA_BYTES = 4096


class MotionControl(msgspec.Struct, frozen=True, kw_only=True):
    """One Kling Motion Control request: the character of the image performs the motion of the video.

    `image` is a URL, a file or base64; `video` is a URL or a file (a file needs a media store).
    `character_orientation` (`image` or `video`) sets which of the two the character's orientation
    follows, and the allowed duration of the video. `mode` is `std` (720p) or `pro` (1080p); None
    selects the vendor's first mode. `element_id` (kling-v3 only) needs the orientation `video`.
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
    `url_lives` is how long a result's URL is valid, as text.
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
    watermark: bool = False
    inline_image: bool = False
    own_id: bool = False
    ids_per_query: int | None = 1
    notes: tuple[str, ...] = ()


class MediaFacts(msgspec.Struct, frozen=True):
    """The properties of an image or a video, as probed. None means unknown.

    `width` and `height` are as displayed (rotation and pixel aspect ratio applied); `coded` is the
    stored size of a video. `duration_s` is in seconds, for videos only.
    """

    format: str | None
    bytes: int | None
    width: int | None = None
    height: int | None = None
    coded: tuple[int, int] | None = None
    duration_s: float | None = None


def ratio(aspect: tuple[int, int]) -> float:
    """Return width / height."""
    return aspect[0] / aspect[1]


def check_request(request: MotionControl, limits: Limits) -> list[Problem]:
    """Return every problem of the request's fields; `check_media` checks the media."""
    problems = [
        *_check_choice("character_orientation", request.character_orientation, ("image", "video")),
        *_check_choice("mode", mode_of(request, limits), limits.modes),
        *_check_choice("model", request.model, limits.models),
    ]
    if limits.prompt_required and not request.prompt.strip():
        problems.append(Problem("prompt", "none", "this vendor requires one", "Describe the scene."))
    if len(request.prompt) > limits.prompt_chars:
        problems.append(
            Problem(
                "prompt", f"{len(request.prompt)} characters", f"at most {limits.prompt_chars}", "Shorten the prompt."
            )
        )
    if len(request.negative_prompt) > limits.negative_prompt_chars:
        limit, remedy = f"at most {limits.negative_prompt_chars}", "Shorten it."
        if limits.negative_prompt_chars == 0:
            limit, remedy = "not supported by this vendor", "Leave it out, or put it into the prompt."
        problems.append(Problem("negative_prompt", f"{len(request.negative_prompt)} characters", limit, remedy))
    if request.watermark and not limits.watermark:
        problems.append(Problem("watermark", "true", "not supported by this vendor", "Leave it out."))
    if request.element_id is not None:
        problems.extend(_check_element(request, limits))
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
        problems.append(
            Problem(
                "metadata",
                f"{size} bytes",
                f"at most {METADATA_BYTES}",
                "Store a key that refers to your own record instead.",
            )
        )
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


def check_media(
    request: MotionControl, limits: Limits, image: MediaFacts | None, video: MediaFacts | None
) -> list[Problem]:
    """Return every problem of the media; properties that could not be probed are not checked."""
    problems: list[Problem] = []
    if image is not None:
        problems.extend(_check_medium("image", image, limits.image))
    if video is not None:
        problems.extend(_check_medium("video", video, limits.video))
        problems.extend(_check_duration(request, video, limits))
    return problems


def _check_choice(field: str, value: str, choices: tuple[str, ...]) -> list[Problem]:
    if value in choices:
        return []
    return [Problem(field, repr(value), f"one of {', '.join(choices)}", f"Choose {' or '.join(choices)}.")]


def _check_element(request: MotionControl, limits: Limits) -> list[Problem]:
    problems = []
    if not re.fullmatch(r"[0-9]{1,19}", request.element_id or ""):
        problems.append(
            Problem("element_id", repr(request.element_id), "digits", "Copy the id from Kling's element library.")
        )
    if request.model not in limits.element_models:
        allowed = ", ".join(limits.element_models) or "no model of this vendor"
        problems.append(
            Problem(
                "element_id",
                f"with model {request.model}",
                f"supported by {allowed}",
                "Leave it out, or use another model.",
            )
        )
    if request.character_orientation != "video":
        problems.append(
            Problem(
                "element_id",
                f"with character_orientation {request.character_orientation!r}",
                "only with 'video'",
                "Set character_orientation to 'video', or leave element_id out.",
            )
        )
    return problems


def _check_medium(field: str, facts: MediaFacts, limits: MediaLimits) -> list[Problem]:
    problems: list[Problem] = []
    wanted = ", ".join(limits.formats)
    if facts.format not in limits.formats:
        found = facts.format or "unknown format"
        problems.append(Problem(f"{field}.format", found, f"{wanted}; detected by content", f"Convert it to {wanted}."))
    if facts.bytes is not None and facts.bytes > limits.max_bytes:
        problems.append(
            Problem(
                f"{field}.bytes",
                f"{facts.bytes:,} bytes",
                f"at most {limits.max_bytes:,}",
                "Compress it, or scale it down.",
            )
        )
    if facts.bytes == 0:
        problems.append(Problem(f"{field}.bytes", "empty", "at least 1 byte", "Use a file with content."))
    if facts.width and facts.height:
        problems.extend(_check_size(field, facts.width, facts.height, facts.coded, limits))
    return problems


def _check_size(
    field: str, width: int, height: int, coded: tuple[int, int] | None, limits: MediaLimits
) -> list[Problem]:
    problems: list[Problem] = []
    # A vendor may measure the stored or the displayed size, so both must be valid.
    for w, h in dict.fromkeys(((width, height), coded or (width, height))):
        too_big = limits.max_side is not None and max(w, h) > limits.max_side
        if min(w, h) < limits.min_side or too_big:
            top = f"to {limits.max_side} px" if limits.max_side else "px or more"
            problems.append(
                Problem(f"{field}.size", f"{w} x {h} px", f"each side {limits.min_side} {top}", "Scale it to fit.")
            )
    low, high = limits.min_aspect, limits.max_aspect
    if low is None or high is None:
        return problems
    if width * low[1] < height * low[0] or width * high[1] > height * high[0]:
        problems.append(
            Problem(
                f"{field}.aspect",
                f"{width / height:.3f} ({width} x {height})",
                f"width / height from {ratio(low):g} to {ratio(high):g}",
                "Crop it.",
            )
        )
    return problems


def _check_duration(request: MotionControl, video: MediaFacts, limits: Limits) -> list[Problem]:
    bounds = limits.durations_s.get(request.character_orientation)
    if bounds is None or video.duration_s is None:
        return []
    low, high = bounds
    if low <= round(video.duration_s, 2) <= high:
        return []
    longest = limits.durations_s["video"][1]
    fits_video = request.character_orientation == "image" and high < video.duration_s <= longest
    remedy = f"Trim it to {high:g} s" + (", or set character_orientation to 'video'." if fits_video else ".")
    if video.duration_s < low:
        remedy = f"Use a video of at least {low:g} s."
    return [
        Problem(
            "video.duration",
            f"{video.duration_s:.3f} s",
            f"{low:g} to {high:g} s with character_orientation {request.character_orientation!r}",
            remedy,
        )
    ]
