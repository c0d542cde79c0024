"""Kling's wire formats v1 and v2: requests, queries, credentials."""

import base64
import hmac
import json
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from submitter.errors import InvalidSettings, VendorRefused
from submitter.request import MotionControl
from submitter.schedule import Backoff, PollPolicy
from submitter.task import Task, TaskStatus
from submitter.vendors.base import CreateRequest, HttpAnswer, Vendor
from submitter.vendors.kling import configure
from submitter.vendors.kling.credentials import ApiKey, KeyPair
from submitter.vendors.kling.protocol import BASE_URL
from submitter.vendors.kling.v1 import KlingV1
from submitter.vendors.kling.v2 import KlingV2

NOW_S = 1781080794.0
V2 = KlingV2(ApiKey("key"))
V1 = KlingV1(KeyPair("access", "secret"))
POLL_POLICY = PollPolicy(Backoff(900, 1.5, 3600), Backoff(10, 1.5, 60), 86400)
CREATE_REQUEST = CreateRequest(
    MotionControl(
        image="girl.png", video="v", character_orientation="video", mode="pro", prompt="on a beach",
        keep_original_sound=False, element_id="829836802793406551", watermark=True,
    ),
    "pro", "order-1", "aW1hZ2U=", "https://example.com/dance.mp4", "https://relay.example.com/callbacks/kling/order-1/t",
)  # fmt: skip


def task(id: str, task_id: str | None = None) -> Task:
    return Task(id, "kling", TaskStatus.SUBMITTED, 0, 0, POLL_POLICY, task_id=task_id)


def answer(body: Any, status: int = 200) -> HttpAnswer:
    return HttpAnswer(status, {}, body.encode() if isinstance(body, str) else msgspec.json.encode(body))


def test_the_v2_create_request_is_as_documented() -> None:
    request = V2.create(CREATE_REQUEST, NOW_S)
    assert (request.method, request.url) == ("POST", f"{BASE_URL}/motion-control/kling-3.0")
    assert request.headers["authorization"] == "Bearer key"
    assert json.loads(request.body) == {
        "contents": [
            {"type": "prompt", "text": "on a beach"},
            {"type": "image", "url": "aW1hZ2U="},
            {"type": "video", "url": "https://example.com/dance.mp4"},
            {"type": "element", "element_id": "829836802793406551", "id": "element_1"},
        ],
        "settings": {"character_orientation": "video", "audio": "off", "resolution": "1080p"},
        "options": {
            "callback_url": "https://relay.example.com/callbacks/kling/order-1/t",
            "external_task_id": "order-1",
            "watermark_info": {"enabled": True},
        },
    }


def test_the_v1_create_request_is_as_documented() -> None:
    request = V1.create(CREATE_REQUEST, NOW_S)
    assert (request.method, request.url) == ("POST", f"{BASE_URL}/v1/videos/motion-control")
    assert b'"element_id":829836802793406551' in request.body  # a 64-bit number, not a float and not a string
    assert json.loads(request.body) == {
        "model_name": "kling-v3",
        "image_url": "aW1hZ2U=",
        "video_url": "https://example.com/dance.mp4",
        "prompt": "on a beach",
        "keep_original_sound": "no",
        "character_orientation": "video",
        "mode": "pro",
        "element_list": [{"element_id": 829836802793406551}],
        "watermark_info": {"enabled": True},
        "callback_url": "https://relay.example.com/callbacks/kling/order-1/t",
        "external_task_id": "order-1",
    }


def test_a_key_pair_signs_a_jwt() -> None:
    token = V1.create(CREATE_REQUEST, NOW_S).headers["authorization"].removeprefix("Bearer ")
    head, claims, signature = token.split(".")

    def part(text: str) -> bytes:
        return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))

    assert json.loads(part(head)) == {"alg": "HS256", "typ": "JWT"}
    assert json.loads(part(claims)) == {"iss": "access", "exp": int(NOW_S) + 1800, "nbf": int(NOW_S) - 5}
    assert part(signature) == hmac.digest(b"secret", f"{head}.{claims}".encode(), "sha256")


def test_v2_queries_have_at_most_twenty_ids_of_one_kind() -> None:
    tasks = [task(f"order-{i}", str(i)) for i in range(41)] + [task("unanswered")]
    urls = [query.request.url for query in V2.queries(tasks, NOW_S)]
    assert [url.count(",") + 1 for url in urls] == [20, 20, 1, 1]
    assert urls[-1].endswith("/tasks?external_task_ids=unanswered")


def test_v2_answers_are_matched_by_id_not_by_position() -> None:
    (query,) = V2.queries([task("a", "1"), task("b", "2"), task("c", "3"), task("d", "4")], NOW_S)
    rows = [
        {"id": "9", "status": "failed"},
        {"id": "2", "status": "processing"},
        {"id": "1", "status": "succeeded", "outputs": [{"type": "video", "url": "https://c/1.mp4"}]},
        {"id": "4", "status": "succeeded", "outputs": []},
        "rubbish",
    ]
    findings = V2.read_query(query, answer({"code": 0, "data": rows}), NOW_S)
    assert {id: report.status.value for id, report in findings.reports.items()} == {"a": "succeed", "b": "processing"}
    assert findings.absent == ()
    assert set(findings.unreadable) == {"c", "d"}  # the rubbish may be `c`
    whole = V2.read_query(query, answer({"code": 0, "data": rows[:-1]}), NOW_S)
    assert (whole.absent, list(whole.unreadable)) == (("c",), ["d"])


