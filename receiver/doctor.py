"""`kling-relay doctor`: checks everything that a first callback needs, and says what to mend."""

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

import click
import httpx
import msgspec

from receiver.cli import print_json, run
from receiver.destinations import kinds, open_destination
from receiver.settings import ReceiverSettings, load_receiver_settings
from receiver.signature import sign
from submitter.callback_url import callback_url, redact
from submitter.clock import Clock
from submitter.egress import is_public, resolve
from submitter.errors import LedgerUnavailable, RelayError
from submitter.http import VendorHttp
from submitter.installed import vendors
from submitter.ledger import open_ledger, shown
from submitter.settings import VendorSettings
from submitter.vendors.base import HttpAnswer

CLOCK_WARN_S, CLOCK_FAIL_S = 30, 240
TEST_ID = "kling-relay-doctor"


class Finding(msgspec.Struct, frozen=True):
    """One check: `ok`, `warn` or `fail`, what was seen, and what mends it."""

    check: str
    state: str
    seen: str
    remedy: str = ""


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(as_json: bool) -> None:
    """Check the settings, the ledger, the keys, the clock, the public URL and each hook.

    Exit status 0 when nothing fails. Costs nothing: the vendor is only asked for the account.
    """
    findings = run(_collect(as_json))
    if as_json:
        print_json(findings)
    failed = sum(finding.state == "fail" for finding in findings)
    if not as_json:
        click.echo(f"{failed} to mend" if failed else "all that a first callback needs is there")
    sys.exit(1 if failed else 0)


async def _collect(as_json: bool) -> list[Finding]:
    findings = []
    async for finding in examine(load_receiver_settings(), Clock()):
        findings.append(finding)
        if not as_json:
            mark = {"ok": " ok ", "warn": "warn", "fail": "FAIL"}[finding.state]
            click.echo(f"[{mark}] {finding.check}: {finding.seen}")
            if finding.remedy:
                click.echo(f"       {finding.remedy}")
    return findings


async def examine(settings: ReceiverSettings, clock: Clock) -> AsyncIterator[Finding]:
    """Check one thing after the other; settings that cannot be read at all raise InvalidSettings before."""
    yield Finding("settings", "ok", "read")
    yield await _ledger(settings.common.ledger)
    for finding in _keys(settings):
        yield finding
    for name, vendor in settings.common.vendors.items():
        async for finding in _vendor(name, vendor, settings, clock):
            yield finding
    if not settings.common.vendors:
        remedies = " ".join(setup.credentials_remedy for setup in vendors().values())
        yield Finding("vendors", "warn", "none has credentials: nothing can be submitted or polled from here", remedies)
    async for finding in _public_url(settings, clock):
        yield finding
    if not settings.hooks:
        yield Finding("hooks", "warn", "none", "Add [[hook]] tables to relay.toml to be told of events.")
    for hook in settings.hooks:
        yield await _hook(hook.name, settings)


async def _ledger(url: str) -> Finding:
    try:
        ledger = open_ledger(url)
        try:
            counts = await ledger.counts()
        finally:
            await ledger.close()
    except LedgerUnavailable as error:
        return Finding("ledger", "fail", str(error), "Mend KLING_RELAY_LEDGER, or the folder's permissions.")
    dead, quarantined = counts["delivery.dead"], counts["quarantine"]
    seen = f"{shown(url)}: {sum(n for name, n in counts.items() if name.startswith('task.'))} open tasks"
    if dead or quarantined:
        remedy = "See `kling-relay hooks dead`; a new word in a body in quarantine is worth an issue to us."
        return Finding("ledger", "warn", f"{seen}, {dead} dead letters, {quarantined} in quarantine", remedy)
    return Finding("ledger", "ok", seen)


def _keys(settings: ReceiverSettings) -> Iterator[Finding]:
    ring = settings.common.ring
    if ring is None:
        yield Finding("keys", "fail", "KLING_RELAY_KEYS is not set", "Make them: `kling-relay keys new`.")
    else:
        yield Finding("keys", "ok", f"{ring.keys[0].id} signs, {len(ring.keys)} verify")


async def _vendor(
    name: str, vendor: VendorSettings, settings: ReceiverSettings, clock: Clock
) -> AsyncIterator[Finding]:
    http = VendorHttp(connect_timeout_s=5, answer_timeout_s=15)
    try:
        answer = await http.run(vendor.vendor.probe(clock.now_s()))
    finally:
        await http.close()
    if not isinstance(answer, HttpAnswer):
        host = urlsplit(vendor.vendor.base_url).netloc
        remedy = f"Check the network, and {name.upper()}_BASE_URL."
        yield Finding(name, "fail", f"{host} does not answer: {answer.reason}", remedy)
        return
    try:
        yield Finding(name, "ok", f"credentials accepted; {vendor.vendor.read_probe(answer)}")
    except RelayError as error:
        yield Finding(name, "fail", str(error), "Mend what it says, then run doctor again.")
    yield _clock(name, answer.headers.get("date"), clock)
    if vendor.vendor.signs_callbacks and not settings.secrets[name]:
        remedy = f"Make a Webhook Secret in its console and set {name.upper()}_WEBHOOK_SECRET: a second proof."
        yield Finding(f"{name} signature", "warn", "callbacks are trusted by their URL alone", remedy)


