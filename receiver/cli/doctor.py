"""`kling-relay doctor`: diagnostics of everything that a first callback needs, each with a remedy."""

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

import click
import httpx
import msgspec

from receiver.cli.console import print_json, run
from receiver.destinations import kinds, open_destination
from receiver.settings import ReceiverSettings, load_receiver_settings
from receiver.signature import sign
from submitter.callback_url import callback_url, redact
from submitter.clock import Clock
from submitter.egress import is_public, resolve
from submitter.errors import LedgerUnavailable, RelayError
from submitter.http import VendorHttp
from submitter.ledger import open_ledger, without_password
from submitter.settings import VendorSettings
from submitter.vendors.base import HttpAnswer
from submitter.vendors.registry import vendors

CLOCK_WARN_S, CLOCK_FAIL_S = 30, 240
TEST_ID = "kling-relay-doctor"


class Finding(msgspec.Struct, frozen=True):
    """The result of one check: its state (`ok`, `warn` or `fail`), the observation, and the remedy."""

    check: str
    state: str
    seen: str
    remedy: str = ""


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def doctor(as_json: bool) -> None:
    """Check the setup end to end, and show how to fix each problem.

    Run it after every change of the settings, with the environment of `serve` and while `serve` runs.
    It checks the settings, the ledger, the keys, each vendor's credentials, the clock, the public URL
    (by test callbacks, as a vendor sends them) and whether each hook is reachable.

    It costs nothing: a vendor gets one free account query, and a hook gets no event.

    \b
      kling-relay doctor
      kling-relay doctor --json

    Exit status: 0 when no check fails (warnings are allowed), else 1.
    """
    findings = run(_run_checks(as_json))
    if as_json:
        print_json(findings)
    failed = sum(finding.state == "fail" for finding in findings)
    if not as_json:
        checks = "1 check" if failed == 1 else f"{failed} checks"
        click.echo(f"{checks} failed" if failed else "no check failed: ready for the first callback")
    sys.exit(1 if failed else 0)


async def _run_checks(as_json: bool) -> list[Finding]:
    """Run every check, and print each finding at once unless JSON is wanted."""
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
    """Yield the findings, one check after the other. Invalid settings raise InvalidSettings before the first."""
    yield Finding("settings", "ok", "valid")
    yield await _ledger(settings.common.ledger)
    for finding in _keys(settings):
        yield finding
    for name, vendor in settings.common.vendors.items():
        async for finding in _vendor(name, vendor, settings, clock):
            yield finding
    if not settings.common.vendors:
        remedies = " ".join(setup.credentials_remedy for setup in vendors().values())
        yield Finding(
            "vendors", "warn", "no vendor has credentials: this environment can neither submit nor poll", remedies
        )
    async for finding in _public_url(settings, clock):
        yield finding
    if not settings.hooks:
        yield Finding("hooks", "warn", "no hooks", "Add [[hook]] tables to relay.toml to receive events.")
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
        return Finding(
            "ledger",
            "fail",
            str(error),
            "Check KLING_RELAY_LEDGER and its server, or for SQLite the directory's permissions.",
        )
    dead, quarantined = counts["delivery.dead"], counts["quarantine"]
    seen = f"{without_password(url)}: {sum(n for name, n in counts.items() if name.startswith('task.'))} open tasks"
    if dead or quarantined:
        remedy = (
            "List dead letters with `kling-relay hooks dead`. If a quarantined body has a status or a field"
            " that kling-relay does not know, open an issue."
        )
        return Finding("ledger", "warn", f"{seen}, {dead} dead letters, {quarantined} in quarantine", remedy)
    return Finding("ledger", "ok", seen)


def _keys(settings: ReceiverSettings) -> Iterator[Finding]:
    ring = settings.common.ring
    if ring is None:
        yield Finding("keys", "fail", "KLING_RELAY_KEYS is not set", "Generate them with `kling-relay keys new`.")
    else:
        yield Finding("keys", "ok", f"{ring.keys[0].id} signs callback URLs; keys that verify them: {len(ring.keys)}")


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
        yield Finding(name, "fail", f"no response from {host}: {answer.reason}", remedy)
        return
    try:
        yield Finding(name, "ok", f"credentials accepted; {vendor.vendor.read_probe(answer)}")
    except RelayError as error:
        yield Finding(name, "fail", str(error), "Fix the cause in this message, then run doctor again.")
    yield _clock(name, answer.headers.get("date"), clock)
    if vendor.vendor.signs_callbacks and not settings.secrets[name]:
        variable = f"{name.upper()}_WEBHOOK_SECRET"
        remedy = f"Create a Webhook Secret in the vendor's console, and set {variable}: signatures are a second proof."
        yield Finding(f"{name} signature", "warn", "callbacks are authenticated by their secret URL alone", remedy)


