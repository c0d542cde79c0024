"""Adds events to a Redis stream (XADD): `redis://user:password@host:6379/stream?db=0&maxlen=100000`.

`rediss://` is TLS. `maxlen` trims the stream, approximately.

Event: an entry with the fields `content-type`, `traceparent`, and `event` (the whole CloudEvent) in structured mode
or `data` and the attributes `ce-...` in binary mode. CloudEvents defines no Redis binding.
Delivered: XADD returned the entry's id. The server's persistence settings decide whether it survives a crash.
Concurrent events share a pipeline.
Order: a task's events are added one after the other.
Limit: 512 MiB per event (`proto-max-bulk-len`).
Source: https://redis.io/docs/latest/commands/xadd/.
"""

from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from redis.asyncio import BlockingConnectionPool, Connection, Redis, SSLConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from receiver.destinations.base import invalid_hook
from receiver.destinations.batches import Batches, BatchLimits
from receiver.destinations.cloudevents import encode, traceparent
from receiver.destinations.outcome import Outcome, failed_outcome
from receiver.hook import Hook
from submitter.egress import require_allowed
from submitter.event import Event

LIMITS = BatchLimits(event_bytes=512 * 1024 * 1024, events=1000, request_bytes=1024 * 1024)


class RedisDestination:
    """One stream. The client pools its connections, and reconnects by itself."""

    def __init__(self, hook: Hook, client: Redis, stream: str, maxlen: int | None, allow_hosts: frozenset[str]) -> None:
        self._hook = hook
        self._client = client
        self._stream = stream
        self._maxlen = maxlen
        self._allow_hosts = allow_hosts
        self._batches = Batches(self._post, LIMITS)

    async def send(self, event: Event, now_s: float) -> Outcome:
        return await self._batches.send(event, now_s)

    async def _post(self, events: list[Event], now_s: float) -> list[Outcome]:
        try:
            await require_allowed(self._hook.url, self._allow_hosts)
            async with self._client.pipeline(transaction=False) as pipe:
                for event in events:
                    pipe.xadd(self._stream, self._fields(event), maxlen=self._maxlen, approximate=True)
                answers = await pipe.execute(raise_on_error=False)
        except (RedisError, OSError) as error:
            return [failed_outcome(error)] * len(events)
        return [
            failed_outcome(answer) if isinstance(answer, Exception) else Outcome(True, f"entry {answer.decode()}")
            for answer in answers
        ]

    def _fields(self, event: Event) -> dict[Any, Any]:
        encoded = encode(event, self._hook.mode)
        return {
            "content-type": encoded.content_type,
            "traceparent": traceparent(event),
            **{f"ce-{name}": value for name, value in encoded.attributes.items()},
            "event" if self._hook.mode == "structured" else "data": encoded.body,
        }

    async def reach(self) -> str | None:
        try:
            await require_allowed(self._hook.url, self._allow_hosts)
            await self._client.ping()
        except (RedisError, OSError) as error:
            return failed_outcome(error).answer
        return None

    async def close(self) -> None:
        await self._batches.close()
        await self._client.aclose()


def open(hook: Hook, allow_hosts: frozenset[str]) -> RedisDestination:
    """Return the destination of a hook; raise InvalidSettings for an invalid URL."""
    parts, options = urlsplit(hook.url), parse_qs(hook.url.partition("?")[2])
    stream = unquote(parts.path.strip("/"))
    if not stream or not parts.hostname:
        found = f"{parts.scheme}://{parts.hostname or ''}{parts.path}"
        raise invalid_hook(hook, "url", found, "redis://host:6379/stream", "Name the host and the stream.")
    db, maxlen = options.get("db", ["0"])[0], options.get("maxlen", [""])[0]
    if not db.isdecimal() or not (maxlen == "" or maxlen.isdecimal()) or set(options) - {"db", "maxlen"}:
        remedy = "Use only these options, with whole numbers."
        raise invalid_hook(hook, "url", f"?{parts.query}", "?db=0&maxlen=100000", remedy)
    pool = BlockingConnectionPool(
        connection_class=SSLConnection if parts.scheme == "rediss" else Connection,
        host=parts.hostname,
        port=parts.port or 6379,
        username=None if parts.username is None else unquote(parts.username) or None,
        password=None if parts.password is None else unquote(parts.password),
        db=int(db),
        socket_timeout=hook.timeout_s,
        socket_connect_timeout=min(hook.timeout_s, 5),
        max_connections=hook.concurrency,
        timeout=hook.timeout_s,
        retry=Retry(NoBackoff(), 0),  # the hook's schedule retries
    )
    return RedisDestination(hook, Redis.from_pool(pool), stream, int(maxlen) if maxlen else None, allow_hosts)
