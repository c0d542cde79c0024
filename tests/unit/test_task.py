"""The task state machine: reports in any order, leases, polling, stored documents."""

import itertools

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from submitter.event import event_of
from submitter.observation import (
    Archived,
    CreateRefused,
    CreateUnclear,
    NoAnswer,
    Observation,
    OutcomeUnknown,
    Report,
    SendLease,
    Unconfirmed,
)
from submitter.schedule import Backoff, PollPolicy
from submitter.task import RANK, TERMINAL, ArchivedCopy, Charge, RefusedBy, Task, TaskStatus, Video, may_send
from submitter.transition import next_poll_ms, transition

NOW = 1_781_080_800_000
POLL_POLICY = PollPolicy(Backoff(900, 1.5, 3600), Backoff(10, 1.5, 60), 86400)
VIDEO = Video("https://cdn.example.com/1.mp4", duration=5.0)


def task(status: TaskStatus = TaskStatus.CREATED, **fields: object) -> Task:
    made = Task("order-1", "kling", status, NOW, NOW, POLL_POLICY)
    return replace(made, **fields)


def report(status: TaskStatus, source: str = "callback") -> Report:
    videos = (VIDEO,) if status is TaskStatus.SUCCEED else ()
    return replace(Report("callback", status, "893", videos=videos), source=source)


LIFECYCLES = [
    [TaskStatus.SUBMITTED, TaskStatus.PROCESSING, TaskStatus.SUCCEED],
    [TaskStatus.SUBMITTED, TaskStatus.PROCESSING, TaskStatus.FAILED],
]


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[Observation], TaskStatus]:
    """Draw a task's reports: duplicated, reordered and partly lost, but with the final one at least once."""
    life = draw(st.sampled_from(LIFECYCLES))
    reports = [report(status, source) for status in life for source in ("create", "callback", "poll")]
    others: list[Observation] = [
        NoAnswer(),
        Unconfirmed(),
        OutcomeUnknown("no answer", "me"),
        CreateUnclear("me"),
        CreateRefused("no", "me"),
        SendLease("me", NOW + 1000),
        SendLease("me", NOW + 1000, begins=True),
    ]
    observed: list[Observation] = draw(st.lists(st.sampled_from([*reports, *others]), max_size=12))
    position = draw(st.integers(0, len(observed)))
    return [*observed[:position], report(life[-1]), *observed[position:]], life[-1]


@given(histories())
def test_reports_in_any_order_reach_the_vendors_final_status(history: tuple[list[Observation], TaskStatus]) -> None:
    observations, end = history
    now, current = NOW, task()
    events = []
    for observation in observations:
        now += 1000
        before = current
        moved = transition(current, observation, now)
        if moved is None:
            continue
        current = moved.task
        starts_again = before.status is TaskStatus.REFUSED and isinstance(observation, SendLease | Report)
        assert RANK[current.status] >= RANK[before.status] or starts_again
        if before.status in TERMINAL:
            pytest.fail(f"{observation} moved a task out of {before.status}")
        event = event_of(moved)
        if event is not None:
            events.append(event)
            assert current.status is not before.status
    assert current.status is end
    assert len({event.id for event in events}) == len(events)
    sequences = [event.sequence for event in events]
    assert sequences == sorted(set(sequences))
    assert current.poll_at_ms is None


@given(st.permutations(LIFECYCLES[0]), st.integers(1, 3))
def test_a_repeated_final_report_emits_one_event(order: list[TaskStatus], times: int) -> None:
    current, ends = task(), 0
    for status in itertools.chain.from_iterable([one] * times for one in order):
        moved = transition(current, report(status), NOW)
        if moved is not None:
            current = moved.task
            ends += moved.event_type == "task.succeed"
    assert ends == 1


def test_an_archived_copy_is_recorded_once_and_does_not_change_the_status() -> None:
    copied = Archived(
        {VIDEO.url: ArchivedCopy("s3://results/0.mp4", "ab" * 32), "https://other.example.com": ArchivedCopy("x", "y")}
    )
    for status in TaskStatus:
        if status is not TaskStatus.SUCCEED:
            assert transition(task(status, videos=(VIDEO,)), copied, NOW) is None
    ended = task(TaskStatus.SUCCEED, videos=(VIDEO,), sequence=3)
    noted = transition(ended, copied, NOW + 5)
    assert noted is not None
    assert (noted.event_type, noted.task.status, noted.task.sequence) == ("task.archived", TaskStatus.SUCCEED, 4)
    assert noted.task.videos[0].archived == ArchivedCopy("s3://results/0.mp4", "ab" * 32)
    assert noted.task.videos[0].archived_watermark is None
    assert transition(noted.task, Archived({VIDEO.url: ArchivedCopy("elsewhere", "cd" * 32)}), NOW + 9) is None
    assert transition(noted.task, report(TaskStatus.FAILED), NOW + 9) is None


