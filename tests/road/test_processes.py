"""The command line, end to end: each command in its own process, and recovery after SIGKILL."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import msgspec
import pytest

from submitter.clock import Clock
from submitter.sandbox.faults import Faults
from submitter.sandbox.server import free_socket
from submitter.task import TaskStatus
from tests.world import World

CLI = (sys.executable, "-m", "receiver")


class Completed(msgspec.Struct):
    """A completed command: exit status, standard output, standard error."""

    status: int
    out: str
    err: str


async def spawn(environ: Mapping[str, str], *arguments: str) -> asyncio.subprocess.Process:
    pipe = asyncio.subprocess.PIPE
    root = str(Path(__file__).parents[2])
    inherited = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    paths = ":".join(filter(None, (root, environ.get("MORE_PATH"))))
    complete = inherited | {"PYTHONPATH": paths} | dict(environ)
    return await asyncio.create_subprocess_exec(*CLI, *arguments, env=complete, stdout=pipe, stderr=pipe)


async def cli(environ: Mapping[str, str], *arguments: str, timeout_s: float = 30) -> Completed:
    process = await spawn(environ, *arguments)
    async with asyncio.timeout(timeout_s):
        out, err = await process.communicate()
    assert process.returncode is not None
    return Completed(process.returncode, out.decode(), err.decode())


@asynccontextmanager
async def serving(environ: Mapping[str, str]) -> AsyncIterator[str]:
    """Run `kling-relay serve` on a free port; yield its URL once it is ready."""
    bound, url = free_socket()
    port = str(bound.getsockname()[1])
    bound.close()
    process = await spawn({"KLING_RELAY_PUBLIC_URL": url} | dict(environ), "serve", "--port", port)
    try:
        async with asyncio.timeout(60), httpx.AsyncClient(trust_env=False) as client:
            while True:
                try:
                    if (await client.get(f"{url}/readyz")).status_code == 200:
                        break
                except httpx.ConnectError:
                    assert process.returncode is None, (await process.communicate())[1].decode()
                    await asyncio.sleep(0.05)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(60):
            await process.communicate()


def submit_arguments(world: World, *more: str) -> list[str]:
    return [
        "submit", "--image", str(world.media / "girl.png"), "--video", f"{world.hook_url}/files/dance.mp4",
        "--orientation", "video", *more,
    ]  # fmt: skip


async def test_quickstart_of_the_readme_works(world: World, tmp_path: Path) -> None:
    await world.start(receiver=False)
    environ = world.environ
    async with serving(environ) as url:
        environ = environ | {"KLING_RELAY_PUBLIC_URL": url}
        output = tmp_path / "result.mp4"
        completed = await cli(
            environ,
            *submit_arguments(world, "--mode", "pro", "--prompt", "on a beach", "--metadata", "order=42"),
            "--external-task-id", "order-42", "--wait", "--output", str(output),
        )  # fmt: skip
        assert completed.status == 0, completed.err
        assert "order-42" in completed.err
        assert output.stat().st_size > 1000
        await world.inbox.until(3)
        shown = msgspec.json.decode((await cli(environ, "tasks", "show", "order-42", "--json")).out)
        assert shown == world.inbox.events[-1]["data"]
        listed = msgspec.json.decode((await cli(environ, "tasks", "list", "--status", "succeed", "--json")).out)
        assert [task["external_task_id"] for task in listed] == ["order-42"]
        doctor = await cli(environ, "doctor", "--json")
        findings = {finding["check"]: finding for finding in msgspec.json.decode(doctor.out)}
        assert doctor.status == 0, doctor.out
        assert findings["public URL"]["state"] == "ok"
        assert "reaches this receiver" in findings["public URL"]["seen"]
        assert "Sandbox-Video" in findings["kling"]["seen"]
        other = await cli(environ | {"KLING_RELAY_KEYS": "other:" + "A" * 43 + "="}, "doctor")
        assert other.status == 1
        assert "has other keys or webhook secrets" in other.out
        async with httpx.AsyncClient(trust_env=False) as client:
            metrics = (await client.get(f"{url}/metrics")).text
        assert 'kling_relay_callbacks_total{result="applied",vendor="kling"}' in metrics
        assert "kling_relay_polls_total{" not in metrics


async def test_submit_without_a_public_url_suggests_no_callback_which_works(world: World) -> None:
    await world.start(receiver=False)
    del world.environ["KLING_RELAY_PUBLIC_URL"]
    del world.environ["KLING_RELAY_MEDIA_STORE"]
    refused = await cli(world.environ, *submit_arguments(world))
    assert refused.status == 2
    assert "--no-callback" in refused.err
    assert world.kling.counts["created"] == 0
    fast = world.environ | {"KLING_RELAY_POLL_AFTER_S": "0.1"}
    completed = await cli(fast, *submit_arguments(world, "--no-callback", "--wait", "--json"))
    assert completed.status == 0, completed.err
    assert msgspec.json.decode(completed.out)["status"] == "succeed"


async def test_wait_exits_with_1_and_the_reason_when_the_task_fails(world: World) -> None:
    world.faults(fail=1, fail_reason="no person in the video")
    await world.start()
    completed = await cli(world.environ, *submit_arguments(world, "--wait"))
    assert completed.status == 1
    assert "failed: no person in the video" in completed.err


async def test_dry_run_sends_nothing_and_redacts_the_callback_token(world: World) -> None:
    await world.start()
    completed = await cli(world.environ, *submit_arguments(world, "--dry-run"))
    assert completed.status == 0, completed.err
    method, _, body = completed.out.partition("\n")
    assert method == f"POST {world.sandbox_url}/kling/motion-control/kling-3.0"
    request = msgspec.json.decode(body)
    assert request["options"]["callback_url"].endswith("/[hidden]")
    assert world.kling.counts["created"] == 0
    assert (await cli(world.environ, "tasks", "list")).out.startswith("no such tasks in sqlite:")


async def test_invalid_input_is_reported_by_field_without_a_traceback(world: World) -> None:
    await world.start()
    arguments = [
        "submit", "--image", str(world.media / "dance.mp4"), "--video", "nowhere.mp4", "--orientation", "image",
        "--element-id", "x", "--prompt", "y" * 2501, "--external-task-id", "a/b",
    ]  # fmt: skip
    completed = await cli(world.environ, *arguments)
    assert completed.status == 2
    for field in ("image.format", "video:", "element_id", "prompt", "external_task_id"):
        assert field in completed.err
    assert "Traceback" not in completed.err


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"KLING_RELAY_KEYS": "x:short"}, "kling-relay keys new"),
        ({"KLING_API": "v3"}, "v1 or v2"),
        ({"KLING_RELAY_POLL_AFTER_S": "soon"}, "a number"),
        ({"KLING_RELAY_LEDGER": "mysql://x"}, "sqlite:///relay.db"),
        ({"KLING_RELAY_LEDGER": "sqlite:///no/such/folder/x.db"}, "its folder must exist"),
        ({"KLING_WEBHOOK_SECRET": "abc"}, "KLING_WEBHOOK_SECRET"),
        ({"KLING_RELAY_CONFIG": "nowhere.toml"}, "nowhere.toml"),
    ],
)
async def test_invalid_settings_are_reported_with_a_remedy(
    world: World, environ: dict[str, str], expected: str
) -> None:
    (world.folder / "relay.toml").write_text("")
    completed = await cli(world.environ | environ, "serve", "--port", "0")
    assert completed.status in (1, 2)
    assert expected in completed.err
    assert "Traceback" not in completed.err


async def test_rotation_puts_the_new_key_first_and_keeps_the_old_key(world: World) -> None:
    (world.folder / "relay.toml").write_text("")
    created = await cli({}, "keys", "new")
    name, _, value = created.out.strip().partition("=")
    assert name == "KLING_RELAY_KEYS"
    rotated = await cli({"KLING_RELAY_KEYS": value}, "keys", "new", "--rotate")
    keys = rotated.out.strip().partition("=")[2].split(",")
    assert keys[1] == value
    assert keys[0].partition(":")[0] != value.partition(":")[0]
    steps = [rotated.err.index(step) for step in ("`serve` first", "every submitter", "30 days", "remove it")]
    assert steps == sorted(steps)


async def test_dead_letters_are_listed_and_replayed_and_the_hook_is_tested(world: World) -> None:
    from starlette.responses import Response

    world.hooks = world.hooks.replace("secret =", "schedule = [0, 0.05]\nsecret =")
    world.inbox.answers = [Response("no", 500) for _ in range(6)]
    await world.start()
    task = await world.submitter.submit(world.request())
    done = await task.result(timeout=60)
    await world.inbox.until(6)
    ledger = world.open_ledger()
    async with asyncio.timeout(60):
        while (await ledger.counts())["delivery.dead"] < 3:
            await ledger.wait_for_change(ledger.version(), 0.1)
    await ledger.close()
    dead = msgspec.json.decode((await cli(world.environ, "hooks", "dead", "inbox", "--json")).out)
    assert {letter["external_task_id"] for letter in dead} == {done.external_task_id}
    assert dead[0]["error"] == "HTTP 500 no"
    replayed = await cli(world.environ, "hooks", "replay", "inbox")
    assert "3 deliveries are due again" in replayed.out
    await world.inbox.until(9)
    dead_ids = {event["id"] for event in world.inbox.events[:6]}
    assert {event["id"] for event in world.inbox.events[6:]} == dead_ids
    tested = await cli(world.environ, "hooks", "test", "inbox")
    assert tested.out.strip() == "delivered: HTTP 204"
    assert world.inbox.events[-1]["type"] == "task.test"
    listed = msgspec.json.decode((await cli(world.environ, "hooks", "list", "--json")).out)
    assert listed[0]["dead"] == 0
    assert listed[0]["state"] == "on"


async def test_deliver_and_poll_work_without_serve(world: World) -> None:
    world.environ["KLING_RELAY_POLL_AFTER_S"] = "0.05"
    await world.start(receiver=False)
    world.faults(drop=1)
    await world.submitter.submit(world.request(video=f"{world.hook_url}/files/dance.mp4"))
    async with asyncio.timeout(60):
        while next(iter(world.kling.jobs.values())).status != "succeeded":
            await asyncio.sleep(0.01)
    polled = await cli(world.environ, "poll", "--once")
    assert polled.out.strip() == "polled 1 task"
    delivered = await cli(world.environ, "deliver", "--once")
    assert delivered.out.strip() == "made 2 delivery attempts"
    assert {event["type"] for event in world.inbox.events} == {"task.submitted", "task.succeed"}


@pytest.mark.slow
async def test_submitter_killed_at_any_instant_never_creates_a_second_task(world: World) -> None:
    """Kill `submit` after 0 to 1.2 s, run the same command again, and count the vendor's tasks."""
    await world.start()
    world.faults(create_late=1, late_s=0.2)
    delays = [0.25 + 0.08 * i for i in range(12)]

    async def kill_and_repeat(i: int, delay_s: float) -> None:
        arguments = submit_arguments(world, "--external-task-id", f"order-{i}", "--metadata", f"n={i}")
        process = await spawn(world.environ, *arguments)
        await asyncio.sleep(delay_s)  # the test varies this instant
        if process.returncode is None:
            process.kill()
        await process.communicate()
        again = await cli(world.environ, *arguments, "--wait", timeout_s=90)
        assert again.status == 0, again.err

    for start in range(0, len(delays), 4):
        await asyncio.gather(*(kill_and_repeat(i, delays[i]) for i in range(start, min(start + 4, len(delays)))))
    ids = [str(job.request.external_id) for job in world.kling.jobs.values()]
    assert sorted(ids) == sorted(f"order-{i}" for i in range(len(delays)))
    ledger = world.open_ledger()
    tasks = await ledger.tasks(limit=100)
    assert {task.status for task in tasks} == {TaskStatus.SUCCEED}
    await ledger.close()


