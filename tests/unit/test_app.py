"""The receiver's endpoints over real HTTP: callbacks, tick, health checks, published media, AsyncAPI."""

import asyncio
import base64
import hmac
import logging
import time
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import msgspec
import pytest
import yaml
from msgspec.structs import replace

from receiver.app import create_app
from receiver.hook import EVENTS
from receiver.metrics import PrometheusMetrics
from receiver.signature import read_secret
from receiver.verification import VendorCheck, Verifier
from submitter.callback_url import KeyRing, callback_url
from submitter.clock import Clock
from submitter.event import cloud_event
from submitter.ledger.sqlite.ledger import SqliteLedger
from submitter.sandbox.server import free_socket, listening
from submitter.task import Charge, Task, TaskStatus, Video
from submitter.vendors.kling.credentials import ApiKey
from submitter.vendors.kling.protocol import POLL_POLICY
from submitter.vendors.kling.v2 import KlingV2
from tests.world import DESCRIBED, KEY, WEBHOOK_SECRET

RING = KeyRing.read(f"test:{KEY}")
VERIFY = Verifier(RING, {"kling": VendorCheck(KlingV2(ApiKey("")), (read_secret("t", WEBHOOK_SECRET),))})


class Receiver:
    """A receiver on loopback with one submitted task: `order-1`, with the vendor's task_id 893."""

    def __init__(self, ledger: SqliteLedger, client: httpx.AsyncClient, url: str) -> None:
        self.ledger = ledger
        self.client = client
        self.url = url

    def callback_url(self, id: str = "order-1", vendor: str = "kling", now_s: float | None = None) -> str:
        return callback_url(self.url, RING, vendor, id, time.time() if now_s is None else now_s)

    async def post(self, body: Any, url: str | None = None, *, signed: bool = True) -> httpx.Response:
        content = body if isinstance(body, bytes) else msgspec.json.encode(body)
        return await self.client.post(
            url or self.callback_url(), content=content, headers=sign(content) if signed else {}
        )

    async def status(self) -> TaskStatus:
        return (await self.ledger.get("order-1")).status


def sign(content: bytes) -> dict[str, str]:
    stamp = str(int(time.time()))
    key = base64.b64decode(WEBHOOK_SECRET.removeprefix("whsec_"))
    signature = base64.b64encode(hmac.digest(key, f"m1.{stamp}.".encode() + content, "sha256")).decode()
    return {"webhook-id": "m1", "webhook-timestamp": stamp, "webhook-signature": f"v1,{signature}"}


@pytest.fixture
async def receiver(ledger: SqliteLedger, client: httpx.AsyncClient) -> AsyncIterator[Receiver]:
    now_ms = Clock().now_ms()
    task = Task("order-1", "kling", TaskStatus.SUBMITTED, now_ms, now_ms, POLL_POLICY, task_id="893", sequence=1)
    await ledger.reserve(task)
    bound, url = free_socket()
    async with listening(create_app(ledger, VERIFY, read_timeout_s=0.3, tick_token="t" * 16), bound):
        yield Receiver(ledger, client, url)


TIMES = {"create_time": int(time.time() * 1000), "update_time": int(time.time() * 1000)}
PROCESSING = {"id": "893", "status": "processing", "external_id": "order-1", **TIMES}
SUCCEEDED = {
    **TIMES,
    "id": "893", "status": "succeeded", "external_id": "order-1", "outputs": [{"type": "video", "url": "https://c/1.mp4"}],
}  # fmt: skip


