"""DynamoDB passes the ledgers' suite on two stand-ins, and keeps its own promises."""

import uuid
from collections.abc import AsyncIterator

import pytest

from submitter.ledger import Ledger, open_ledger
from tests.conformance.ledgers import LedgerSuite, Open
from tests.conftest import use_aws


@pytest.fixture(params=["moto", "ministack"])
def stand_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each of the stand-ins, by its URL."""
    return use_aws(request.getfixturevalue(request.param), monkeypatch)


async def opening(options: str = "") -> AsyncIterator[Open]:
    """Give what opens one table of its own, again and again."""
    url = f"dynamodb://relay-{uuid.uuid4().hex[:12]}?shards=2{options}"
    ledgers: list[Ledger] = []

    def again() -> Ledger:
        ledgers.append(open_ledger(url))
        return ledgers[-1]

    yield again
    for ledger in ledgers:
        await ledger.close()


@pytest.fixture
async def opened(stand_in: str) -> AsyncIterator[Open]:
    async for again in opening():
        yield again


@pytest.fixture
async def empty(stand_in: str) -> AsyncIterator[Open]:
    async for again in opening():
        yield again


class TestDynamo(LedgerSuite):
    """The suite, on both stand-ins."""
