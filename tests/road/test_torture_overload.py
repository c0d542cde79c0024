"""The part `overload` of `make torture`, in its short form; and that it finds what a broken receiver does wrong."""

from pathlib import Path

import pytest

from tests.torture.overload import Size, attack

SHORT = Size(seconds=4.0, share=0.3, measured=0)

LOGS_EACH_REFUSAL = """
from receiver.refusal_log import RefusalLog
RefusalLog.admits = lambda self, result: True
"""
ANSWERS_500 = """
from receiver.callbacks import CallbackEndpoint
read, count = CallbackEndpoint._read, 0
async def broken(self, headers, receive):
    global count
    count += 1
    if count % 50 == 0:
        raise RuntimeError("broken")
    return await read(self, headers, receive)
CallbackEndpoint._read = broken
"""
LOSES = """
from receiver.callbacks import CallbackEndpoint
accept, count = CallbackEndpoint._accept, 0
async def broken(self, vendor, id, headers, body):
    global count
    count += id.startswith("b-")
    return "applied" if id.startswith("b-") and count % 5 == 0 else await accept(self, vendor, id, headers, body)
CallbackEndpoint._accept = broken
"""
COUNTS_HALF = """
from receiver.metrics import PrometheusMetrics
counted, count = PrometheusMetrics.callback, 0
def broken(self, vendor, result):
    global count
    count += 1
    if count % 2:
        counted(self, vendor, result)
PrometheusMetrics.callback = broken
"""
MAIN = "\nfrom receiver.cli.main import main\nmain()\n"


def test_authentic_callbacks_are_accepted_in_a_flood_and_what_is_refused_is_counted(tmp_path: Path) -> None:
    done = attack(1, tmp_path, SHORT)
    assert done.findings == []
    assert done.counts["UrlUnknown"] > 1000
    assert done.counts["callbacks accepted"] > 40


@pytest.mark.parametrize(
    ("broken", "finding"),
    [
        (LOGS_EACH_REFUSAL, "beside what changed"),
        (ANSWERS_500, "were answered {500"),
        (LOSES, "lost: "),
        (COUNTS_HALF, "UrlUnknown: "),
    ],
)
def test_a_broken_receiver_is_found(tmp_path: Path, broken: str, finding: str) -> None:
    done = attack(1, tmp_path, SHORT, program=("-c", broken + MAIN))
    assert any(finding in one for one in done.findings), done.findings
