"""What a vendor or a hook wrote never acts on the terminal or on the log that shows it."""

import asyncio
import json
import re
import subprocess
import sys
from typing import Any

import httpx
import msgspec
import pytest
from click.testing import CliRunner
from starlette.responses import Response

from receiver.cli.main import main
from submitter import log
from submitter.callback_url import callback_url
from submitter.log import without_controls
from submitter.task import TaskStatus
from tests.world import World

HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\x7f\u202e\r\nforged row\ttab"
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def run(world: World, *arguments: str) -> str:
    result = CliRunner().invoke(main, arguments, env=world.environ, prog_name="kling-relay", color=True)
    assert isinstance(result.exception, SystemExit | None), result.exception
    return result.output


async def test_no_command_prints_a_control_character_that_a_vendor_or_a_hook_wrote(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "quiet", lambda: None)  # commands run in this process, and would leave their settings
    monkeypatch.setattr(log, "configure", lambda *_: None)
    world.hooks += "schedule = [0]\n"
    world.inbox.answers = [Response(HOSTILE, 500)] * 9
    world.faults(fail=1, fail_reason=HOSTILE)
    world.stand_in("novita")
    await world.start()
    failed = await (await world.submitter.submit(world.request(external_task_id="order-1"))).result(timeout=60)
    assert (failed.status, failed.status_message) == (TaskStatus.FAILED, HOSTILE)
    await world.inbox.until(3)
    settings = world.settings.common
    assert settings.ring is not None
    url = callback_url(world.receiver_url, settings.ring, "novita", "order-9", world.clock.now_s())
    async with httpx.AsyncClient(trust_env=False) as client:  # what an unsigned vendor's URL takes from a stranger
        assert (await client.post(url, content=f'{{"event_type": "{HOSTILE}'.encode())).status_code == 200

    def print_everything() -> list[str]:
        outputs = [
            run(world, *command.split(), *style)
            for command in (
                "tasks list", "tasks show order-1", "tasks wait order-1", "tasks quarantine",
                "hooks list", "hooks dead", "hooks test inbox",
            )
            for style in ((), ("--json",))
        ]  # fmt: skip
        return [*outputs, run(world, "tasks", "show", "order-1", "--raw")]

    ledger = world.open_ledger()
    dead: list[Any] = []
    while len(dead) < 3:
        version = ledger.version()
        dead = await ledger.deliveries(hook="inbox", state="dead", limit=9)
        await ledger.wait_for_change(version, 0.1)
    await ledger.close()
    outputs = await asyncio.to_thread(print_everything)
    assert sum("owned" in output for output in outputs) >= 9  # all of them are shown ...
    for output in outputs:
        assert not OBEYED.search(output), repr(output)  # ... and nothing in them is obeyed
    table = outputs[0].splitlines()
    assert len(table) == 2  # the heading and one task: a line break forges no row
    assert msgspec.json.decode(outputs[1])[0]["status_message"] == HOSTILE  # JSON holds it as it came


SCRIPT = """
import sys
from submitter import log
log.configure(sys.argv[1])
hostile = sys.argv[2]
log.Logger("test").warning("delivery.attempted", answer=hostile, reason=hostile.replace(" ", ""))
try:
    raise ValueError(hostile)
except ValueError:
    log.Logger("test").exception("poll.failed")
"""


@pytest.mark.parametrize("style", ["json", "console"])
def test_a_log_line_cannot_be_forged_and_obeys_nothing(style: str) -> None:
    command = [sys.executable, "-c", SCRIPT, style, HOSTILE]
    written = subprocess.run(command, capture_output=True, check=True).stderr.decode()
    assert "owned" in written
    assert not OBEYED.search(written), repr(written)
    if style == "json":
        assert [json.loads(line)["event"] for line in written.splitlines()] == ["delivery.attempted", "poll.failed"]
    else:
        assert not written.splitlines()[0].startswith("forged")
        assert "delivery.attempted" in written.splitlines()[0]


@pytest.mark.parametrize("text", ["", "plain", "Zoë 猫 👩‍👩‍👧", "two\nlines\tand a tab"])
def test_text_without_control_characters_is_unchanged(text: str) -> None:
    assert without_controls(text) == text


def test_in_one_line_there_is_no_line_break() -> None:
    assert without_controls("a\r\nb\tc\x1b", one_line=True) == "a␍␊b␉c␛"
