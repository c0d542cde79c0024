"""DynamoDB passes the ledgers' suite on two stand-ins, and keeps its own promises."""

import os
import re
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from unittest.mock import patch

import botocore.credentials
import pytest
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from hypothesis import given
from hypothesis import strategies as st
from starlette.responses import Response

from submitter.errors import InvalidSettings, LedgerUnavailable
from submitter.ledger import Ledger, dynamodb_client, open_ledger
from submitter.ledger.base import Disabled, Route, Settlement
from submitter.ledger.dynamodb import DynamoLedger
from submitter.ledger.dynamodb_client import Credentials, sign
from submitter.task import TaskStatus
from tests.conformance.brokers import free_port
from tests.conformance.dynamodb_road import BadRoad, Fault, bad_road, refusal
from tests.conformance.ledgers import ALL, NOW, LedgerSuite, Open, report, succeed, task
from tests.conftest import use_aws

LOCAL = os.environ.get("KLING_RELAY_TEST_DYNAMODB")
"""The URL of DynamoDB Local, where somebody has one: then the tests stand on it too."""


@pytest.fixture(params=["moto", "ministack", *(["local"] if LOCAL else [])])
def stand_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each of the stand-ins, by its URL."""
    url = LOCAL if request.param == "local" else request.getfixturevalue(request.param)
    return use_aws(str(url), monkeypatch)


async def opening(options: str = "") -> AsyncIterator[Open]:
    """Give what opens one table of its own, again and again."""
    url = f"dynamodb://relay-{uuid.uuid4().hex[:12]}?shards=2{options}"
    ledgers: list[Ledger] = []

    def again() -> Ledger:
        ledgers.append(open_ledger(url))
        return ledgers[-1]

    yield again
    for ledger in ledgers:
        await ledger.close()


@pytest.fixture
async def opened(stand_in: str) -> AsyncIterator[Open]:
    async for again in opening():
        yield again


@pytest.fixture
async def empty(stand_in: str) -> AsyncIterator[Open]:
    async for again in opening():
        yield again


class TestDynamo(LedgerSuite):
    """The suite, on both stand-ins."""


@pytest.fixture
async def road(stand_in: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[BadRoad]:
    """The stand-in at the end of a bad road."""
    async with bad_road(stand_in) as made:
        monkeypatch.setenv("AWS_ENDPOINT_URL", made.url)
        yield made


def once(operation: str, what: Response | str) -> Fault:
    """Let one thing go wrong, once."""
    left = [what]
    return lambda asked, _: left.pop() if asked == operation and left else None


async def test_a_change_whose_answer_is_lost_is_made_once(road: BadRoad, opened: Open) -> None:
    ledger = opened()
    assert await ledger.tasks(limit=1) == []  # the table is there
    road.fault = once("TransactWriteItems", "lost")
    reserved = await ledger.reserve(task("a"))
    assert reserved is not None
    assert reserved.is_new
    road.fault = once("TransactWriteItems", "lost")
    applied = await ledger.apply("a", report(TaskStatus.SUBMITTED))
    assert applied.transition is not None
    assert [event.type for event in await ledger.events("a")] == ["task.submitted"]
    assert road.operations.count("TransactWriteItems") == 4


async def test_an_end_whose_answer_is_lost_is_known_as_its_own(road: BadRoad, opened: Open) -> None:
    ledger = opened()
    await succeed(ledger, "a")
    bus = Route("bus", None, "t1", 9, ordered=True)
    (first,) = (await ledger.claim_deliveries([bus], NOW, 1000)).items
    assert (await ledger.claim_deliveries([bus], NOW, 1000)).items == []  # the second waits for the first
    road.fault = once("UpdateItem", "lost")
    assert await ledger.settle(first, Settlement("done"))
    (second,) = (await ledger.claim_deliveries([bus], NOW, 1000)).items
    assert second.event.sequence == 2


async def test_what_is_stored_here_is_delivered_while_the_indexes_lag(road: BadRoad, opened: Open) -> None:
    ledger = opened()
    await ledger.tasks(limit=1)
    empty = Response('{"Items": [], "Count": 0}', media_type="application/x-amz-json-1.0")
    road.fault = lambda operation, asked: empty if asked.get("IndexName") else None
    await succeed(ledger, "a")
    bus = Route("bus", None, "t1", 9, ordered=True)
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
async def test_what_aws_asks_to_have_tried_again_is(road: BadRoad, opened: Open, answer: Response) -> None:
    ledger = opened()
    await ledger.tasks(limit=1)
    road.fault = once("TransactWriteItems", answer)
    reserved = await ledger.reserve(task("a"))
    assert reserved is not None
    assert reserved.is_new


async def test_an_end_that_meets_another_write_is_stored_all_the_same(road: BadRoad, opened: Open) -> None:
    ledger = opened()
    await succeed(ledger, "a")
    found = (await ledger.claim_deliveries([ALL], NOW, 1000)).items
    road.fault = once("UpdateItem", refusal("TransactionConflictException"))
    assert [await ledger.settle(one, Settlement("done")) for one in found] == [True, True]


async def test_a_dead_letter_is_revived_by_one_write(road: BadRoad, opened: Open) -> None:
    ledger = opened()
    await ledger.reserve(task("a"))
    await ledger.apply("a", report(TaskStatus.SUBMITTED))
    (found,) = (await ledger.claim_deliveries([ALL], NOW, 1000)).items
    await ledger.settle(found, Settlement("dead", error="HTTP 500"))
    before = road.operations.count("UpdateItem")
    assert await ledger.replay("all", NOW) == 1  # in two, a worker could claim it in between
    assert road.operations.count("UpdateItem") == before + 1
    (again,) = (await ledger.claim_deliveries([ALL], NOW, 1000)).items
    assert again.attempts == 1


async def test_a_table_that_may_not_be_made_is_named_with_its_remedy(road: BadRoad, opened: Open) -> None:
    road.fault = lambda operation, _: refusal("AccessDeniedException") if operation == "CreateTable" else None
    with pytest.raises(LedgerUnavailable, match="ledger migrate"):
        await opened().get("a")


async def test_nothing_answers(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setattr(dynamodb_client, "GIVE_UP_AFTER_S", 0.1)
    with pytest.raises(LedgerUnavailable, match="ConnectionRefusedError"):
        await opened().get("a")


async def test_those_that_wait_for_another_are_in_nobodys_way(opened: Open) -> None:
    ledger = opened()
    for n in range(12):
        await succeed(ledger, f"t{n}")
    bus = Route("bus", None, "t1", 4, ordered=True)
    seen: list[str] = []
    while found := (await ledger.claim_deliveries([bus], NOW, 1000)).items:
        seen.extend(one.event.external_task_id for one in found if one.event.sequence == 1)
    assert sorted(seen) == sorted(f"t{n}" for n in range(12))  # a dozen that wait, and room for four


async def test_what_has_ended_expires_and_nothing_that_is_on_its_way(stand_in: str) -> None:
    async for again in opening("&keep_days=7"):
        ledger = again()
        assert isinstance(ledger, DynamoLedger)
        for id in ("told", "telling"):
            await succeed(ledger, id)
        for found in (await ledger.claim_deliveries([ALL], NOW, 1000)).items:
            if found.event.external_task_id == "told":
                await ledger.settle(found, Settlement("done"))
        await succeed(ledger, "unrouted")
        await ledger.reserve(task("open"))
        kept = {}
        for id in ("told", "telling", "unrouted", "open"):
            items = await ledger._table.query(None, f"T#{id}")
            kept[id] = {item["sk"]["S"] for item in items if "ttl" not in item}
        assert kept["told"] == set()
        assert kept["telling"] == {"d#all#0000000001", "d#all#0000000002"}
        assert kept["unrouted"] == {"e#0000000001", "e#0000000002"}
        assert kept["open"] == {"task"}
        await ledger.disable(Disabled("all", "t1", "HTTP 410"))
        await ledger.claim_deliveries([ALL], NOW, 1000)
        assert {item["ttl"]["N"] for item in await ledger._table.query(None, "T#telling") if "ttl" in item} == {
            str(NOW // 1000 + 7 * 86_400)
        }
        table = await ledger.client.call("DescribeTimeToLive", TableName=ledger._table.name)
        assert table["TimeToLiveDescription"]["AttributeName"] == "ttl"
        (told,) = [item for item in await ledger._table.query(None, "T#told") if item["sk"]["S"] == "task"]
        assert int(told["ttl"]["N"]) == NOW // 1000 + 7 * 86_400


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("dynamodb://?region=eu-west-1", "3 to 255"),
        ("dynamodb://relay", "Give ?region="),
        ("dynamodb://relay/x?region=eu-west-1", "table 'relay/x'"),
        ("dynamodb://relay?region=eu-west-1&shards=0", "1 to 256"),
        ("dynamodb://relay?region=eu-west-1&keep_days=1", "7 days or more"),
        ("dynamodb://relay?region=eu-west-1&ttl=1", "unknown options ttl"),
    ],
)
def test_a_wrong_url_is_refused_with_its_remedy(url: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InvalidSettings, match=re.escape(said)):
        open_ledger(url)


def test_credentials_that_are_not_in_the_environment_are_found_by_botocore(tmp_path: Path) -> None:
    """A process of its own: botocore reads its environment once."""
    profile = tmp_path / "credentials"
    profile.write_text("[default]\naws_access_key_id = mine\naws_secret_access_key = hidden\n")
    code = "import os; from submitter.ledger.dynamodb_client import find_credentials as f; print(f(os.environ)())"
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
def test_requests_are_signed_as_botocore_signs_them(body: bytes, region: str, token: str | None, second: int) -> None:
    now = datetime.fromtimestamp(second, UTC)
    host, target = f"dynamodb.{region}.amazonaws.com", "DynamoDB_20120810.GetItem"
    headers = sign(host, target, body, region, Credentials("AKID", "secret/+", token), now)
    unsigned = {"content-type": headers["content-type"], "x-amz-target": target}
    request = AWSRequest("POST", f"https://{host}/", headers=unsigned, data=body)
    with patch("botocore.auth.get_current_datetime", lambda: now.replace(tzinfo=None)):
        SigV4Auth(botocore.credentials.Credentials("AKID", "secret/+", token), "dynamodb", region).add_auth(request)
    assert headers["authorization"] == request.headers["Authorization"]