async def test_receiver_killed_between_two_callbacks_loses_no_event(world: World) -> None:
    world.kling.pace_s = 0.5
    await world.start(receiver=False)
    bound, url = free_socket()
    port = str(bound.getsockname()[1])
    bound.close()
    environ = world.environ | {"KLING_RELAY_PUBLIC_URL": url, "KLING_RELAY_POLL_AFTER_S": "1"}
    first = await spawn(environ, "serve", "--port", port)
    completed = await cli(environ, *submit_arguments(world, "--external-task-id", "order-1"))
    assert completed.status == 0, completed.err
    first.kill()
    await first.communicate()
    second = await spawn(environ, "serve", "--port", port)
    await world.inbox.until(2)
    waited = await cli(environ, "tasks", "wait", "order-1", "--timeout", "20")
    assert waited.status == 0, waited.err
    async with asyncio.timeout(60):
        while "task.succeed" not in [event["type"] for event in world.inbox.events]:
            await world.inbox.until(len(world.inbox.requests) + 1)
    second.terminate()
    await second.communicate()


async def test_demo_runs_offline_and_prints_each_step(tmp_path: Path) -> None:
    completed = await cli({}, "demo", "--directory", str(tmp_path / "out"), timeout_s=60)
    assert completed.status == 0, completed.err
    for step in ("callback verified and stored: succeed", "hook demo notified", "signature verified: task.succeed"):
        assert step in completed.out
    assert (tmp_path / "out" / "result.mp4").stat().st_size > 10_000


