"""`kling-relay doctor`: diagnostics of everything that a first callback needs, each with a remedy."""

import asyncio
import hashlib
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import urlsplit

import click
import httpx
import msgspec

from receiver.cli.console import echo, print_json, run
from receiver.destinations import kinds, open_destination
from receiver.settings import ReceiverSettings, load_receiver_settings
from receiver.signature import sign
from submitter.callback_url import callback_url, redact
from submitter.clock import Clock
from submitter.egress import CannotConnect, is_public, resolve
from submitter.errors import InvalidRequest, InvalidSettings, LedgerUnavailable, RelayError
from submitter.http import VendorHttp
from submitter.ledger import open_ledger
from submitter.ledger.engines import file_of
from submitter.media.store import open_media_store
from submitter.settings import VendorSettings
from submitter.transition import ADOPTION_SKEW_MS
from submitter.vendors.base import HttpAnswer
from submitter.vendors.reading import object_or_empty
from submitter.vendors.registry import vendors
from submitter.web_address import without_password

VENDORS = "vendors"
CLOCK_WARN_S, CLOCK_FAIL_S = 15, ADOPTION_SKEW_MS / 1000
TEST_ID = "kling-relay-doctor"
SQLITE_PROCESSES = 2
"""More than this accept no more callbacks on one file (measured in tests/README.md)."""


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
    (by a test callback, as a vendor sends it), the media store (by a small file that it publishes), and
    whether each hook can be connected to.

    It costs nothing: a vendor gets one free account query, and a hook gets no request.

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
        click.echo(_verdict(findings, failed))
    sys.exit(1 if failed else 0)


def _verdict(findings: Sequence[Finding], failed: int) -> str:
    if failed:
        return "1 check failed" if failed == 1 else f"{failed} checks failed"
    if any(finding.check == VENDORS for finding in findings):
        return "no check failed, but nothing can be submitted or polled from here: no vendor has credentials"
    return "no check failed: ready for the first callback"


async def _run_checks(as_json: bool) -> list[Finding]:
    """Run every check, and print each finding at once unless JSON is wanted."""
    findings = []
    async for finding in _findings():
        findings.append(finding)
        if not as_json:
            mark = {"ok": " ok ", "warn": "warn", "fail": "FAIL"}[finding.state]
            echo(f"[{mark}] {finding.check}: {finding.seen}")
            if finding.remedy:
                echo(f"       {finding.remedy}")
    return findings


async def _findings() -> AsyncIterator[Finding]:
    """Yield the findings; what ends the examination early is the last one."""
    try:
        async for finding in examine(load_receiver_settings(), Clock()):
            yield finding
    except (InvalidSettings, InvalidRequest) as error:
        for problem in error.problems:
            yield Finding("settings", "fail", f"{problem.field}: {problem.value} ({problem.limit})", problem.remedy)
    except Exception as error:  # noqa: BLE001 - with --json, the answer is JSON whatever fails
        reason = redact(str(error)) or type(error).__name__
        yield Finding("doctor", "fail", reason, "Correct this, then run doctor again: later checks did not run.")


async def examine(settings: ReceiverSettings, clock: Clock) -> AsyncIterator[Finding]:
    """Yield the findings, one check after the other. Invalid settings raise InvalidSettings before the first."""
    yield Finding("settings", "ok", "valid")
    yield await _ledger(settings.common.ledger)
    if settings.workers > 1:
        yield _processes(settings.workers, settings.common.ledger, os.cpu_count() or 1)
    for finding in _keys(settings):
        yield finding
    for name, vendor in settings.common.vendors.items():
        async for finding in _vendor(name, vendor, settings, clock):
            yield finding
    if not settings.common.vendors:
        remedies = " ".join(setup.credentials_remedy for setup in vendors().values())
        yield Finding(
            VENDORS, "warn", "no vendor has credentials: this environment can neither submit nor poll", remedies
        )
    for finding in _signatures(settings):
        yield finding
    async for finding in _public_url(settings, clock):
        yield finding
    for finding in await _isolated("media store", _media_store(settings, clock)):
        yield finding
    if not settings.hooks:
        yield Finding("hooks", "warn", "no hooks", "Add [[hook]] tables to relay.toml to receive events.")
    for hook in settings.hooks:
        for finding in await _isolated(f"hook {hook.name}", _hook(hook.name, settings)):
            yield finding


async def _isolated(check: str, work: Awaitable[Finding]) -> list[Finding]:
    """Return the finding of one check, or what ended it: the checks after it still run."""
    try:
        return [await work]
    except (InvalidSettings, InvalidRequest) as error:
        return [
            Finding(check, "fail", f"{problem.field}: {problem.value} ({problem.limit})", problem.remedy)
            for problem in error.problems
        ]
    except Exception as error:  # noqa: BLE001 - stores and buses have their own errors
        reason = redact(str(error)) or type(error).__name__
        return [Finding(check, "fail", reason, "Correct this, then run doctor again.")]


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


def _processes(workers: int, ledger: str, processors: int) -> Finding:
    """Say whether so many server processes have what they need."""
    seen = f"`serve` runs {workers} on {processors} processor{'' if processors == 1 else 's'}"
    if workers > processors:
        remedy = f"Set KLING_RELAY_WORKERS to {processors} at most: more of them only take time from each other."
        return Finding("processes", "warn", seen, remedy)
    if workers > SQLITE_PROCESSES and file_of(ledger) is not None:
        remedy = f"Set KLING_RELAY_WORKERS to {SQLITE_PROCESSES}, or use PostgreSQL: a file has one writer at a time."
        return Finding("processes", "warn", f"{seen} and one SQLite file", remedy)
    return Finding("processes", "ok", seen)


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


