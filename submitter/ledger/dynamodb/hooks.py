"""Hook registry in DynamoDB: which hooks exist, and which are disabled or paused. One small partition."""

import asyncio
from collections.abc import Collection, Iterable, Mapping

from submitter.ledger.base import Disabled, Subscription
from submitter.ledger.dynamodb.items import Item, key, number, text
from submitter.ledger.dynamodb.table import Table

PARTITION = "hooks"


class Hooks:
    """The registry of one table, with a cache for claims. `register`, `disable` and `enable` clear the cache."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self._cached: dict[str, Item] | None = None
        self._read_s = 0.0

    async def read(self, *, max_age_s: float = 0) -> dict[str, Item]:
        """Return the registry's items by sort key. They may lack other processes' writes of the last `max_age_s`."""
        now_s = asyncio.get_running_loop().time()
        if self._cached is None or now_s - self._read_s >= max_age_s:
            self._read_s = now_s
            self._cached = {item["sk"]["S"]: item for item in await self._table.query(None, PARTITION)}
        return self._cached

    async def register(self, hooks: Collection[str]) -> None:
        """Record that these hooks have deliveries, so that `names_in` finds them."""
        if hooks:
            await asyncio.gather(*(self._table.put(key(PARTITION, f"hook#{hook}")) for hook in hooks))
            self._cached = None

    async def disabled(self) -> list[Disabled]:
        """Return the disabled hooks, by name."""
        items = await self.read()
        found = [(sk.partition("#")[2], item) for sk, item in items.items() if sk.startswith("disabled#")]
        return [Disabled(hook, item["target"]["S"], item["reason"]["S"]) for hook, item in sorted(found)]

    async def disable(self, entry: Disabled) -> None:
        """Record that a hook is disabled."""
        item_key = key(PARTITION, f"disabled#{entry.hook}")
        await self._table.put({**item_key, "target": text(entry.endpoint_fingerprint), "reason": text(entry.reason)})
        self._cached = None

    async def enable(self, hook: str) -> None:
        """Remove the record that a hook is disabled."""
        await self._table.delete(key(PARTITION, f"disabled#{hook}"))
        self._cached = None

    async def pause(self, hook: str, until_ms: int | None, reason: str) -> None:
        """Record a pause, or (None) its end."""
        item_key = key(PARTITION, f"paused#{hook}")
        if until_ms is None:
            await self._table.delete(item_key)
        else:
            await self._table.put({**item_key, "until": number(until_ms), "reason": text(reason)})


def names_in(registry: Iterable[str]) -> list[str]:
    """Return the names of the hooks that have deliveries, from the registry's sort keys."""
    return [sk.removeprefix("hook#") for sk in registry if sk.startswith("hook#")]


def disabled_reason(subscription: Subscription, registry: Mapping[str, Item]) -> str | None:
    """Return why a hook's endpoint is disabled, or None."""
    item = registry.get(f"disabled#{subscription.hook}")
    if item is None or item["target"]["S"] != subscription.endpoint_fingerprint:
        return None
    return str(item["reason"]["S"])
