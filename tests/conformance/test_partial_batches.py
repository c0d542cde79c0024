"""Batching and partial failure: each entry of a batch gets its own outcome. moto refuses none; this stand-in does."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from urllib.parse import parse_qs

import msgspec
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from receiver.destinations import open_destination
from receiver.destinations.batches import ENVELOPE_BYTES, Batches, BatchLimits
from receiver.destinations.outcome import Outcome
from receiver.hook import Hook
from submitter.event import Event
from submitter.sandbox.server import free_socket, listening
from tests.conformance.destinations import NOW_S, event

REFUSED = "order-3"
THROTTLED = {"ErrorCode": "Throttled", "ErrorMessage": "later"}


class MockPartialAws:
    """Answers the four batch API calls as AWS documents them, and refuses each entry of one task."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    async def answer(self, request: Request) -> Response:
        body = await request.body()
        call = request.headers.get("x-amz-target", "").rpartition(".")[2]
        if not call:
            return self.sns(parse_qs(body.decode()))
        parameters = json.loads(body)
        if call == "GetQueueUrl":
            return JSONResponse({"QueueUrl": str(request.base_url) + "queue"})
        if call == "SendMessageBatch":
            entries = parameters["Entries"]
            accepted = [{"Id": e["Id"], "MessageId": f"m{e['Id']}"} for e in entries if REFUSED not in e["MessageBody"]]
            refused = [self.failed(e["Id"]) for e in entries if REFUSED in e["MessageBody"]]
            self.sizes.append(len(entries))
            return JSONResponse({"Successful": accepted, "Failed": refused})
        if call == "PutRecords":
            texts = [base64.b64decode(record["Data"]).decode() for record in parameters["Records"]]
            results = [{"SequenceNumber": "1", "ShardId": "shard-0"}, THROTTLED]
            self.sizes.append(len(texts))
            return JSONResponse({"FailedRecordCount": 1, "Records": [results[REFUSED in text] for text in texts]})
        assert call == "PutEvents"
        entries = parameters["Entries"]
        self.sizes.append(len(entries))
        results = [{"EventId": "e1"}, THROTTLED]
        outcomes = [results[REFUSED in entry["Detail"]] for entry in entries]
        return JSONResponse({"FailedEntryCount": 1, "Entries": outcomes})

    def failed(self, id: str) -> dict[str, object]:
        return {"Id": id, "Code": "Throttled", "Message": "later", "SenderFault": False}

    def sns(self, form: dict[str, list[str]]) -> Response:
        assert form["Action"] == ["PublishBatch"]
        prefix = "PublishBatchRequestEntries.member"
        accepted = refused = ""
        position = 0
        while f"{prefix}.{position + 1}.Id" in form:
            position += 1
            id, message = form[f"{prefix}.{position}.Id"][0], form[f"{prefix}.{position}.Message"][0]
            if REFUSED in message:
                refused += f"<member><Id>{id}</Id><Code>Throttled</Code><Message>later</Message></member>"
            else:
                accepted += f"<member><Id>{id}</Id><MessageId>m{id}</MessageId></member>"
        self.sizes.append(position)
        result = f"<Successful>{accepted}</Successful><Failed>{refused}</Failed>"
        xml = f"<PublishBatchResponse><PublishBatchResult>{result}</PublishBatchResult></PublishBatchResponse>"
        return Response(xml, media_type="text/xml")


@pytest.fixture
async def partial(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[MockPartialAws]:
    mock = MockPartialAws()
    bound, url = free_socket()
    values = {"AWS_ENDPOINT_URL": url, "AWS_REGION": "us-east-1", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in (values | {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}).items():
        monkeypatch.setenv(name, value)
    async with listening(Starlette(routes=[Route("/{path:path}", mock.answer, methods=["POST"])]), bound):
        yield mock


@pytest.mark.parametrize(
    ("url", "sizes"),
    [
        ("sqs://queue", [10, 2]),
        ("sns://arn:aws:sns:us-east-1:123456789012:topic", [10, 2]),
        ("kinesis://stream", [12]),
        ("eventbridge://bus", [10, 2]),
    ],
)
async def test_only_the_refused_entry_of_a_batch_fails(partial: MockPartialAws, url: str, sizes: list[int]) -> None:
    destination = open_destination(Hook("bus", url, timeout_s=5, concurrency=100), frozenset())
    events = [event(1, f"order-{n}") for n in range(12)]
    outcomes = await asyncio.gather(*(destination.send(one, NOW_S) for one in events))
    assert [outcome.is_delivered for outcome in outcomes] == [n != 3 for n in range(12)]
    assert outcomes[3].answer == "Throttled: later"
    assert sorted(partial.sizes, reverse=True) == sizes
    await destination.close()


class RecordingPost:
    """A `post` that records its batches, and answers when `answer_now` is set."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.answer_now = asyncio.Event()
        self.was_cancelled = asyncio.Event()

    async def post(self, events: list[Event], now_s: float) -> list[Outcome]:
        self.batches.append([one.external_task_id for one in events])
        try:
            await self.answer_now.wait()
        except asyncio.CancelledError:
            self.was_cancelled.set()
            raise
        if REFUSED in self.batches[-1]:
            raise ValueError("a broken destination")
        return [Outcome(True, "taken") for _ in events]


def sized(name: str, size: int) -> Event:
    return msgspec.structs.replace(event(1, name), body=b"x" * (size - ENVELOPE_BYTES))


async def test_batches_are_split_by_count_and_by_bytes() -> None:
    posted = RecordingPost()
    posted.answer_now.set()
    batches = Batches(posted.post, BatchLimits(event_bytes=5000, events=3, request_bytes=6000))
    sizes = {"a": 1000, "b": 1000, "c": 1000, "d": 1000, "e": 5000, "f": 1000, "g": 5001}
    sent = (batches.send(sized(name, size), NOW_S) for name, size in sizes.items())
    outcomes = await asyncio.gather(*sent)
    assert posted.batches == [["a", "b", "c"], ["d", "e"], ["f"]]
    assert [outcome.is_delivered for outcome in outcomes] == [True] * 6 + [False]
    assert outcomes[-1].is_final


async def test_a_request_is_cancelled_when_all_its_callers_are() -> None:
    posted = RecordingPost()
    batches = Batches(posted.post, BatchLimits(10_000, 10, 100_000))
    sends = [asyncio.create_task(batches.send(event(1, f"order-{n}"), NOW_S)) for n in range(2)]
    while not posted.batches:
        await asyncio.sleep(0)
    sends[0].cancel()
    await asyncio.gather(sends[0], return_exceptions=True)
    assert not posted.was_cancelled.is_set()  # one caller still waits
    sends[1].cancel()
    await asyncio.gather(sends[1], return_exceptions=True)
    async with asyncio.timeout(5):
        await posted.was_cancelled.wait()
    await batches.close()


async def test_an_error_of_post_is_raised_to_every_caller_of_the_batch() -> None:
    posted = RecordingPost()
    posted.answer_now.set()
    batches = Batches(posted.post, BatchLimits(10_000, 10, 100_000))
    sends = (batches.send(event(1, name), NOW_S) for name in (REFUSED, "order-4"))
    outcomes = await asyncio.gather(*sends, return_exceptions=True)
    assert [str(outcome) for outcome in outcomes] == ["a broken destination"] * 2
