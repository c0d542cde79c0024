"""Publishes events to a RabbitMQ exchange: `amqp://user:password@host:5672/vhost/exchange?routing_key=...`.

Without a vhost (`amqp://host/exchange`) it is `/`. Messages are persistent and confirmed by the
broker; `message_id` is the event's id, the routing key the event's type unless one is given. In
binary mode the attributes are headers with the prefix `cloudEvents:`, as CloudEvents' AMQP
binding names them. With `mandatory=true` an event that no queue takes is a failure.
"""

from urllib.parse import parse_qs, quote, unquote, urlsplit

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractExchange
from aio_pika.exceptions import AMQPException, DeliveryError

from receiver.cloudevents import encode, traceparent
from receiver.destinations.base import Kept, Outcome, failed, wrong
from receiver.hooks import Hook
from submitter.egress import AddressForbidden, require_allowed
from submitter.event import Event

BROKEN = (AMQPException, OSError, AddressForbidden, RuntimeError, TimeoutError)  # RuntimeError: a closed channel


Link = tuple[AbstractConnection, AbstractChannel, AbstractExchange]


class AmqpDestination:
    """One exchange, over one channel with publisher confirms."""

    def __init__(
        self, hook: Hook, broker: str, exchange: str, routing_key: str, *, mandatory: bool, allow_hosts: frozenset[str]
    ) -> None:
        self._hook = hook
        self._broker = broker
        self._exchange = exchange
        self._routing_key = routing_key
        self._mandatory = mandatory
        self._allow_hosts = allow_hosts
        self._password = urlsplit(hook.url).password
        self._kept = Kept(self._connect, _disconnect)

    async def _connect(self) -> Link:
        await require_allowed(self._hook.url, self._allow_hosts)
        connection = await aio_pika.connect(self._broker, timeout=min(self._hook.timeout_s, 5))
        try:
            channel = await connection.channel(publisher_confirms=True, on_return_raises=True)
            # Asks the broker for the exchange: a wrong name is told now.
            return connection, channel, await channel.get_exchange(self._exchange)
        except BaseException:
            await connection.close()
            raise

    async def send(self, event: Event, now_s: float) -> Outcome:
        encoded = encode(event, self._hook.mode)
        headers = {f"cloudEvents:{name}": value for name, value in encoded.attributes.items()}
        message = aio_pika.Message(
            encoded.body,
            headers={**headers, "traceparent": traceparent(event)},
            content_type=encoded.content_type,
            message_id=event.id,
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
        )
        kept = None
        try:
            kept = await self._kept.get()
            await kept[2].publish(
                message,
                self._routing_key or event.type,
                mandatory=self._mandatory,
                timeout=self._hook.timeout_s,
            )
        except DeliveryError as error:  # the broker's answer: the channel is well
            return failed(error, self._password)
        except BROKEN as error:
            if kept is not None:
                await self._kept.drop(kept)
            return failed(error, self._password)
        return Outcome(True, "confirmed")

    async def reach(self) -> str | None:
        kept = None
        try:
            kept = await self._kept.get()
            if kept[1].is_closed:
                raise ConnectionError("the channel is closed")
        except BROKEN as error:
            if kept is not None:
                await self._kept.drop(kept)
            return failed(error, self._password).answer
        return None

    async def close(self) -> None:
        await self._kept.drop()


def open(hook: Hook, allow_hosts: frozenset[str]) -> AmqpDestination:
    """Open an exchange."""
    parts, asked = urlsplit(hook.url), parse_qs(hook.url.partition("?")[2])
    vhost, _, exchange = parts.path.strip("/").rpartition("/")
    if not parts.hostname or not exchange:
        shape, found = "amqp://host:5672/exchange, or .../vhost/exchange", f"{parts.scheme}://{parts.hostname or ''}"
        raise wrong(hook, "url", f"{found}{parts.path}", shape, "Name host and exchange.")
    mandatory = asked.get("mandatory", ["false"])[0]
    if mandatory not in ("true", "false") or set(asked) - {"mandatory", "routing_key"}:
        raise wrong(hook, "url", f"?{parts.query}", "?routing_key=...&mandatory=true", "Mend it, or leave it out.")
    broker = f"{parts.scheme}://{parts.netloc}/{quote(unquote(vhost) or '/', safe='')}"
    routing_key = asked.get("routing_key", [""])[0]
    return AmqpDestination(
        hook, broker, unquote(exchange), routing_key, mandatory=mandatory == "true", allow_hosts=allow_hosts
    )


async def _disconnect(kept: Link) -> None:
    await kept[0].close()
