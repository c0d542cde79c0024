"""`POST /events`: a CloudEvent in any binding becomes a task. The reference SDK creates the events."""

import asyncio
import base64
import struct
from typing import Any

import httpx
import msgspec
import pytest
from cloudevents.core.bindings.http import to_binary_event, to_structured_event
from cloudevents.core.v1.event import CloudEvent

from tests.world import World

TOKEN = "e" * 20
BEARER = {"authorization": f"Bearer {TOKEN}"}


def data(world: World, **changes: Any) -> dict[str, Any]:
    """Return a request whose media can be fetched."""
    files = f"{world.hook_url}/files"
    return {"image": f"{files}/girl.png", "video": f"{files}/dance.mp4", "character_orientation": "video"} | changes


def event(world: World, id: str, **changes: Any) -> CloudEvent:
    """Return an event, created by the reference SDK."""
    attributes = {"type": "task.requested", "source": "/shop", "id": id, "datacontenttype": "application/json"}
    return CloudEvent(attributes | {"specversion": "1.0"}, data(world, **changes))


@pytest.fixture
async def url(world: World) -> str:
    """Start the whole world, and return the URL of its events endpoint."""
    world.environ["KLING_RELAY_EVENTS_TOKEN"] = TOKEN
    await world.start()
    return f"{world.receiver_url}/events"


async def test_an_event_becomes_one_task_in_every_binding(world: World, url: str, client: httpx.AsyncClient) -> None:
    structured, binary = to_structured_event(event(world, "order-1")), to_binary_event(event(world, "order 2 猫"))
    pushed = {"subscription": "projects/p/subscriptions/s", "message": {"messageId": "1", "attributes": {}}}
    structured_data = base64.b64encode(to_structured_event(event(world, "order-3")).body).decode()
    attributes = {"ce-specversion": "1.0", "ce-type": "task.requested", "ce-source": "/shop", "ce-id": "order-4"}
    binary_data = base64.b64encode(msgspec.json.encode(data(world))).decode()
    batch = [msgspec.json.decode(to_structured_event(event(world, f"order-{n}")).body) for n in (5, 6)]
    pubsub = {"content-type": "application/json"}
    requests: list[tuple[dict[str, str], bytes]] = [
        (structured.headers, structured.body),
        (binary.headers, binary.body),
        (pubsub, msgspec.json.encode(pushed | {"message": pushed["message"] | {"data": structured_data}})),  # type: ignore[operator]
        (pubsub, msgspec.json.encode(pushed | {"message": {"data": binary_data, "attributes": attributes}})),
        ({"content-type": "application/cloudevents-batch+json"}, msgspec.json.encode(batch)),
    ]
    ids: list[str] = []
    for _ in range(2):
        for headers, body in requests:
            answer = await client.post(url, content=body, headers=headers | BEARER)
            assert answer.status_code == 202, answer.text
            ids.extend(task["external_task_id"] for task in answer.json()["tasks"])
    assert ids[:6] == ids[6:]
    assert [ids[0], *ids[2:6]] == ["order-1", "order-3", "order-4", "order-5", "order-6"]
    assert ids[1].startswith("ce-")
    assert world.kling.counts["created"] == 6
    await world.inbox.until(18)
    assert {event["subject"] for event in world.inbox.events} == set(ids)


async def test_events_require_the_token(world: World, url: str, client: httpx.AsyncClient) -> None:
    message = to_structured_event(event(world, "order-1"))
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {TOKEN}"}):
        answer = await client.post(url, content=message.body, headers=message.headers | headers)
        assert (answer.status_code, answer.headers["content-type"]) == (401, "application/problem+json")
    assert (await client.options(url)).status_code == 401
    assert world.kling.counts["created"] == 0
    answer = await client.post(f"{url}?access_token={TOKEN}", content=message.body, headers=message.headers)
    assert answer.status_code == 202


async def test_cloudevents_and_event_grid_handshakes_are_answered(url: str, client: httpx.AsyncClient) -> None:
    asking = {"webhook-request-origin": "eventgrid.azure.net", "webhook-request-rate": "120"}
    allowed = await client.options(f"{url}?access_token={TOKEN}", headers=asking)
    assert allowed.status_code == 200
    assert allowed.headers["webhook-allowed-origin"] == "eventgrid.azure.net"
    assert allowed.headers["webhook-allowed-rate"] == "*"
    validation = [
        {
            "id": "2d1781af-3a4c-4d7c-bd0c-e34b19da4e66",
            "topic": "/subscriptions/s",
            "subject": "",
            "data": {"validationCode": "512d38b6-c7b8-40c8-89fe-f46f9e9622b6", "validationUrl": "https://x.example"},
            "eventType": "Microsoft.EventGrid.SubscriptionValidationEvent",
            "eventTime": "2018-01-25T22:12:19.4556811Z",
            "metadataVersion": "1",
            "dataVersion": "1",
        }
    ]
    headers = BEARER | {"aeg-event-type": "SubscriptionValidation"}
    answer = await client.post(url, json=validation, headers=headers)
    assert answer.json() == {"validationResponse": "512d38b6-c7b8-40c8-89fe-f46f9e9622b6"}
    assert (await client.post(url, json={"data": 1}, headers=headers)).status_code == 400


