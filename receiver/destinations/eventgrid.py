"""Publishes events to Azure Event Grid: `eventgrid://:key@topic.westeurope-1.eventgrid.azure.net`.

That is a custom topic with the CloudEvents schema; `.../topics/name` behind a namespace's host is
a namespace topic. Without a key, Entra ID gives a token (the role EventGrid Data Sender). What is
sent at once shares a request, which is taken or refused as a whole. Event Grid keeps no order.
"""

import httpx

from receiver.cloudevents import with_trace
from receiver.destinations.azure import Entra, read_url
from receiver.destinations.base import Outcome, failed, wrong
from receiver.destinations.batches import Batches, Limits
from receiver.destinations.http import open_client, post, reach
from receiver.hooks import Hook
from submitter.event import Event

SHAPE = "eventgrid://:key@topic.region-1.eventgrid.azure.net, or .../topics/name of a namespace"
SCOPE = "https://eventgrid.azure.net/.default"
LIMITS = Limits(event_bytes=1_000_000, events=100, request_bytes=1_000_000)


class EventGridDestination:
    """One topic."""

    def __init__(self, client: httpx.AsyncClient, url: str, key_header: dict[str, str] | None) -> None:
        self._client = client
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
            return [failed(error)] * len(events)
        body = b"[" + b",".join(with_trace(event) for event in events) + b"]"
        outcome, _ = await post(self._client, self._url, body, headers | (self._key_header or {}), now_s)
        return [Outcome(outcome.is_delivered, outcome.answer, outcome.retry_after_s)] * len(events)

    async def reach(self) -> str | None:
        return await reach(self._client, self._url)

    async def close(self) -> None:
        await self._batches.close()
        await self._client.aclose()
        if self._entra is not None:
            await self._entra.close()


def open(hook: Hook, allow_hosts: frozenset[str]) -> EventGridDestination:
    """Open a topic."""
    address = read_url(hook, SHAPE)
    if hook.mode != "structured":
        raise wrong(hook, "mode", repr(hook.mode), "structured", "Event Grid takes whole events: leave `mode` out.")
    levels = address.parts.path.strip("/").split("/")
    if levels == [""]:
        url, key_header = f"{address.endpoint}/api/events?api-version=2018-01-01", {"aeg-sas-key": address.key or ""}
    elif levels[0] == "topics" and len(levels) == 2:
        url = f"{address.endpoint}/topics/{levels[1]}:publish?api-version=2024-06-01"
        key_header = {"authorization": f"SharedAccessKey {address.key}"}
    else:
        raise wrong(hook, "url", f"eventgrid://{address.host}{address.parts.path}", SHAPE, "Mend the path.")
    return EventGridDestination(open_client(hook, allow_hosts), url, key_header if address.key else None)
