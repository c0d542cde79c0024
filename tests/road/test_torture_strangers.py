"""The part `strangers` of `make torture`, in its short form; and that it finds what a broken receiver does wrong."""

from pathlib import Path

import pytest

from tests.torture.strangers import Size, attack

SHORT = Size(requests=4000, live=400, kept=8, waits=False)

FAILS_FOR_A_HEADER = """
from receiver.callbacks import CallbackEndpoint
accept = CallbackEndpoint._read
async def read(self, headers, receive):
    if b"cookie" in headers:
        raise RuntimeError("broken")
    return await accept(self, headers, receive)
CallbackEndpoint._read = read
"""
STORES_THE_FORGED = """
from receiver import verification
verification.verify = lambda *given: None
"""
LOGS_THE_URL = """
import sys
from receiver.callbacks import CallbackEndpoint
call = CallbackEndpoint.__call__
async def logged(self, scope, receive, send):
    print(scope["path"], file=sys.stderr)
    await call(self, scope, receive, send)
CallbackEndpoint.__call__ = logged
"""
MAIN = "\nfrom receiver.cli.main import main\nmain()\n"


def test_no_stranger_gets_anything_and_every_authentic_callback_is_accepted(tmp_path: Path) -> None:
    done = attack(1, tmp_path, SHORT)
    assert done.findings == []
    assert done.counts["requests"] >= 4000
    assert done.counts["authentic"] > 0


@pytest.mark.parametrize(
    ("broken", "finding"),
    [
        (FAILS_FOR_A_HEADER, "answered 500"),
        (STORES_THE_FORGED, "changed without an authentic callback"),
        (LOGS_THE_URL, "the log contains a token"),
    ],
)
def test_a_broken_receiver_is_found(tmp_path: Path, broken: str, finding: str) -> None:
    done = attack(1, tmp_path, SHORT, program=("-c", broken + MAIN))
    assert any(finding in one for one in done.findings), done.findings
