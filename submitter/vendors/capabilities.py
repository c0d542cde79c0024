"""The capability table: each vendor's limits and features, from the values that preflight checks. Pure."""

from collections.abc import Callable, Mapping

from submitter.request import MediaLimits, ratio
from submitter.vendors.base import Streams, Vendor


def capabilities(vendors: Mapping[str, Vendor]) -> list[tuple[str, dict[str, str]]]:
    """Return the rows of the table: a title, and each vendor's value as text."""
    return [(title, {name: value_of(vendor) for name, vendor in vendors.items()}) for title, value_of in ROWS]


def _yes(value: object) -> str:
    return "yes" if value else "no"


def _medium(limits: MediaLimits) -> str:
    top = f"to {limits.max_side} px" if limits.max_side else "px or more"
    aspect = ""
    if limits.min_aspect is not None and limits.max_aspect is not None:
        aspect = f", width / height {ratio(limits.min_aspect):g} to {ratio(limits.max_aspect):g}"
    return f"{', '.join(limits.formats)}; to {limits.max_bytes >> 20} MB; each side {limits.min_side} {top}{aspect}"


def _seconds(orientation: str) -> Callable[[Vendor], str]:
    def value_of(vendor: Vendor) -> str:
        low, high = vendor.limits.durations_s[orientation]
        return f"{low:g} to {high:g}"

    return value_of


def _prompt(vendor: Vendor) -> str:
    length = f"to {vendor.limits.prompt_chars} characters"
    return f"required, {length}" if vendor.limits.prompt_required else length


def _negative(vendor: Vendor) -> str:
    limit = vendor.limits.negative_prompt_chars
    return f"to {limit} characters" if limit else "no"


def _status_reports(vendor: Vendor) -> str:
    if isinstance(vendor, Streams):
        return "event stream"
    if not vendor.callbacks:
        return "polling only"
    return "callbacks, optionally signed" if vendor.signs_callbacks else "unsigned callbacks"


ROWS: tuple[tuple[str, Callable[[Vendor], str]], ...] = (
    ("models", lambda vendor: ", ".join(vendor.limits.models)),
    ("modes", lambda vendor: ", ".join(vendor.limits.modes)),
    ("prompt", _prompt),
    ("negative prompt", _negative),
    ("element of Kling's library", lambda vendor: ", ".join(vendor.limits.element_models) or "no"),
    ("element as an object", lambda vendor: _yes(vendor.limits.element_object)),
    ("a prompt cites the element as", lambda vendor: vendor.limits.element_cited_as),
    ("watermark", lambda vendor: _yes(vendor.limits.watermark)),
    ("image", lambda vendor: _medium(vendor.limits.image)),
    ("image as a file or base64", lambda vendor: "yes" if vendor.limits.inline_image else "file, by a media store"),
    ("video", lambda vendor: _medium(vendor.limits.video)),
    ("video as a file", lambda vendor: "by a media store"),
    ("video seconds, orientation video", _seconds("video")),
    ("video seconds, orientation image", _seconds("image")),
    ("your id is known there", lambda vendor: _yes(vendor.limits.own_id)),
    ("status reports", _status_reports),
    ("callbacks by default", lambda vendor: str(vendor.callbacks).lower()),
    ("tasks a query", lambda vendor: str(vendor.limits.ids_per_query or "all")),
    ("result URL lives", lambda vendor: vendor.limits.url_lives),
    ("besides", lambda vendor: "; ".join(vendor.limits.notes)),
)
