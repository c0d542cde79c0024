"""Parses the CloudEvent `task.requested`, which submits a task: HTTP, Pub/Sub, SQS, EventBridge. Pure.

    {"specversion": "1.0", "type": "task.requested", "source": "/shop", "id": "order-42",
     "datacontenttype": "application/json",
     "data": {"image": "https://...", "video": "https://...", "character_orientation": "video"}}

`data` has the fields of `MotionControl`. The event's `id` becomes the idempotency key
(`external_task_id`), so that an event which arrives twice creates one task; an id that does not match
`ID_PATTERN` is hashed together with the source. `data.external_task_id` overrides it.

Accepted forms: an event in structured, batched and binary mode (CloudEvents 1.0.2 HTTP binding), an
event inside a Pub/Sub push request, an SQS record, and an EventBridge event.
"""

import base64
import binascii
import hashlib
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

import msgspec

from submitter.errors import InvalidRequest, Problem
from submitter.request import ID_PATTERN, Limits, MotionControl, check_request
from submitter.safe_json import NotJson, read_json

TYPE = "task.requested"
BATCH_MAX = 100  # events in one request: each is a task with two media to check
LimitsByVendor = Mapping[str, Limits]
FIELDS = {field.name: field for field in msgspec.structs.fields(MotionControl)}
TYPES = {name: str if name in ("image", "video") else field.type for name, field in FIELDS.items()}
STRUCTURED, BATCHED = "application/cloudevents+json", "application/cloudevents-batch+json"


def read_http(headers: Mapping[str, str], body: bytes, limits: LimitsByVendor) -> list[MotionControl]:
    """Return the requests in an HTTP request: one event, a batch, or a Pub/Sub push. Raises InvalidRequest.

    The names of `headers` are in lower case. `limits` are those of every vendor, by name.
    """
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == BATCHED:
        events = _decode(body)
        if not isinstance(events, list):
            raise _wrong(
                "body", type(events).__name__, "a list of CloudEvents", f"Send a list, or one event as {STRUCTURED}."
            )
        if len(events) > BATCH_MAX:
            remedy = f"Send at most {BATCH_MAX} events in one request."
            raise _wrong("body", f"{len(events)} events", f"at most {BATCH_MAX}", remedy)
        return [read_event(event, limits) for event in events]
    if "ce-specversion" in headers:
        attributes = {name[3:]: unquote(value) for name, value in headers.items() if name.startswith("ce-")}
        return [read_event(attributes | {"data": _decode(body)}, limits)]
    decoded = _decode(body)
    if kind != STRUCTURED and isinstance(decoded, dict) and "subscription" in decoded:
        return [_read_pushed(decoded.get("message"), limits)]
    return [read_event(decoded, limits)]


def read_sqs(record: Mapping[str, Any], limits: LimitsByVendor) -> MotionControl:
    """Return the request in an SQS record as Lambda receives it. Raises InvalidRequest.

    Its body is a CloudEvent, an EventBridge event from a rule, or, with attributes `ce-...`, only the data.
    """
    typed = record.get("messageAttributes", {})
    attributes = {name: str(value.get("stringValue", "")) for name, value in typed.items()}
    body = _decode(str(record.get("body", "")).encode())
    return _read_message(attributes, body, limits)


def read_eventbridge(event: Mapping[str, Any], limits: LimitsByVendor) -> MotionControl:
    """Return the request in an EventBridge event: its `detail` is a CloudEvent, or the data of one.

    EventBridge assigns a new id to every entry, so a producer that retries must set the id of a
    CloudEvent or `detail.external_task_id` to stay idempotent. Raises InvalidRequest.
    """
    detail = event.get("detail")
    if isinstance(detail, dict) and "specversion" in detail:
        return read_event(detail, limits)
    attributes = {"specversion": "1.0", "type": event.get("detail-type"), "source": event.get("source")}
    return read_event(attributes | {"id": event.get("id"), "data": detail}, limits)


def read_event(event: Any, limits: LimitsByVendor) -> MotionControl:
    """Return the request in a CloudEvent; raise InvalidRequest with every problem."""
    if not isinstance(event, Mapping):
        raise _wrong("event", type(event).__name__, "a CloudEvent", f"Send a JSON object with type {TYPE!r}.")
    problems = [
        Problem(name, repr(event.get(name)), limit, "Correct this attribute of the event.")
        for name, limit, is_right in (
            ("specversion", "'1.0'", event.get("specversion") == "1.0"),
            ("type", repr(TYPE), event.get("type") == TYPE),
            ("id", "a non-empty string", _is_text(event.get("id"))),
            ("source", "a non-empty string", _is_text(event.get("source"))),
        )
        if not is_right
    ]
    data = event.get("data")
    if "data_base64" in event:
        data = _decode(_from_base64(event["data_base64"]))
    if problems or not isinstance(data, Mapping):
        if not isinstance(data, Mapping):
            problems.append(Problem("data", type(data).__name__, "a JSON object", "Send the request in `data`."))
        raise InvalidRequest(problems)
    problems = [*_check_names(data), *_check_types(data), *_check_media(data)]
    if problems:
        raise InvalidRequest([*problems, *_check_rest(data, problems, limits)])
    request = MotionControl(**data)
    if request.external_task_id is not None:
        return request
    return msgspec.structs.replace(request, external_task_id=id_of(event["source"], event["id"]))


