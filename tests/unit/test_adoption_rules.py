"""The state machine's rules on whose task it is: adoption, refusal, late reports, renewed results."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from submitter.observation import (
    Adopted,
    CreateRefused,
    CreateUnclear,
    FailedOver,
    NoAnswer,
    Observation,
    OutcomeUnknown,
    Report,
    SendLease,
    Unconfirmed,
)
from submitter.schedule import Backoff, PollPolicy
from submitter.task import ArchivedCopy, Task, TaskStatus, Video, may_send
from submitter.transition import (
    ADOPTION_SKEW_MS,
    LATE_POLLS,
    UNCONFIRMED_AGAIN_MS,
    Transition,
    is_about,
    transition,
)

NOW = 1_781_080_800_000
POLL_POLICY = PollPolicy(Backoff(900, 1.5, 3600), Backoff(10, 1.5, 60), 86400)
VIDEO = Video("https://cdn.example.com/1.mp4", duration=5.0)


def task(status: TaskStatus = TaskStatus.CREATED, **fields: object) -> Task:
    return replace(Task("order-1", "kling", status, NOW, NOW, POLL_POLICY), **fields)


def sent() -> Task:
    """Return a task whose create was sent at NOW, and got no answer."""
    sending = changed(transition(task(), SendLease("me", NOW + 15_000, begins=True), NOW))
    return changed(transition(sending, OutcomeUnknown("no answer", "me"), NOW + 1000))


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


def reserved() -> Task:
    return changed(transition(task(), SendLease("me", NOW + 15_000), NOW))


def test_a_refused_task_starts_again_and_an_unconfirmed_report_delays_that() -> None:
    refused = changed(transition(reserved(), CreateRefused("1102: buy a pack", "me"), NOW))
    assert (refused.status, refused.is_open, may_send(refused, NOW)) == (TaskStatus.REFUSED, False, True)
    again = changed(transition(refused, SendLease("me", NOW + 15_000), NOW + 5000))
    assert (again.status, again.status_message, again.first_sent_at_ms) == (TaskStatus.CREATED, "", NOW + 5000)
    has_task = changed(transition(refused, Unconfirmed("893"), NOW))
    assert not may_send(has_task, NOW)
    assert transition(has_task, SendLease("me", NOW + 15_000), NOW) is None
    for _ in range(20):  # an outage of the vendor says nothing
        assert has_task.poll_at_ms is not None
        has_task = changed(transition(has_task, NoAnswer("HTTP 502"), has_task.poll_at_ms))
    assert (has_task.task_id, may_send(has_task, NOW)) == ("893", False)
    while has_task.poll_at_ms is not None:  # no query finds that task
        has_task = changed(transition(has_task, NoAnswer(is_absent=True), has_task.poll_at_ms))
    assert (has_task.task_id, may_send(has_task, NOW)) == (None, True)


def test_a_submitter_that_was_stopped_does_not_send_what_was_refused_meanwhile() -> None:
    refused = changed(transition(reserved(), NoAnswer(is_absent=True), NOW + 3_600_000))
    assert refused.status is TaskStatus.REFUSED
    late = NOW + 3_600_001
    assert transition(refused, SendLease("me", late + 15_000, begins=True), late) is None


def test_a_persons_word_is_about_the_creates_before_it() -> None:
    judged = sent()
    again = changed(transition(judged, SendLease("me", NOW + 25_000, absent_at_ms=judged.updated_at_ms), NOW + 9_000))
    sending = changed(transition(again, SendLease("me", NOW + 25_000, begins=True), NOW + 10_000))
    lost = changed(transition(sending, OutcomeUnknown("no answer", "me"), NOW + 11_000))
    late = SendLease("other", NOW + 40_000, absent_at_ms=judged.updated_at_ms)
    assert changed(transition(lost, late, NOW + 20_000)).may_have_been_sent


def test_a_create_without_a_clear_answer_is_remembered_after_a_later_refusal() -> None:
    sending = changed(transition(reserved(), SendLease("me", NOW + 15_000, begins=True), NOW))
    unclear = changed(transition(sending, CreateUnclear("me"), NOW + 5000))
    again = changed(transition(unclear, SendLease("me", NOW + 25_000, begins=True), NOW + 10_000))
    refused = changed(transition(again, CreateRefused("1102: buy a pack", "me"), NOW + 11_000))
    assert (refused.status, refused.may_have_been_sent) == (TaskStatus.REFUSED, True)
    later = NOW + 5 * 86_400_000
    restarted = changed(transition(refused, SendLease("new", later + 15_000), later))
    assert (restarted.may_have_been_sent, restarted.abandon_at_ms) == (True, later + 86_400_000)
    first = found(TaskStatus.SUCCEED, NOW + 1000)  # the first create made a task after all
    assert is_about(restarted, replace(first, source="callback"))
    assert changed(transition(restarted, first, later)).task_id == "893"
    older = found(TaskStatus.SUCCEED, NOW - ADOPTION_SKEW_MS - 1)
    assert changed(transition(restarted, older, later)).status is TaskStatus.REFUSED


def test_a_create_without_a_clear_answer_is_remembered_for_its_vendor() -> None:
    sending = changed(transition(reserved(), SendLease("me", NOW + 15_000, begins=True), NOW))
    unclear = changed(transition(sending, CreateUnclear("me"), NOW))
    moved = changed(transition(unclear, FailedOver("novita", POLL_POLICY, "5001", "me"), NOW))
    assert (moved.vendor, moved.may_have_been_sent) == ("novita", False)
    back = changed(transition(moved, FailedOver("kling", POLL_POLICY, "no balance", "me"), NOW))
    assert (back.may_have_been_sent, back.ours_after_ms) == (True, NOW)


def test_a_persons_word_that_the_vendor_has_no_task_is_taken() -> None:
    again = changed(transition(sent(), SendLease("me", NOW + 25_000, absent_at_ms=sent().updated_at_ms), NOW + 10_000))
    assert (again.may_have_been_sent, again.unanswered_since_ms) == (False, {})


def test_a_dead_submitters_create_is_remembered_by_the_one_that_takes_over() -> None:
    dead = changed(transition(reserved(), SendLease("me", NOW + 15_000, begins=True), NOW))
    taken = changed(transition(dead, SendLease("new", NOW + 35_000), NOW + 20_000))
    sending = changed(transition(taken, SendLease("new", NOW + 35_000, begins=True), NOW + 21_000))
    refused = changed(transition(sending, CreateRefused("1102: buy a pack", "new"), NOW + 22_000))
    assert (refused.may_have_been_sent, refused.ours_after_ms) == (True, NOW)


@pytest.mark.parametrize(
    "outcome",
    [
        CreateRefused("1102: buy a pack", "me"),
        CreateUnclear("me"),
        FailedOver("novita", POLL_POLICY, "no balance", "me"),
        OutcomeUnknown("no answer", "me"),
    ],
)
def test_only_the_owner_of_the_lease_records_the_outcome_of_a_create(outcome: Observation) -> None:
    """A submitter that was suspended for longer than its lease comes back while another one sends."""
    sending = changed(transition(reserved(), SendLease("me", NOW + 15_000, begins=True), NOW))
    assert transition(sending, outcome, NOW + 1000) is not None
    taken = changed(transition(sending, SendLease("new", NOW + 35_000, begins=True), NOW + 20_000))
    assert transition(taken, outcome, NOW + 21_000) is None
    unknown = changed(transition(taken, OutcomeUnknown("no answer", "new"), NOW + 22_000))
    assert transition(unknown, outcome, NOW + 23_000) is None


def test_a_task_that_is_being_sent_is_not_adopted_by_a_person() -> None:
    report = found(TaskStatus.SUBMITTED, NOW, source="refresh")
    sending = changed(transition(reserved(), SendLease("me", NOW + 15_000, begins=True), NOW))
    assert transition(sending, Adopted(report), NOW + 14_999) is None
    assert changed(transition(sending, Adopted(report), NOW + 15_000)).task_id == "893"


def test_a_found_task_without_results_yet_is_processing() -> None:
    unfinished = found(TaskStatus.SUCCEED, NOW + 1, unfinished=True)
    after = changed(transition(sent(), replace(unfinished, videos=()), NOW + 5000))
    assert (after.status, after.task_id, after.unconfirmed) == (TaskStatus.PROCESSING, "893", True)


@pytest.mark.parametrize("status", [TaskStatus.REFUSED, TaskStatus.ABANDONED])
def test_a_later_final_report_wins_over_our_own_end(status: TaskStatus) -> None:
    moved = transition(task(status, task_id="893"), found(TaskStatus.SUCCEED, NOW, source="callback"), NOW)
    assert moved is not None
    assert (moved.task.status, moved.event_type) == (TaskStatus.SUCCEED, "task.succeed")


@pytest.mark.parametrize("source", ["create", "callback", "poll"])
def test_a_refused_task_that_the_vendor_has_after_all_goes_on(source: str) -> None:
    processing = found(TaskStatus.PROCESSING, NOW, source=source)
    moved = transition(task(TaskStatus.REFUSED, may_have_been_sent=True), processing, NOW)
    assert moved is not None
    assert (moved.event_type, moved.task.task_id) == ("task.processing", "893")
    assert moved.task.poll_at_ms is not None
    assert transition(task(TaskStatus.ABANDONED, task_id="893"), processing, NOW) is None


def test_a_strangers_task_is_asked_about_a_limited_number_of_times() -> None:
    current = changed(transition(replace(sent(), status=TaskStatus.ABANDONED), Unconfirmed(), NOW))
    older, polls = found(TaskStatus.SUCCEED, NOW - ADOPTION_SKEW_MS - 1), 0
    while current.poll_at_ms is not None:
        polls, current = polls + 1, changed(transition(current, older, current.poll_at_ms))
    assert (polls, current.status, current.task_id) == (LATE_POLLS, TaskStatus.ABANDONED, None)


def test_an_unconfirmed_report_of_an_abandoned_task_is_asked_about_a_limited_number_of_times() -> None:
    current = changed(transition(task(TaskStatus.ABANDONED, task_id="893"), Unconfirmed("893"), NOW))
    polls, now = 0, NOW
    while current.poll_at_ms is not None:
        assert current.poll_at_ms > now or polls == 0
        now, polls = current.poll_at_ms, polls + 1
        observation = NoAnswer(is_absent=True) if polls % 2 else found(TaskStatus.PROCESSING, NOW)
        current = changed(transition(current, observation, now))
    assert (polls, current.status) == (LATE_POLLS, TaskStatus.ABANDONED)


def test_many_unconfirmed_reports_do_not_make_the_polls_more_frequent() -> None:
    current, polled_at_ms = task(TaskStatus.SUBMITTED, task_id="893", poll_at_ms=NOW + 900_000), []
    for now in range(NOW, NOW + 60_000, 100):  # ten a second for a minute, by anyone with the callback URL
        current = changed(transition(current, Unconfirmed("893"), now))
        assert current.poll_at_ms is not None
        if current.poll_at_ms <= now:
            polled_at_ms.append(now)
            current = changed(transition(current, NoAnswer(), now))
    assert polled_at_ms[0] == NOW
    assert len(polled_at_ms) <= 1 + 60_000 // UNCONFIRMED_AGAIN_MS


def test_a_lease_that_was_taken_while_a_clock_was_a_year_ahead_does_not_count() -> None:
    ahead = NOW + 365 * 86_400_000
    wrong = changed(transition(task(), SendLease("other", ahead + 15_000), ahead))
    assert may_send(wrong, NOW)
    assert changed(transition(wrong, SendLease("me", NOW + 15_000), NOW)).lease_owner == "me"


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
