"""The state machine's rules on whose task it is: adoption, refusal, late reports, renewed results."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from submitter.observation import Adopted, CreateRefused, NoAnswer, OutcomeUnknown, Report, SendLease, Unconfirmed
from submitter.schedule import Backoff, PollPolicy
from submitter.task import ArchivedCopy, Task, TaskStatus, Video, may_send
from submitter.transition import ADOPTION_SKEW_MS, LATE_POLLS, Transition, is_about, transition

NOW = 1_781_080_800_000
POLL_POLICY = PollPolicy(Backoff(900, 1.5, 3600), Backoff(10, 1.5, 60), 86400)
VIDEO = Video("https://cdn.example.com/1.mp4", duration=5.0)


def task(status: TaskStatus = TaskStatus.CREATED, **fields: object) -> Task:
    return replace(Task("order-1", "kling", status, NOW, NOW, POLL_POLICY), **fields)


def sent() -> Task:
    """Return a task whose create was sent at NOW, and got no answer."""
    sending = changed(transition(task(), SendLease("me", NOW + 15_000, begins=True), NOW))
    return changed(transition(sending, OutcomeUnknown("no answer"), NOW + 1000))


def changed(moved: Transition | None) -> Task:
    assert moved is not None
    return moved.task


def found(status: TaskStatus, created_at_ms: int | None, **fields: object) -> Report:
    """Return what a query by our id found."""
    videos = (VIDEO,) if status is TaskStatus.SUCCEED else ()
    return replace(Report("poll", status, "893", "order-1", videos=videos, created_at_ms=created_at_ms), **fields)


@given(st.integers(-10 * ADOPTION_SKEW_MS, 10 * ADOPTION_SKEW_MS), st.sampled_from(["poll", "refresh"]))
def test_a_task_is_adopted_only_if_it_was_created_after_the_first_send(offset_ms: int, source: str) -> None:
    report = replace(found(TaskStatus.SUCCEED, NOW + offset_ms), source=source)
    after = changed(transition(sent(), report, NOW + 10_000))
    if offset_ms >= -ADOPTION_SKEW_MS:
        assert (after.status, after.task_id) == (TaskStatus.SUCCEED, "893")
    else:
        assert (after.status, after.task_id, after.videos) == (TaskStatus.REFUSED, None, ())


def test_a_found_task_without_a_creation_time_is_not_adopted() -> None:
    after = changed(transition(sent(), found(TaskStatus.SUCCEED, None), NOW + 10_000))
    assert (after.status, after.task_id) == (TaskStatus.SUBMISSION_UNKNOWN, None)


def test_a_task_that_was_never_sent_adopts_nothing() -> None:
    reserved = changed(transition(task(), SendLease("me", NOW + 15_000), NOW))
    after = changed(transition(reserved, found(TaskStatus.SUCCEED, NOW + 5000), NOW + 10_000))
    assert (after.status, after.task_id) == (TaskStatus.CREATED, None)


def test_the_first_send_is_the_time_that_counts() -> None:
    first = changed(transition(task(), SendLease("me", NOW + 25_000, begins=True), NOW + 10_000))
    second = changed(transition(first, SendLease("me", NOW + 35_000, begins=True), NOW + 20_000))
    assert (second.first_sent_at_ms, second.abandon_at_ms) == (NOW + 10_000, NOW + 10_000 + 86_400_000)
    assert task(first_sent_at_ms=None).sent_after_ms == NOW  # as ledgers of earlier versions have it


def test_a_pushed_report_about_an_older_task_with_this_id_is_about_another_task() -> None:
    old = replace(found(TaskStatus.SUCCEED, NOW - ADOPTION_SKEW_MS - 1), source="callback")
    assert not is_about(sent(), old)
    assert is_about(sent(), replace(old, created_at_ms=NOW))
    assert is_about(sent(), replace(old, created_at_ms=None))  # vendors that state no time
    known = replace(sent(), task_id="893")
    assert is_about(known, old)
    assert not is_about(known, replace(old, task_id="894"))


def test_a_refused_task_starts_again_and_a_vendors_task_stops_that() -> None:
    refused = changed(transition(task(), CreateRefused("1102: buy a pack"), NOW))
    assert (refused.status, refused.is_open, may_send(refused, NOW)) == (TaskStatus.REFUSED, False, True)
    again = changed(transition(refused, SendLease("me", NOW + 15_000), NOW + 5000))
    assert (again.status, again.status_message, again.first_sent_at_ms) == (TaskStatus.CREATED, "", NOW + 5000)
    has_task = changed(transition(refused, Unconfirmed("893"), NOW))
    assert not may_send(has_task, NOW)
    assert transition(has_task, SendLease("me", NOW + 15_000), NOW) is None


@pytest.mark.parametrize("status", [TaskStatus.REFUSED, TaskStatus.ABANDONED])
def test_a_later_final_report_wins_over_our_own_end(status: TaskStatus) -> None:
    moved = transition(task(status, task_id="893"), found(TaskStatus.SUCCEED, NOW, source="callback"), NOW)
    assert moved is not None
    assert (moved.task.status, moved.event_type) == (TaskStatus.SUCCEED, "task.succeed")
    assert transition(task(status, task_id="893"), found(TaskStatus.PROCESSING, NOW, source="callback"), NOW) is None


def test_an_unconfirmed_report_of_an_abandoned_task_is_asked_about_a_limited_number_of_times() -> None:
    current = changed(transition(task(TaskStatus.ABANDONED, task_id="893"), Unconfirmed("893"), NOW))
    polls, now = 0, NOW
    while current.poll_at_ms is not None:
        assert current.poll_at_ms > now or polls == 0
        now, polls = current.poll_at_ms, polls + 1
        observation = NoAnswer() if polls % 2 else found(TaskStatus.PROCESSING, NOW)
        current = changed(transition(current, observation, now))
    assert (polls, current.status) == (LATE_POLLS, TaskStatus.ABANDONED)


def test_a_refresh_renews_urls_and_keeps_the_archived_copies() -> None:
    copy = ArchivedCopy("s3://b/1.mp4", "ab")
    done = task(TaskStatus.SUCCEED, task_id="893", videos=(replace(VIDEO, archived=copy),))
    renewed = found(TaskStatus.SUCCEED, NOW, source="refresh", videos=(Video("https://cdn.example.com/new.mp4"),))
    moved = transition(done, renewed, NOW + 1000)
    assert moved is not None
    assert moved.event_type is None
    assert moved.task.videos == (Video("https://cdn.example.com/new.mp4", archived=copy),)
    assert transition(moved.task, renewed, NOW + 2000) is None
    assert transition(done, replace(renewed, source="poll"), NOW) is None


def test_a_pushed_result_without_the_watermark_that_was_asked_for_is_unconfirmed() -> None:
    wanted = task(TaskStatus.SUBMITTED, task_id="893", request={"watermark": "yes"})
    pushed = found(TaskStatus.SUCCEED, NOW, source="callback")
    waiting = changed(transition(wanted, pushed, NOW))
    assert (waiting.status, waiting.unconfirmed, waiting.poll_at_ms) == (TaskStatus.SUBMITTED, True, NOW)
    complete = replace(VIDEO, watermark_url="https://cdn.example.com/1w.mp4")
    assert changed(transition(wanted, replace(pushed, videos=(complete,)), NOW)).status is TaskStatus.SUCCEED
    assert changed(transition(waiting, found(TaskStatus.SUCCEED, NOW), NOW)).status is TaskStatus.SUCCEED


@pytest.mark.parametrize(
    ("status", "after"),
    [
        (TaskStatus.CREATED, TaskStatus.PROCESSING),
        (TaskStatus.SUBMISSION_UNKNOWN, TaskStatus.PROCESSING),
        (TaskStatus.REFUSED, TaskStatus.PROCESSING),
        (TaskStatus.ABANDONED, TaskStatus.ABANDONED),
    ],
)
def test_a_person_may_adopt_a_task_that_is_not_followed(status: TaskStatus, after: TaskStatus) -> None:
    adopted = changed(transition(task(status), Adopted(found(TaskStatus.PROCESSING, NOW, source="refresh")), NOW))
    assert (adopted.status, adopted.task_id) == (after, "893")
    ended = changed(transition(task(status), Adopted(found(TaskStatus.FAILED, NOW, source="refresh")), NOW))
    assert ended.status is TaskStatus.FAILED


def test_a_task_with_another_vendors_task_is_not_adopted() -> None:
    other = task(TaskStatus.ABANDONED, task_id="894")
    assert transition(other, Adopted(found(TaskStatus.FAILED, NOW)), NOW) is None


def test_the_last_body_is_kept_and_bounded() -> None:
    current = task(TaskStatus.SUBMITTED, task_id="893")
    current = changed(transition(current, found(TaskStatus.PROCESSING, NOW, raw='{"progress": 40}'), NOW))
    assert current.raw == '{"progress": 40}'
    current = changed(transition(current, found(TaskStatus.PROCESSING, NOW, raw='{"progress": 60}'), NOW))
    assert current.raw == '{"progress": 60}'  # a poll without news
    current = changed(transition(current, found(TaskStatus.SUCCEED, NOW, raw="x" * 100_000), NOW))
    assert len(current.raw) == 16 * 1024