async def test_vendors_lists_capabilities_and_credentials(world: World) -> None:
    await world.start(receiver=False)
    world.environ["NOVITA_API_KEY"] = "k"
    table = msgspec.json.decode((await cli(world.environ, "vendors", "--json")).out)
    assert list(table) == ["kling", "novita", "highway", "aihubmax", "oxen"]
    assert (table["novita"]["credentials"], table["oxen"]["credentials"]) == ("set", "not set")
    assert table["novita"]["negative prompt"] == "to 2500 characters"
    shown = await cli(world.environ, "vendors")
    assert "event stream" in shown.out


async def test_costs_are_totalled_by_day_and_vendor(world: World) -> None:
    for vendor in ("aihubmax", "oxen"):
        world.stand_in(vendor)
    await world.start()
    for vendor in ("kling", "kling", "aihubmax", "oxen"):
        await (await world.submitter.submit(world.request(vendor=vendor))).result(timeout=60)
    rows = msgspec.json.decode((await cli(world.environ, "tasks", "costs", "--json")).out)
    assert [(row["vendor"], row["tasks"], row["amount"], row["unit"]) for row in rows] == [
        ("aihubmax", 1, None, "not said"),  # what it reserved is no cost
        ("kling", 2, "7.2", "unit"),
        ("oxen", 1, None, "not said"),
    ]
    only = await cli(world.environ, "tasks", "costs", "--vendor", "kling")
    assert "7.2" in only.out
    assert "oxen" not in only.out