def test_only_a_final_report_changes_an_abandoned_task() -> None:
    abandoned = task(TaskStatus.ABANDONED, sequence=4)
    assert transition(abandoned, report(TaskStatus.PROCESSING), NOW) is None
    moved = transition(abandoned, report(TaskStatus.SUCCEED), NOW)
    assert moved is not None
    assert moved.event_type == "task.succeed"
    assert moved.task.sequence == 5


def test_an_overdue_task_is_polled_with_backoff_until_its_deadline() -> None:
    current, now, polls = task(TaskStatus.SUBMITTED, task_id="893"), NOW, []
    current = replace(current, poll_at_ms=next_poll_ms(current, now))
    while current.poll_at_ms is not None:
        now = current.poll_at_ms
        polls.append(now - NOW)
        moved = transition(current, NoAnswer(), now)
        assert moved is not None
        current = moved.task
    gaps = [after - before for before, after in itertools.pairwise(polls)]
    assert 900_000 * 0.75 <= polls[0] <= 900_000 * 1.25
    assert gaps[0] > polls[0]
    assert polls[-1] == 86_400_000
    assert current.status is TaskStatus.ABANDONED
    assert len(polls) < 30


def test_an_unconfirmed_report_changes_no_status_and_is_polled_at_once() -> None:
    moved = transition(task(TaskStatus.PROCESSING, poll_at_ms=NOW + 900_000), Unconfirmed(), NOW)
    assert moved is not None
    assert moved.event_type is None
    assert moved.task.status is TaskStatus.PROCESSING
    assert moved.task.poll_at_ms == NOW


def test_sending_does_not_delay_the_poll_of_an_unconfirmed_task() -> None:
    held = transition(task(), SendLease("s1", NOW + 1000, begins=True), NOW)
    assert held is not None
    unconfirmed = transition(held.task, Unconfirmed("893"), NOW + 100)
    assert unconfirmed is not None
    renewed = transition(unconfirmed.task, SendLease("s1", NOW + 2000, renews=True), NOW + 300)
    assert renewed is not None
    assert renewed.task.poll_at_ms == NOW + 100
    unknown = transition(renewed.task, OutcomeUnknown("no answer", "s1"), NOW + 900)
    assert unknown is not None
    assert unknown.task.poll_at_ms == NOW + 100


def test_one_owner_holds_the_send_lease_until_it_expires() -> None:
    moved = transition(task(), SendLease("first", NOW + 15_000), NOW)
    assert moved is not None
    assert not may_send(moved.task, NOW + 14_999)
    assert transition(moved.task, SendLease("second", NOW + 30_000), NOW + 14_999) is None
    assert transition(moved.task, SendLease("first", NOW + 30_000), NOW + 14_999) is not None
    taken = transition(moved.task, SendLease("second", NOW + 30_000), NOW + 15_000)
    assert taken is not None
    assert taken.task.lease_owner == "second"


def test_a_late_renewal_does_not_take_a_released_lease() -> None:
    held = transition(task(), SendLease("s1", NOW + 1000, begins=True), NOW)
    assert held is not None
    renewed = transition(held.task, SendLease("s1", NOW + 2000, renews=True), NOW)
    assert renewed is not None
    assert renewed.task.lease_until_ms == NOW + 2000
    ended = transition(renewed.task, OutcomeUnknown("no answer", "s1"), NOW)
    assert ended is not None
    assert transition(ended.task, SendLease("s1", NOW + 3000, renews=True), NOW) is None
    assert transition(ended.task, SendLease("s2", NOW + 3000), NOW) is not None


@pytest.mark.parametrize("refused", [False, True])
def test_a_reservation_of_a_submitter_that_died_before_the_vendor_took_a_create_is_refused(refused: bool) -> None:
    reserved = transition(task(), SendLease("dead", NOW + 15_000), NOW)
    assert reserved is not None
    if refused:  # for the time being: HTTP 429
        sent = transition(reserved.task, SendLease("dead", NOW + 15_000, begins=True), NOW)
        assert sent is not None
        reserved = transition(sent.task, SendLease("dead", NOW + 15_000, renews=True, refused=True), NOW)
        assert reserved is not None
    assert reserved.task.poll_at_ms is not None
    moved = transition(reserved.task, NoAnswer(), reserved.task.poll_at_ms)
    assert moved is not None
    assert (moved.event_type, may_send(moved.task, reserved.task.poll_at_ms)) == ("task.refused", True)


def test_a_create_of_a_dead_submitter_becomes_submission_unknown_if_the_vendor_has_no_such_task() -> None:
    sending = transition(task(), SendLease("dead", NOW + 15_000, begins=True), NOW)
    assert sending is not None
    assert sending.task.poll_at_ms is not None
    assert sending.task.poll_at_ms > NOW + 15_000
    moved = transition(sending.task, NoAnswer(), sending.task.poll_at_ms)
    assert moved is not None
    assert moved.event_type == "task.submission_unknown"


