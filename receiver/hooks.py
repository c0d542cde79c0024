"""A hook from its table in relay.toml, and which hooks want an event. Pure but for secrets by reference."""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import msgspec

from receiver.destinations import kinds
from receiver.signature import Secret, read_secret
from submitter.errors import InvalidSettings, Problem
from submitter.ledger.base import Route

if TYPE_CHECKING:
    from jmespath.parser import ParsedResult

EVENTS = (
    "task.submitted",
    "task.processing",
    "task.succeed",
    "task.failed",
    "task.archived",
    "task.abandoned",
    "task.submission_unknown",
)
TEST = "task.test"
"""What `kling-relay hooks test` sends, about no real task."""

PROGRESS = frozenset({"task.submitted", "task.processing"})
"""What `latest_only` drops once a later event has overtaken it."""

MINUTE, HOUR = 60, 3600
SCHEDULE_S = (0, 5, MINUTE, 5 * MINUTE, 30 * MINUTE, *(hours * HOUR for hours in (2, 5, 10, 14, 20, 24)))
"""Seconds to wait before each attempt, the first included: Standard Webhooks' advice, and longer."""

NAMES = (
    "name", "url", "events", "when", "latest_only", "secret", "mode", "signature", "schedule", "timeout_s",
    "concurrency", "rate",
)  # fmt: skip


class Hook(msgspec.Struct, frozen=True):
    """One destination of events. `rate` in deliveries a second; None is no limit."""

    name: str
    url: str
    events: frozenset[str] | None = None
    secrets: tuple[Secret, ...] = ()
    mode: str = "structured"
    schedule_s: tuple[float, ...] = SCHEDULE_S
    timeout_s: float = 15
    concurrency: int = 10
    rate: float | None = None
    ordered: bool = False
    when: "ParsedResult | None" = None
    latest_only: bool = False

    def __repr__(self) -> str:
        return f"Hook({self.name!r})"  # its URL may hold a password

    @property
    def scheme(self) -> str:
        """What picks the kind of its destination."""
        return self.url.partition(":")[0]

    @property
    def target(self) -> str:
        """A fingerprint of where it leads: a hook that was disabled is another one with another URL."""
        return hashlib.sha256(self.url.encode()).hexdigest()[:16]

    def route(self, room: int) -> Route:
        """Return the hook as the ledger sees it, with room for `room` more deliveries."""
        return Route(self.name, self.events, self.target, room, self.ordered)


def read_hooks(
    tables: Sequence[Any], follow: Callable[[str, str], str | None], problems: list[Problem]
) -> tuple[Hook, ...]:
    """Read `[[hook]]` tables; `follow(field, reference)` resolves `env:` and `file:`. Problems are appended."""
    hooks: dict[str, Hook] = {}
    for position, table in enumerate(tables if isinstance(tables, list) else [tables], start=1):
        found: list[Problem] = []
        name = table.get("name") if isinstance(table, dict) else None
        where = f"hook[{name or position}]"
        if not isinstance(table, dict):
            found.append(Problem(where, repr(table)[:80], "a table", "Write [[hook]] and its fields below it."))
        elif not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", name):
            found.append(Problem(f"{where}.name", repr(name), "1 to 64 of A-Z a-z 0-9 _ . -", "Name the hook."))
        elif name in hooks:
            found.append(Problem(f"{where}.name", repr(name), "a name of its own", "Rename one of them."))
        else:
            hook = _hook(where, name, table, follow, found)
            if not found:
                hooks[name] = hook
        problems.extend(found)
    return tuple(hooks.values())


