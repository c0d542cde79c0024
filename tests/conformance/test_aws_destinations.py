"""Conformance of the SQS, SNS, Kinesis and EventBridge destinations, against moto, a stand-in for AWS."""

import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import boto3
import msgspec
import pytest

from receiver.destinations import open_destination
from receiver.destinations.base import Destination
from receiver.hook import Hook
from submitter.errors import InvalidSettings
from tests.conformance.destinations import NOW_S, DestinationSuite, event


class AwsPeer(ABC):
    """An AWS resource that receives events, and the events that arrived there."""

    service: str
    too_large_bytes = 256 * 1024

    def __init__(self) -> None:
        self.name = f"kling-{uuid.uuid4().hex[:12]}"
        self.client = boto3.client(self.service)
        self.clients: list[Any] = [self.client]
        self.create()

    @abstractmethod
    def create(self) -> None: ...

    @abstractmethod
    def delete(self) -> None: ...

    def close(self) -> None:
        for client in self.clients:
            client.close()

    @property
    @abstractmethod
    def url(self) -> str: ...

    def open(self, **settings: Any) -> Destination:
        return open_destination(Hook("bus", self.url, timeout_s=5, **settings), frozenset())

    @abstractmethod
    async def arrived(self) -> list[str]: ...

    async def refuse(self) -> None:
        self.delete()

    async def accept(self) -> None:
        self.create()