def _clock(name: str, date: str | None, clock: Clock) -> Finding:
    try:
        off_s = clock.now_s() - parsedate_to_datetime(date or "").timestamp()
    except ValueError:
        return Finding("clock", "warn", f"not checked: the response of {name} has no valid Date header")
    seen = f"{abs(off_s):.0f} s {'ahead of' if off_s > 0 else 'behind'} {name}'s clock"
    if abs(off_s) >= CLOCK_WARN_S:
        state = "fail" if abs(off_s) >= CLOCK_FAIL_S else "warn"
        return Finding("clock", state, seen, "Synchronize this machine's clock (NTP): a signature is valid for 300 s.")
    return Finding("clock", "ok", seen)


async def _public_url(settings: ReceiverSettings, clock: Clock) -> AsyncIterator[Finding]:
    url, ring = settings.common.public_url, settings.common.ring
    if url is None:
        remedy = "Set it to the https URL by which vendors reach `serve`. Without one, submit with --no-callback."
        yield Finding("public URL", "fail", "KLING_RELAY_PUBLIC_URL is not set", remedy)
        return
    if ring is None:
        return
    parts = urlsplit(url)
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        addresses = await resolve(parts.hostname or "", port)
    except httpx.ConnectError as error:
        yield Finding("public URL", "fail", str(error), "Check the host name in KLING_RELAY_PUBLIC_URL.")
        return
    private = [address for address in addresses if not is_public(address)]
    if private:
        remedy = "Use a public host name: only a vendor in the same network (the sandbox) reaches this address."
        yield Finding("public URL", "warn", f"{parts.hostname} resolves to {private[0]}, not a public address", remedy)
    if parts.scheme != "https":
        remedy = "Use https: over http, anyone on the network path can read callback URLs and forge callbacks."
        yield Finding("public URL", "warn", "not https", remedy)
    async for finding in _callback(settings, clock, url):
        yield finding


async def _callback(settings: ReceiverSettings, clock: Clock, url: str) -> AsyncIterator[Finding]:
    """Send two test callbacks to the public URL, one with a valid token and one with a wrong token."""
    ring = settings.common.ring
    assert ring is not None
    now_ms = clock.now_ms()
    vendor, body = next((name, setup.test_callback(now_ms)) for name, setup in vendors().items() if setup.test_callback)
    test = callback_url(url, ring, vendor, TEST_ID, now_ms / 1000)
    headers = {"content-type": "application/json"}
    if settings.secrets[vendor]:
        headers |= sign(settings.secrets[vendor], "doctor", now_ms // 1000, body)
    remedy = "Check that `kling-relay serve` runs, and that the proxy forwards POST /callbacks/... unchanged."
    try:
        async with httpx.AsyncClient(timeout=10) as client:
            right, wrong = await asyncio.gather(
                client.post(test, content=body, headers=headers),
                client.post(test[:-2] + ("AA" if test[-2:] != "AA" else "BB"), content=body, headers=headers),
            )
    except httpx.HTTPError as error:
        reason = redact(str(error)) or type(error).__name__
        yield Finding("public URL", "fail", f"no response: {reason}", remedy)
        return
    if right.status_code == 200 and right.headers.get("kling-relay-result") == "test" and wrong.status_code == 404:
        yield Finding("public URL", "ok", f"{url} reaches this receiver, and the keys match")
        yield Finding("console test", "ok", f"callback URL for the test in {vendor}'s console: {test}")
    elif right.status_code in (401, 403, 404) and "problem+json" in right.headers.get("content-type", ""):
        remedy = "Restart `serve` with the KLING_RELAY_KEYS and the webhook secret of this shell."
        seen = f"HTTP {right.status_code}: the receiver has other keys or webhook secrets than this shell"
        yield Finding("public URL", "fail", seen, remedy)
    else:
        yield Finding("public URL", "fail", f"HTTP {right.status_code}: not the answer of a receiver", remedy)


async def _hook(name: str, settings: ReceiverSettings) -> Finding:
    """Check that a hook is reachable, without sending it an event."""
    hook = next(hook for hook in settings.hooks if hook.name == name)
    check = f"hook {name}"
    destination = open_destination(hook, settings.common.allow_hosts)
    try:
        reached = await destination.reach()
    finally:
        await destination.close()
    if reached is not None:
        return Finding(
            check, "fail", reached, f"Fix its `url` or the network, then run `kling-relay hooks test {name}`."
        )
    if not kinds()[hook.scheme].signs:
        return Finding(check, "ok", f"reachable; `kling-relay hooks test {name}` sends it a test event")
    if not hook.secrets:
        remedy = 'Generate a secret with `kling-relay keys new --for hook`, and set `secret = "env:NAME"` in its table.'
        return Finding(check, "warn", "reachable; its events are unsigned: it has no `secret`", remedy)
    return Finding(check, "ok", f"reachable; `kling-relay hooks test {name}` sends it a test event")
