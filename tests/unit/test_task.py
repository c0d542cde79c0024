"""The law of a task: whatever is reported, in whatever order."""

import itertools

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from submitter.event import event_of
from submitter.schedule import Backoff, Patience
from submitter.task import (
    RANK,
    TERMINAL,
    Archived,
    Copied,
    Doubted,
    Observation,
    OutcomeUnknown,
    Refused,
    Report,
    Sending,
    Task,
    TaskStatus,
    Unheard,
    Video,
    may_send,
    next_poll_ms,
    transition,
)

NOW = 1_781_080_800_000
PATIENCE = Patience(Backoff(900, 1.5, 3600), Backoff(10, 1.5, 60), 86400)
VIDEO = Video("https://cdn.example.com/1.mp4", duration=5.0)


def task(status: TaskStatus = TaskStatus.CREATED, **fields: object) -> Task:
    made = Task("order-1", "kling", status, NOW, NOW, PATIENCE)
    return msgspec.structs.replace(made, **fields)


def report(status: TaskStatus, source: str = "callback") -> Report:
    videos = (VIDEO,) if status is TaskStatus.SUCCEED else ()
    return msgspec.structs.replace(Report("callback", status, "893", videos=videos), source=source)


LIVES = [
    [TaskStatus.SUBMITTED, TaskStatus.PROCESSING, TaskStatus.SUCCEED],
    [TaskStatus.SUBMITTED, TaskStatus.PROCESSING, TaskStatus.FAILED],
]


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[Observation], TaskStatus]:
    """A life of a task as it is heard: repeated, reordered and partly lost, but its end is heard once."""
    life = draw(st.sampled_from(LIVES))
    told = [report(status, source) for status in life for source in ("create", "callback", "poll")]
    ours: list[Observation] = [
        Unheard(),
        Doubted(),
        OutcomeUnknown("no answer"),
        Refused("no"),
        Sending("me", NOW + 1000),
    ]
    heard: list[Observation] = draw(st.lists(st.sampled_from([*told, *ours]), max_size=12))
    position = draw(st.integers(0, len(heard)))
    return [*heard[:position], report(life[-1]), *heard[position:]], life[-1]


@given(histories())
def test_the_final_state_is_the_vendors_whatever_the_order(history: tuple[list[Observation], TaskStatus]) -> None:
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
        assert RANK[current.status] >= RANK[before.status]
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


@given(st.permutations(LIVES[0]), st.integers(1, 3))
def test_the_end_is_one_event_however_often_it_is_told(order: list[TaskStatus], times: int) -> None:
    current, ends = task(), 0
    for status in itertools.chain.from_iterable([one] * times for one in order):
        moved = transition(current, report(status), NOW)
        if moved is not None:
            current = moved.task
            ends += moved.event_type == "task.succeed"
    assert ends == 1


def test_a_copy_is_noted_once_and_changes_no_end() -> None:
    copied = Archived(
        {VIDEO.url: Copied("s3://results/0.mp4", "ab" * 32), "https://other.example.com": Copied("x", "y")}
    )
    for status in TaskStatus:
        if status is not TaskStatus.SUCCEED:
            assert transition(task(status, videos=(VIDEO,)), copied, NOW) is None
    ended = task(TaskStatus.SUCCEED, videos=(VIDEO,), sequence=3)
    noted = transition(ended, copied, NOW + 5)
    assert noted is not None
    assert (noted.event_type, noted.task.status, noted.task.sequence) == ("task.archived", TaskStatus.SUCCEED, 4)
    assert noted.task.videos[0].archived == Copied("s3://results/0.mp4", "ab" * 32)
    assert noted.task.videos[0].archived_watermark is None
    assert transition(noted.task, Archived({VIDEO.url: Copied("elsewhere", "cd" * 32)}), NOW + 9) is None
    assert transition(noted.task, report(TaskStatus.FAILED), NOW + 9) is None


def test_abandoned_is_left_for_the_truth_and_for_nothing_else() -> None:
    gone = task(TaskStatus.ABANDONED, sequence=4)
    assert transition(gone, report(TaskStatus.PROCESSING), NOW) is None
    moved = transition(gone, report(TaskStatus.SUCCEED), NOW)
    assert moved is not None
    assert moved.event_type == "task.succeed"
    assert moved.task.sequence == 5