def result(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.headers.get("kling-relay-result", "")


async def test_a_report_is_durable_before_its_2xx(receiver: Receiver) -> None:
    assert result(await receiver.post(PROCESSING)) == (200, "applied")
    assert await receiver.status() is TaskStatus.PROCESSING


async def test_repeated_late_and_reordered_reports_change_nothing_and_get_200(receiver: Receiver) -> None:
    assert result(await receiver.post(SUCCEEDED)) == (200, "applied")
    for late in (SUCCEEDED, PROCESSING, PROCESSING | {"status": "failed"}):
        assert result(await receiver.post(late)) == (200, "unchanged")
    assert await receiver.status() is TaskStatus.SUCCEED
    assert len(await receiver.ledger.events("order-1")) == 1


async def test_callbacks_of_both_kling_api_generations_are_accepted_at_one_url(receiver: Receiver) -> None:
    times = {"created_at": TIMES["create_time"], "updated_at": TIMES["update_time"]}
    old = {"task_id": "893", "task_status": "processing", "task_info": {"external_task_id": "order-1"}, **times}
    assert result(await receiver.post(old)) == (200, "applied")
    assert result(await receiver.post(SUCCEEDED)) == (200, "applied")


async def test_a_forged_url_is_404_and_touches_no_store(receiver: Receiver) -> None:
    good = receiver.callback_url()
    await receiver.ledger.close()  # any access to it would be a 503
    for url in (
        good[:-1] + ("A" if good[-1] != "A" else "B"),
        good.replace("order-1", "order-2"),
        good.replace("/kling/", "/novita/"),
        f"{receiver.url}/callbacks/kling/order-1/{'x' * 70}",
        f"{receiver.url}/callbacks/kling/order-1",
        f"{receiver.url}/callbacks/kling/order-1/a/b",
        f"{receiver.url}/callbacks/%ff%fe/%00/%f0",
    ):
        answer = await receiver.post(PROCESSING, url)
        assert answer.status_code == 404
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["status"] == 404
    assert (await receiver.post(PROCESSING)).status_code == 503


async def test_an_expired_url_is_403(receiver: Receiver) -> None:
    assert (await receiver.post(PROCESSING, receiver.callback_url(now_s=0))).status_code == 403


async def test_an_unsigned_or_wrongly_signed_body_is_401_when_a_secret_is_set(receiver: Receiver) -> None:
    assert (await receiver.post(PROCESSING, signed=False)).status_code == 401
    answer = await receiver.client.post(
        receiver.callback_url(), content=msgspec.json.encode(SUCCEEDED), headers=sign(b"{}")
    )
    assert answer.status_code == 401
    assert await receiver.status() is TaskStatus.SUBMITTED
    assert await receiver.ledger.quarantined(9) == []


async def test_a_body_about_another_task_is_refused_or_quarantined(receiver: Receiver) -> None:
    assert (await receiver.post(SUCCEEDED | {"external_id": "order-2"})).status_code == 404
    assert result(await receiver.post({k: v for k, v in SUCCEEDED.items() if k != "external_id"} | {"id": "999"})) == (
        200,
        "quarantined",
    )
    assert await receiver.status() is TaskStatus.SUBMITTED
    assert (await receiver.ledger.get("order-1")).unconfirmed


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"\xff", b"[]", b"null", b'{"id":"893","status":"unheard_of"}', b'{"status":"succeeded"}', b"[" * 5000],
)
async def test_an_unparsable_body_is_quarantined_polled_and_answered_2xx(receiver: Receiver, body: bytes) -> None:
    assert result(await receiver.post(body)) == (200, "quarantined")
    (kept,) = await receiver.ledger.quarantined(9)
    assert kept.body == body
    assert await receiver.status() is TaskStatus.SUBMITTED
    due = await receiver.ledger.claim_polls(Clock().now_ms(), 1000, 9)
    assert [task.external_task_id for task in due.items] == ["order-1"]


async def test_a_callback_url_in_a_body_is_redacted_before_it_is_stored(receiver: Receiver) -> None:
    url = receiver.callback_url()
    assert result(await receiver.post({"id": "893", "status": "new", "callback_url": url, **TIMES})) == (
        200,
        "quarantined",
    )
    (kept,) = await receiver.ledger.quarantined(9)
    assert url.rpartition("/")[2].encode() not in kept.body
    failed = {"id": "893", "status": "failed", "message": f"could not call {url}", **TIMES}
    assert result(await receiver.post(failed)) == (200, "applied")
    assert (await receiver.ledger.get("order-1")).status_message.endswith("/callbacks/kling/order-1/[hidden]")


async def test_klings_console_test_gets_200_and_stores_nothing(receiver: Receiver) -> None:
    test = {"id": "1", "status": "submitted", "outputs": [], "message": "", "create_time": 1, "update_time": 1}
    assert result(await receiver.post(test, receiver.callback_url("console"))) == (200, "test")
    assert await receiver.ledger.quarantined(9) == []


async def test_a_submitted_callback_without_our_id_makes_an_unconfirmed_task_due_for_a_poll(receiver: Receiver) -> None:
    now_ms = Clock().now_ms()
    sent = Task(
        "lost", "kling", TaskStatus.SUBMISSION_UNKNOWN, now_ms, now_ms, POLL_POLICY, poll_at_ms=now_ms + 900_000
    )
    await receiver.ledger.reserve(sent)
    first = {"id": "894", "status": "submitted", **TIMES}
    assert result(await receiver.post(first, receiver.callback_url("lost"))) == (200, "test")
    claimed = await receiver.ledger.claim_polls(Clock().now_ms(), 1000, 9)
    assert [task.external_task_id for task in claimed.items] == ["lost"]