async def test_submission_unknown_is_resolved_by_adopt_or_retry(world: World) -> None:
    novita = world.stand_in("novita")
    novita.pace_s = 30
    await world.start()
    world.faults(create_5xx=1)
    arguments = submit_arguments(world, "--vendor", "novita", "--external-task-id")
    for id in ("order-1", "order-2"):
        completed = await cli(world.environ, *arguments, id)
        assert completed.status == 1
        assert "kling-relay tasks adopt" in completed.err
    world.faults()
    adopted = await cli(world.environ, "tasks", "adopt", "order-1", next(iter(novita.jobs)))
    assert adopted.out.startswith("submitted  external_task_id order-1"), adopted.err
    sent = await cli(world.environ, "tasks", "retry", "order-2", "--absent")
    assert sent.out.startswith("submitted  external_task_id order-2"), sent.err
    assert novita.counts["created"] == 3


async def test_failover_is_shown_with_the_refusing_vendor_and_its_reason(world: World) -> None:
    world.stand_in("novita")
    await world.start()
    world.kling.set_faults(Faults(refuse="balance"))
    completed = await cli(
        world.environ, *submit_arguments(world, "--vendor", "kling,novita", "--external-task-id", "o-1", "--wait")
    )
    assert completed.status == 0, completed.err
    shown = (await cli(world.environ, "tasks", "show", "o-1")).out
    assert "refused by        kling: no balance" in shown
    assert "novita" in shown


async def test_hook_pause_is_listed_until_it_ends(world: World) -> None:
    await world.start(receiver=False)
    ledger = world.open_ledger()
    for until_ms, state in ((Clock().now_ms() + 600_000, "paused until"), (Clock().now_ms() - 1, "on")):
        await ledger.pause("inbox", until_ms, "HTTP 500")
        (row,) = msgspec.json.decode((await cli(world.environ, "hooks", "list", "--json")).out)
        assert row["state"].startswith(state)
    await ledger.close()


@pytest.mark.matrix
@pytest.mark.parametrize("vendor", ["novita", "oxen"])
async def test_demo_runs_with_other_vendors(vendor: str, tmp_path: Path) -> None:
    completed = await cli({}, "demo", "--vendor", vendor, "--directory", str(tmp_path / "demo"), timeout_s=60)
    assert completed.status == 0, completed.err
    assert (tmp_path / "demo" / "result.mp4").stat().st_size > 1000
    wrong = await cli({}, "demo", "--vendor", "unknown")
    assert wrong.status == 2
    assert "one of kling, novita" in wrong.err