def test_silence_is_asked_about_later_and_later_and_ends_at_the_deadline() -> None:
    current, now, polls = task(TaskStatus.SUBMITTED, task_id="893"), NOW, []
    current = msgspec.structs.replace(current, poll_at_ms=next_poll_ms(current, now))
    while current.poll_at_ms is not None:
        now = current.poll_at_ms
        polls.append(now - NOW)
        moved = transition(current, Unheard(), now)
        assert moved is not None
        current = moved.task
    gaps = [after - before for before, after in itertools.pairwise(polls)]
    assert 900_000 * 0.75 <= polls[0] <= 900_000 * 1.25
    assert gaps[0] > polls[0]
    assert polls[-1] == 86_400_000
    assert current.status is TaskStatus.ABANDONED
    assert len(polls) < 30


def test_a_doubted_report_changes_no_state_and_is_asked_about_at_once() -> None:
    moved = transition(task(TaskStatus.PROCESSING, poll_at_ms=NOW + 900_000), Doubted(), NOW)
    assert moved is not None
    assert moved.event_type is None
    assert moved.task.status is TaskStatus.PROCESSING
    assert moved.task.poll_at_ms == NOW


def test_what_we_do_puts_off_no_poll_of_a_doubted_task() -> None:
    held = transition(task(), Sending("s1", NOW + 1000, begins=True), NOW)
    assert held is not None
    doubted = transition(held.task, Doubted("893"), NOW + 100)
    assert doubted is not None
    renewed = transition(doubted.task, Sending("s1", NOW + 2000, renews=True), NOW + 300)
    assert renewed is not None
    assert renewed.task.poll_at_ms == NOW + 100
    unknown = transition(renewed.task, OutcomeUnknown("no answer"), NOW + 900)
    assert unknown is not None
    assert unknown.task.poll_at_ms == NOW + 100


def test_the_right_to_send_is_a_lease() -> None:
    moved = transition(task(), Sending("first", NOW + 15_000), NOW)
    assert moved is not None
    assert not may_send(moved.task, NOW + 14_999)
    assert transition(moved.task, Sending("second", NOW + 30_000), NOW + 14_999) is None
    assert transition(moved.task, Sending("first", NOW + 30_000), NOW + 14_999) is not None
    taken = transition(moved.task, Sending("second", NOW + 30_000), NOW + 15_000)
    assert taken is not None
    assert taken.task.sender == "second"


def test_a_renewal_behind_the_end_takes_no_right_anew() -> None:
    held = transition(task(), Sending("s1", NOW + 1000, begins=True), NOW)
    assert held is not None
    renewed = transition(held.task, Sending("s1", NOW + 2000, renews=True), NOW)
    assert renewed is not None
    assert renewed.task.sending_until_ms == NOW + 2000
    ended = transition(renewed.task, OutcomeUnknown("no answer"), NOW)
    assert ended is not None
    assert transition(ended.task, Sending("s1", NOW + 3000, renews=True), NOW) is None
    assert transition(ended.task, Sending("s2", NOW + 3000), NOW) is not None


def test_a_reservation_whose_submitter_died_becomes_unknown_when_the_vendor_has_no_such_task() -> None:
    sending = transition(task(), Sending("dead", NOW + 15_000), NOW)
    assert sending is not None
    assert sending.task.poll_at_ms is not None
    assert sending.task.poll_at_ms > NOW + 15_000
    moved = transition(sending.task, Unheard(), sending.task.poll_at_ms)
    assert moved is not None
    assert moved.event_type == "task.submission_unknown"


def test_a_refusal_ends_the_reservation_and_lets_it_be_sent_again() -> None:
    sending = transition(task(), Sending("me", NOW + 15_000), NOW)
    assert sending is not None
    refused = transition(sending.task, Refused("1102: buy a pack"), NOW)
    assert refused is not None
    assert refused.task.poll_at_ms is None
    assert may_send(refused.task, NOW)
    days_later = NOW + 5 * 86_400_000
    again = transition(refused.task, Sending("me", days_later + 15_000), days_later)
    assert again is not None
    assert again.task.abandon_at_ms == days_later + 86_400_000


def test_a_callback_that_overtakes_the_answer_to_create_keeps_its_state() -> None:
    sending = transition(task(), Sending("me", NOW + 15_000), NOW)
    assert sending is not None
    early = transition(sending.task, report(TaskStatus.PROCESSING), NOW)
    assert early is not None
    late = transition(early.task, report(TaskStatus.SUBMITTED, "create"), NOW)
    assert late is None or (late.task.status is TaskStatus.PROCESSING and late.event_type is None)