async def test_an_invalid_event_is_refused_with_its_reason_and_creates_no_task(
    world: World, url: str, client: httpx.AsyncClient
) -> None:
    (world.media / "boxes.mp4").write_bytes(_movie_of_empty_boxes(7 * 1024 * 1024))
    for changes, status, reason in (
        ({"image": "/etc/passwd"}, 400, "Events cannot refer to local files"),
        ({"character_orientation": "sideways"}, 400, "character_orientation"),
        ({"vendor": "acme"}, 400, "acme"),
        ({"vendor": "oxen"}, 400, "a vendor with credentials at this receiver: kling"),
        ({"image": "https://a..b/girl.png"}, 400, "a URL that can be opened"),
        ({"image": "https://xn--a/girl.png"}, 400, "a URL that can be opened"),
        ({"video": f"{world.hook_url}/files/boxes.mp4"}, 400, "boxes"),
    ):
        message = to_structured_event(event(world, "order-1", **changes))
        answer = await client.post(url, content=message.body, headers=message.headers | BEARER)
        assert (answer.status_code, reason in answer.json()["detail"]) == (status, True), answer.text
    assert (await client.post(url, content=b"x" * 2_000_000, headers=BEARER)).status_code == 413
    assert (await client.post(url, content=b"{", headers=BEARER)).status_code == 400
    assert world.kling.counts["created"] == 0
    first, other = (to_structured_event(event(world, "order-1", prompt=prompt)) for prompt in ("a", "b"))
    assert (await client.post(url, content=first.body, headers=first.headers | BEARER)).status_code == 202
    assert (await client.post(url, content=other.body, headers=other.headers | BEARER)).status_code == 409


def _movie_of_empty_boxes(size: int) -> bytes:
    return b"\0\0\0\x18ftypmp42" + bytes(12) + struct.pack(">I4s", size + 8, b"moov") + b"\0\0\0\x08free" * (size // 8)


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({}, b"[" * 500_000),
        ({"ce-specversion": "1.0"}, b'{"a":' * 100_000),
        ({"content-type": "application/cloudevents-batch+json"}, b"[" + b"{}," * 100 + b"{}]"),
        ({"aeg-event-type": "SubscriptionValidation"}, b"\xff"),
        ({"aeg-event-type": "SubscriptionValidation"}, b'["\xff"]'),
        ({"aeg-event-type": "SubscriptionValidation"}, b"[" * 500_000),
        ({}, b'{"subscription": "s", "message": {"attributes": [1], "data": "e30="}}'),
        ({}, b'{"subscription": "s", "message": {"attributes": "ce-specversion", "data": "e30="}}'),
        ({}, b'{"subscription": "s", "message": {"data": "\xc3\x28"}}'),
        ({"content-type": "application/cloudevents+json"}, b'{"data_base64": 7, "data": 1}'),
    ],
)  # fmt: skip
async def test_a_malformed_body_is_answered_with_400(
    url: str, client: httpx.AsyncClient, headers: dict[str, str], body: bytes
) -> None:
    answer = await client.post(url, content=body, headers=headers | BEARER)
    assert (answer.status_code, answer.headers["content-type"]) == (400, "application/problem+json"), answer.text


async def test_a_body_that_does_not_end_is_answered_with_408(
    world: World, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("receiver.task_requests.READ_TIMEOUT_S", 0.1)
    address = httpx.URL(world.receiver_url)
    reader, writer = await asyncio.open_connection(address.host, address.port)
    writer.write(f"POST /events?access_token={TOKEN} HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{{".encode())
    async with asyncio.timeout(10):
        assert b" 408 " in await reader.readline()
    writer.close()


async def test_a_batch_with_a_failed_event_is_answered_after_all_others_are_submitted(
    world: World, url: str, client: httpx.AsyncClient
) -> None:
    wrong = msgspec.json.decode(to_structured_event(event(world, "order-1", character_orientation="sideways")).body)
    right = msgspec.json.decode(to_structured_event(event(world, "order-2")).body)
    headers = {"content-type": "application/cloudevents-batch+json"} | BEARER
    answer = await client.post(url, content=msgspec.json.encode([wrong, right]), headers=headers)
    assert answer.status_code == 400
    assert "1 of 2 events were submitted. These were not:\norder-1: " in answer.json()["detail"]
    assert world.kling.counts["created"] == 1  # before the answer
    same = await client.post(url, content=msgspec.json.encode([wrong, wrong, right]), headers=headers)
    assert "1 of 3 events were submitted" in same.json()["detail"]
    again = await client.post(url, content=msgspec.json.encode([right]), headers=headers)
    assert (again.status_code, world.kling.counts["created"]) == (202, 1)


async def test_a_task_whose_creation_is_unknown_is_accepted_with_202(world: World, client: httpx.AsyncClient) -> None:
    world.stand_in("novita")
    world.environ["KLING_RELAY_EVENTS_TOKEN"] = TOKEN
    await world.start()
    world.faults(create_5xx=1.0, drop=1.0)
    message = to_structured_event(event(world, "order-1", vendor="novita"))
    answer = await client.post(
        f"{world.receiver_url}/events", content=message.body, headers=message.headers | BEARER, timeout=60
    )
    assert (answer.status_code, answer.json()["tasks"][0]["status"]) == (202, "submission_unknown"), answer.text


async def test_events_are_off_without_a_token(world: World, client: httpx.AsyncClient) -> None:
    await world.start()
    answer = await client.post(f"{world.receiver_url}/events", json={})
    assert (answer.status_code, "KLING_RELAY_EVENTS_TOKEN" in answer.text) == (404, True)
