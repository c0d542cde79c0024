"""Sends events to an Azure Service Bus queue or topic, over its HTTP API (Send Message).

URL: `servicebus://policy:key@namespace/queue`. The namespace is its name or its full host name. Without policy and
key, the machine's Microsoft Entra ID identity is used; it needs the role `Azure Service Bus Data Sender`.

Event: a message. `MessageId` is the event's id, which duplicate detection uses; `SessionId` is the
external_task_id; `Label` is the event's type; `traceparent` is an application property. In binary mode the
attributes are application properties `cloudEvents_...`, as in the CloudEvents AMQP binding.
Delivered: any 2xx. Each request has one event: the API's batches have no content type, by which a consumer
recognizes a CloudEvent.
Order: a task's events keep their order in a queue with sessions.
Limit: the tier's message size (Standard: 256 KB).
Sources: https://learn.microsoft.com/rest/api/servicebus/send-message-to-queue,
https://learn.microsoft.com/azure/service-bus-messaging/service-bus-quotas,
https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/bindings/amqp-protocol-binding.md.
"""

import base64
import hashlib
import hmac
from urllib.parse import quote_plus, unquote

import msgspec

from receiver.destinations.azure import Entra, read_url
from receiver.destinations.base import invalid_hook
from receiver.destinations.cloudevents import encode, traceparent
from receiver.destinations.http import open_client, post, reach
from receiver.destinations.http_client import HttpClient
from receiver.destinations.outcome import Outcome, failed_outcome
from receiver.hook import Hook
from submitter.event import Event

URL_FORMAT = "servicebus://policy:key@namespace/queue"
SCOPE = "https://servicebus.azure.net/.default"
TOKEN_LIFETIME_S = 900


class ServiceBusDestination:
    """One queue or topic."""

    def __init__(
        self,
        hook: Hook,
        client: HttpClient,
        url: str,
        resource: str,
        key: tuple[str, str] | None,
        allow_hosts: frozenset[str],
    ):
        self._allow_hosts = allow_hosts
        self._hook = hook
        self._client = client
        self._url = url
        self._resource = resource
        self._key = key
        self._entra = Entra(SCOPE) if key is None else None

    async def send(self, event: Event, now_s: float) -> Outcome:
        encoded = encode(event, self._hook.mode)
        properties = {f"cloudEvents_{name}": value for name, value in encoded.attributes.items()}
        properties["traceparent"] = traceparent(event)
        broker = {"MessageId": event.id, "SessionId": event.external_task_id, "Label": event.type}
        try:
            authorization = await self._authorization(now_s)
        except PermissionError as error:
            return failed_outcome(error)
        headers = {
            **{name: msgspec.json.encode(value).decode() for name, value in properties.items()},
            "content-type": encoded.content_type,
            "brokerproperties": msgspec.json.encode(broker).decode(),
            "authorization": authorization,
        }
        outcome, _ = await post(self._client, f"{self._url}/messages", encoded.body, headers, now_s)
        return msgspec.structs.replace(outcome, is_gone=False)  # 410: the queue does not exist; it can be created later

    async def _authorization(self, now_s: float) -> str:
        if self._key is None:
            assert self._entra is not None
            return f"Bearer {await self._entra.token()}"
        return shared_access_signature(self._resource, *self._key, int(now_s) + TOKEN_LIFETIME_S)

    async def reach(self) -> str | None:
        return await reach(self._url, self._allow_hosts)

    async def close(self) -> None:
        await self._client.close()
        if self._entra is not None:
            await self._entra.close()


def shared_access_signature(resource: str, policy: str, key: str, expires_s: int) -> str:
    """Return a shared access signature for one resource (its https URL), valid until `expires_s` (Unix seconds)."""
    encoded = quote_plus(resource)
    signature = base64.b64encode(hmac.digest(key.encode(), f"{encoded}\n{expires_s}".encode(), hashlib.sha256))
    return f"SharedAccessSignature sr={encoded}&sig={quote_plus(signature)}&se={expires_s}&skn={quote_plus(policy)}"


def open(hook: Hook, allow_hosts: frozenset[str]) -> ServiceBusDestination:
    """Return the destination of a hook; raise InvalidSettings for an invalid URL."""
    address = read_url(hook, URL_FORMAT, ".servicebus.windows.net")
    queue, policy = address.parts.path.strip("/"), address.parts.username
    if not queue or (policy is None) != (address.key is None):
        remedy = "Name the namespace and the queue; give both policy and key, or neither."
        raise invalid_hook(hook, "url", f"servicebus://{address.host}/{queue}", URL_FORMAT, remedy)
    credentials = None if address.key is None else (unquote(policy or ""), address.key)
    return ServiceBusDestination(
        hook,
        open_client(hook, allow_hosts),
        f"{address.endpoint}/{queue}",
        f"https://{address.host}/{queue}",
        credentials,
        allow_hosts,
    )
