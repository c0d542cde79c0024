"""The event `task.requested` is read, or refused by an error that names the field."""

import base64
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from submitter.errors import InvalidRequest
from submitter.request import ID_PATTERN, MotionControl
from submitter.requested import id_of, read_event, read_eventbridge, read_http, read_sqs

DATA = {"image": "https://x.example/a.png", "video": "https://x.example/b.mp4", "character_orientation": "video"}
EVENT = {"specversion": "1.0", "type": "task.requested", "source": "/shop", "id": "order-1", "data": DATA}

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def test_a_request_is_read_whole() -> None:
    data: Any = DATA | {"mode": "pro", "prompt": "on a beach", "metadata": {"order": "1"}, "vendor": "kling,novita"}
    found = read_event(EVENT | {"data": data})
    assert found == MotionControl(**data, external_task_id="order-1")
    assert read_event(EVENT | {"data": data | {"external_task_id": "mine"}}).external_task_id == "mine"
    encoded = base64.b64encode(msgspec.json.encode(DATA)).decode()
    bare = {name: value for name, value in EVENT.items() if name != "data"}
    assert read_event(bare | {"data_base64": encoded}) == read_event(EVENT)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"specversion": "0.3"}, "specversion: '0.3' ('1.0')"),
        ({"type": "task.succeed"}, "type: 'task.succeed' ('task.requested')"),
        ({"id": ""}, "id: '' (a text that is not empty)"),
        ({"source": 7}, "source: 7"),
        ({"data": None}, "data: NoneType (a JSON object)"),
        ({"data": DATA | {"promt": "x"}}, "Did you mean 'prompt'?"),
        ({"data": DATA | {"frobnicate": "x"}}, "Known are image, video"),
        ({"data": {"image": DATA["image"]}}, "data.video: missing"),
        ({"data": DATA | {"prompt": 7}}, "data.prompt: 7"),
        ({"data": DATA | {"metadata": {"a": 1}}}, "data.metadata"),
        ({"data": DATA | {"image": "/etc/passwd"}}, "An event can name no file"),
        ({"data": DATA | {"image": "DATA:/etc/passwd"}}, "An event can name no file"),
        ({"data": DATA | {"video": "../b.mp4"}}, "An event can name no file"),
        ({"data": DATA | {"video": "file:///b.mp4"}}, "An event can name no file"),
    ],
)
def test_what_is_wrong_is_named_with_its_remedy(change: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        read_event(EVENT | change)
    assert said in str(raised.value)


@given(source=st.text(min_size=1), id=st.text(min_size=1))
def test_every_id_makes_an_external_task_id_and_always_the_same(source: str, id: str) -> None:
    made = id_of(source, id)
    assert ID_PATTERN.fullmatch(made)
    assert made == id_of(source, id)
    assert made == id or made != id_of(source + "/other", id)


def test_an_event_of_eventbridge_is_one_or_holds_one() -> None:
    envelope = {"detail-type": "task.requested", "source": "shop", "id": "e-1", "detail": DATA}
    assert read_eventbridge(envelope).external_task_id == "e-1"
    assert read_eventbridge(envelope | {"detail": EVENT}).external_task_id == "order-1"
    record = {"messageId": "m", "body": msgspec.json.encode(envelope).decode(), "messageAttributes": {}}
    assert read_sqs(record).external_task_id == "e-1"
    with pytest.raises(InvalidRequest, match=r"task\.requested"):
        read_eventbridge(envelope | {"detail-type": "Something Else"})


@given(
    body=json_values.map(msgspec.json.encode) | st.binary(max_size=60),
    kind=st.sampled_from(
        ["application/json", "application/cloudevents+json", "application/cloudevents-batch+json; charset=utf-8", ""]
    ),
    more=st.dictionaries(st.sampled_from(["ce-specversion", "ce-id", "ce-type", "ce-source"]), st.text(max_size=9)),
)
def test_whatever_arrives_is_a_request_or_an_invalid_request(body: bytes, kind: str, more: dict[str, str]) -> None:
    try:
        assert all(isinstance(one, MotionControl) for one in read_http({"content-type": kind} | more, body))
    except InvalidRequest:
        return


@given(message=json_values, event=st.dictionaries(st.sampled_from([*EVENT, "data_base64", "detail"]), json_values))
def test_whatever_is_inside_an_envelope_too(message: Any, event: dict[str, Any]) -> None:
    pushed = msgspec.json.encode({"subscription": "s", "message": message})
    reads: list[Callable[[], list[MotionControl]]] = [
        lambda: read_http({}, pushed),
        lambda: [read_event(EVENT | event)],
        lambda: [read_eventbridge(event)],
        lambda: [read_sqs({"body": message})],
    ]
    for read in reads:
        try:
            assert all(isinstance(one, MotionControl) for one in read())
        except InvalidRequest:
            continue
