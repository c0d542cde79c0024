"""Fixtures: real servers on loopback, real files, real databases in fresh schemas."""

import os
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import hypothesis
import pytest

from submitter.ledger.sqlite.ledger import SqliteLedger
from submitter.sandbox.media import make_image, make_video
from submitter.vendors.registry import vendors
from tests.conformance.aws_stand_ins import AWS, MINISTACK, run_ministack, run_moto
from tests.conformance.brokers import is_listening
from tests.world import World

# Shared machines are slow now and then: a property is about values, not about time.
hypothesis.settings.register_profile("relay", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("relay")


def needs(what: str, *, is_there: bool) -> None:
    """Skip with a reason where something is not there; fail where it must be (CI=true)."""
    if not is_there:
        if os.environ.get("CI") == "true":
            pytest.fail(f"{what} is missing, and CI must have it")
        pytest.skip(f"{what} is not on this machine")


@pytest.fixture(scope="session")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with girl.png and dance.mp4 (4 s, with sound)."""
    folder = tmp_path_factory.mktemp("media")
    (folder / "girl.png").write_bytes(make_image(400, 600))
    (folder / "dance.mp4").write_bytes(make_video(4, 480, 360))
    return folder


@pytest.fixture
async def ledger(tmp_path: Path) -> AsyncIterator[SqliteLedger]:
    opened = SqliteLedger(tmp_path / "relay.db")
    yield opened
    await opened.close()


@pytest.fixture
def ledger_url(tmp_path: Path) -> str:
    """Where a world keeps its ledger; a module may have several."""
    return f"sqlite:///{tmp_path / 'relay.db'}"


@pytest.fixture
async def world(tmp_path: Path, media: Path, ledger_url: str) -> AsyncIterator[World]:
    """A world that is not started yet, so that a test can set it up."""
    made = World(tmp_path, media)
    made.environ["KLING_RELAY_LEDGER"] = ledger_url
    async with made.stack:
        yield made
    assert made.inbox.undescribed == []  # every event is as asyncapi.yaml says


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(timeout=10, trust_env=False) as made:
        yield made


async def postgres_schema() -> AsyncIterator[str]:
    """Yield the URL of a ledger in a fresh schema of a real PostgreSQL; drop the schema afterwards."""
    import asyncpg

    server = os.environ.get("TEST_POSTGRES_URL", "postgresql://postgres@127.0.0.1:5432/test")
    needs("PostgreSQL", is_there="TEST_POSTGRES_URL" in os.environ or is_listening(5432))
    schema = f"relay_{uuid.uuid4().hex[:12]}"
    yield f"{server}?schema={schema}"
    db = await asyncpg.connect(server)
    await db.execute(f'DROP SCHEMA IF EXISTS "{schema}" CASCADE')
    await db.close()


postgres_url = pytest.fixture(postgres_schema, name="postgres_url")
another_postgres_url = pytest.fixture(postgres_schema, name="another_postgres_url")


@pytest.fixture(scope="session")
def moto() -> Iterator[str]:
    """The URL of moto, a stand-in for AWS."""
    with run_moto() as url:
        yield url


@pytest.fixture(scope="session")
def ministack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of ministack, another stand-in for AWS."""
    needs("ministack (make install)", is_there=MINISTACK.exists())
    with run_ministack(tmp_path_factory.mktemp("ministack")) as url:
        yield url


@pytest.fixture
def dynamodb_url(ministack: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a ledger in a fresh table of a stand-in for DynamoDB."""
    use_aws(ministack, monkeypatch)
    return f"dynamodb://relay-{uuid.uuid4().hex[:12]}"


@pytest.fixture
def aws(moto: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of moto, with the environment variables that lead AWS's clients there."""
    return use_aws(moto, monkeypatch)


def use_aws(url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Set the environment variables that lead AWS's clients to the stand-in at `url`; return `url`."""
    values = {**AWS, "AWS_ENDPOINT_URL": url}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    return url


@pytest.fixture(autouse=True)
def no_settings_of_this_shell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hide the settings of the shell that runs the tests."""
    for name in os.environ:
        if name.startswith(tuple(f"{prefix.upper()}_" for prefix in vendors())):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
