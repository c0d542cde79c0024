"""Short forms of `make torture`'s parts `stores` and `rotation`, and proofs that they notice a broken product."""

from pathlib import Path

import pytest

from tests.torture.damaged_file import damage_trial
from tests.torture.parts import Missing
from tests.torture.rotation import rotate
from tests.torture.stores import postgres_trial, sqlite_trial

ANSWERS_TOO_EARLY = """
from receiver import callbacks
from submitter.errors import LedgerUnavailable
inner = callbacks.CallbackEndpoint._accept_in_time
async def accept(self, *given):
    try:
        return await inner(self, *given)
    except LedgerUnavailable:
        return "applied"
callbacks.CallbackEndpoint._accept_in_time = accept
"""
KEEPS_WRITING_TO_A_REPLACED_FILE = """
from submitter.ledger.sqlite.group_commit import GroupWriter
GroupWriter._is_replaced = lambda self: False
"""
IGNORES_SIGNATURES = """
from receiver import verification
verification.verify = lambda *given: None
"""


async def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    done = await sqlite_trial(1, tmp_path, lambda name: "full" in name)
    assert (done.findings, done.counts["faults"]) == ([], 1)
    assert done.counts["answers 503"] > 0


@pytest.mark.slow
async def test_a_file_replaced_by_a_backup_loses_nothing(tmp_path: Path) -> None:
    done = await sqlite_trial(1, tmp_path, lambda name: "replaced" in name)
    assert (done.findings, done.counts["faults"]) == ([], 1)


@pytest.mark.slow
async def test_postgresql_that_stops_loses_nothing_and_logs_no_traceback(tmp_path: Path) -> None:
    try:
        done = await postgres_trial(1, tmp_path, lambda name: "stopped" in name)
    except Missing as reason:
        pytest.skip(str(reason))
    assert (done.findings, done.counts["faults"]) == ([], 1)


async def test_damaged_files_are_refused_or_acknowledge_nothing_that_is_lost(tmp_path: Path) -> None:
    done = await damage_trial(1, tmp_path, damages=2)
    assert (done.findings, done.counts["damaged files"]) == ([], 2)


@pytest.mark.slow
async def test_rotations_under_load_refuse_and_accept_what_they_should(tmp_path: Path) -> None:
    done = await rotate(1, tmp_path, cycles=1)
    assert done.findings == []
    assert done.counts["probes"] > 0


@pytest.mark.slow
async def test_an_answer_before_the_commit_is_found(tmp_path: Path) -> None:
    done = await sqlite_trial(1, tmp_path, lambda name: "full" in name, ANSWERS_TOO_EARLY)
    assert any("lost: " in finding for finding in done.findings), done.findings


@pytest.mark.slow
async def test_a_receiver_that_writes_into_a_replaced_file_is_found(tmp_path: Path) -> None:
    done = await sqlite_trial(1, tmp_path, lambda name: "replaced" in name, KEEPS_WRITING_TO_A_REPLACED_FILE)
    assert any("stayed ready" in finding for finding in done.findings), done.findings


@pytest.mark.slow
async def test_a_receiver_that_ignores_signatures_is_found(tmp_path: Path) -> None:
    done = await rotate(1, tmp_path, ("webhook",), 1, IGNORES_SIGNATURES)
    assert any("answered 200, not 401" in finding for finding in done.findings), done.findings
