"""End-to-end tests in one process: sandbox, receiver, hook and submitter on loopback, with each ledger."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import standardwebhooks
from cloudevents.core.bindings.http import HTTPMessage, from_binary_event, from_structured_event

from receiver.poller import Poller
from submitter.clock import Clock
from submitter.errors import IdConflict, InvalidRequest, InvalidSettings, SubmissionUnknown, VendorRefused
from submitter.http import VendorHttp
from submitter.media.download import download
from submitter.sandbox.media import inspect
from submitter.task import TaskStatus
from tests.world import HOOK_SECRET, World


def queries(world: World) -> int:
    return sum(world.kling.counts[name] for name in ("query_v2", "query_v1", "list_v1", "list_v2"))


@pytest.fixture(
    params=[
        "sqlite",
        pytest.param("postgresql", marks=pytest.mark.matrix),
        pytest.param("dynamodb", marks=[pytest.mark.matrix, pytest.mark.xdist_group("aws")]),
    ]
)
def ledger_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The ledgers that each test runs with."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'relay.db'}"
    return str(request.getfixturevalue("postgres_url" if request.param == "postgresql" else "dynamodb_url"))


@pytest.mark.parametrize("api", ["v1", "v2"])
async def test_a_task_is_followed_by_its_callbacks_without_a_query(world: World, api: str, tmp_path: Path) -> None:
    if api == "v1":
        world.use_v1()
    await world.start()
    task = await world.submitter.submit(world.request(metadata={"order": "42"}))
    done = await task.result(timeout=60)
    await world.inbox.until(3)
    assert done.status is TaskStatus.SUCCEED
    assert [event["type"] for event in world.inbox.events] == ["task.submitted", "task.processing", "task.succeed"]
    assert queries(world) == 0
    assert world.kling.counts["created"] == 1
    last = world.inbox.events[-1]
    source = "video" if api == "v2" else None
    assert last["data"]["metadata"] == {"order": "42"}
    assert last["data"]["task_id"] == done.task_id
    assert isinstance(done.task_id, str)
    assert last["data"]["cost"] == [
        {"kind": "unit", "amount": "3.6", "currency": None, "list_price": None, "source": source}
    ]
    saved = tmp_path / "result.mp4"
    await download(last["data"]["videos"][0]["url"], saved, frozenset({"127.0.0.1"}))
    facts = await asyncio.to_thread(inspect, saved.read_bytes())
    assert min(facts.width, facts.height) == 720
    assert last["data"]["videos"][0]["duration"] == pytest.approx(facts.duration_s, abs=0.1)


async def test_every_event_is_signed_and_a_cloudevent_in_both_modes(world: World) -> None:
    world.hooks += (
        f'[[hook]]\nname = "binary"\nurl = "{world.hook_url}/b"\nmode = "binary"\n'
        'secret = "env:HOOK_SECRET"\nevents = ["task.succeed"]\n'
    )
    await world.start()
    task = await world.submitter.submit(world.request(external_task_id="order.1~a", metadata={"name": "Zoë 猫"}))
    await task.result(timeout=60)
    await world.inbox.until(4)
    by_id: dict[str, list[Any]] = {}
    for headers, body in world.inbox.requests:
        standardwebhooks.Webhook(HOOK_SECRET).verify(body, headers)
        read = from_binary_event if "ce-id" in headers else from_structured_event
        event = read(HTTPMessage(headers=headers, body=body))
        assert event.get_id() == headers["webhook-id"]
        assert "." not in event.get_id()
        assert event.get_source() == "/kling-relay/kling"
        assert event.get_subject() == "order.1~a"
        by_id.setdefault(event.get_id(), []).append(event)
    assert len(by_id) == 3
    twice = next(events for events in by_id.values() if len(events) == 2)
    assert twice[0].get_data() == twice[1].get_data()
    assert twice[0].get_data()["metadata"] == {"name": "Zoë 猫"}
    sequences = [event["sequence"] for event in world.inbox.events if "sequence" in event]
    assert sequences == sorted(sequences)


async def test_callbacks_may_arrive_before_the_answer_to_create(world: World) -> None:
    world.faults(create_late=1, late_s=30)
    await world.start()
    submitting = asyncio.create_task(world.submitter.submit(world.request()))
    await world.inbox.until(3)
    await world.clock.skip_until(submitting.done, step_s=30)
    task = await submitting
    assert task.task.status is TaskStatus.SUCCEED
    assert task.task.task_id is not None
    assert queries(world) == 0


async def test_forged_callbacks_change_nothing(world: World) -> None:
    world.faults(forge=1)
    await world.start()
    task = await world.submitter.submit(world.request())
    done = await task.result(timeout=60)
    assert done.status is TaskStatus.SUCCEED
    ledger = world.open_ledger()
    assert [event.type for event in await ledger.events(done.external_task_id)] == [
        "task.submitted",
        "task.processing",
        "task.succeed",
    ]
    assert await ledger.quarantined(10) == []
    await ledger.close()


async def test_with_a_secret_set_an_unsigned_callback_is_refused(world: World) -> None:
    world.kling.secret = None
    world.environ["KLING_RELAY_POLL_AFTER_S"] = "0.2"
    await world.start()
    task = await world.submitter.submit(world.request())
    done = await task.result(timeout=60)
    assert done.status is TaskStatus.SUCCEED
    assert queries(world) > 0  # only the answers to polls were accepted
    assert {line.rpartition(":")[2] for job in world.kling.jobs.values() for line in job.callbacks} == {"401"}


@pytest.mark.parametrize("api", ["v1", "v2"])
async def test_a_task_whose_callbacks_are_lost_is_polled(world: World, api: str) -> None:
    if api == "v1":
        world.use_v1()
    world.environ["KLING_RELAY_POLL_AFTER_S"] = "0.2"
    world.faults(drop=1)
    await world.start()
    tasks = [await world.submitter.submit(world.request()) for _ in range(3)]
    done = [await task.result(timeout=60) for task in tasks]
    assert {task.status for task in done} == {TaskStatus.SUCCEED}
    await world.inbox.until(6)
    assert 0 < queries(world) <= 12


@pytest.mark.parametrize("api", ["v1", "v2"])
@pytest.mark.parametrize("fault", [{"create_5xx": 1}, {"create_never": 1}])
async def test_a_create_without_a_clear_answer_is_looked_up_and_adopted(
    world: World, api: str, fault: dict[str, float]
) -> None:
    if api == "v1":
        world.use_v1()
    world.faults(**fault)
    await world.start()
    world.create_with(VendorHttp(answer_timeout_s=1))
    task = await world.submitter.submit(world.request())
    done = await task.result(timeout=60)
    assert done.status is TaskStatus.SUCCEED
    assert world.kling.counts["created"] == 1


async def test_a_create_that_never_arrived_is_sent_again_with_the_same_id(world: World) -> None:
    await world.start()
    http = VendorHttp(answer_timeout_s=2)
    run = http.run
    lost = iter([True])

    async def lose_the_first(request: Any, *, fresh: bool = False) -> Any:
        if request.method == "POST" and next(lost, False):
            from submitter.http import Unanswered

            return Unanswered("the connection broke")
        return await run(request, fresh=fresh)

    http.run = lose_the_first  # type: ignore[method-assign]
    world.create_with(http)
    task = await world.submitter.submit(world.request())
    done = await task.result(timeout=60)
    assert done.status is TaskStatus.SUCCEED
    assert world.kling.counts["created"] == 1
    assert world.kling.counts["query_v2"] == 3  # three lookups show that it is absent before it is sent again


async def test_a_create_with_an_unknown_outcome_is_settled_by_its_callback(world: World) -> None:
    world.kling.pace_s = 1
    await world.start()

    async def lose_every_answer(request: Any, *, fresh: bool = False) -> Any:
        from submitter.http import Unanswered

        if request.method == "POST":
            await run(request, fresh=fresh)
        return Unanswered("no response")

    http = VendorHttp()
    run = http.run
    http.run = lose_every_answer  # type: ignore[method-assign]
    world.create_with(http)
    world.faults(drop=1)
    with pytest.raises(SubmissionUnknown, match="it is not sent again"):
        await world.submitter.submit(world.request(external_task_id="order-7"))
    world.faults()
    task = await world.submitter.task("order-7")
    assert task.task.status is TaskStatus.SUBMISSION_UNKNOWN
    done = await task.result(timeout=60)
    assert done.status is TaskStatus.SUCCEED
    assert world.kling.counts["created"] == 1
    await world.inbox.until(3)
    assert [event["type"] for event in world.inbox.events] == [
        "task.submission_unknown",
        "task.processing",
        "task.succeed",
    ]


async def test_the_same_request_with_the_same_id_creates_one_task(world: World) -> None:
    await world.start()
    request = world.request(external_task_id="order-1")
    first, second = await asyncio.gather(world.submitter.submit(request), world.submitter.submit(request))
    assert first.task.task_id == second.task.task_id
    assert world.kling.counts["created"] == 1
    with pytest.raises(IdConflict, match="a different mode, metadata"):
        await world.submitter.submit(world.request(external_task_id="order-1", mode="pro", metadata={"a": "b"}))
    assert world.kling.counts["created"] == 1


async def test_submissions_wait_while_the_account_has_no_free_slot(world: World) -> None:
    world.kling.slots = 2
    await world.start()
    tasks = await asyncio.gather(*(world.submitter.submit(world.request()) for _ in range(6)))
    done = [await task.result(timeout=30) for task in tasks]
    assert {task.status for task in done} == {TaskStatus.SUCCEED}
    assert world.kling.counts["created"] == 6
    assert world.kling.counts["refused_1303"] > 0


async def test_the_parallel_limit_prevents_refusals_of_a_full_account(world: World) -> None:
    world.kling.slots = 2
    world.environ["KLING_RELAY_PARALLEL"] = "2"
    await world.start()
    tasks = await asyncio.gather(*(world.submitter.submit(world.request()) for _ in range(6)))
    done = [await task.result(timeout=30) for task in tasks]
    assert {task.status for task in done} == {TaskStatus.SUCCEED}
    assert world.kling.counts["refused_1303"] == 0


async def test_resubmitting_an_existing_task_needs_no_slot(world: World) -> None:
    world.kling.pace_s = 30
    world.environ["KLING_RELAY_PARALLEL"] = "1"
    await world.start()
    request = world.request(external_task_id="order-1")
    first = await world.submitter.submit(request)
    waiting = asyncio.create_task(world.submitter.submit(world.request()))
    async with asyncio.timeout(5):
        again = await world.submitter.submit(request)
    assert again.task.task_id == first.task.task_id
    assert not waiting.done()
    waiting.cancel()


async def test_a_refused_request_succeeds_after_the_settings_are_corrected(world: World) -> None:
    world.environ["KLING_API_KEY"] = "wrong"
    await world.start()
    request = world.request(external_task_id="order-1")
    with pytest.raises(VendorRefused, match="KLING_API=v1") as refused:
        await world.submitter.submit(request)
    assert not refused.value.retryable
    world.environ["KLING_API_KEY"] = "sandbox-key"
    from submitter.submit import Submitter

    async with Submitter(world.settings.common, world.open_ledger()) as corrected:
        done = await (await corrected.submit(request)).result(timeout=60)
    assert done.status is TaskStatus.SUCCEED
    assert world.kling.counts["created"] == 1
    assert queries(world) == 0  # a definite refusal needs no lookup


async def test_a_failed_task_has_the_reason_and_is_retried_with_a_new_id(world: World) -> None:
    world.faults(fail=1, fail_reason="no person in the video")
    await world.start()
    task = await world.submitter.submit(world.request(external_task_id="order-1", metadata={"order": "1"}))
    failed = await task.result(timeout=60)
    assert failed.status is TaskStatus.FAILED
    assert failed.status_message == "no person in the video"
    world.faults()
    again = await world.submitter.retry("order-1", new_id="order-1b")
    done = await again.result(timeout=60)
    assert done.status is TaskStatus.SUCCEED
    assert done.metadata == {"order": "1", "retry_of": "order-1"}
    with pytest.raises(InvalidRequest, match="order-1b is succeed"):
        await world.submitter.retry("order-1b")


async def test_succeed_without_a_url_is_quarantined_and_polled(world: World) -> None:
    world.environ["KLING_RELAY_POLL_AFTER_S"] = "0.2"
    world.faults(no_url=1)
    await world.start()
    task = await world.submitter.submit(world.request())
    ledger = world.open_ledger()
    async with asyncio.timeout(60):
        while world.kling.counts["query_v2"] < 2:
            version = ledger.version()
            await ledger.wait_for_change(version, 0.2)
    quarantined = await ledger.quarantined(10)
    assert "without a video URL" in quarantined[0].reason
    assert (await ledger.get(task.external_task_id)).status is TaskStatus.PROCESSING
    next(iter(world.kling.jobs.values())).has_url = True
    assert (await task.result(timeout=60)).status is TaskStatus.SUCCEED
    await ledger.close()


async def test_confirm_terminal_polls_before_it_accepts_a_final_report(world: World) -> None:
    world.hooks += '[vendor.kling]\nconfirm = "terminal"\n'
    await world.start()
    task = await world.submitter.submit(world.request())
    done = await task.result(timeout=60)
    assert done.status is TaskStatus.SUCCEED
    assert queries(world) == 1


async def test_an_abandoned_task_emits_an_event_and_still_accepts_a_final_report(world: World) -> None:
    world.environ["KLING_RELAY_ABANDON_AFTER_S"] = "3600"
    world.kling.pace_s = 7200
    await world.start()
    task = await world.submitter.submit(world.request())
    abandoned = await world.skip_to_end(task)
    assert abandoned.status is TaskStatus.ABANDONED
    await world.clock.skip_until(lambda: "task.succeed" in [event["type"] for event in world.inbox.events], step_s=60)
    types = dict.fromkeys(event["type"] for event in world.inbox.events)  # skipping ends leases, so some come twice
    assert list(types) == ["task.submitted", "task.abandoned", "task.succeed"]


async def test_submitting_without_a_public_url_is_refused_and_suggests_no_callback(world: World) -> None:
    await world.start(receiver=False)
    del world.environ["KLING_RELAY_PUBLIC_URL"]
    from submitter.submit import Submitter

    async with Submitter(world.settings.common, world.open_ledger()) as submitter:
        with pytest.raises(InvalidSettings, match="--no-callback"):
            await submitter.submit(world.request())
        assert world.kling.counts["created"] == 0


async def test_a_medium_that_cannot_be_probed_is_a_warning_and_an_invalid_one_is_an_error(world: World) -> None:
    await world.start(receiver=False)
    unreachable = await world.submitter.prepare(world.request(image="http://127.0.0.1:9/girl.png"))
    assert "image was not checked" in unreachable.warnings[0]
    with pytest.raises(InvalidRequest) as wrong:
        await world.submitter.prepare(world.request(image=world.media / "dance.mp4", video=world.media / "girl.png"))
    assert {problem.field for problem in wrong.value.problems} == {"image.format", "video.format"}


async def test_the_poller_queries_in_batches_of_twenty(world: World) -> None:
    world.faults(drop=1)
    await world.start(receiver=False)
    request = world.request(video=f"{world.hook_url}/files/dance.mp4")
    tasks = await asyncio.gather(*(world.submitter.submit(request, callback=False) for _ in range(45)))
    clock = _Later()
    ledger = world.open_ledger()
    http = VendorHttp()
    async with asyncio.timeout(60):
        while any(job.status != "succeeded" for job in world.kling.jobs.values()):
            await asyncio.sleep(0.01)
    poller = Poller(ledger, world.settings.common.vendors, http, clock)
    await poller.poll()
    assert world.kling.counts["query_v2"] == 3
    found = await ledger.get_many([task.external_task_id for task in tasks])
    assert {task.status for task in found} == {TaskStatus.SUCCEED}
    await http.close()
    await ledger.close()


class _Later(Clock):
    def now_ms(self) -> int:
        return super().now_ms() + 3_600_000
