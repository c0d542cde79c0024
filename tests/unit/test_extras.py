"""Error messages about a missing extra name a command that works wherever the package came from."""

import subprocess
import sys
from importlib import metadata

import pytest

from submitter.extras import install_command


def test_the_command_names_the_packages_of_the_extra() -> None:
    assert install_command("postgres") == "pip install 'asyncpg>=0.30'"
    assert install_command("google") == "pip install 'google-auth[requests]>=2.40'"


def test_every_extra_has_a_command() -> None:
    extras = metadata.metadata("kling-relay").get_all("Provides-Extra")
    assert extras
    assert not [extra for extra in extras if "kling-relay" in install_command(extra)]


def test_without_metadata_the_command_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", missing)
    assert install_command("postgres") == "pip install 'kling-relay[postgres]'"


def test_the_demo_without_its_extra_names_the_command() -> None:
    code = "import sys; sys.modules['av'] = None; from receiver.cli.main import main; main(['demo'])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 1
    assert "pip install 'av>=14'" in ran.stderr
    assert "Traceback" not in ran.stderr
