"""What the vendor said is kept: its last body, ids of outputs, quarantined bodies, watermarks."""

import msgspec
import pytest

from submitter.task import TaskStatus
from tests.road.test_processes import cli
from tests.world import World


@pytest.mark.parametrize("api", ["v1", "v2"])
async def test_the_last_body_is_shown_and_sent_to_hooks_that_want_it(world: World, api: str) -> None:
    if api == "v1":
        world.use_v1()
    world.hooks += f'[[hook]]\nname = "raw"\nurl = "{world.hook_url}/raw"\nraw = true\nevents = ["task.succeed"]\n'
    await world.start()
    task = await world.submitter.submit(world.request(external_task_id="order-1"))
    done = await task.result(timeout=60)
    await world.inbox.until(4)
    shown = await cli(world.environ, "tasks", "show", "order-1", "--raw")
    body = msgspec.json.decode(shown.out)
    assert body["id" if api == "v2" else "task_id"] == done.task_id
    ends = [event for event in world.inbox.events if event["type"] == "task.succeed"]
    (raw,) = [event["data"]["raw"] for event in ends if "raw" in event["data"]]
    assert msgspec.json.decode(raw) == body
    assert len({event["id"] for event in ends}) == 1
    assert done.videos[0].id == f"{done.task_id}-1"
    assert ends[0]["data"]["videos"][0]["id"] == done.videos[0].id
    assert done.videos[0].id in (await cli(world.environ, "tasks", "show", "order-1")).out


@pytest.mark.parametrize("api", ["v1", "v2"])
async def test_a_watermark_is_never_lost(world: World, api: str) -> None:
    if api == "v1":
        world.use_v1()
    await world.start()
    task = await world.submitter.submit(world.request(watermark=True))
    done = await task.result(timeout=60)
    assert done.status is TaskStatus.SUCCEED
    assert str(done.videos[0].watermark_url).endswith("?watermark=1")
    assert world.kling.counts["query_v1"] == (1 if api == "v1" else 0)  # v1's callback lacks it, so it is asked for


async def test_a_quarantined_body_can_be_read(world: World) -> None:
    world.faults(no_url=1)
    await world.start()
    await world.submitter.submit(world.request(external_task_id="order-1"))
    ledger = world.open_ledger()
    while not await ledger.quarantined(9):
        await ledger.wait_for_change(ledger.version(), 1)
    await ledger.close()
    entry, *_ = msgspec.json.decode((await cli(world.environ, "tasks", "quarantine", "order-1", "--json")).out)
    assert (entry["vendor"], "without a video URL" in entry["reason"]) == ("kling", True)
    assert "order-1" in entry["body"]
    assert "without a video URL" in (await cli(world.environ, "tasks", "quarantine")).out
    assert (await cli(world.environ, "tasks", "quarantine", "order-2")).out.strip() == "nothing is quarantined"


async def test_refresh_by_the_command_line_has_three_exit_statuses(world: World) -> None:
    await world.start()
    task = await world.submitter.submit(world.request(external_task_id="order-1"))
    await task.result(timeout=60)
    answered = await cli(world.environ, "tasks", "refresh", "order-1")
    assert (answered.status, "kling says succeed" in answered.out) == (0, True), answered
    silent = await cli(
        world.environ | {"KLING_BASE_URL": "http://127.0.0.1:9"}, "tasks", "refresh", "order-1", "--json"
    )
    (row,) = msgspec.json.decode(silent.out)
    assert (silent.status, row["outcome"], row["task"]["status"]) == (1, "no_answer", "succeed")
    without = {name: value for name, value in world.environ.items() if name != "KLING_API_KEY"}
    keyless = await cli(without, "tasks", "refresh", "order-1")
    assert (keyless.status, "no credentials for kling" in keyless.out) == (2, True), keyless
    assert (await cli(world.environ, "tasks", "refresh", "order-2")).status == 1