class Queue(AwsPeer):
    """A FIFO queue. `refuse` deletes it; `accept` creates it again, empty, as on AWS."""

    service = "sqs"

    def create(self) -> None:
        self.queue = self.client.create_queue(
            QueueName=f"{self.name}.fifo", Attributes={"FifoQueue": "true", "VisibilityTimeout": "0"}
        )["QueueUrl"]

    def delete(self) -> None:
        self.client.delete_queue(QueueUrl=self.queue)

    @property
    def url(self) -> str:
        return f"sqs://{self.name}.fifo?region=us-east-1"

    def messages(self) -> list[dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        while True:
            answer = self.client.receive_message(
                QueueUrl=self.queue,
                MaxNumberOfMessages=10,
                MessageAttributeNames=["All"],
                AttributeNames=["All"],
                VisibilityTimeout=30,
            )
            if not answer.get("Messages"):
                return list(found.values())
            for message in answer["Messages"]:
                found[message["MessageId"]] = message
                self.client.delete_message(QueueUrl=self.queue, ReceiptHandle=message["ReceiptHandle"])

    async def arrived(self) -> list[str]:
        return [msgspec.json.decode(message["Body"])["id"] for message in self.messages()]


class Topic(Queue):
    """A FIFO topic, read through a FIFO queue that is subscribed to it."""

    def create(self) -> None:
        if not hasattr(self, "queue"):
            super().create()
            self.sns = boto3.client("sns")
            self.clients.append(self.sns)
        self.arn = self.sns.create_topic(Name=f"{self.name}.fifo", Attributes={"FifoTopic": "true"})["TopicArn"]
        queue_arn = f"arn:aws:sqs:us-east-1:123456789012:{self.name}.fifo"
        self.sns.subscribe(
            TopicArn=self.arn, Protocol="sqs", Endpoint=queue_arn, Attributes={"RawMessageDelivery": "true"}
        )

    def delete(self) -> None:
        self.sns.delete_topic(TopicArn=self.arn)

    @property
    def url(self) -> str:
        return f"sns://{self.arn}"


class Stream(AwsPeer):
    service = "kinesis"
    too_large_bytes = 1024 * 1024

    def create(self) -> None:
        self.client.create_stream(StreamName=self.name, ShardCount=1)

    def delete(self) -> None:
        self.client.delete_stream(StreamName=self.name)

    @property
    def url(self) -> str:
        return f"kinesis://{self.name}?region=us-east-1"

    def records(self) -> list[dict[str, Any]]:
        shard = self.client.list_shards(StreamName=self.name)["Shards"][0]["ShardId"]
        start = self.client.get_shard_iterator(StreamName=self.name, ShardId=shard, ShardIteratorType="TRIM_HORIZON")[
            "ShardIterator"
        ]
        found: list[dict[str, Any]] = self.client.get_records(ShardIterator=start)["Records"]
        return found

    async def arrived(self) -> list[str]:
        return [msgspec.json.decode(record["Data"])["id"] for record in self.records()]


class Bus(Queue):
    """An event bus with a rule that forwards every event to a queue. `refuse` deletes the bus."""

    def create(self) -> None:
        if not hasattr(self, "queue"):
            self.queue = self.client.create_queue(QueueName=self.name)["QueueUrl"]
            self.events = boto3.client("events")
            self.clients.append(self.events)
        self.events.create_event_bus(Name=self.name)
        pattern = msgspec.json.encode({"detail-type": [{"prefix": "task."}]}).decode()
        self.events.put_rule(Name="all", EventBusName=self.name, EventPattern=pattern)
        target = {"Id": "queue", "Arn": f"arn:aws:sqs:us-east-1:123456789012:{self.name}"}
        self.events.put_targets(Rule="all", EventBusName=self.name, Targets=[target])

    def delete(self) -> None:
        self.events.remove_targets(Rule="all", EventBusName=self.name, Ids=["queue"])
        self.events.delete_rule(Name="all", EventBusName=self.name)
        self.events.delete_event_bus(Name=self.name)

    @property
    def url(self) -> str:
        return f"eventbridge://{self.name}?region=us-east-1"

    async def arrived(self) -> list[str]:
        return [msgspec.json.decode(message["Body"])["detail"]["id"] for message in self.messages()]


class AwsSuite(DestinationSuite):
    """The suite for one kind of AWS resource."""

    kind: type[AwsPeer]

    @pytest.fixture
    def peer(self, aws: str) -> Iterator[AwsPeer]:
        peer = self.kind()
        yield peer
        peer.close()

    async def test_reach_reports_a_missing_resource(self, peer: AwsPeer) -> None:
        destination = peer.open()
        assert await destination.reach() is None
        await peer.refuse()
        assert await destination.reach()
        await destination.close()

    async def test_an_unreachable_endpoint_is_a_failed_outcome(
        self, peer: AwsPeer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        destination = peer.open()
        outcome = await destination.send(event(), NOW_S)
        assert not outcome.is_delivered
        assert "127.0.0.1:9" in outcome.answer
        await destination.close()


class TestSqs(AwsSuite):
    kind = Queue

    async def test_binary_mode_sends_message_attributes_and_a_repeat_is_dropped(self, peer: Queue) -> None:
        destination = peer.open(mode="binary")
        for _ in range(2):
            assert (await destination.send(event(), NOW_S)).is_delivered
        (message,) = peer.messages()
        assert message["MessageAttributes"]["ce-id"]["StringValue"] == event().id
        assert message["MessageAttributes"]["traceparent"]["StringValue"].startswith("00-")
        assert message["Attributes"]["MessageGroupId"] == "order-1"
        assert msgspec.json.decode(message["Body"])["external_task_id"] == "order-1"
        await destination.close()


class TestSns(AwsSuite):
    kind = Topic


class TestKinesis(AwsSuite):
    kind = Stream

    async def test_the_partition_key_is_the_task(self, peer: Stream) -> None:
        destination = peer.open()
        assert (await destination.send(event(), NOW_S)).is_delivered
        assert [record["PartitionKey"] for record in peer.records()] == ["order-1"]
        await destination.close()


class TestEventBridge(AwsSuite):
    kind = Bus

    async def test_source_and_detail_type_are_those_of_the_event(self, peer: Bus) -> None:
        destination = peer.open(mode="binary")
        assert (await destination.send(event(), NOW_S)).is_delivered
        (message,) = peer.messages()
        body = msgspec.json.decode(message["Body"])
        assert (body["source"], body["detail-type"]) == ("/kling-relay/kling", "task.processing")
        assert body["detail"]["external_task_id"] == "order-1"
        await destination.close()


@pytest.mark.parametrize(
    ("url", "mode", "expected"),
    [
        ("sqs://queue?colour=1", "structured", "sqs://queue?region"),
        ("sns://topic", "structured", "Copy the topic's ARN"),
        ("kinesis://stream?region=us-east-1", "binary", "hook[bus].mode"),
        ("eventbridge://bus", "structured", "AWS_REGION"),
    ],
)
def test_an_invalid_hook_is_reported(url: str, mode: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    with pytest.raises(InvalidSettings) as raised:
        open_destination(Hook("bus", url, mode=mode), frozenset())
    assert expected in str(raised.value)
