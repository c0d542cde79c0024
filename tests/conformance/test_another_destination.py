"""Plugins: a destination of another package, found by its entry point."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from receiver import destinations
from receiver.hook_settings import read_hooks
from submitter.errors import InvalidSettings, Problem
from tests.conformance.destinations import NOW_S, event

ACME = """
from receiver.destinations import Kind
from receiver.destinations.base import Outcome

KIND = Kind("acme_bus")
received = []

class Acme:
    async def send(self, event, now_s):
        received.append(event.id)
        return Outcome(True, "acme has it")

    async def reach(self):
        return None

    async def close(self):
        return None

def open(hook, allow_hosts):
    return Acme()
"""


@pytest.fixture
def metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The metadata directory of an installed package that adds the scheme `acme`."""
    folder = tmp_path / "site" / "acme_bus-1.0.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-bus\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[kling_relay.destinations]\nacme = acme_bus:KIND\n")
    (folder.parent / "acme_bus.py").write_text(ACME)
    monkeypatch.syspath_prepend(str(folder.parent))
    importlib.invalidate_caches()
    destinations.kinds.cache_clear()
    yield folder
    destinations.kinds.cache_clear()
    sys.modules.pop("acme_bus", None)


async def test_a_plugin_destination_is_opened_by_its_scheme(metadata: Path) -> None:
    problems: list[Problem] = []
    (hook,) = read_hooks([{"name": "a", "url": "acme://host/x"}], lambda _, value: value, problems)
    destination = destinations.open_destination(hook, frozenset())
    assert (await destination.send(event(), NOW_S)).answer == "acme has it"
    assert sys.modules["acme_bus"].received == [event().id]
    assert hook.ordered


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("https = acme_bus:KIND", "another destination already uses this scheme"),
        ("acme = acme_bus:Acme", "not Kind"),
        ("acme = acme_missing:KIND", "cannot be imported"),
    ],
)
def test_an_invalid_entry_point_is_reported(metadata: Path, line: str, expected: str) -> None:
    (metadata / "entry_points.txt").write_text(f"[kling_relay.destinations]\n{line}\n")
    with pytest.raises(InvalidSettings, match="Fix or uninstall the package") as raised:
        destinations.kinds()
    assert expected in str(raised.value)


def test_a_missing_extra_is_reported_with_its_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "redis", None)
    monkeypatch.setitem(sys.modules, "redis.asyncio", None)
    monkeypatch.delitem(sys.modules, "receiver.destinations.redis", raising=False)
    (hook,) = read_hooks([{"name": "a", "url": "redis://host/x"}], lambda _, value: value, [])
    with pytest.raises(InvalidSettings, match="pip install 'redis>=6'"):
        destinations.open_destination(hook, frozenset())
