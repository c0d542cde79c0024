"""The breaker: opens on repeated failure, probes, closes by itself."""

from hypothesis import given
from hypothesis import strategies as st

from receiver.breaker import FAILURES, PAUSE, Breaker


def fail(breaker: Breaker, times: int, now_s: float) -> Breaker:
    for _ in range(times):
        breaker = breaker.after(is_delivered=False, now_s=now_s, chance=0.5)
    return breaker


def test_it_opens_after_failures_in_a_row_and_not_before() -> None:
    assert fail(Breaker(), FAILURES - 1, 100).room(10, 0, 100) == 10
    opened = fail(Breaker(), FAILURES, 100)
    assert opened.room(10, 0, 100) == 0
    one_success = fail(Breaker(), FAILURES - 1, 100).after(is_delivered=True, now_s=100, chance=0.5)
    assert fail(one_success, FAILURES - 1, 100).room(10, 0, 100) == 10


def test_after_its_pause_it_probes_with_one_and_a_success_closes_it() -> None:
    opened = fail(Breaker(), FAILURES, 100)
    assert opened.until_s == 105
    assert opened.room(10, 0, 104.9) == 0
    assert opened.room(10, 0, 105) == 1
    assert opened.room(10, 1, 105) == 0  # one probe at a time
    assert opened.after(is_delivered=True, now_s=105, chance=0.5) == Breaker()


def test_a_probe_that_failed_makes_the_pause_longer_up_to_five_minutes() -> None:
    breaker, now_s, pauses = fail(Breaker(), FAILURES, 0), 0.0, []
    for _ in range(8):
        assert breaker.until_s is not None
        pauses.append(breaker.until_s - now_s)
        now_s = breaker.until_s
        breaker = fail(breaker, 1, now_s)
    assert pauses == [5, 10, 20, 40, 80, 160, 300, 300]


def test_what_had_begun_before_it_opened_does_not_lengthen_the_pause() -> None:
    opened = fail(Breaker(), FAILURES, 100)
    assert fail(opened, 20, 101).until_s == opened.until_s


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 1000)), max_size=60))
def test_it_never_stays_open_for_ever(ends: list[tuple[bool, float]]) -> None:
    breaker, now_s = Breaker(), 0.0
    for is_delivered, passed_s in ends:
        now_s += passed_s
        breaker = breaker.after(is_delivered=is_delivered, now_s=now_s, chance=1)
    assert breaker.room(1, 0, now_s + PAUSE.max_s * 1.25) == 1