def _signatures(settings: ReceiverSettings) -> Iterator[Finding]:
    """Say for each vendor of this environment what a callback must prove."""
    for name, setup in vendors().items():
        if name not in settings.common.vendors and not settings.secrets[name]:
            continue
        check, confirm = f"{name} callbacks", settings.confirm[name]
        polled = {"never": "", "terminal": "; a query confirms each end", "always": "; a query confirms each"}[confirm]
        by_url = f"their secret URL is the proof{polled}"
        if settings.secrets[name]:
            yield Finding(check, "ok", f"a signature is required{polled}")
        elif setup.reader.signs_callbacks:
            variable = f"{name.upper()}_WEBHOOK_SECRET"
            remedy = f"Create a Webhook Secret in its console, and set {variable}: signatures are a second proof."
            yield Finding(check, "warn", f"no signature is required: {by_url}", remedy)
        elif setup.reader.callbacks is not False:
            state = "ok" if confirm != "never" else "warn"
            remedy = "" if state == "ok" else f'Set confirm = "terminal" in [vendor.{name}].'
            yield Finding(check, state, f"this vendor signs none: {by_url}", remedy)


async def _media_store(settings: ReceiverSettings, clock: Clock) -> Finding:
    """Publish a small file, and fetch it as a vendor would."""
    common = settings.common
    if common.media_store is None:
        remedy = "Set KLING_RELAY_MEDIA_STORE to submit local videos: a directory that `serve` publishes, or a bucket."
        return Finding("media store", "ok", "none: local videos cannot be submitted, URLs can", remedy)
    content = b"a file that kling-relay doctor publishes to check the media store\n"
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        store = open_media_store(common.media_store, public_url=common.public_url, ring=common.ring, clock=clock)
        url = await store.publish(Path(file.name), hashlib.sha256(content).hexdigest(), "txt")
    try:
        async with httpx.AsyncClient(timeout=10) as client:
            answer = await client.get(url)
        if answer.content == content:
            where = common.media_store.partition("?")[0]
            return Finding("media store", "ok", f"{where}: a published file can be fetched")
        reason = f"HTTP {answer.status_code}"
    except httpx.HTTPError as error:
        reason = redact(str(error)) or type(error).__name__
    remedy = "Vendors fetch it by the same URL. Check that `serve` runs with this setting, or the bucket's permissions."
    return Finding("media store", "fail", f"a published file cannot be fetched: {reason}", remedy)


def _clock(name: str, date: str | None, clock: Clock) -> Finding:
    try:
        off_s = clock.now_s() - parsedate_to_datetime(date or "").timestamp()
    except ValueError:
        return Finding("clock", "warn", f"not checked: the response of {name} has no valid Date header")
    seen = f"{abs(off_s):.0f} s {'ahead of' if off_s > 0 else 'behind'} {name}'s clock"
    if abs(off_s) >= CLOCK_WARN_S:
        state = "fail" if abs(off_s) >= CLOCK_FAIL_S else "warn"
        remedy = (
            f"Synchronize this machine's clock (NTP): beyond {CLOCK_FAIL_S:g} s, a task whose create got no answer is"
            " not recognized as yours, and beyond 300 s no signature is valid."
        )
        return Finding("clock", state, seen, remedy)
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
    except CannotConnect as error:
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
    """Send a test callback to the public URL, as a vendor's console does, and ask whether the receiver is ready."""
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
            right, ready = await asyncio.gather(
                client.post(test, content=body, headers=headers), _readiness(client, f"{url}/readyz")
            )
    except httpx.HTTPError as error:
        reason = redact(str(error)) or type(error).__name__
        yield Finding("public URL", "fail", f"no response: {reason}", remedy)
        return
    if right.status_code == 200 and right.headers.get("kling-relay-result") == "test":
        yield Finding("public URL", "ok", f"{url} reaches this receiver, and the keys match")
        if ready is not None and ready.status_code == 503:
            seen = object_or_empty(ready.content).get("title", "no reason given")
            yield Finding("receiver", "fail", f"not ready: {seen}", "See GET /readyz, and the log of `serve`.")
        yield Finding("console test", "ok", f"callback URL for the test in {vendor}'s console: {test}")
    elif right.status_code in (401, 403, 404) and "problem+json" in right.headers.get("content-type", ""):
        remedy = "Restart `serve` with the KLING_RELAY_KEYS and the webhook secret of this shell."
        seen = f"HTTP {right.status_code}: the receiver has other keys or webhook secrets than this shell"
        yield Finding("public URL", "fail", seen, remedy)
    else:
        yield Finding("public URL", "fail", f"HTTP {right.status_code}: not the answer of a receiver", remedy)


async def _readiness(client: httpx.AsyncClient, url: str) -> httpx.Response | None:
    """Return the answer of `/readyz`; None if it is not reached from outside, as it should be."""
    try:
        return await client.get(url)
    except httpx.HTTPError:
        return None


async def _hook(name: str, settings: ReceiverSettings) -> Finding:
    """Check that a hook can be connected to, without sending it a request."""
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
