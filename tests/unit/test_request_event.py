"""Parsing of the CloudEvent `task.requested`: a request, or an error that names the field."""

import base64
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from submitter.errors import InvalidRequest
from submitter.request import ID_PATTERN, MotionControl
from submitter.request_event import id_of, read_event, read_eventbridge, read_http, read_sqs
from submitter.vendors.registry import limits_by_vendor

LIMITS = limits_by_vendor()

DATA = {"image": "https://x.example/a.png", "video": "https://x.example/b.mp4", "character_orientation": "video"}
EVENT = {"specversion": "1.0", "type": "task.requested", "source": "/shop", "id": "order-1", "data": DATA}

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def test_every_field_of_a_request_is_parsed() -> None:
    data: Any = DATA | {"mode": "pro", "prompt": "on a beach", "metadata": {"order": "1"}, "vendor": "kling,novita"}
    found = read_event(EVENT | {"data": data}, LIMITS)
    assert found == MotionControl(**data, external_task_id="order-1")
    assert read_event(EVENT | {"data": data | {"external_task_id": "mine"}}, LIMITS).external_task_id == "mine"
    encoded = base64.b64encode(msgspec.json.encode(DATA)).decode()
    bare = {name: value for name, value in EVENT.items() if name != "data"}
    assert read_event(bare | {"data_base64": encoded}, LIMITS) == read_event(EVENT, LIMITS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"specversion": "0.3"}, "specversion: '0.3' ('1.0')"),
        ({"type": "task.succeed"}, "type: 'task.succeed' ('task.requested')"),
        ({"id": ""}, "id: '' (a non-empty string)"),
        ({"source": 7}, "source: 7"),
        ({"data": None}, "data: NoneType (a JSON object)"),
        ({"data": DATA | {"promt": "x"}}, "Did you mean 'prompt'?"),
        ({"data": DATA | {"frobnicate": "x"}}, "Known fields: image, video"),
        ({"data": {"image": DATA["image"]}}, "data.video: missing"),
        ({"data": DATA | {"prompt": 7}}, "data.prompt: 7"),
        ({"data": DATA | {"metadata": {"a": 1}}}, "data.metadata"),
        ({"data": DATA | {"image": "/etc/passwd"}}, "Events cannot refer to local files"),
        ({"data": DATA | {"image": "DATA:/etc/passwd"}}, "Events cannot refer to local files"),
        ({"data": DATA | {"video": "../b.mp4"}}, "Events cannot refer to local files"),
        ({"data": DATA | {"video": "file:///b.mp4"}}, "Events cannot refer to local files"),
    ],
)
def test_a_problem_is_reported_with_its_field_and_remedy(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        read_event(EVENT | change, LIMITS)
    assert message in str(raised.value)


@given(source=st.text(min_size=1), id=st.text(min_size=1))
def test_every_event_id_maps_to_one_valid_external_task_id(source: str, id: str) -> None:
    made = id_of(source, id)
    assert ID_PATTERN.fullmatch(made)
    assert made == id_of(source, id)
    assert made == id or made != id_of(source + "/other", id)


def test_an_eventbridge_event_is_a_request_or_contains_a_cloudevent() -> None:
    envelope = {"detail-type": "task.requested", "source": "shop", "id": "e-1", "detail": DATA}
    assert read_eventbridge(envelope, LIMITS).external_task_id == "e-1"
    assert read_eventbridge(envelope | {"detail": EVENT}, LIMITS).external_task_id == "order-1"
    record = {"messageId": "m", "body": msgspec.json.encode(envelope).decode(), "messageAttributes": {}}
    assert read_sqs(record, LIMITS).external_task_id == "e-1"
    with pytest.raises(InvalidRequest, match=r"task\.requested"):
        read_eventbridge(envelope | {"detail-type": "Something Else"}, LIMITS)


@given(
    body=json_values.map(msgspec.json.encode) | st.binary(max_size=60),
    kind=st.sampled_from(
        ["application/json", "application/cloudevents+json", "application/cloudevents-batch+json; charset=utf-8", ""]
    ),
    more=st.dictionaries(st.sampled_from(["ce-specversion", "ce-id", "ce-type", "ce-source"]), st.text(max_size=9)),
)
def test_any_http_body_is_a_request_or_an_invalid_request(body: bytes, kind: str, more: dict[str, str]) -> None:
    try:
        assert all(isinstance(one, MotionControl) for one in read_http({"content-type": kind} | more, body, LIMITS))
    except InvalidRequest:
        return


@given(message=json_values, event=st.dictionaries(st.sampled_from([*EVENT, "data_base64", "detail"]), json_values))
def test_any_enveloped_message_is_a_request_or_an_invalid_request(message: Any, event: dict[str, Any]) -> None:
    pushed = msgspec.json.encode({"subscription": "s", "message": message})
    reads: list[Callable[[], list[MotionControl]]] = [
        lambda: read_http({}, pushed, LIMITS),
        lambda: [read_event(EVENT | event, LIMITS)],
        lambda: [read_eventbridge(event, LIMITS)],
        lambda: [read_sqs({"body": message}, LIMITS)],
    ]
    for read in reads:
        try:
            assert all(isinstance(one, MotionControl) for one in read())
        except InvalidRequest:
            continue