async def test_a_report_for_a_task_that_is_not_in_the_ledger_is_quarantined(receiver: Receiver) -> None:
    lost = SUCCEEDED | {"external_id": "lost"}
    assert result(await receiver.post(lost, receiver.callback_url("lost"))) == (200, "quarantined")
    (kept,) = await receiver.ledger.quarantined(9)
    assert kept.external_task_id == "lost"


def test_the_access_log_of_a_foreign_server_shows_no_token(receiver: Receiver) -> None:
    from receiver.service import _without_tokens

    path = urlsplit(receiver.callback_url()).path
    media = f"/media/a.mp4/{path.rpartition('/')[2]}"
    secret = path.rpartition("/")[2]
    for given in (path, media, f"/events?access_token={secret}", "/healthz"):
        arguments = ("127.0.0.1:1", "POST", given, "1.1", 200)
        record = logging.LogRecord("uvicorn.access", logging.INFO, "", 0, '%s - "%s %s HTTP/%s" %d', arguments, None)
        assert _without_tokens(record)
        assert (path.rpartition("/")[2] in record.getMessage(), "[hidden]" in record.getMessage()) == (
            False,
            given != "/healthz",
        )


async def test_a_body_over_the_limit_is_413_with_and_without_content_length(receiver: Receiver) -> None:
    long = b"x" * (64 * 1024 + 1)
    assert (await receiver.post(long)).status_code == 413

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(70):
            yield b"x" * 1024

    answer = await receiver.client.post(receiver.callback_url(), content=chunks())
    assert answer.status_code == 413


