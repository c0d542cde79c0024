"""Parses the `[[hook]]` tables of relay.toml into hooks, and reports every problem."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from receiver.destinations import kinds
from receiver.hook import EVENTS, SCHEDULE_S, Hook
from receiver.signature import Secret, read_secret
from submitter.errors import InvalidSettings, Problem
from submitter.schedule import DELAY_MAX_S
from submitter.web_address import why_not_server, why_not_web

if TYPE_CHECKING:
    from jmespath.parser import ParsedResult

NAMES = (
    "name", "url", "events", "when", "latest_only", "raw", "max_mb", "secret", "mode", "signature", "schedule",
    "timeout_s", "concurrency", "rate",
)  # fmt: skip


def read_hooks(
    tables: Sequence[Any], follow: Callable[[str, str], str | None], problems: list[Problem]
) -> tuple[Hook, ...]:
    """Return the hooks that have no problem; append the problems of the others to `problems`.

    `follow(field, text)` returns `text`, with `env:NAME` or `file:PATH` resolved; None when that failed.
    """
    hooks: dict[str, Hook] = {}
    for position, table in enumerate(tables if isinstance(tables, list) else [tables], start=1):
        found: list[Problem] = []
        name = table.get("name") if isinstance(table, dict) else None
        where = f"hook[{name or position}]"
        if not isinstance(table, dict):
            found.append(Problem(where, repr(table)[:80], "a table", "Write [[hook]] and the fields below it."))
        elif not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", name):
            found.append(Problem(f"{where}.name", repr(name), "1 to 64 of A-Z a-z 0-9 _ . -", "Set `name`."))
        elif name in hooks:
            found.append(Problem(f"{where}.name", repr(name), "a unique name", "Rename one of the hooks."))
        else:
            hook = _hook(where, name, table, follow, found)
            if not found:
                hooks[name] = hook
        problems.extend(found)
    return tuple(hooks.values())


def _hook(
    where: str, name: str, table: Mapping[str, Any], follow: Callable[[str, str], str | None], found: list[Problem]
) -> Hook:
    def require(field: str, is_good: bool, limit: str, remedy: str) -> None:
        if not is_good:
            found.append(Problem(f"{where}.{field}", repr(table.get(field)), limit, remedy))

    known = f"one of {', '.join(NAMES)}"
    unknown = sorted(set(table) - set(NAMES))
    found.extend(Problem(f"{where}.{field}", "unknown field", known, "Correct or remove it.") for field in unknown)
    url = table.get("url")
    resolved = (follow(f"{where}.url", url) or "") if isinstance(url, str) else ""
    scheme = resolved.partition(":")[0]
    kind = kinds().get(scheme)
    if kind is None:
        known = f"a URL with one of {', '.join(kinds())}"
        found.append(Problem(f"{where}.url", f"scheme {scheme!r}", known, "Set `url` to the destination's full URL."))
    elif kind.has_host and (wrong := _why_no_destination(resolved)) is not None:
        limit, remedy = f"{scheme}://host/...: {wrong}", "Correct the destination's URL."
        found.append(Problem(f"{where}.url", f"{scheme}://", limit, remedy))
    elif "secret" in table and not kind.signs:
        limit, remedy = "only HTTP hooks are signed", "Remove `secret`: a bus is secured by its own credentials."
        found.append(Problem(f"{where}.secret", f"with {scheme}:", limit, remedy))
    events = table.get("events")
    is_list = events is None or (isinstance(events, list) and all(isinstance(event, str) for event in events))
    is_known = is_list and events != [] and set(events or ()) <= set(EVENTS)
    require("events", is_known, f"a list of {', '.join(EVENTS)}", "Use only these; without `events`, all are sent.")
    mode = table.get("mode", "structured")
    require("mode", mode in ("structured", "binary"), "structured or binary", "Use one of them.")
    schedule = table.get("schedule", list(SCHEDULE_S))
    require(
        "schedule",
        isinstance(schedule, list)
        and bool(schedule)
        and all(_is_number(delay, 0) and delay <= DELAY_MAX_S for delay in schedule),
        f"a list of seconds, one for each attempt, each at most {DELAY_MAX_S}",
        "Use for example [0, 5, 60].",
    )
    timeout_s, rate = table.get("timeout_s", 15), table.get("rate")
    concurrency = table.get("concurrency", 10 if kind is None else kind.concurrency)
    require("timeout_s", _is_number(timeout_s, 0.1) and timeout_s <= 60, "0.1 to 60 seconds", "Use 0.1 to 60.")
    is_count = isinstance(concurrency, int) and not isinstance(concurrency, bool) and 1 <= concurrency <= 1000
    require("concurrency", is_count, "1 to 1000", "Use 1 to 1000.")
    require("rate", rate is None or _is_number(rate, 0.001), "deliveries per second", "Use 0.001 or more.")
    latest_only, raw = table.get("latest_only", False), table.get("raw", False)
    require("latest_only", isinstance(latest_only, bool), "true or false", "Use one of them.")
    require("raw", isinstance(raw, bool), "true or false", "Use one of them.")
    max_mb = table.get("max_mb", 1024)
    is_size = isinstance(max_mb, int) and not isinstance(max_mb, bool) and 1 <= max_mb <= 65536
    require("max_mb", is_size, "1 to 65536 (MiB)", "Use 1 to 65536.")
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
        raw=raw,
        max_mb=max_mb,
    )


def _why_no_destination(url: str) -> str | None:
    if url.startswith(("http://", "https://")):
        return why_not_web(url)
    return why_not_server(url) or (None if urlsplit(url).netloc.rpartition("@")[2] else "it has no host")


def _when(where: str, expression: object, found: list[Problem]) -> "ParsedResult | None":
    """Compile a JMESPath expression over the event."""
    if expression is None:
        return None
    import jmespath
    from jmespath.exceptions import JMESPathError

    try:
        return jmespath.compile(str(expression))
    except JMESPathError as error:
        reason = str(error).partition("\n")[0]
        remedy = "Use for example: data.vendor == 'kling' && data.metadata.env == 'live' (jmespath.org)."
        found.append(Problem(f"{where}.when", repr(expression), f"a JMESPath expression: {reason}", remedy))
        return None


def _secrets(
    where: str, table: Mapping[str, Any], follow: Callable[[str, str], str | None], found: list[Problem]
) -> tuple[Secret, ...]:
    references = table.get("secret", [])
    if "secret" in table and references == []:
        found.append(Problem(f"{where}.secret", "[]", "set but empty", "Name a secret, or remove `secret`."))
    secrets: list[Secret] = []
    for reference in references if isinstance(references, list) else [references]:
        if not isinstance(reference, str) or reference.partition(":")[0] not in ("env", "file"):
            remedy = 'Keep the secret out of this file: set `secret` to "env:NAME" or "file:PATH".'
            found.append(Problem(f"{where}.secret", "[hidden]", "env:NAME or file:PATH", remedy))
            continue
        resolved = follow(f"{where}.secret", reference)
        for value in [] if resolved is None else resolved.split(","):
            try:
                secrets.append(read_secret(f"{where}.secret", value))
            except InvalidSettings as error:
                found.extend(error.problems)
    signature = table.get("signature", "v1")
    schemes = {secret.scheme for secret in secrets}
    if signature not in ("v1", "v1a"):
        found.append(Problem(f"{where}.signature", repr(signature), "v1 or v1a", "Use one of them."))
    elif signature == "v1" and schemes == {"v1a"}:
        # Common verification libraries support only v1, and would reject a signature by v1a alone.
        remedy = 'Add a whsec_ secret, or set signature = "v1a".'
        found.append(Problem(f"{where}.secret", "only a whsk_ secret", "with a whsec_ secret", remedy))
    elif signature == "v1a" and "v1a" not in schemes:
        remedy = "Create one with `kling-relay keys new --for v1a`."
        found.append(Problem(f"{where}.secret", "no whsk_ secret", "required by v1a", remedy))
    return tuple(secret for secret in secrets if signature == "v1" or secret.scheme == "v1a")


def _is_number(value: object, least: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= least
