"""Sends events to HTTP webhooks: a POST in the CloudEvents HTTP binding, signed by Standard Webhooks.

Event: in structured mode the body is the CloudEvent; in binary mode it is the data, and the attributes are
`ce-...` headers. Other headers: `content-type`, `traceparent`, `webhook-id`, `webhook-timestamp` and, if the hook
has a `secret`, `webhook-signature`.

    status    outcome
    2xx       delivered
    3xx       failed; a redirect is not followed, because that would send a signed event to another address
    410       failed; the endpoint asks for no further events
    413       failed permanently: the event is too large
    429, 503  failed; `Retry-After` can set the delay, at most one day
    other     failed

Order is not kept: a task's events can be sent concurrently, and a retry can arrive after a later event.
Sources: https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/bindings/http-protocol-binding.md,
https://www.standardwebhooks.com, RFC 9110.
"""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from datetime import UTC
from email.utils import parsedate_to_datetime
from urllib.parse import parse_qsl, unquote, urlsplit

from receiver.destinations.cloudevents import encode, traceparent
from receiver.destinations.http_client import GuardedClient, HttpClient, NoAnswer
from receiver.destinations.outcome import Outcome
from receiver.hook import Hook
from receiver.signature import sign
from submitter.egress import CannotConnect, connect
from submitter.event import Event

BODY_TIMEOUT_S = 1.0
RETRY_AFTER_MAX_S = 86400.0


class HttpDestination:
    """One HTTP endpoint, with its own connection pool."""

    def __init__(self, hook: Hook, client: HttpClient, allow_hosts: frozenset[str]) -> None:
        self._hook = hook
        self._client = client
        self._allow_hosts = allow_hosts
        self._hidden = parts_to_hide(hook.url)

    async def send(self, event: Event, now_s: float) -> Outcome:
        encoded = encode(event, self._hook.mode)
        headers = {f"ce-{name}": _header(value) for name, value in encoded.attributes.items()}
        headers |= {
            "user-agent": "kling-relay",
            "content-type": encoded.content_type,
            "traceparent": traceparent(event),
            **sign(self._hook.secrets, event.id, int(now_s), encoded.body),
        }
        outcome, _ = await post(self._client, self._hook.url, encoded.body, headers, now_s, hidden=self._hidden)
        return outcome

    async def reach(self) -> str | None:
        return await reach(self._hook.url, self._allow_hosts)

    async def close(self) -> None:
        await self._client.close()


def open(hook: Hook, allow_hosts: frozenset[str]) -> HttpDestination:
    """Return the destination of a hook. It reaches public addresses, and the hosts in `allow_hosts`."""
    return HttpDestination(hook, open_client(hook, allow_hosts), allow_hosts)


def open_client(hook: Hook, allow_hosts: frozenset[str]) -> GuardedClient:
    """Return an SSRF-guarded HTTP client with a hook's timeout and as many connections as its concurrency."""
    return GuardedClient(allow_hosts, timeout_s=hook.timeout_s, connections=hook.concurrency)


async def post(
    client: HttpClient,
    url: str,
    body: bytes,
    headers: Mapping[str, str],
    now_s: float,
    *,
    body_timeout_s: float = BODY_TIMEOUT_S,
    hidden: Sequence[str] = (),
) -> tuple[Outcome, bytes]:
    """Send one POST request; return its outcome, and as much of the response body as arrives in `body_timeout_s`.

    Each of `hidden` is masked in the outcome.

    The status alone decides the outcome. The body is read because only then is the connection reusable.
    """
    try:
        answer = await client.post(url, body, headers, body_timeout_s)
    except NoAnswer as error:
        return Outcome(False, str(error)[:500]), b""
    status = answer.status
    if 200 <= status < 300:
        return Outcome(True, f"HTTP {status}"), answer.body
    retry_after_s = read_retry_after(answer.retry_after, now_s) if status in (429, 503) else None
    shown = answer.body[:4000].decode(errors="replace")
    for part in hidden:
        shown = shown.replace(part, "[hidden]")
    text = f"HTTP {status} {shown[:200]}".replace("\n", " ").strip()
    return Outcome(False, text, retry_after_s, is_gone=status == 410, is_final=status == 413), answer.body


def parts_to_hide(url: str) -> list[str]:
    """Return the parts of a hook's URL that may be secret, the longest first: error pages often repeat a request."""
    parts = urlsplit(url)
    login = unquote(parts.netloc.rpartition("@")[0])
    found = {parts.path, unquote(parts.path), parts.query, unquote(parts.query), *dict(parse_qsl(parts.query)).values()}
    if login:
        found |= {login, unquote(parts.password or ""), b64encode(login.encode()).decode()}
    return sorted((part for part in found if len(part) > 3), key=len, reverse=True)


async def reach(url: str, allow_hosts: frozenset[str]) -> str | None:
    """Return None if the URL's server can be connected to, or the error if not. No request is sent."""
    try:
        await connect(url, allow_hosts)
    except CannotConnect as error:
        return str(error)
    return None


def read_retry_after(value: str | None, now_s: float) -> float | None:
    """Return the delay of a Retry-After header in seconds (RFC 9110: seconds or a date), at most one day."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return min(float(value[:12]), RETRY_AFTER_MAX_S)
    try:
        moment = parsedate_to_datetime(value)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return min(max(moment.timestamp() - now_s, 0.0), RETRY_AFTER_MAX_S)


def _header(value: str) -> str:
    """Percent-encode spaces, quotes, percent signs and non-ASCII characters (CloudEvents HTTP binding, 3.1.3.2)."""
    return "".join(
        char if "!" <= char <= "~" and char not in '"%' else "".join(f"%{byte:02X}" for byte in char.encode())
        for char in value
    )
