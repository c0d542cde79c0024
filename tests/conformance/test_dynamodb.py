"""DynamoDB ledger on two stand-ins: the conformance suite, lost responses, lagging indexes, retries, TTL, signing."""

import os
import re
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest.mock import patch

import botocore.credentials
import msgspec
import pytest
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from hypothesis import given
from hypothesis import strategies as st
from starlette.responses import Response

from submitter.aws import Credentials, sign
from submitter.errors import InvalidSettings, LedgerUnavailable
from submitter.event import Event
from submitter.ledger import Ledger, open_ledger
from submitter.ledger.base import Disabled, Quarantined, Settlement, Subscription
from submitter.ledger.dynamodb import client as dynamodb_client
from submitter.ledger.dynamodb.items import event_item, read_event, read_task
from submitter.ledger.dynamodb.ledger import DynamoLedger
from submitter.observation import CreateRefused
from submitter.task import TaskStatus
from submitter.transition import transition
from tests.conformance.brokers import free_port
from tests.conformance.dynamodb_faults import Fault, FaultyProxy, faulty_proxy, refusal
from tests.conformance.ledgers import ALL, NOW, LedgerSuite, Open, report, succeed, task
from tests.conftest import use_aws

LOCAL = os.environ.get("TEST_DYNAMODB_URL")
"""The URL of DynamoDB Local (optional): the tests run on it too."""


pytestmark = pytest.mark.xdist_group("aws")  # the stand-ins start once