def test_a_refused_task_can_be_sent_again_with_a_new_deadline() -> None:
    sending = transition(task(), SendLease("me", NOW + 15_000), NOW)
    assert sending is not None
    refused = transition(sending.task, CreateRefused("1102: buy a pack", "me"), NOW)
    assert refused is not None
    assert refused.task.poll_at_ms is None
    assert may_send(refused.task, NOW)
    days_later = NOW + 5 * 86_400_000
    again = transition(refused.task, SendLease("me", days_later + 15_000), days_later)
    assert again is not None
    assert again.task.abandon_at_ms == days_later + 86_400_000


def test_a_callback_before_the_answer_to_create_keeps_its_status() -> None:
    sending = transition(task(), SendLease("me", NOW + 15_000), NOW)
    assert sending is not None
    early = transition(sending.task, report(TaskStatus.PROCESSING), NOW)
    assert early is not None
    late = transition(early.task, report(TaskStatus.SUBMITTED, "create"), NOW)
    assert late is None or (late.task.status is TaskStatus.PROCESSING and late.event_type is None)


STORED_BY_AN_EARLIER_VERSION = (
    b'{"external_task_id":"order-42","vendor":"novita","status":"submitted","created_at_ms":1790000000000,'
    b'"updated_at_ms":1790000001000,"patience":[[900,1.5,3600],[10,1.5,60],86400],"request":{"prompt":"x"},'
    b'"metadata":{"order":"42"},"task_id":"893","status_message":"m","videos":[{"url":"https://c/1.mp4",'
    b'"watermark_url":null,"duration":5.0,"expires_at_ms":1792592000000,"archived":{"url":"s3://b/1.mp4",'
    b'"sha256":"ab"},"archived_watermark":null}],"cost":[{"kind":"unit","amount":"8","currency":null,'
    b'"list_price":null}],"sequence":2,"tried":[["kling","no balance"]],"is_told":false,"was_told":true,'
    b'"sender":"s","sending_until_ms":1790000002000,"begun":true,"refused":true,"doubted":true,"polls":3,'
    b'"poll_at_ms":1790000003000}'
)
# Written back, it has the fields that came later; `refused` has become a status (a migration of the ledger).
# A task's first write has the integers of the vendor's poll policy; once read, they are floats in later writes.
WRITTEN_BACK = (
    STORED_BY_AN_EARLIER_VERSION.replace(b',"refused":true', b"")
    .replace(b'"archived_watermark":null}', b'"archived_watermark":null,"id":null}')
    .replace(b'"list_price":null}', b'"list_price":null,"source":null}')
)
FLOATS = WRITTEN_BACK.replace(b"[[900,1.5,3600],[10,1.5,60],86400]", b"[[900.0,1.5,3600.0],[10.0,1.5,60.0],86400.0]")


def test_a_document_of_an_earlier_version_is_read_and_nothing_of_it_is_lost() -> None:
    stored = msgspec.json.decode(STORED_BY_AN_EARLIER_VERSION, type=Task)
    assert msgspec.json.encode(stored) == FLOATS
    assert msgspec.json.encode(msgspec.json.decode(FLOATS, type=Task)) == FLOATS
    assert msgspec.json.encode(replace(stored, poll_policy=POLL_POLICY)) == WRITTEN_BACK
    assert stored == Task(
        external_task_id="order-42",
        vendor="novita",
        status=TaskStatus.SUBMITTED,
        created_at_ms=1_790_000_000_000,
        updated_at_ms=1_790_000_001_000,
        poll_policy=POLL_POLICY,
        request={"prompt": "x"},
        metadata={"order": "42"},
        task_id="893",
        status_message="m",
        videos=(
            Video(
                "https://c/1.mp4",
                duration=5.0,
                expires_at_ms=1_792_592_000_000,
                archived=ArchivedCopy("s3://b/1.mp4", "ab"),
            ),
        ),
        cost=(Charge("unit", "8"),),
        sequence=2,
        refused_by=(RefusedBy("kling", "no balance"),),
        expects_callback=False,
        heard_from_vendor=True,
        lease_owner="s",
        lease_until_ms=1_790_000_002_000,
        may_have_been_sent=True,
        unconfirmed=True,
        polls=3,
        poll_at_ms=1_790_000_003_000,
    )


@pytest.mark.parametrize("unfinished", [False, True])
def test_the_answer_to_create_replaces_an_unconfirmed_task_id(*, unfinished: bool) -> None:
    """Otherwise polls ask for a task that does not exist, and callbacks about the real one are refused."""
    leased = transition(task(), SendLease("me", NOW + 60_000, begins=True), NOW)
    assert leased is not None
    doubted = transition(leased.task, Unconfirmed("from-a-stranger"), NOW)
    assert doubted is not None
    answer = replace(report(TaskStatus.SUBMITTED, "create"), unfinished=unfinished)
    answered = transition(doubted.task, answer, NOW)
    assert answered is not None
    assert answered.task.task_id == "893"
