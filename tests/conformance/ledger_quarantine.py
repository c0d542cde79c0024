"""Conformance suite of a ledger's quarantine; a part of the ledger protocol's."""

from collections.abc import Callable

from submitter.ledger.base import QUARANTINED_MAX, Ledger, Quarantined

NOW = 1_781_080_800_000
Open = Callable[[], Ledger]


class QuarantineSuite:
    """What `submitter.ledger.base.Tasks.quarantine` and `Maintenance.quarantined` promise."""

    async def test_quarantine_stores_a_body_once_and_counts_its_repetitions(self, opened: Open) -> None:
        ledger = opened()
        for body in (b"\xff\x00", b"{}", b"{}"):
            await ledger.quarantine(Quarantined("a", "kling", NOW, "unknown status", body))
        await ledger.quarantine(Quarantined("b", "kling", NOW + 1, "unknown status", b"other"))
        assert [entry.body for entry in await ledger.quarantined(1)] == [b"other"]
        assert {entry.body: entry.times for entry in await ledger.quarantined(10, "a")} == {b"\xff\x00": 1, b"{}": 2}
        assert len(await ledger.quarantined(1, "a")) == 1
        assert await ledger.quarantined(10, "c") == []
        kept = {entry.body: entry.times for entry in await ledger.quarantined(10)}
        assert kept == {b"\xff\x00": 1, b"{}": 2, b"other": 1}

    async def test_the_last_bodies_of_a_task_are_kept_and_all_are_counted(self, opened: Open) -> None:
        ledger = opened()
        for number in range(2 * QUARANTINED_MAX):
            await ledger.quarantine(Quarantined("a", "kling", NOW + number, "unknown status", b"%d" % number))
        await ledger.quarantine(Quarantined("b", "kling", NOW, "unknown status", b"other"))
        kept = await ledger.quarantined(100, "a")
        assert [entry.body for entry in kept] == [b"%d" % (2 * QUARANTINED_MAX - 1 - n) for n in range(QUARANTINED_MAX)]
        assert sum(entry.times for entry in kept) == 2 * QUARANTINED_MAX
        assert (await ledger.counts())["quarantine"] == QUARANTINED_MAX + 1