@pytest.mark.parametrize(
    "data",
    [
        None,
        "hello",
        {},
        7,
        [None],
        ["x"],
        [[]],
        [{"status": "processing"}],
        {"id": "8", "status": "processing"},
        {"a": []},
    ],
)
@pytest.mark.parametrize("adapter", [V1, V2])
def test_an_answer_that_is_no_list_does_not_show_that_a_task_is_absent(adapter: Vendor, data: Any) -> None:
    """`tasks retry` would pay for it again."""
    for asked in ([task("a", "1")], [replace(task("a", "1"), task_id=None)], [task("a", "1"), task("b", "2")]):
        (query,) = adapter.queries(asked, NOW_S)
        findings = adapter.read_query(query, answer({"code": 0, "data": data}), NOW_S)
        assert (findings.absent, findings.reports) == ((), {})


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, {"code": 1201, "message": "Account not found"}),
        (404, {"code": 1203, "message": "resource /v1/videos does not exist"}),
        (404, {}),
        (500, {"code": 5000, "message": "task not found"}),
    ],
)
def test_an_error_that_does_not_name_the_task_does_not_show_that_it_is_absent(status: int, body: Any) -> None:
    (query,) = V1.queries([task("a", "1")], NOW_S)
    with pytest.raises(VendorRefused):
        V1.read_query(query, HttpAnswer(status, {}, msgspec.json.encode(body)), NOW_S)


def test_v1_pages_end_at_rows_older_than_the_tasks_that_are_asked_for() -> None:
    now_ms = 1_781_080_800_000
    asked = [replace(task(id, id), created_at_ms=now_ms) for id in ("1", "2")]
    (query,) = V1.queries(asked, NOW_S)

    def page(oldest_ms: int) -> Any:
        rows = [{"task_id": f"x{i}", "task_status": "failed", "created_at": now_ms} for i in range(499)]
        return answer({"code": 0, "data": [*rows, {"task_id": "y", "task_status": "failed", "created_at": oldest_ms}]})

    more = V1.read_query(query, page(now_ms - 299_000), NOW_S)
    assert (len(more.more), more.absent) == (1, ())
    ended = V1.read_query(query, page(now_ms - 301_000), NOW_S)
    assert (ended.more, ended.absent) == ((), ("1", "2"))


def test_v1_queries_one_task_by_id_and_several_by_pages() -> None:
    (one,) = V1.queries([task("order-1")], NOW_S)
    assert one.request.url.endswith("/v1/videos/motion-control/order-1")
    unknown = V1.read_query(one, answer({"code": 1201, "message": "Task not found"}, 400), NOW_S)
    assert unknown.absent == ("order-1",)
    (many,) = V1.queries([task("a", "1"), task("b", "2")], NOW_S)
    assert "pageNum=1&pageSize=500" in many.request.url
    full = [{"task_id": "1", "task_status": "processing"}] + [{"task_id": f"x{i}"} for i in range(499)]
    first = V1.read_query(many, answer({"code": 0, "data": full}), NOW_S)
    assert list(first.reports) == ["a"]
    (page,) = first.more
    assert "pageNum=2" in page.request.url
    last = V1.read_query(page, answer({"code": 0, "data": []}), NOW_S)
    assert (last.absent, last.more) == (("b",), ())


@pytest.mark.parametrize(
    ("given_settings", "kind"),
    [
        ({"api_key": "k"}, "KlingV2"),
        ({"api_key": "k", "api": "v1"}, "KlingV1"),
        ({"access_key": "a", "secret_key": "s"}, "KlingV1"),
        ({}, "NoneType"),
    ],
)
def test_the_credentials_select_the_api_version(given_settings: dict[str, str], kind: str) -> None:
    assert type(configure(given_settings)).__name__ == kind


@pytest.mark.parametrize(
    ("given_settings", "message"),
    [
        ({"access_key": "a"}, "KLING_SECRET_KEY"),
        ({"access_key": "a", "secret_key": "s", "api": "v2"}, "v2 takes API keys only"),
        ({"api_key": "k", "base_url": "ftp://x"}, "KLING_BASE_URL"),
    ],
)
def test_invalid_credentials_are_an_error(given_settings: dict[str, str], message: str) -> None:
    with pytest.raises(InvalidSettings, match=message):
        configure(given_settings)


def test_credentials_never_appear_in_repr() -> None:
    assert "key" not in repr(V2.credentials).replace("ApiKey", "")
    assert "Bearer" not in repr(V2.create(CREATE_REQUEST, NOW_S))