def _clock(name: str, date: str | None, clock: Clock) -> Finding:
    try:
        off_s = clock.now_s() - parsedate_to_datetime(date or "").timestamp()
    except ValueError:
        return Finding("clock", "warn", f"{name} does not say what time it is")
    seen = f"{abs(off_s):.0f} s {'ahead of' if off_s > 0 else 'behind'} {name}'s"
    if abs(off_s) >= CLOCK_WARN_S:
        state = "fail" if abs(off_s) >= CLOCK_FAIL_S else "warn"
        return Finding("clock", state, seen, "Set this machine's clock (NTP): signatures are good for 300 s.")
    return Finding("clock", "ok", seen)


async def _public_url(settings: ReceiverSettings, clock: Clock) -> AsyncIterator[Finding]:
    url, ring = settings.common.public_url, settings.common.ring
    if url is None:
        remedy = "Set it to the https URL that leads to `kling-relay serve`; without it, use --no-callback."
        yield Finding("public URL", "fail", "KLING_RELAY_PUBLIC_URL is not set", remedy)
        return
    if ring is None:
        return
    parts = urlsplit(url)
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        addresses = await resolve(parts.hostname or "", port)
    except httpx.ConnectError as error:
        yield Finding("public URL", "fail", str(error), "Check the name in KLING_RELAY_PUBLIC_URL.")
        return
    inside = [address for address in addresses if not is_public(address)]
    if inside:
        remedy = "Vendors cannot reach it, unless they run here too (the sandbox)."
        yield Finding("public URL", "warn", f"{parts.hostname} leads to {inside[0]}, inside a private network", remedy)
    if parts.scheme != "https":
        yield Finding("public URL", "warn", "not https", "Anyone on the way can read, and use, callback URLs.")
    async for finding in _callback(settings, clock, url):
        yield finding


async def _callback(settings: ReceiverSettings, clock: Clock, url: str) -> AsyncIterator[Finding]:
    """Call our own public URL as Kling's console would: with the right URL, and with a wrong one."""
    ring = settings.common.ring
    assert ring is not None
    now_ms = clock.now_ms()
    test = callback_url(url, ring, "kling", TEST_ID, now_ms / 1000)
    body = msgspec.json.encode(
        {"id": "0", "status": "submitted", "outputs": [], "message": "", "create_time": now_ms, "update_time": now_ms}
    )
    headers = {"content-type": "application/json"}
    if settings.secrets["kling"]:
        headers |= sign(settings.secrets["kling"], "doctor", now_ms // 1000, body)
    remedy = "Is `kling-relay serve` running, and does the proxy pass POST /callbacks/... on unchanged?"
    try:
        async with httpx.AsyncClient(timeout=10) as client:
            right, wrong = await asyncio.gather(
                client.post(test, content=body, headers=headers),
                client.post(test[:-2] + ("AA" if test[-2:] != "AA" else "BB"), content=body, headers=headers),
            )
    except httpx.HTTPError as error:
        reason = redact(str(error)) or type(error).__name__
        yield Finding("public URL", "fail", f"does not answer: {reason}", remedy)
        return
    if right.status_code == 200 and right.headers.get("kling-relay-result") == "test" and wrong.status_code == 404:
        yield Finding("public URL", "ok", f"{url} reaches this receiver, with these keys")
        yield Finding("console test", "ok", f"for Kling's console: {test}")
    elif right.status_code in (401, 403, 404) and "problem+json" in right.headers.get("content-type", ""):
        remedy = "Give `serve` the same KLING_RELAY_KEYS and webhook secret as this shell, and restart it."
        seen = f"a receiver answers HTTP {right.status_code}: it has other keys or secrets"
        yield Finding("public URL", "fail", seen, remedy)
    else:
        yield Finding("public URL", "fail", f"something else answers there: HTTP {right.status_code}", remedy)


async def _hook(name: str, settings: ReceiverSettings) -> Finding:
    """Check that a hook can be reached, without sending it an event."""
    hook = next(hook for hook in settings.hooks if hook.name == name)
    check = f"hook {name}"
    destination = open_destination(hook, settings.common.allow_hosts)
    try:
        reached = await destination.reach()
    finally:
        await destination.close()
    if reached is not None:
        return Finding(check, "fail", reached, f"Mend its URL, or the network; then `kling-relay hooks test {name}`.")
    if not kinds()[hook.scheme].signs:
        return Finding(check, "ok", f"reachable; `kling-relay hooks test {name}` sends it a test event")
    if not hook.secrets:
        remedy = 'Give it one: `kling-relay keys new --for hook`, and secret = "env:NAME" in its table.'
        return Finding(check, "warn", "reachable; its events are not signed: it has no secret", remedy)
    return Finding(check, "ok", f"reachable; `kling-relay hooks test {name}` sends it a test event")
