"""Checks an image and a video, as probed, against a vendor's limits. Pure."""

import msgspec

from submitter.errors import Problem
from submitter.request import Limits, MediaLimits, MotionControl, ratio


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
