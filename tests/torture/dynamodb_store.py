"""A DynamoDB table of a stand-in, behind a proxy that refuses calls as throttled and loses answers."""

import random
import uuid
from typing import Any

import httpx
import msgspec
from starlette.responses import Response

from tests.conformance.aws_stand_ins import AWS
from tests.conformance.dynamodb_faults import FaultyProxy, refusal
from tests.torture.load import Stored
from tests.torture.store_trial import Fault

WRITES = ("TransactWriteItems", "PutItem", "UpdateItem")
THROTTLED_S = 11.0  # longer than a call is repeated before it is an error


class DynamoStore:
    """A new table; the receiver reaches it through the proxy."""

    def __init__(self, stand_in: str, proxy: FaultyProxy, seed: int) -> None:
        self._stand_in = stand_in
        self._proxy = proxy
        self._random = random.Random(seed)
        self._table = f"relay-{uuid.uuid4().hex[:12]}"
        self.url = f"dynamodb://{self._table}?shards=2"
        self.environ = {**AWS, "AWS_ENDPOINT_URL": proxy.url}

    async def read(self) -> Stored:
        statuses: dict[str, str] = {}
        events: list[tuple[str, str, str]] = []
        for item in await self._scan():
            task = item["pk"]["S"].removeprefix("T#")
            if item["sk"]["S"] == "task" and item["pk"]["S"].startswith("T#"):
                statuses[task] = item["status"]["S"]
            elif item["sk"]["S"].startswith("e#"):
                events.append((item["id"]["S"], task, item["type"]["S"]))
        return Stored(statuses, events)

    def faults(self) -> list[Fault]:
        """Return every fault, in an order by seed."""
        last_s = self._random.uniform(2, 4)
        faults = [
            Fault("every call throttled", lambda: self._refuse(1), self._heal, THROTTLED_S),
            Fault("many calls throttled", lambda: self._refuse(0.5), self._heal, last_s, stops_writes=False),
            Fault("answers lost", self._lose, self._heal, last_s, stops_writes=False),
        ]
        self._random.shuffle(faults)
        return faults

    def _refuse(self, rate: float) -> None:
        def fault(operation: str, parameters: dict[str, Any]) -> Response | None:
            is_refused = self._random.random() < rate
            return refusal("ProvisionedThroughputExceededException") if is_refused else None

        self._proxy.fault = fault

    def _lose(self) -> None:
        def fault(operation: str, parameters: dict[str, Any]) -> str | None:
            return "lost" if operation in WRITES and self._random.random() < 0.3 else None

        self._proxy.fault = fault

    def _heal(self) -> None:
        self._proxy.fault = lambda operation, parameters: None

    async def _scan(self) -> list[Any]:
        """Return every item, page by page."""
        found: list[Any] = []
        query: dict[str, Any] = {"TableName": self._table, "ConsistentRead": True}
        headers = {"x-amz-target": "DynamoDB_20120810.Scan", "content-type": "application/x-amz-json-1.0"}
        headers["authorization"] = "AWS4-HMAC-SHA256 Credential=key/20260101/us-east-1/dynamodb/aws4_request"
        async with httpx.AsyncClient(timeout=30, trust_env=False) as client:
            while True:
                answer = await client.post(self._stand_in, content=msgspec.json.encode(query), headers=headers)
                page = answer.raise_for_status().json()
                found += page["Items"]
                if "LastEvaluatedKey" not in page:
                    return found
                query["ExclusiveStartKey"] = page["LastEvaluatedKey"]
