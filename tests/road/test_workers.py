"""Several server processes on one socket: load, kills, graceful restart, stop, metrics, and what is refused."""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import httpx
import pytest

from receiver.cli.doctor import _processes
from receiver.supervisor import ServerProcess, StartFailed, Supervisor, pause_s
from submitter.clock import Clock
from submitter.ledger import open_ledger
from submitter.sandbox.oxen import OxenSandbox
from submitter.sandbox.server import free_socket, listening
from submitter.task import TaskStatus
from tests.bench import servers
from tests.conformance.brokers import free_port
from tests.road.many_processes import fill
from tests.road.test_processes import cli
from tests.road.workers import Vendor, gone, serving
from tests.world import Inbox, World

TASKS = 150


@pytest.fixture(params=["sqlite", "postgres"])
def environ(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    """Return the settings of a receiver on each ledger that several processes share."""
    fixture = "ledger_url" if request.param == "sqlite" else "postgres_url"
    return {**servers.environment(tmp_path), "KLING_RELAY_LEDGER": request.getfixturevalue(fixture)}


@pytest.fixture
def on_sqlite(tmp_path: Path, ledger_url: str) -> dict[str, str]:
    return {**servers.environment(tmp_path), "KLING_RELAY_LEDGER": ledger_url}


async def prepare(environ: dict[str, str], tasks: int = TASKS) -> list[bytes]:
    """Store tasks, and return the callbacks that end them."""
    ledger = open_ledger(environ["KLING_RELAY_LEDGER"])
    await fill(ledger, "b", tasks)
    await ledger.close()
    return servers.callbacks("b", tasks)


async def stored(environ: dict[str, str], tasks: int = TASKS) -> tuple[set[TaskStatus], list[str]]:
    """Return the states of the tasks, and the ids of their events."""
    ledger = open_ledger(environ["KLING_RELAY_LEDGER"])
    ids = [f"b-{n}" for n in range(tasks)]
    states = {task.status for task in await ledger.get_many(ids)}
    events = [event.id for id in ids for event in await ledger.events(id)]
    await ledger.close()
    return states, events


async def test_two_processes_accept_callbacks_notify_the_hook_and_add_up_their_metrics(
    environ: dict[str, str], tmp_path: Path
) -> None:
    inbox = Inbox(tmp_path)
    bound, url = free_socket()
    (tmp_path / "relay.toml").write_text(f'[[hook]]\nname = "inbox"\nurl = "{url}/events"\n')
    requests = await prepare(environ)
    async with listening(inbox.app(), bound), serving(environ, "--workers", "2") as running:
        assert len(running.pids()) == 2
        vendor = Vendor(running.port, requests)
        await vendor.send_all()
        assert vendor.failures == []
        await inbox.until(2 * TASKS)
        scraped = [await running.metrics() for _ in range(4)]  # each connection may reach another process
        async with httpx.AsyncClient(trust_env=False) as client:
            assert (await client.get(f"{running.url}/readyz")).json() == {"status": "ready"}
    states, events = await stored(environ)
    assert states == {TaskStatus.SUCCEED}
    assert sorted(event["id"] for event in inbox.events) == sorted(events)
    for text in scraped:
        assert f'kling_relay_callbacks_total{{result="applied",vendor="kling"}} {2 * TASKS}.0' in text
        assert "kling_relay_quarantine 0.0" in text
        assert "kling_relay_open_tasks{" not in text


async def test_no_acknowledged_callback_is_lost_when_a_process_is_killed_under_load(environ: dict[str, str]) -> None:
    requests = await prepare(environ)
    async with serving(environ, "--workers", "2") as running:
        vendor = Vendor(running.port, requests)
        sending = asyncio.create_task(vendor.send_all())
        await vendor.until(TASKS // 2)
        killed = running.pids()[1]
        os.kill(killed, signal.SIGKILL)
        await sending
        started = await running.until("process.started", 3)
        assert [(line["pid"], line["status"]) for line in running.found("process.ended")] == [(killed, -9)]
        assert sorted(running.pids()) == sorted(line["pid"] for line in started if line["pid"] != killed)
        counted = await running.metrics()
    states, events = await stored(environ)
    assert (states, len(events)) == ({TaskStatus.SUCCEED}, 2 * TASKS)
    assert "kling_relay_callbacks_total{" in counted


async def test_sighup_replaces_every_process_under_load_and_refuses_no_request(environ: dict[str, str]) -> None:
    requests = await prepare(environ)
    async with serving(environ, "--workers", "2") as running:
        before = set(running.pids())
        vendor = Vendor(running.port, requests)
        vendor.repeats = True  # so that load lasts
        idle = [await asyncio.open_connection("127.0.0.1", running.port) for _ in range(8)]
        sending = asyncio.create_task(vendor.send_all())
        await vendor.until(TASKS // 2)
        running.process.send_signal(signal.SIGHUP)
        await running.until("process.replaced")
        for reader, writer in idle:  # the process of each drains, or is not replaced yet
            writer.write(requests[0])
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
            writer.close()
        await running.until("process.ended", 2)
        vendor.repeats = False
        await sending
        assert vendor.failures == []
        assert len(running.pids()) == 2
        assert before.isdisjoint(running.pids())
        assert [line["status"] for line in running.found("process.ended")] == [0, 0]
    assert (await stored(environ))[0] == {TaskStatus.SUCCEED}


@pytest.mark.parametrize("send", [os.kill, os.killpg], ids=["to the supervisor", "to all, as systemd does"])
async def test_sigterm_ends_the_requests_under_way_then_every_process_with_status_0(
    on_sqlite: dict[str, str], send: Callable[[int, int], None]
) -> None:
    (request, *_) = await prepare(on_sqlite, 1)
    async with serving(on_sqlite, "--workers", "2") as running:
        pids = running.pids()
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write(request[:-10])
        send(running.process.pid, signal.SIGTERM)
        await running.until("supervisor.stopping")
        writer.write(request[-10:])
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        writer.close()
        assert await running.end() == 0
        assert running.found("process.killed") == []
        for pid in pids:
            await gone(pid)
    assert (await stored(on_sqlite, 1))[0] == {TaskStatus.PROCESSING}


async def test_a_second_signal_ends_the_processes_at_once(on_sqlite: dict[str, str], tmp_path: Path) -> None:
    async with serving(on_sqlite | {"TMPDIR": str(tmp_path)}, "--workers", "2") as running:
        pids = running.pids()
        _, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write(b"POST /tick HTTP/1.1\r\n")
        running.process.send_signal(signal.SIGINT)
        await running.until("supervisor.stopping")
        running.process.send_signal(signal.SIGINT)
        assert await running.end() == 0
        assert "a second signal" in {line["reason"] for line in running.found("process.killed")}
        writer.close()
        for pid in pids:
            await gone(pid)
        assert list(tmp_path.glob("kling-relay-*")) == []


async def test_the_processes_of_a_killed_supervisor_stop_by_themselves(
    on_sqlite: dict[str, str], tmp_path: Path
) -> None:
    async with serving(on_sqlite | {"TMPDIR": str(tmp_path)}, "--workers", "2") as running:
        pids = running.pids()
        assert len(list(tmp_path.glob("kling-relay-*"))) == 1
        running.process.kill()
        for pid in pids:
            await gone(pid)
        assert list(tmp_path.glob("kling-relay-*")) == []


async def test_sighup_with_invalid_settings_keeps_the_processes_that_serve(
    on_sqlite: dict[str, str], tmp_path: Path
) -> None:
    requests = await prepare(on_sqlite, 5)
    async with serving(on_sqlite, "--workers", "2") as running:
        before = running.pids()
        (tmp_path / "relay.toml").write_text("unknown = 1\n")
        running.process.send_signal(signal.SIGHUP)
        await running.until("process.kept", 2)
        assert "unknown" in running.text
        assert running.pids() == before
        vendor = Vendor(running.port, requests)
        await vendor.send_all(1)
        assert vendor.failures == []


async def test_what_keeps_the_first_process_from_starting_is_said_once_and_ends_serve(
    on_sqlite: dict[str, str],
) -> None:
    broken = on_sqlite | {"KLING_RELAY_LEDGER": "sqlite:////no/such/folder/relay.db", "KLING_RELAY_WORKERS": "3"}
    ended = await cli(broken, "serve", "--port", str(free_port()))
    assert ended.status == 1
    assert ended.err.count("its folder must exist and be writable") == 1
    assert "Traceback" not in ended.err


@pytest.mark.parametrize(
    ("arguments", "settings", "said"),
    [
        (("--workers", "0"), {}, "--workers: 0 (1 to 64). Use the number of processors"),
        (("--workers", "65"), {}, "--workers: 65 (1 to 64)"),
        (("--workers", "two"), {}, "Invalid value for '--workers': 'two'"),
        ((), {"KLING_RELAY_WORKERS": "0"}, "KLING_RELAY_WORKERS: '0' (a whole number from 1 to 64). Use 1 to 64."),
        ((), {"KLING_RELAY_WORKERS": "many"}, "KLING_RELAY_WORKERS: 'many' (a whole number from 1 to 64)"),
        ((), {"KLING_RELAY_WORKERS": "2.5"}, "KLING_RELAY_WORKERS: '2.5' (a whole number from 1 to 64)"),
    ],
)
async def test_an_invalid_number_of_processes_is_refused(
    on_sqlite: dict[str, str], arguments: tuple[str, ...], settings: dict[str, str], said: str
) -> None:
    ended = await cli(on_sqlite | settings, "serve", "--port", str(free_port()), *arguments)
    assert ended.status == 2
    assert said in ended.err


async def test_one_process_has_no_supervisor(on_sqlite: dict[str, str]) -> None:
    async with serving(on_sqlite | {"KLING_RELAY_WORKERS": "2"}, "--workers", "1", processes=1) as running:
        assert running.pids() == []


async def test_one_of_the_processes_listens_to_the_stream_of_a_vendor(world: World) -> None:
    oxen = world.stand_in("oxen")
    assert isinstance(oxen, OxenSandbox)
    await world.start(receiver=False)
    async with serving(world.environ, "--workers", "2") as running:
        assert len(await running.until("stream.opened")) == 1
        assert oxen.counts["streams"] == 1


class HastyClock(Clock):
    """Limits end after a three-hundredth of their time."""

    def timeout(self, seconds: float | None) -> AbstractAsyncContextManager[asyncio.Timeout]:
        return asyncio.timeout(None if seconds is None else seconds / 300)


async def spoken_once(clock: Clock, first: str = "") -> ServerProcess:
    """Return a process that has said once that it serves, and then waits for the end of its standard input."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    script = f"{first}\nimport os, sys\nos.write({theirs.fileno()}, b'.')\nsys.stdin.read()"
    with theirs:
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", script, pass_fds=(theirs.fileno(),), stdin=asyncio.subprocess.PIPE
        )
    process = ServerProcess(child, ours, 0, clock)
    await process.started()
    return process


@pytest.fixture
async def silent() -> AsyncIterator[ServerProcess]:
    """A process that served, then says nothing any more and ignores SIGTERM."""
    process = await spoken_once(HastyClock(), "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)")
    yield process
    await process.ended


async def test_a_process_whose_event_loop_hangs_is_killed(silent: ServerProcess) -> None:
    assert await silent.ended == -signal.SIGKILL


async def test_a_process_that_does_not_stop_in_time_is_killed(silent: ServerProcess) -> None:
    await silent.stop()
    assert silent.ended.result() == -signal.SIGKILL


class ThawedClock(Clock):
    """The limit that ran when all processes were frozen is over at once; then `is_over` is set."""

    def __init__(self) -> None:
        self.limits = 0
        self.is_over = asyncio.Event()

    def timeout(self, seconds: float | None) -> AbstractAsyncContextManager[asyncio.Timeout]:
        self.limits += 1
        if self.limits > 2:
            self.is_over.set()
        return asyncio.timeout(0 if self.limits == 2 else seconds)


async def test_a_process_that_was_frozen_together_with_the_supervisor_is_kept() -> None:
    clock = ThawedClock()
    process = await spoken_once(clock)
    async with asyncio.timeout(20):
        await clock.is_over.wait()
    process._process.stdin.close()  # type: ignore[union-attr]
    assert await process.ended == 0


async def test_a_process_that_cannot_be_started_for_now_is_a_failed_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*_: object, **__: object) -> None:
        raise BlockingIOError("no more processes")

    monkeypatch.setattr(asyncio, "create_subprocess_exec", refuse)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        supervisor = Supervisor(listening, 2, tmp_path, Clock())
        with pytest.raises(StartFailed):
            await supervisor._start(1, 1)


async def test_sighup_to_the_whole_group_ends_no_process_ungracefully(on_sqlite: dict[str, str]) -> None:
    async with serving(on_sqlite, "--workers", "2") as running:
        for pid in running.pids():
            os.kill(pid, signal.SIGHUP)
        running.process.send_signal(signal.SIGHUP)
        ended = await running.until("process.ended", 2)
        assert [line["status"] for line in ended] == [0, 0]


@pytest.mark.parametrize(
    ("workers", "ledger", "processors", "state"),
    [
        (2, "sqlite:///relay.db", 2, "ok"),
        (4, "sqlite:///relay.db", 8, "warn"),
        (4, "postgresql://relay@db/relay", 8, "ok"),
        (4, "postgresql://relay@db/relay", 2, "warn"),
    ],
)
def test_doctor_warns_of_more_processes_than_have_work(workers: int, ledger: str, processors: int, state: str) -> None:
    found = _processes(workers, ledger, processors)
    assert (found.state, bool(found.remedy)) == (state, state == "warn")


def test_a_process_that_does_not_last_is_replaced_after_a_growing_pause() -> None:
    assert [pause_s(lives) for lives in range(9)] == [0, 0, 1, 2, 4, 8, 16, 30, 30]
