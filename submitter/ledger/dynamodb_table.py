"""One DynamoDB table: reads and writes of items, page by page, and the table's own making.

Expressions name attributes by `#name`, since half of the short words are reserved.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any

from submitter.errors import LedgerUnavailable
from submitter.ledger.dynamodb_client import DynamoClient, Refused
from submitter.ledger.dynamodb_items import Item, key_of, table_of, text

GET_MAX, WRITE_MAX = 100, 25  # of one batch
READY_AFTER_S = 60

KEYS = {None: ("pk", "sk"), "due": ("queue", "at"), "newest": ("list", "made")}
"""The partition and sort keys of the table and of its indexes."""


class Conflict(Exception):
    """A condition did not hold: what was read is out of date."""


class Table:
    """Every method raises LedgerUnavailable when DynamoDB cannot answer."""

    def __init__(self, client: DynamoClient, name: str) -> None:
        self.client = client
        self.name = name
        self._making = asyncio.Lock()

    async def get(self, key: Item) -> Item | None:
        """Return an item as it is now, or None."""
        found: Item | None = (await self._call("GetItem", Key=key, ConsistentRead=True)).get("Item")
        return found

    async def get_many(self, keys: Iterable[Item]) -> list[Item]:
        """Return those of these items that exist, as they are now, in any order."""
        asked = list({(key["pk"]["S"], key["sk"]["S"]): key for key in keys}.values())
        batches = [asked[start : start + GET_MAX] for start in range(0, len(asked), GET_MAX)]
        return [item for found in await asyncio.gather(*map(self._get_batch, batches)) for item in found]

    async def _get_batch(self, keys: list[Item]) -> list[Item]:
        found: list[Item] = []
        attempt = 0
        while keys:
            answer = await self._call("BatchGetItem", RequestItems={self.name: {"Keys": keys, "ConsistentRead": True}})
            found.extend(answer["Responses"].get(self.name, ()))
            keys = answer.get("UnprocessedKeys", {}).get(self.name, {}).get("Keys", [])
            attempt = await self._pause(attempt, more=bool(keys))
        return found

    async def write_many(self, puts: Sequence[Item] = (), deletes: Sequence[Item] = ()) -> None:
        """Store and delete many items, each by itself; of two with the same key the last is stored."""
        latest = {(item["pk"]["S"], item["sk"]["S"]): item for item in puts}
        requests: list[Item] = [{"PutRequest": {"Item": item}} for item in latest.values()]
        requests.extend({"DeleteRequest": {"Key": key_of(item)}} for item in deletes)
        batches = [requests[start : start + WRITE_MAX] for start in range(0, len(requests), WRITE_MAX)]
        await asyncio.gather(*map(self._write_batch, batches))

    async def _write_batch(self, requests: list[Item]) -> None:
        attempt = 0
        while requests:
            answer = await self._call("BatchWriteItem", RequestItems={self.name: requests})
            requests = answer.get("UnprocessedItems", {}).get(self.name, [])
            attempt = await self._pause(attempt, more=bool(requests))

    async def _pause(self, attempt: int, *, more: bool) -> int:
        if more:
            await self.client.back_off(attempt)
        return attempt + 1

    async def put(self, item: Item, condition: str | None = None) -> None:
        """Store an item; raise Conflict when the condition does not hold."""
        await self._call("PutItem", Item=item, **_expressions(ConditionExpression=condition))

    async def delete(self, key: Item, condition: str | None = None, **values: Item) -> None:
        """Delete an item, if there is one; raise Conflict when the condition does not hold."""
        await self._call("DeleteItem", Key=key, **_expressions(values, ConditionExpression=condition))

    async def update(self, key: Item, change: str, condition: str | None = None, **values: Item) -> Item:
        """Change an item and return it as it is then; raise Conflict when the condition does not hold."""
        asked = _expressions(values, UpdateExpression=change, ConditionExpression=condition)
        item: Item = (await self._call("UpdateItem", Key=key, ReturnValues="ALL_NEW", **asked))["Attributes"]
        return item

    async def transact(self, actions: Sequence[Item]) -> None:
        """Make some writes all or none; raise Conflict when a condition of one does not hold."""
        await self._call("TransactWriteItems", TransactItems=list(actions))

    def action(self, kind: str, condition: str | None = None, change: str | None = None, **fields: Any) -> Item:
        """Return one write of a transaction: `Put` (item), `Update` or `ConditionCheck` (key), with its values."""
        asked = {name.capitalize(): fields.pop(name) for name in ("item", "key") if name in fields}
        asked |= _expressions(fields, UpdateExpression=change, ConditionExpression=condition)
        return {kind: {"TableName": self.name, **asked}}

    async def query(self, index: str | None, partition: str, limit: int | None = None, **asked: Any) -> list[Item]:
        """Return items of a partition, all or the first `limit`; see `pages`."""
        found: list[Item] = []
        async for page in self.pages(index, partition, limit, **asked):
            found.extend(page)
            if limit is not None and len(found) >= limit:
                return found[:limit]
        return found

    async def pages(
        self,
        index: str | None,
        partition: str,
        limit: int | None = None,
        *,
        where: str | None = None,
        only: str | None = None,
        fields: Sequence[str] = (),
        is_newest_first: bool = False,
        **values: Item,
    ) -> AsyncIterator[list[Item]]:
        """Give a partition's items in the order of their sort keys, a page at a time.

        `where` is a condition on the sort key, `#sort`; `only` a filter; `fields` what is read of each
        item. An index may lag behind the table, which is read as it is now.
        """
        asked = _query(index, partition, where, only, fields, values) | {"ScanIndexForward": not is_newest_first}
        if limit is not None and only is None:
            asked["Limit"] = limit
        while True:
            answer = await self._call("Query", **asked)
            yield answer["Items"]
            if "LastEvaluatedKey" not in answer:
                return
            asked["ExclusiveStartKey"] = answer["LastEvaluatedKey"]

    async def count(
        self, index: str | None, partition: str, where: str | None = None, only: str | None = None, **values: Item
    ) -> int:
        """Return how many items `pages` would give."""
        asked = _query(index, partition, where, only, (), values) | {"Select": "COUNT"}
        total = 0
        while True:
            answer = await self._call("Query", **asked)
            total += int(answer["Count"])
            if "LastEvaluatedKey" not in answer:
                return total
            asked["ExclusiveStartKey"] = answer["LastEvaluatedKey"]

    async def scan(self, only: str, after: Item | None, **values: Item) -> AsyncIterator[list[Item]]:
        """Give the keys of all items that `only` lets through, in the table's own order, a page at a time."""
        asked: dict[str, Any] = _expressions(values, FilterExpression=only, ProjectionExpression="#pk, #sk")
        asked["ConsistentRead"] = True
        while True:
            if after is not None:
                asked["ExclusiveStartKey"] = after
            answer = await self._call("Scan", **asked)
            yield answer["Items"]
            after = answer.get("LastEvaluatedKey")
            if after is None:
                return

    # -- the table itself ---------------------------------------------------------------------

    async def _call(self, operation: str, **asked: Any) -> dict[str, Any]:
        if operation not in ("BatchGetItem", "BatchWriteItem", "TransactWriteItems"):
            asked["TableName"] = self.name
        try:
            return await self.client.call(operation, **asked)
        except Refused as error:
            if error.is_conflict:
                raise Conflict from error
            if error.code != "ResourceNotFoundException":
                raise LedgerUnavailable(f"DynamoDB refused {operation} on {self.name!r}: {error}") from error
        await self._make()
        return await self._call(operation, **asked)

    async def _make(self) -> None:
        """Make the table, and wait until it is there, and its retention on."""
        async with self._making:
            try:
                await self.client.call("CreateTable", **table_of(self.name))
            except Refused as error:
                if error.code != "ResourceInUseException":
                    remedy = "Make it with infra/aws, or by `kling-relay ledger migrate` with a role that may"
                    reason = f"DynamoDB has no table {self.name!r}, and it could not be made: {error}. {remedy}."
                    raise LedgerUnavailable(reason) from error
            try:
                async with asyncio.timeout(READY_AFTER_S):
                    while not await self._is_ready():  # noqa: ASYNC110 - DynamoDB tells nobody
                        await asyncio.sleep(0.2)
                retention = {"Enabled": True, "AttributeName": "ttl"}
                await self.client.call("UpdateTimeToLive", TableName=self.name, TimeToLiveSpecification=retention)
            except TimeoutError as error:
                raise LedgerUnavailable(f"DynamoDB did not make {self.name!r} in {READY_AFTER_S} s") from error
            except Refused as error:
                if "already enabled" not in str(error):
                    raise LedgerUnavailable(f"DynamoDB refused to expire items of {self.name!r}: {error}") from error

    async def _is_ready(self) -> bool:
        table = (await self.client.call("DescribeTable", TableName=self.name))["Table"]
        states = [table["TableStatus"], *(index["IndexStatus"] for index in table["GlobalSecondaryIndexes"])]
        return set(states) == {"ACTIVE"}


def _query(
    index: str | None, partition: str, where: str | None, only: str | None, fields: Sequence[str], values: Item
) -> Item:
    hash_key, sort_key = KEYS[index]
    condition = f"#{hash_key} = :partition" + (f" AND {where}" if where else "")
    asked = _expressions(
        values | {"partition": text(partition)},
        KeyConditionExpression=condition.replace("#sort", f"#{sort_key}"),
        FilterExpression=only,
        ProjectionExpression=", ".join(f"#{field}" for field in fields) or None,
    )
    return asked | ({"ConsistentRead": True} if index is None else {"IndexName": index})


def _expressions(values: Item | None = None, **expressions: str | None) -> Item:
    """Return expressions with the names and values that they speak of."""
    asked: Item = {name: expression for name, expression in expressions.items() if expression is not None}
    names = {f"#{name}": name for expression in asked.values() for name in re.findall(r"#(\w+)", expression)}
    if names:
        asked["ExpressionAttributeNames"] = names
    if values:
        asked["ExpressionAttributeValues"] = {f":{name}": value for name, value in values.items()}
    return asked