@pytest.fixture(params=[pytest.param("moto", marks=pytest.mark.matrix), "ministack", *(["local"] if LOCAL else [])])
def stand_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of each stand-in."""
    url = LOCAL if request.param == "local" else request.getfixturevalue(request.param)
    return use_aws(str(url), monkeypatch)


async def opening(options: str = "") -> AsyncIterator[Open]:
    """Yield a function that opens the same new table each time."""
    url = f"dynamodb://relay-{uuid.uuid4().hex[:12]}?shards=2{options}"
    ledgers: list[Ledger] = []

    def open_again() -> Ledger:
        ledgers.append(open_ledger(url))
        return ledgers[-1]

    yield open_again
    for ledger in ledgers:
        await ledger.close()


@pytest.fixture
async def opened(stand_in: str) -> AsyncIterator[Open]:
    async for open_again in opening():
        yield open_again


@pytest.fixture
async def empty(stand_in: str) -> AsyncIterator[Open]:
    async for open_again in opening():
        yield open_again


class TestDynamo(LedgerSuite):
    """The conformance suite on both stand-ins."""


@pytest.fixture
async def proxy(stand_in: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FaultyProxy]:
    """A proxy that injects faults between the ledger and the stand-in."""
    async with faulty_proxy(stand_in) as opened_proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", opened_proxy.url)
        yield opened_proxy


def once(operation: str, fault: Response | str) -> Fault:
    """Return a fault that hits the first call of `operation`."""
    left = [fault]
    return lambda called, _: left.pop() if called == operation and left else None


async def test_reserve_and_apply_are_idempotent_when_their_response_is_lost(proxy: FaultyProxy, opened: Open) -> None:
    ledger = opened()
    assert await ledger.tasks(limit=1) == []  # creates the table
    proxy.fault = once("TransactWriteItems", "lost")
    reserved = await ledger.reserve(task("a"))
    assert reserved is not None
    assert reserved.is_new
    proxy.fault = once("TransactWriteItems", "lost")
    applied = await ledger.apply("a", report(TaskStatus.SUBMITTED))
    assert applied.transition is not None
    assert [event.type for event in await ledger.events("a")] == ["task.submitted"]
    assert proxy.operations.count("TransactWriteItems") == 4


async def test_settle_is_idempotent_when_its_response_is_lost(proxy: FaultyProxy, opened: Open) -> None:
    ledger = opened()
    await succeed(ledger, "a")
    bus = Subscription("bus", None, "t1", 9, ordered=True)
    (first,) = (await ledger.claim_deliveries([bus], NOW, 1000)).items
    assert (await ledger.claim_deliveries([bus], NOW, 1000)).items == []  # the second event is blocked behind the first
    proxy.fault = once("UpdateItem", "lost")
    assert await ledger.settle(first, Settlement("done"))
    (second,) = (await ledger.claim_deliveries([bus], NOW, 1000)).items
    assert second.event.sequence == 2


async def test_own_writes_are_delivered_while_the_indexes_lag(proxy: FaultyProxy, opened: Open) -> None:
    ledger = opened()
    await ledger.tasks(limit=1)
    empty = Response('{"Items": [], "Count": 0}', media_type="application/x-amz-json-1.0")
    proxy.fault = lambda operation, parameters: empty if parameters.get("IndexName") else None
    await succeed(ledger, "a")
    bus = Subscription("bus", None, "t1", 9, ordered=True)
    for sequence in (1, 2):
        (found,) = (await ledger.claim_deliveries([ALL, bus], NOW, 1000)).items[-1:]
        assert (found.hook, found.event.sequence) == ("bus", sequence)
        assert await ledger.settle(found, Settlement("done"))
    assert await ledger.settle(found, Settlement("done"))


@pytest.mark.parametrize(
    "answer",
    [
        refusal("ProvisionedThroughputExceededException"),
        refusal("TransactionCanceledException", CancellationReasons=[{"Code": "None"}, {"Code": "ThrottlingError"}]),
        refusal(
            "TransactionCanceledException", CancellationReasons=[{"Code": "TransactionConflict"}, {"Code": "None"}]
        ),
        refusal("InternalServerError", 500),
        Response("<html>", 503),
    ],
)
async def test_transient_errors_are_retried(proxy: FaultyProxy, opened: Open, answer: Response) -> None:
    ledger = opened()
    await ledger.tasks(limit=1)
    proxy.fault = once("TransactWriteItems", answer)
    reserved = await ledger.reserve(task("a"))
    assert reserved is not None
    assert reserved.is_new


async def test_settle_is_retried_after_a_transaction_conflict(proxy: FaultyProxy, opened: Open) -> None:
    ledger = opened()
    await succeed(ledger, "a")
    found = (await ledger.claim_deliveries([ALL], NOW, 1000)).items
    proxy.fault = once("UpdateItem", refusal("TransactionConflictException"))
    assert [await ledger.settle(one, Settlement("done")) for one in found] == [True, True]


async def test_a_dead_letter_is_replayed_by_one_write(proxy: FaultyProxy, opened: Open) -> None:
    ledger = opened()
    await ledger.reserve(task("a"))
    await ledger.apply("a", report(TaskStatus.SUBMITTED))
    (found,) = (await ledger.claim_deliveries([ALL], NOW, 1000)).items
    await ledger.settle(found, Settlement("dead", error="HTTP 500"))
    before = proxy.operations.count("UpdateItem")
    assert await ledger.replay("all", NOW) == 1  # with two writes, a worker could claim it in between
    assert proxy.operations.count("UpdateItem") == before + 1
    (again,) = (await ledger.claim_deliveries([ALL], NOW, 1000)).items
    assert again.attempts == 1


async def test_a_task_that_a_late_report_changes_while_it_is_pruned_keeps_its_events(
    proxy: FaultyProxy, opened: Open
) -> None:
    ledger, other = opened(), opened()
    await other.reserve(task("a"))
    await other.apply("a", lambda current: transition(current, CreateRefused("no balance", None), NOW))
    late = [True]

    def fault(operation: str, parameters: dict[str, Any]) -> Response | str | None:
        if operation == "TransactWriteItems" and late.pop():
            proxy.fault = lambda *_: None
            return refusal("TransactionCanceledException", CancellationReasons=[{"Code": "ConditionalCheckFailed"}])
        return None

    (found,) = (await other.claim_deliveries([ALL], NOW, 1000)).items
    await other.settle(found, Settlement("done"))
    proxy.fault = fault
    assert await ledger.prune(NOW + 1, 10) == 0
    assert [event.type for event in await ledger.events("a")] == ["task.refused"]
    assert await ledger.prune(NOW + 1, 10) == 1
    assert (await ledger.ids(None, 10), await ledger.events("a")) == ([], [])


async def test_a_refused_create_table_raises_an_error_with_a_remedy(proxy: FaultyProxy, opened: Open) -> None:
    proxy.fault = lambda operation, _: refusal("AccessDeniedException") if operation == "CreateTable" else None
    with pytest.raises(LedgerUnavailable, match="ledger migrate"):
        await opened().get("a")


async def test_an_unreachable_endpoint_raises_ledger_unavailable(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setattr(dynamodb_client, "GIVE_UP_AFTER_S", 0.1)
    with pytest.raises(LedgerUnavailable, match="ConnectionRefusedError"):
        await opened().get("a")


async def test_blocked_deliveries_do_not_fill_a_claim(opened: Open) -> None:
    ledger = opened()
    for n in range(12):
        await succeed(ledger, f"t{n}")
    bus = Subscription("bus", None, "t1", 4, ordered=True)
    seen: list[str] = []
    while found := (await ledger.claim_deliveries([bus], NOW, 1000)).items:
        seen.extend(one.event.external_task_id for one in found if one.event.sequence == 1)
    assert sorted(seen) == sorted(f"t{n}" for n in range(12))  # 12 blocked deliveries, capacity 4


async def test_ended_tasks_get_a_ttl_and_undelivered_items_do_not(stand_in: str) -> None:
    async for open_again in opening("&keep_days=7"):
        ledger = open_again()
        assert isinstance(ledger, DynamoLedger)
        for id in ("delivered", "due"):
            await succeed(ledger, id)
        for found in (await ledger.claim_deliveries([ALL], NOW, 1000)).items:
            if found.event.external_task_id == "delivered":
                await ledger.settle(found, Settlement("done"))
        await succeed(ledger, "in_outbox")
        await ledger.reserve(task("open"))
        without_ttl = {}
        for id in ("delivered", "due", "in_outbox", "open"):
            items = await ledger._table.query(None, f"T#{id}")
            without_ttl[id] = {item["sk"]["S"] for item in items if "ttl" not in item}
        assert without_ttl["delivered"] == set()
        assert without_ttl["due"] == {"d#all#0000000001", "d#all#0000000002"}
        assert without_ttl["in_outbox"] == {"e#0000000001", "e#0000000002"}
        assert without_ttl["open"] == {"task"}
        await ledger.disable(Disabled("all", "t1", "HTTP 410"))
        await ledger.claim_deliveries([ALL], NOW, 1000)
        assert {item["ttl"]["N"] for item in await ledger._table.query(None, "T#due") if "ttl" in item} == {
            str(NOW // 1000 + 7 * 86_400)
        }
        table = await ledger.client.call("DescribeTimeToLive", TableName=ledger._table.name)
        assert table["TimeToLiveDescription"]["AttributeName"] == "ttl"
        (item,) = [item for item in await ledger._table.query(None, "T#delivered") if item["sk"]["S"] == "task"]
        assert int(item["ttl"]["N"]) == NOW // 1000 + 7 * 86_400


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("dynamodb://?region=eu-west-1", "3 to 255"),
        ("dynamodb://relay", "Add ?region="),
        ("dynamodb://relay/x?region=eu-west-1", "table 'relay/x'"),
        ("dynamodb://relay?region=eu-west-1&shards=0", "1 to 256"),
        ("dynamodb://relay?region=eu-west-1&keep_days=1", "7 days or more"),
        ("dynamodb://relay?region=eu-west-1&ttl=1", "unknown options ttl"),
    ],
)
def test_an_invalid_url_raises_an_error_with_a_remedy(url: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InvalidSettings, match=re.escape(message)):
        open_ledger(url)


def test_botocore_finds_credentials_outside_the_environment(tmp_path: Path) -> None:
    """Runs in subprocesses: botocore reads the environment once per process."""
    profile = tmp_path / "credentials"
    profile.write_text("[default]\naws_access_key_id = mine\naws_secret_access_key = hidden\n")
    code = "import os; from submitter.aws import find_credentials as f; print(f(os.environ)())"
    environ = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    environ |= {"AWS_SHARED_CREDENTIALS_FILE": str(profile), "AWS_EC2_METADATA_DISABLED": "true"}
    found = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    assert "access_key='mine'" in found.stdout
    environ["AWS_SHARED_CREDENTIALS_FILE"] = os.devnull
    missing = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=False)
    assert "Set AWS_ACCESS_KEY_ID" in missing.stderr


@given(
    body=st.binary(max_size=200),
    region=st.sampled_from(["us-east-1", "eu-west-1", "cn-north-1"]),
    token=st.none() | st.text("abcABC123+/=", min_size=1, max_size=40),
    second=st.integers(1_600_000_000, 1_900_000_000),
)
def test_signatures_equal_those_of_botocore(body: bytes, region: str, token: str | None, second: int) -> None:
    now = datetime.fromtimestamp(second, UTC)
    host, target = f"dynamodb.{region}.amazonaws.com", "DynamoDB_20120810.GetItem"
    unsigned = {"content-type": "application/x-amz-json-1.0", "x-amz-target": target}
    headers = sign(host, unsigned, body, "dynamodb", region, Credentials("AKID", "secret/+", token), now)
    request = AWSRequest("POST", f"https://{host}/", headers=unsigned, data=body)
    with patch("botocore.auth.get_current_datetime", lambda: now.replace(tzinfo=None)):
        SigV4Auth(botocore.credentials.Credentials("AKID", "secret/+", token), "dynamodb", region).add_auth(request)
    assert headers["authorization"] == request.headers["Authorization"]


def test_a_refused_task_of_an_earlier_version_is_read_with_its_status() -> None:
    sending = task("sending", metadata={"note": '"refused":true'})
    doc = msgspec.json.encode(sending).decode()
    assert read_task({"doc": {"S": doc}}) == sending
    flagged = doc.replace('"vendor"', '"refused":true,"vendor"', 1)
    assert read_task({"doc": {"S": flagged}}) == msgspec.structs.replace(sending, status=TaskStatus.REFUSED)


@pytest.mark.parametrize("body", [b'{"a":"short"}', '{"prompt":"猫 \\u0000 '.encode() + b"a " * 2000 + b'"}'])
def test_long_texts_are_compressed_and_those_of_an_earlier_version_are_read(body: bytes) -> None:
    event = Event("evt_1", "task.processing", "order-1", 1, NOW, body)
    stored = event_item(event, 0)
    assert len(stored["body"].get("B", "")) < 400
    assert read_event(stored) == event
    assert read_event(stored | {"body": {"S": body.decode()}}) == event


async def test_newer_bodies_that_displace_one_while_it_is_stored_leave_no_remains(
    dynamodb_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger, other = DynamoLedger(dynamodb_url), open_ledger(dynamodb_url)
    for n in range(5):
        await ledger.quarantine(Quarantined("a", "kling", NOW + n, "new", b"old %d" % n))
    update, calls = ledger._table.update, 0

    async def interrupted(*arguments: Any, **values: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:  # between the two writes of one body
            for n in range(6):
                await other.quarantine(Quarantined("a", "kling", NOW + 100 + n, "new", b"newer %d" % n))
        return await update(*arguments, **values)

    monkeypatch.setattr(ledger._table, "update", interrupted)
    await ledger.quarantine(Quarantined("a", "kling", NOW + 50, "new", b"displaced"))
    await ledger.quarantine(Quarantined("a", "kling", NOW + 200, "new", b"later"))
    kept = await ledger.quarantined(99, "a")
    assert (len(kept), kept[0].body) == (5, b"later")
    await ledger.close()
    await other.close()
