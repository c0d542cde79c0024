"""Tolerant JSON parsing: returns a field as the requested type, or None. Pure.

URLs are the exception: what is no http(s) URL is an error, since users and services open them.
"""

from collections.abc import Mapping
from typing import Any

import msgspec

from submitter.callback_url import redact
from submitter.errors import Unintelligible
from submitter.safe_json import NotJson, read_json
from submitter.task import RAW_MAX
from submitter.web_address import why_not_result


def read_object(body: bytes | str) -> dict[str, Any]:
    """Parse a JSON object; raise Unintelligible for anything else."""
    try:
        value = read_json(body)
    except NotJson as error:
        raise Unintelligible(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise Unintelligible(f"expected a JSON object, not {type(value).__name__}")
    return value


def object_or_empty(body: bytes) -> dict[str, Any]:
    """Parse a JSON object; return an empty one for anything else."""
    try:
        return read_object(body)
    except Unintelligible:
        return {}


def text(source: Mapping[str, Any], name: str) -> str | None:
    """Return a field as text: vendors send ids and amounts as strings or numbers. None for "" and null."""
    value = source.get(name)
    if type(value) is str:
        return value or None
    return str(value) if type(value) in (int, float) else None


def number(source: Mapping[str, Any], name: str) -> float | None:
    """Return a field as a finite number, parsed from a number or a string; None for anything else."""
    try:
        value = float(text(source, name) or "")
    except ValueError:
        return None
    return value if abs(value) < 1e18 else None


def objects(source: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """Return the objects in a field that holds a list or a single object; empty for anything else."""
    value = source.get(name)
    found = value if isinstance(value, list) else [value]
    return [item for item in found if isinstance(item, dict)]


def inner(source: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the object in a field; empty for anything else."""
    value = source.get(name)
    return value if isinstance(value, dict) else {}


def url(source: Mapping[str, Any], name: str) -> str | None:
    """Return a field that holds an http(s) URL; None for "" and null. Raises Unintelligible for anything else."""
    value = source.get(name)
    if value is None or value == "":
        return None
    reason = "it is no text" if not isinstance(value, str) else why_not_result(value)
    if reason is not None or not isinstance(value, str):
        raise Unintelligible(f"`{name}` is no http(s) URL, {reason}: {value!r:.80}")
    return value


def raw(body: bytes | str | Mapping[str, Any]) -> str:
    """Return a body, or the part of one that is about a task, as a task keeps it: redacted, and cut off at RAW_MAX."""
    if not isinstance(body, bytes | str):
        body = msgspec.json.encode(body)
    text = body.decode(errors="replace") if isinstance(body, bytes) else body
    return redact(text)[:RAW_MAX]
