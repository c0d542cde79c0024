"""Which refused and repeated callbacks get a line in the log."""

import asyncio
import time
from pathlib import Path

import httpx
import pytest
from structlog.testing import CapturingLogger

from receiver.app import create_app
from receiver.metrics import PrometheusMetrics
from receiver.refusal_log import INTERVAL_S, LINES, RefusalLog
from receiver.signature import read_secret
from receiver.verification import VendorCheck, Verifier
from submitter.callback_url import KeyRing, callback_url
from submitter.ledger.sqlite.ledger import SqliteLedger
from submitter.vendors.kling.credentials import ApiKey
from submitter.vendors.kling.v2 import KlingV2
from tests.world import KEY, WEBHOOK_SECRET


def test_the_first_of_each_result_get_a_line_and_the_others_are_counted() -> None:
    refusals = RefusalLog()
    refusals.begin(100.0)
    assert sum(refusals.admits("UrlUnknown") for _ in range(1000)) == LINES
    assert refusals.admits("SignatureInvalid")  # a flood of forged URLs hides no other result
    assert refusals.end() == {"UrlUnknown": 1000 - LINES}


def test_each_interval_has_its_lines() -> None:
    refusals = RefusalLog()
    assert refusals.is_over(0.0)
    refusals.begin(100.0)
    assert not refusals.is_over(100.0 + INTERVAL_S - 0.1)
    assert refusals.is_over(100.0 + INTERVAL_S)
    for _ in range(LINES + 1):
        refusals.admits("UrlUnknown")
    assert refusals.end() == {"UrlUnknown": 1}
    assert refusals.end() == {}
    assert refusals.is_over(100.0)  # an interval that was ended is followed by a new one at once
    refusals.begin(101.0)
    assert refusals.admits("UrlUnknown")


async def test_a_flood_of_refused_callbacks_is_counted_and_most_of_it_is_not_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged = CapturingLogger()
    monkeypatch.setattr("receiver.callbacks.log", logged)
    for module in ("callbacks", "refusal_log"):
        monkeypatch.setattr(f"receiver.{module}.INTERVAL_S", 0.5)
    ring, ledger, metrics = KeyRing.read(f"test:{KEY}"), SqliteLedger(tmp_path / "relay.db"), PrometheusMetrics()
    check = VendorCheck(KlingV2(ApiKey("")), (read_secret("t", WEBHOOK_SECRET),))
    app = create_app(ledger, Verifier(ring, {"kling": check}), metrics=metrics)
    url = callback_url("http://relay", ring, "kling", "order-1", time.time())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app)) as client:
        for _ in range(500):
            assert (await client.post(f"{url}x")).status_code == 404
        assert (await client.post(url, content=b"{}")).status_code == 401
    assert 'kling_relay_callbacks_total{result="UrlUnknown",vendor="unknown"} 500.0' in metrics.render({}).decode()

    def unlogged() -> int:
        return sum(call.kwargs["UrlUnknown"] for call in logged.calls if call.args == ("callbacks.unlogged",))

    lines = [call.kwargs["vendor"] for call in logged.calls if call.args == ("callback.refused",)]
    assert lines.count("kling") == 1
    assert lines.count("unknown") < 400
    async with asyncio.timeout(20):
        while lines.count("unknown") + unlogged() < 500:
            await asyncio.sleep(0.01)
    await ledger.close()
