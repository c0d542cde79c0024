"""Crash recovery with eight receivers on one PostgreSQL ledger: two are killed, and no event is lost."""

from pathlib import Path

import pytest

from tests.road.many_processes import flood_many


@pytest.mark.slow
async def test_eight_receivers_on_one_ledger_with_two_killed_lose_nothing(
    postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BENCH_LEDGER", "")
    monkeypatch.chdir(Path(__file__).parents[2])
    flooded = await flood_many(tmp_path, postgres_url, 1000, processes=8, kills=2)
    assert flooded.callbacks == 2000
    assert (flooded.unfinished, flooded.undelivered, flooded.events_with_two_ids) == (0, 0, 0), flooded
    assert flooded.sent_again > 0  # the killed receivers left callbacks unanswered