def _hook(
    where: str, name: str, table: Mapping[str, Any], follow: Callable[[str, str], str | None], found: list[Problem]
) -> Hook:
    def need(field: str, is_good: bool, limit: str, remedy: str) -> None:
        if not is_good:
            found.append(Problem(f"{where}.{field}", repr(table.get(field)), limit, remedy))

    known = f"one of {', '.join(NAMES)}"
    found.extend(
        Problem(f"{where}.{name}", "unknown", known, "Mend its name.") for name in sorted(set(table) - set(NAMES))
    )
    url = table.get("url")
    resolved = (follow(f"{where}.url", url) or "") if isinstance(url, str) else ""
    scheme = urlsplit(resolved).scheme
    kind = kinds().get(scheme)
    if kind is None:
        known = f"a URL with one of {', '.join(kinds())}"
        found.append(Problem(f"{where}.url", f"scheme {scheme!r}", known, "Give the destination's full URL."))
    elif kind.has_host and not urlsplit(resolved).hostname:
        found.append(Problem(f"{where}.url", f"{scheme}://", f"{scheme}://host/...", "Name the host."))
    elif "secret" in table and not kind.signs:
        limit, remedy = "only HTTP hooks are signed", "Leave it out: a bus has credentials of its own."
        found.append(Problem(f"{where}.secret", f"with {scheme}:", limit, remedy))
    events = table.get("events")
    strings = events is None or (isinstance(events, list) and all(isinstance(event, str) for event in events))
    need("events", strings and set(events or ()) <= set(EVENTS), f"a list of {', '.join(EVENTS)}", "Mend it.")
    mode = table.get("mode", "structured")
    need("mode", mode in ("structured", "binary"), "structured or binary", "Choose one of them.")
    schedule = table.get("schedule", list(SCHEDULE_S))
    need(
        "schedule",
        isinstance(schedule, list) and bool(schedule) and all(_is_number(delay, 0) for delay in schedule),
        "a list of seconds, one for each attempt",
        "For example [0, 5, 60].",
    )
    timeout_s, rate = table.get("timeout_s", 15), table.get("rate")
    concurrency = table.get("concurrency", 10 if kind is None else kind.concurrency)
    need("timeout_s", _is_number(timeout_s, 0.1) and timeout_s <= 60, "0.1 to 60 seconds", "Mend it.")
    need("concurrency", isinstance(concurrency, int) and 1 <= concurrency <= 1000, "1 to 1000", "Mend it.")
    need("rate", rate is None or _is_number(rate, 0.001), "deliveries a second, more than 0", "Mend it.")
    latest_only = table.get("latest_only", False)
    need("latest_only", isinstance(latest_only, bool), "true or false", "Choose one of them.")
    when = _when(where, table.get("when"), found)
    secrets = _secrets(where, table, follow, found)
    if found:
        return Hook(name, "")
    return Hook(
        name=name,
        url=resolved,
        events=None if events is None else frozenset(events),
        secrets=secrets,
        mode=mode,
        schedule_s=tuple(float(delay) for delay in schedule),
        timeout_s=float(timeout_s),
        concurrency=concurrency,
        rate=None if rate is None else float(rate),
        ordered=kind is not None and kind.ordered,
        when=when,
        latest_only=latest_only,
    )


def _when(where: str, expression: object, found: list[Problem]) -> "ParsedResult | None":
    """Compile a JMESPath expression over the event."""
    if expression is None:
        return None
    import jmespath
    from jmespath.exceptions import JMESPathError

    try:
        return jmespath.compile(str(expression))
    except JMESPathError as error:
        said = str(error).partition("\n")[0]
        remedy = "For example: data.vendor == 'kling' && data.metadata.env == 'live' (jmespath.org)."
        found.append(Problem(f"{where}.when", repr(expression), f"a JMESPath expression: {said}", remedy))
        return None


def _secrets(
    where: str, table: Mapping[str, Any], follow: Callable[[str, str], str | None], found: list[Problem]
) -> tuple[Secret, ...]:
    given = table.get("secret", [])
    secrets: list[Secret] = []
    for reference in given if isinstance(given, list) else [given]:
        if not isinstance(reference, str) or reference.partition(":")[0] not in ("env", "file"):
            remedy = 'Keep the secret out of this file: secret = "env:NAME" or "file:PATH".'
            found.append(Problem(f"{where}.secret", "[hidden]", "env:NAME or file:PATH", remedy))
            continue
        for value in filter(None, (part.strip() for part in (follow(f"{where}.secret", reference) or "").split(","))):
            try:
                secrets.append(read_secret(f"{where}.secret", value))
            except InvalidSettings as error:
                found.extend(error.problems)
    wanted = table.get("signature", "v1")
    schemes = {secret.scheme for secret in secrets}
    if wanted not in ("v1", "v1a"):
        found.append(Problem(f"{where}.signature", repr(wanted), "v1 or v1a", "Leave it out, or choose one of them."))
    elif wanted == "v1" and schemes == {"v1a"}:
        # Common verifiers know only v1: a v1a signature alone would be refused by them.
        remedy = 'Add a whsec_ secret beside it, or set signature = "v1a".'
        found.append(Problem(f"{where}.secret", "only a whsk_ secret", "a whsec_ secret with it", remedy))
    elif wanted == "v1a" and "v1a" not in schemes:
        found.append(Problem(f"{where}.secret", "no whsk_ secret", "one, for v1a", "`kling-relay keys new --for v1a`."))
    return tuple(secret for secret in secrets if wanted == "v1" or secret.scheme == "v1a")


def _is_number(value: object, least: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= least
