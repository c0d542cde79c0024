"""One DynamoDB table: item reads, conditional writes, transactions, queries; creates the table.

Expressions write an attribute as `#name` (expression attribute names), since many short words are
reserved, and a value as `:name`. The names are filled in here.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any

from submitter.errors import LedgerUnavailable
from submitter.ledger.dynamodb.client import DynamoClient, Refused
from submitter.ledger.dynamodb.items import Item, key_of, table_of, text

GET_MAX, WRITE_MAX = 100, 25  # items in a BatchGetItem, in a BatchWriteItem
CREATE_TIMEOUT_S = 60

KEYS = {None: ("pk", "sk"), "due": ("queue", "at"), "newest": ("list", "made")}
"""The partition and sort keys of the table and of its indexes."""


class Conflict(Exception):
    """A conditional write failed: the item changed since it was read."""


class Table:
    """A table, created at its first use. Every method raises LedgerUnavailable when DynamoDB does not answer.

    Reads of the table itself are strongly consistent. Reads of an index may lag.
    """

    def __init__(self, client: DynamoClient, name: str) -> None:
        self.client = client
        self.name = name
        self._creating = asyncio.Lock()

    async def get(self, key: Item) -> Item | None:
        """Return an item, or None."""
        found: Item | None = (await self._call("GetItem", Key=key, ConsistentRead=True)).get("Item")
        return found

    async def get_many(self, keys: Iterable[Item]) -> list[Item]:
        """Return the items with these keys, in any order. Keys that do not exist are left out."""
        unique = list({(key["pk"]["S"], key["sk"]["S"]): key for key in keys}.values())
        batches = [unique[start : start + GET_MAX] for start in range(0, len(unique), GET_MAX)]
        return [item for found in await asyncio.gather(*map(self._get_batch, batches)) for item in found]

    async def _get_batch(self, keys: list[Item]) -> list[Item]:
        found: list[Item] = []
        attempt = 0
        while keys:
            request = {self.name: {"Keys": keys, "ConsistentRead": True}}
            response = await self._call("BatchGetItem", RequestItems=request)
            found.extend(response["Responses"].get(self.name, ()))
            keys = response.get("UnprocessedKeys", {}).get(self.name, {}).get("Keys", [])
            attempt = await self._back_off(attempt, more=bool(keys))
        return found

    async def write_many(self, puts: Sequence[Item] = (), deletes: Sequence[Item] = ()) -> None:
        """Store and delete many items, without a transaction. Of two puts with the same key the last one wins."""
        latest = {(item["pk"]["S"], item["sk"]["S"]): item for item in puts}
        requests: list[Item] = [{"PutRequest": {"Item": item}} for item in latest.values()]
        requests.extend({"DeleteRequest": {"Key": key_of(item)}} for item in deletes)
        batches = [requests[start : start + WRITE_MAX] for start in range(0, len(requests), WRITE_MAX)]
        await asyncio.gather(*map(self._write_batch, batches))

    async def _write_batch(self, requests: list[Item]) -> None:
        attempt = 0
        while requests:
            response = await self._call("BatchWriteItem", RequestItems={self.name: requests})
            requests = response.get("UnprocessedItems", {}).get(self.name, [])
            attempt = await self._back_off(attempt, more=bool(requests))

    async def _back_off(self, attempt: int, *, more: bool) -> int:
        if more:
            await self.client.back_off(attempt)
        return attempt + 1

    async def put(self, item: Item, condition: str | None = None) -> None:
        """Store an item; raise Conflict if the condition fails."""
        await self._call("PutItem", Item=item, **_expressions(ConditionExpression=condition))

    async def delete(self, key: Item, condition: str | None = None, **values: Item) -> None:
        """Delete an item, if it exists; raise Conflict if the condition fails."""
        await self._call("DeleteItem", Key=key, **_expressions(values, ConditionExpression=condition))

    async def update(self, key: Item, change: str, condition: str | None = None, **values: Item) -> Item:
        """Apply an update expression and return the updated item; raise Conflict if the condition fails."""
        expressions = _expressions(values, UpdateExpression=change, ConditionExpression=condition)
        item: Item = (await self._call("UpdateItem", Key=key, ReturnValues="ALL_NEW", **expressions))["Attributes"]
        return item

    async def transact(self, actions: Sequence[Item]) -> None:
        """Execute writes in one transaction; raise Conflict if a condition fails."""
        await self._call("TransactWriteItems", TransactItems=list(actions))

    def action(self, kind: str, condition: str | None = None, change: str | None = None, **fields: Any) -> Item:
        """Return one action of a transaction: `Put` (item=), `Update`, `Delete` or `ConditionCheck` (key=).

        The other fields are the values of the expressions.
        """
        action = {name.capitalize(): fields.pop(name) for name in ("item", "key") if name in fields}
        action |= _expressions(fields, UpdateExpression=change, ConditionExpression=condition)
        return {kind: {"TableName": self.name, **action}}

    async def query(self, index: str | None, partition: str, limit: int | None = None, **options: Any) -> list[Item]:
        """Return all items of a partition, or the first `limit`; the options are those of `pages`."""
        found: list[Item] = []
        async for page in self.pages(index, partition, limit, **options):
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
        filter_by: str | None = None,
        fields: Sequence[str] = (),
        is_newest_first: bool = False,
        **values: Item,
    ) -> AsyncIterator[list[Item]]:
        """Yield a partition's items page by page, in the order of their sort keys.

        `where` is a key condition on the sort key, written `#sort`; `filter_by` a filter expression;
        `fields` are the attributes to read (default: all).
        """
        request = _query(index, partition, where, filter_by, fields, values)
        request["ScanIndexForward"] = not is_newest_first
        if limit is not None and filter_by is None:
            request["Limit"] = limit
        while True:
            response = await self._call("Query", **request)
            yield response["Items"]
            if "LastEvaluatedKey" not in response:
                return
            request["ExclusiveStartKey"] = response["LastEvaluatedKey"]

    async def count(
        self, index: str | None, partition: str, where: str | None = None, filter_by: str | None = None, **values: Item
    ) -> int:
        """Return the number of items that `pages` yields."""
        request = _query(index, partition, where, filter_by, (), values) | {"Select": "COUNT"}
        total = 0
        while True:
            response = await self._call("Query", **request)
            total += int(response["Count"])
            if "LastEvaluatedKey" not in response:
                return total
            request["ExclusiveStartKey"] = response["LastEvaluatedKey"]

    async def scan(self, filter_by: str, after: Item | None, **values: Item) -> AsyncIterator[list[Item]]:
        """Yield the keys of the items that pass the filter page by page, in the table's own order.

        `after` is the last key of the previous scan.
        """
        request: dict[str, Any] = _expressions(values, FilterExpression=filter_by, ProjectionExpression="#pk, #sk")
        request["ConsistentRead"] = True
        while True:
            if after is not None:
                request["ExclusiveStartKey"] = after
            response = await self._call("Scan", **request)
            yield response["Items"]
            after = response.get("LastEvaluatedKey")
            if after is None:
                return

    # -- calls, creation of the table ---------------------------------------------------------

    async def _call(self, operation: str, **parameters: Any) -> dict[str, Any]:
        if operation not in ("BatchGetItem", "BatchWriteItem", "TransactWriteItems"):
            parameters["TableName"] = self.name
        try:
            return await self.client.call(operation, **parameters)
        except Refused as error:
            if error.is_conflict:
                raise Conflict from error
            if error.code != "ResourceNotFoundException":
                raise LedgerUnavailable(f"DynamoDB refused {operation} on {self.name!r}: {error}") from error
        await self._create()
        return await self._call(operation, **parameters)

    async def _create(self) -> None:
        """Create the table, wait until it is active, and enable TTL."""
        async with self._creating:
            try:
                await self.client.call("CreateTable", **table_of(self.name))
            except Refused as error:
                if error.code != "ResourceInUseException":
                    remedy = "Deploy infra/aws, or run `kling-relay ledger migrate` with a role that may create it."
                    reason = f"DynamoDB has no table {self.name!r}, and could not create it: {error}. {remedy}"
                    raise LedgerUnavailable(reason) from error
            try:
                async with asyncio.timeout(CREATE_TIMEOUT_S):
                    while not await self._is_active():  # noqa: ASYNC110 - DynamoDB sends no notification
                        await asyncio.sleep(0.2)
                ttl = {"Enabled": True, "AttributeName": "ttl"}
                await self.client.call("UpdateTimeToLive", TableName=self.name, TimeToLiveSpecification=ttl)
            except TimeoutError as error:
                reason = f"DynamoDB did not create the table {self.name!r} within {CREATE_TIMEOUT_S} s"
                raise LedgerUnavailable(reason) from error
            except Refused as error:
                if "already enabled" not in str(error):
                    reason = f"DynamoDB refused to enable TTL on the table {self.name!r}: {error}"
                    raise LedgerUnavailable(reason) from error

    async def _is_active(self) -> bool:
        table = (await self.client.call("DescribeTable", TableName=self.name))["Table"]
        states = [table["TableStatus"], *(index["IndexStatus"] for index in table["GlobalSecondaryIndexes"])]
        return set(states) == {"ACTIVE"}


def _query(
    index: str | None, partition: str, where: str | None, filter_by: str | None, fields: Sequence[str], values: Item
) -> Item:
    """Return the parameters of a Query."""
    hash_key, sort_key = KEYS[index]
    condition = f"#{hash_key} = :partition" + (f" AND {where}" if where else "")
    request = _expressions(
        values | {"partition": text(partition)},
        KeyConditionExpression=condition.replace("#sort", f"#{sort_key}"),
        FilterExpression=filter_by,
        ProjectionExpression=", ".join(f"#{field}" for field in fields) or None,
    )
    return request | ({"ConsistentRead": True} if index is None else {"IndexName": index})


def _expressions(values: Item | None = None, **expressions: str | None) -> Item:
    """Return the expressions that are not None, with their attribute names and values."""
    parameters: Item = {name: expression for name, expression in expressions.items() if expression is not None}
    names = {f"#{name}": name for expression in parameters.values() for name in re.findall(r"#(\w+)", expression)}
    if names:
        parameters["ExpressionAttributeNames"] = names
    if values:
        parameters["ExpressionAttributeValues"] = {f":{name}": value for name, value in values.items()}
    return parameters
