"""The commands `ledger copy`, `ledger prune` and `ledger migrate`, end to end."""

import asyncio
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from receiver.cli.main import main
from submitter.ledger import Ledger, open_ledger
from submitter.ledger.base import Disabled, Quarantined, Settlement, Subscription
from submitter.ledger.copying import PAGE, copy
from submitter.task import TaskStatus
from submitter.web_address import without_password
from tests.conformance.ledgers import NOW, report, succeed, task


@pytest.fixture
def source(tmp_path: Path) -> str:
    (tmp_path / "relay.toml").write_text('[[hook]]\nname = "web"\nurl = "https://example.com/x"\n')
    return f"sqlite:///{tmp_path / 'relay.db'}"


async def run(*arguments: str, ledger: str) -> Result:
    """Run a command in a thread: it starts its own event loop."""
    environ = {"KLING_RELAY_LEDGER": ledger}
    return await asyncio.to_thread(CliRunner().invoke, main, ["ledger", *arguments], env=environ)


async def fill(ledger: Ledger, count: int) -> None:
    for n in range(count):
        await succeed(ledger, f"t{n:04}")
    web = Subscription("web", None, "t1", 3)
    claimed = (await ledger.claim_deliveries([web], NOW, 1000)).items
    await ledger.settle(claimed[0], Settlement("dead", error="HTTP 410", disable_endpoint="t1"))
    await ledger.settle(claimed[1], Settlement("done"))
    await ledger.reserve(task("in_outbox", metadata={"a": "ü 猫"}))
    await ledger.apply("in_outbox", report(TaskStatus.SUBMITTED))
    for _ in range(3):
        await ledger.quarantine(Quarantined("t0000", "kling", NOW, "unknown status", b"\xff\x00"))


@pytest.fixture(params=["postgres_url", "dynamodb_url"])
def server_url(request: pytest.FixtureRequest) -> str:
    """The URL of a ledger on a server."""
    return str(request.getfixturevalue(request.param))


async def test_a_copy_to_another_engine_and_back_is_identical(source: str, server_url: str, tmp_path: Path) -> None:
    first = open_ledger(source)
    await fill(first, PAGE + 5)
    await first.close()
    copied = await run("copy", source, server_url, ledger=source)
    assert copied.exit_code == 0, copied.output
    assert f"{PAGE + 6} tasks, {2 * PAGE + 11} events" in copied.output
    back = f"sqlite:///{tmp_path / 'back.db'}"
    assert (await run("copy", server_url, back, ledger=source)).exit_code == 0
    ledgers = [open_ledger(url) for url in (source, server_url, back)]
    ids = [sorted(await ledger.ids(None, 1000)) for ledger in ledgers]
    assert ids[0] == ids[1] == ids[2]
    records = [await ledger.records(ids[0]) for ledger in ledgers]
    assert records[0] == records[1] == records[2]
    for ledger in ledgers:
        assert await ledger.disabled() == [Disabled("web", "t1", "HTTP 410")]
        assert [(entry.body, entry.times) for entry in await ledger.quarantined(9)] == [(b"\xff\x00", 3)]
        assert [one.hook for one in (await ledger.records(["in_outbox"]))[0].deliveries] == ["web"]
        await ledger.close()


async def test_copy_refuses_a_target_that_is_not_empty(source: str, postgres_url: str) -> None:
    for url in (source, postgres_url):
        ledger = open_ledger(url)
        await ledger.reserve(task("a"))
        await ledger.close()
    refused = await run("copy", source, postgres_url, ledger=source)
    assert refused.exit_code == 2
    assert "an empty ledger" in refused.output


async def test_copy_raises_an_error_when_the_copy_differs(source: str, tmp_path: Path) -> None:
    first, other = open_ledger(source), open_ledger(f"sqlite:///{tmp_path / 'other.db'}")
    await fill(first, 3)
    await other.reserve(task("zz"))  # not in the source
    with pytest.raises(Exception, match="the copy differs"):
        await copy(first, other)
    await first.close()
    await other.close()


async def test_prune_deletes_tasks_that_ended_long_ago(source: str) -> None:
    ledger = open_ledger(source)
    for n in range(3):
        await ledger.reserve(task(f"old{n}", status=TaskStatus.SUCCEED, poll_at_ms=None, updated_at_ms=1000))
    await ledger.reserve(task("open", updated_at_ms=1000))
    await ledger.close()
    assert (await run("prune", "--days", "30", ledger=source)).output == "deleted 3 tasks\n"
    assert (await run("prune", "--days", "30", ledger=source)).output == "deleted 0 tasks\n"
    assert (await run("prune", ledger=source)).exit_code == 2
    assert "1 open tasks" in (await run("migrate", ledger=source)).output


def test_without_password_removes_the_password() -> None:
    assert without_password("postgresql://me:s3cret@db:5432/relay?schema=x") == "postgresql://me@db:5432/relay"
    assert without_password("sqlite:////var/relay.db") == "sqlite:////var/relay.db"
    assert without_password("sqlite:///relay.db") == "sqlite:///relay.db"
