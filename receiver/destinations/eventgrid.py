"""Publishes events to an Azure Event Grid topic, over its HTTP API.

URL: `eventgrid://:key@topic.westeurope-1.eventgrid.azure.net` is a custom topic with the CloudEvents schema; with
the path `/topics/name` and a namespace's host it is a namespace topic. Without a key, the machine's Microsoft
Entra ID identity is used; it needs the role `EventGrid Data Sender`.

Event: the whole CloudEvent (structured mode only), in a JSON batch.
Delivered: any 2xx. Concurrent events share a request, which succeeds or fails as a whole.
Order is not kept.
Limits: 1 MB per event and per request, 100 events per request.
Sources: https://learn.microsoft.com/azure/event-grid/post-to-custom-topic,
https://learn.microsoft.com/azure/event-grid/publisher-operations.
"""

from receiver.destinations.azure import Entra, read_url
from receiver.destinations.base import invalid_hook
from receiver.destinations.batches import Batches, BatchLimits
from receiver.destinations.cloudevents import with_trace
from receiver.destinations.http import open_client, post, reach
from receiver.destinations.http_client import HttpClient
from receiver.destinations.outcome import Outcome, failed_outcome
from receiver.hook import Hook
from submitter.event import Event

URL_FORMAT = "eventgrid://:key@topic.region-1.eventgrid.azure.net, or .../topics/name of a namespace"
SCOPE = "https://eventgrid.azure.net/.default"
LIMITS = BatchLimits(event_bytes=1_000_000, events=100, request_bytes=1_000_000)


class EventGridDestination:
    """One custom topic or namespace topic."""

    def __init__(
        self, client: HttpClient, url: str, key_header: dict[str, str] | None, allow_hosts: frozenset[str]
    ) -> None:
        self._client = client
        self._allow_hosts = allow_hosts
        self._url = url
        self._key_header = key_header
        self._entra = Entra(SCOPE) if key_header is None else None
        self._batches = Batches(self._post, LIMITS)

    async def send(self, event: Event, now_s: float) -> Outcome:
        return await self._batches.send(event, now_s)

    async def _post(self, events: list[Event], now_s: float) -> list[Outcome]:
        headers = {"content-type": "application/cloudevents-batch+json; charset=utf-8"}
        try:
            if self._entra is not None:
                headers["authorization"] = f"Bearer {await self._entra.token()}"
        except PermissionError as error:
            return [failed_outcome(error)] * len(events)
        body = b"[" + b",".join(with_trace(event) for event in events) + b"]"
        outcome, _ = await post(self._client, self._url, body, headers | (self._key_header or {}), now_s)
        # 410 (no such topic yet) and 413 (of the batch) are not final for a single event.
        return [Outcome(outcome.is_delivered, outcome.answer, outcome.retry_after_s)] * len(events)

    async def reach(self) -> str | None:
        return await reach(self._url, self._allow_hosts)

    async def close(self) -> None:
        await self._batches.close()
        await self._client.close()
        if self._entra is not None:
            await self._entra.close()


def open(hook: Hook, allow_hosts: frozenset[str]) -> EventGridDestination:
    """Return the destination of a hook; raise InvalidSettings for an invalid URL or mode."""
    address = read_url(hook, URL_FORMAT)
    if hook.mode != "structured":
        raise invalid_hook(hook, "mode", repr(hook.mode), "structured", "Event Grid needs whole events: remove `mode`.")
    levels = address.parts.path.strip("/").split("/")
    if levels == [""]:
        url, key_header = f"{address.endpoint}/api/events?api-version=2018-01-01", {"aeg-sas-key": address.key or ""}
    elif levels[0] == "topics" and len(levels) == 2:
        url = f"{address.endpoint}/topics/{levels[1]}:publish?api-version=2024-06-01"
        key_header = {"authorization": f"SharedAccessKey {address.key}"}
    else:
        found = f"eventgrid://{address.host}{address.parts.path}"
        raise invalid_hook(hook, "url", found, URL_FORMAT, "Use no path, or /topics/name.")
    client = open_client(hook, allow_hosts)
    return EventGridDestination(client, url, key_header if address.key else None, allow_hosts)
