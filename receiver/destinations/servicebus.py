"""Sends events to an Azure Service Bus queue or topic: `servicebus://policy:key@namespace/queue`.

The namespace is its name, or its whole host. Without policy and key, Entra ID gives a token (the
role Azure Service Bus Data Sender). The message's id is the event's, which a queue with duplicate
detection heeds, its session the task, which keeps its events in order where sessions are on. In
binary mode attributes are application properties `cloudEvents_...`, as CloudEvents' AMQP binding
names them. Each event is a request of its own: the API's batches have no place for the content
type, by which a consumer knows a CloudEvent.
"""

import base64
import hashlib
import hmac
from urllib.parse import quote_plus, unquote

import httpx
import msgspec

from receiver.cloudevents import encode, traceparent
from receiver.destinations.azure import Entra, read_url
from receiver.destinations.base import Outcome, failed, wrong
from receiver.destinations.http import open_client, post, reach
from receiver.hooks import Hook
from submitter.event import Event

SHAPE = "servicebus://policy:key@namespace/queue"
SCOPE = "https://servicebus.azure.net/.default"
TOKEN_S = 900


class ServiceBusDestination:
    """One queue or topic."""

    def __init__(self, hook: Hook, client: httpx.AsyncClient, url: str, resource: str, key: tuple[str, str] | None):
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
            return failed(error)
        headers = {
            **{name: msgspec.json.encode(value).decode() for name, value in properties.items()},
            "content-type": encoded.content_type,
            "brokerproperties": msgspec.json.encode(broker).decode(),
            "authorization": authorization,
        }
        outcome, _ = await post(self._client, f"{self._url}/messages", encoded.body, headers, now_s)
        return msgspec.structs.replace(outcome, is_gone=False)  # here 410 is a queue that is not there yet

    async def _authorization(self, now_s: float) -> str:
        if self._key is None:
            assert self._entra is not None
            return f"Bearer {await self._entra.token()}"
        return shared_access_signature(self._resource, *self._key, int(now_s) + TOKEN_S)

    async def reach(self) -> str | None:
        return await reach(self._client, self._url)

    async def close(self) -> None:
        await self._client.aclose()
        if self._entra is not None:
            await self._entra.close()


def shared_access_signature(resource: str, policy: str, key: str, expires_s: int) -> str:
    """Return a token of Service Bus for one resource (its https URL), valid until `expires_s` (Unix seconds)."""
    encoded = quote_plus(resource)
    signature = base64.b64encode(hmac.digest(key.encode(), f"{encoded}\n{expires_s}".encode(), hashlib.sha256))
    return f"SharedAccessSignature sr={encoded}&sig={quote_plus(signature)}&se={expires_s}&skn={quote_plus(policy)}"


def open(hook: Hook, allow_hosts: frozenset[str]) -> ServiceBusDestination:
    """Open a queue or topic."""
    address = read_url(hook, SHAPE, ".servicebus.windows.net")
    queue, policy = address.parts.path.strip("/"), address.parts.username
    if not queue or (policy is None) != (address.key is None):
        raise wrong(hook, "url", f"servicebus://{address.host}/{queue}", SHAPE, "Name namespace and queue.")
    credentials = None if address.key is None else (unquote(policy or ""), address.key)
    return ServiceBusDestination(
        hook,
        open_client(hook, allow_hosts),
        f"{address.endpoint}/{queue}",
        f"https://{address.host}/{queue}",
        credentials,
    )