async def test_a_slow_body_is_408(receiver: Receiver) -> None:
    host, _, port = receiver.url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    path = receiver.callback_url().removeprefix(receiver.url)
    writer.write(f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 50\r\n\r\n{{".encode())
    async with asyncio.timeout(5):
        assert b" 408 " in await reader.readline()
    writer.close()
    await writer.wait_closed()


async def test_a_wrong_method_is_405_and_an_unknown_path_404(receiver: Receiver) -> None:
    assert (await receiver.client.get(receiver.callback_url())).status_code == 405
    assert (await receiver.client.get(f"{receiver.url}/nowhere")).status_code == 404


async def test_readyz_is_503_and_healthz_200_while_the_ledger_is_unavailable(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("receiver.app.READY_FOR_S", 0)
    assert (await receiver.client.get(f"{receiver.url}/healthz")).json() == {"status": "ok"}
    assert (await receiver.client.get(f"{receiver.url}/readyz")).status_code == 200
    await receiver.ledger.close()
    assert (await receiver.client.get(f"{receiver.url}/healthz")).status_code == 200
    unready = await receiver.client.get(f"{receiver.url}/readyz")
    assert unready.status_code == 503
    assert "relay.db" not in unready.text


async def test_readyz_is_503_while_no_write_is_possible(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads go on when the disk is full."""
    monkeypatch.setattr("receiver.app.READY_FOR_S", 0)
    database = receiver.ledger._write_connection
    for is_full, status in ((1, 503), (0, 200)):
        database.execute(f"PRAGMA query_only = {is_full}")
        assert (await receiver.client.get(f"{receiver.url}/readyz")).status_code == status


async def test_a_callback_that_the_ledger_takes_too_long_for_is_503_and_can_be_repeated(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("receiver.callbacks.STORE_TIMEOUT_S", 0.2)
    apply, release = receiver.ledger.apply, asyncio.Event()

    async def slow(external_task_id: str, decide: Any) -> Any:
        await release.wait()
        return await apply(external_task_id, decide)

    monkeypatch.setattr(receiver.ledger, "apply", slow)
    late = await receiver.post(SUCCEEDED)
    assert (late.status_code, late.headers["retry-after"]) == (503, "30")
    release.set()
    assert (await receiver.post(SUCCEEDED)).status_code == 200


async def test_above_the_bound_of_waiting_callbacks_one_is_503_at_once_and_counted(
    ledger: SqliteLedger, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("receiver.callbacks.STORING_MAX", 3)
    apply, waiting, release = ledger.apply, asyncio.Semaphore(0), asyncio.Event()

    async def held(external_task_id: str, decide: Any) -> Any:
        waiting.release()
        await release.wait()
        return await apply(external_task_id, decide)

    monkeypatch.setattr(ledger, "apply", held)
    now_ms = Clock().now_ms()
    await ledger.reserve(Task("order-1", "kling", TaskStatus.SUBMITTED, now_ms, now_ms, POLL_POLICY, task_id="893"))
    metrics = PrometheusMetrics()
    bound, url = free_socket()
    async with listening(create_app(ledger, VERIFY, metrics=metrics), bound):
        receiver = Receiver(ledger, client, url)
        stored = [asyncio.create_task(receiver.post(SUCCEEDED)) for _ in range(3)]
        for _ in stored:
            await waiting.acquire()
        refused = await receiver.post(SUCCEEDED)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "30")
        assert (await receiver.post(SUCCEEDED, f"{receiver.callback_url()}x")).status_code == 404  # the URL comes first
        release.set()
        assert {answer.status_code for answer in await asyncio.gather(*stored)} == {200}
        assert result(await receiver.post(SUCCEEDED)) == (200, "unchanged")  # the places are free again
    counted = 'kling_relay_callbacks_total{result="Overloaded",vendor="kling"} 1.0'
    assert counted in metrics.render({}).decode()


async def test_tick_is_404_without_a_tick_function(receiver: Receiver) -> None:
    assert (await receiver.client.post(f"{receiver.url}/tick")).status_code == 404


async def test_tick_requires_its_token_and_a_valid_budget(ledger: SqliteLedger, client: httpx.AsyncClient) -> None:
    budgets = []

    async def tick(budget_s: float) -> dict[str, int]:
        budgets.append(budget_s)
        return {"delivered": 2, "polled": 1}

    bound, url = free_socket()
    async with listening(create_app(ledger, VERIFY, tick=tick, tick_token="t" * 16), bound):
        for wrong in ({}, {"authorization": "Bearer x"}, {"authorization": "t" * 16}):
            assert (await client.post(f"{url}/tick", headers=wrong)).status_code == 401
        headers = {"authorization": "Bearer " + "t" * 16}
        assert (await client.post(f"{url}/tick", headers=headers)).json() == {"delivered": 2, "polled": 1}
        assert (await client.post(f"{url}/tick?budget_s=2.5", headers=headers)).status_code == 200
        assert budgets == [20.0, 2.5]
        for wrong_budget in ("0", "-1", "901", "nan", "1e2", ""):
            refused = await client.post(f"{url}/tick?budget_s={wrong_budget}", headers=headers)
            assert refused.status_code == 400
            assert "at most 900" in refused.json()["detail"]


async def test_published_media_have_unguessable_urls(
    ledger: SqliteLedger, client: httpx.AsyncClient, tmp_path: Any
) -> None:
    from submitter.media.store import DirectoryStore

    source = tmp_path / "dance.mp4"
    source.write_bytes(b"video")
    bound, url = free_socket()
    store = DirectoryStore(tmp_path / "published", url, RING, Clock())
    async with listening(create_app(ledger, VERIFY, media=tmp_path / "published"), bound):
        published = await store.publish(source, "abc", "mp4")
        assert (await client.get(published)).content == b"video"
        assert (await client.get(published, headers={"range": "bytes=1-2"})).content == b"id"
        for wrong in (published[:-2], published.replace("abc", "abd"), f"{url}/media/..%2frelay.db/{'x' * 9}"):
            assert (await client.get(wrong)).status_code == 404


async def test_the_asyncapi_document_lists_every_event_type_and_status(receiver: Receiver) -> None:
    answer = await receiver.client.get(f"{receiver.url}/asyncapi.yaml")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/yaml")
    document = yaml.safe_load(answer.text)
    assert document["asyncapi"] == "3.0.0"
    types = document["components"]["schemas"]["event"]["properties"]["type"]["enum"]
    assert set(types) == {*EVENTS, "task.test"}
    assert {message["name"] for message in document["components"]["messages"].values()} == set(types)
    statuses = document["components"]["schemas"]["task"]["properties"]["status"]["enum"]
    assert set(statuses) == {status.value for status in TaskStatus}


def test_the_asyncapi_schema_rejects_events_that_do_not_match_it() -> None:
    task = Task("order-1", "kling", TaskStatus.SUCCEED, 1000, 1000, POLL_POLICY, task_id="893", sequence=3)
    video = Video("https://c/1.mp4", duration=5.0, expires_at_ms=2000)
    task = replace(task, videos=(video,), cost=(Charge("unit", "4.5"),), metadata={"order": "42"})
    good = msgspec.json.decode(cloud_event(id="evt_1", type="task.succeed", task=task, time_ms=1000))
    assert list(DESCRIBED.iter_errors(good)) == []
    for change in ({"sequence": "3"}, {"brand_new": 1}, {"time": "yesterday"}, {"type": "task.paused"}):
        assert list(DESCRIBED.iter_errors(good | change)), change
    assert list(DESCRIBED.iter_errors(good | {"data": good["data"] | {"cost": None}}))