def id_of(source: str, id: str) -> str:
    """Return the external_task_id of an event."""
    if ID_PATTERN.fullmatch(id):
        return id
    digest = hashlib.sha256(f"{source}\n{id}".encode())
    return f"ce-{digest.hexdigest()[:32]}"


def _read_pushed(message: Any, limits: LimitsByVendor) -> MotionControl:
    """Return the request in a message of a Pub/Sub push subscription."""
    if not isinstance(message, Mapping):
        raise _wrong(
            "message",
            type(message).__name__,
            "a Pub/Sub message",
            "Turn payload unwrapping off in the push subscription.",
        )
    attributes = message.get("attributes") or {}
    if not isinstance(attributes, Mapping):
        remedy = "Send the attributes as an object of strings."
        raise _wrong("message.attributes", type(attributes).__name__, "a JSON object", remedy)
    return _read_message(attributes, _decode(_from_base64(message.get("data", ""))), limits)


def _read_message(attributes: Mapping[str, str], body: Any, limits: LimitsByVendor) -> MotionControl:
    if "ce-specversion" in attributes:
        named = {name[3:]: value for name, value in attributes.items() if name.startswith("ce-")}
        return read_event(named | {"data": body}, limits)
    if isinstance(body, dict) and "detail-type" in body:
        return read_eventbridge(body, limits)
    return read_event(body, limits)


def _check_names(data: Mapping[str, Any]) -> list[Problem]:
    problems = []
    for name in data:
        if name not in FIELDS:
            import difflib

            near = difflib.get_close_matches(name, FIELDS, 1)
            remedy = f"Did you mean {near[0]!r}?" if near else f"Known fields: {', '.join(FIELDS)}."
            problems.append(Problem(f"data.{name}", "unknown", "a field of the request", remedy))
    missing = [name for name, field in FIELDS.items() if field.required and name not in data]
    problems.extend(Problem(f"data.{name}", "missing", "a required field", "Add it.") for name in missing)
    return problems


def _check_types(data: Mapping[str, Any]) -> list[Problem]:
    problems = []
    for name, value in data.items():
        try:
            msgspec.convert(value, TYPES.get(name, Any))
        except msgspec.ValidationError as error:
            problems.append(Problem(f"data.{name}", repr(value)[:80], str(error), "Correct the type of this field."))
    return problems


def _check_media(data: Mapping[str, Any]) -> list[Problem]:
    """Refuse local paths: an event from outside must not read files of the submitting machine."""
    problems = []
    for name, schemes in (("image", ("https://", "http://", "data:")), ("video", ("https://", "http://"))):
        value = data.get(name)
        if isinstance(value, str) and not value.startswith(schemes):
            limit = f"starts with {' or '.join(schemes)}"
            problems.append(
                Problem(f"data.{name}", repr(value[:80]), limit, "Events cannot refer to local files. Use a URL.")
            )
    return problems


def _check_rest(data: Mapping[str, Any], problems: list[Problem], limits: LimitsByVendor) -> list[Problem]:
    """Return the problems of the fields that have none so far, as if the others were right."""
    wrong = {problem.field.removeprefix("data.") for problem in problems}
    valid = {name: value for name, value in data.items() if name in FIELDS and name not in wrong}
    request = MotionControl(**{"image": "", "video": "", "character_orientation": "video"} | valid)
    of_vendor = next((limits[name] for name in request.vendors if name in limits), None)
    if of_vendor is None:
        return []
    found = check_request(request, of_vendor)
    return [msgspec.structs.replace(one, field=f"data.{one.field}") for one in found if one.field not in wrong]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _decode(body: bytes) -> Any:
    try:
        return read_json(body)
    except NotJson as error:
        raise _wrong("body", repr(body[:80]), f"JSON: {error}", "Send a CloudEvent as JSON.") from error


def _from_base64(value: Any) -> bytes:
    try:
        return base64.b64decode(str(value), validate=True)
    except (binascii.Error, ValueError) as error:
        raise _wrong("data", repr(str(value)[:80]), "base64", "Encode it as standard base64 with padding.") from error


def _wrong(field: str, value: str, limit: str, remedy: str) -> InvalidRequest:
    return InvalidRequest([Problem(field, value, limit, remedy)])
