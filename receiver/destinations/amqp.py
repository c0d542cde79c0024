"""Publishes events to a RabbitMQ exchange (AMQP 0-9-1), with publisher confirms.

URL: `amqp://user:password@host:5672/vhost/exchange?routing_key=...&mandatory=true`, or `amqps://` for TLS.
Without a vhost (`amqp://host/exchange`) the vhost is `/`.

Event: a persistent message. `message_id` is the event's id; the routing key is the event's type unless the URL
gives one. In binary mode the attributes are headers `cloudEvents:...`, as in the CloudEvents AMQP binding.
Delivered: the broker confirmed the message. By default it also confirms a message that no queue receives;
with `mandatory=true` that is a failure.
Order: a task's events are published one after the other, on one channel.
Limit: the broker's `max_message_size`.
Sources: https://www.rabbitmq.com/docs/confirms,
https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/bindings/amqp-protocol-binding.md.
"""

from urllib.parse import parse_qs, quote, unquote, urlsplit

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractExchange
from aio_pika.exceptions import AMQPException, DeliveryError

from receiver.destinations.base import invalid_hook
from receiver.destinations.cloudevents import encode, traceparent
from receiver.destinations.connection import KeptConnection
from receiver.destinations.outcome import Outcome, failed_outcome
from receiver.hook import Hook
from submitter.egress import require_allowed
from submitter.event import Event

CONNECTION_ERRORS = (AMQPException, OSError, RuntimeError, TimeoutError)
"""Errors after which the connection is reopened. RuntimeError: the channel is closed."""

Link = tuple[AbstractConnection, AbstractChannel, AbstractExchange]


class AmqpDestination:
    """One exchange, on one channel with publisher confirms."""

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
        self._kept = KeptConnection(self._connect, _disconnect)

    async def _connect(self) -> Link:
        await require_allowed(self._hook.url, self._allow_hosts)
        connection = await aio_pika.connect(self._broker, timeout=min(self._hook.timeout_s, 5))
        try:
            channel = await connection.channel(publisher_confirms=True, on_return_raises=True)
            # A passive declare: a missing exchange is an error now.
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
        link = None
        try:
            link = await self._kept.get()
            await link[2].publish(
                message,
                self._routing_key or event.type,
                mandatory=self._mandatory,
                timeout=self._hook.timeout_s,
            )
        except DeliveryError as error:  # rejected or returned by the broker; the channel is still usable
            return failed_outcome(error, self._password)
        except CONNECTION_ERRORS as error:
            if link is not None:
                await self._kept.drop(link)
            return failed_outcome(error, self._password)
        return Outcome(True, "confirmed")

    async def reach(self) -> str | None:
        link = None
        try:
            link = await self._kept.get()
            if link[1].is_closed:
                raise ConnectionError("the channel is closed")
        except CONNECTION_ERRORS as error:
            if link is not None:
                await self._kept.drop(link)
            return failed_outcome(error, self._password).answer
        return None

    async def close(self) -> None:
        await self._kept.drop()


def open(hook: Hook, allow_hosts: frozenset[str]) -> AmqpDestination:
    """Return the destination of a hook; raise InvalidSettings for an invalid URL."""
    parts, options = urlsplit(hook.url), parse_qs(hook.url.partition("?")[2])
    vhost, _, exchange = parts.path.strip("/").rpartition("/")
    if not parts.hostname or not exchange:
        limit = "amqp://host:5672/exchange, or .../vhost/exchange"
        found = f"{parts.scheme}://{parts.hostname or ''}{parts.path}"
        raise invalid_hook(hook, "url", found, limit, "Name the host and the exchange.")
    mandatory = options.get("mandatory", ["false"])[0]
    if mandatory not in ("true", "false") or set(options) - {"mandatory", "routing_key"}:
        limit, remedy = "?routing_key=...&mandatory=true", "Use only these options; `mandatory` is true or false."
        raise invalid_hook(hook, "url", f"?{parts.query}", limit, remedy)
    broker = f"{parts.scheme}://{parts.netloc}/{quote(unquote(vhost) or '/', safe='')}"
    routing_key = options.get("routing_key", [""])[0]
    return AmqpDestination(
        hook, broker, unquote(exchange), routing_key, mandatory=mandatory == "true", allow_hosts=allow_hosts
    )


async def _disconnect(link: Link) -> None:
    await link[0].close()
