"""The contract with users: what an import loads, how settings are read, the pinned dependencies.

The documentation is compared with the code in `tests/house/test_documentation.py`.
"""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from receiver.settings import load_receiver_settings
from submitter.errors import InvalidSettings

ROOT = Path(__file__).parents[2]


def loaded_by(module: str) -> set[str]:
    code = f"import sys, {module}; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return {name.partition(".")[0] for name in ran.stdout.split()} | set(ran.stdout.split())


def test_importing_the_app_loads_no_client_sdk_command_line_or_sandbox() -> None:
    loaded = loaded_by("receiver.app")
    forbidden = {"httpx", "httpcore", "click", "boto3", "obstore", "av", "imagesize", "uvicorn", "cryptography"}
    assert not loaded & forbidden
    assert not {name for name in loaded if name.startswith(("submitter.sandbox", "receiver.worker", "receiver.cli"))}


def test_a_function_that_logs_json_loads_no_structlog_and_no_toml_parser() -> None:
    logs = "from submitter import log; log.configure('json'); log.Logger('test').info('task.changed')"
    loaded = loaded_by(f"receiver.aws_lambda.receive; {logs}")
    assert "receiver.aws_lambda.receive" in loaded
    assert not loaded & {"structlog", "tomllib", "importlib.metadata"}


def test_the_service_and_the_submitter_load_no_command_line_and_no_sandbox() -> None:
    for module in ("receiver.service", "submitter.submit"):
        loaded = loaded_by(module)
        assert not {"receiver.cli", "submitter.sandbox.app", "av"} & loaded
        # Only a hook that uses a bus imports its client.
        assert not {"redis", "nats", "aio_pika", "aiomqtt", "paho", "boto3"} & loaded
    assert "receiver" not in loaded_by("submitter.submit")


def test_every_dependency_is_pinned_with_hashes_and_no_host_is_named() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras, groups = project["project"]["optional-dependencies"], project["dependency-groups"]
    demo = [*project["project"]["dependencies"], *extras["sandbox"], *groups["build"]]
    development = [*demo, *(one for extra in extras.values() for one in extra), *groups["dev"]]
    for file, required in (("requirements.txt", demo), ("requirements-dev.txt", development)):
        pins = (ROOT / file).read_text()
        for requirement in filter(lambda one: isinstance(one, str), required):
            name = re.match(r"[A-Za-z0-9-]+", requirement)
            assert name is not None
            assert re.search(rf"^{name[0]}==", pins, re.MULTILINE), (file, requirement)
        assert "://" not in pins


def test_the_demo_and_the_tests_install_the_same_versions() -> None:
    demo, development = (
        dict(re.findall(r"^(\S+)==(\S+)", (ROOT / file).read_text(), re.MULTILINE))
        for file in ("requirements.txt", "requirements-dev.txt")
    )
    assert demo.items() <= development.items()


def settings(tmp_path: Path, toml: str = "", **environ: str) -> object:
    config = tmp_path / "relay.toml"
    config.write_text(toml)
    return load_receiver_settings({"KLING_RELAY_CONFIG": str(config), **environ})


def test_environment_variables_override_the_file_which_overrides_the_defaults(tmp_path: Path) -> None:
    config = tmp_path / "relay.toml"
    config.write_text(
        'public_url = "https://file.example.com"\nledger = "sqlite:///file.db"\nallow_hosts = ["a", "b"]\n'
        '[vendor.kling]\napi_key = "env:MY_KEY"\nparallel = 3\nconfirm = "always"\n'
    )
    found = load_receiver_settings(
        {"KLING_RELAY_CONFIG": str(config), "KLING_RELAY_LEDGER": "sqlite:///env.db", "MY_KEY": "secret-key"}
    )
    assert found.common.public_url == "https://file.example.com"
    assert found.common.ledger == "sqlite:///env.db"
    assert found.common.allow_hosts == {"a", "b"}
    assert found.common.vendors["kling"].parallel == 3
    assert found.confirm["kling"] == "always"
    assert found.confirm["novita"] == "terminal"
    assert "secret-key" not in repr(found) + repr(found.common)


def test_all_problems_of_the_settings_are_reported_at_once(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings) as wrong:
        settings(
            tmp_path,
            'publik_url = "x"\n[vendor.kling]\nconfirm = "maybe"\nshade = 1\n[vendor.unknown]\n[[hook]]\nname = "a"\n',
            KLING_RELAY_PUBLIC_URL="relay.example.com",
            KLING_RELAY_TICK_TOKEN="short",
            KLING_RELAY_ABANDON_AFTER_S="-1",
        )
    message = str(wrong.value)
    for part in (
        "Did you mean 'public_url'?", "confirm", "vendor.kling.shade", "vendor.unknown", "hook[a].url",
        "KLING_RELAY_PUBLIC_URL", "KLING_RELAY_TICK_TOKEN", "KLING_RELAY_ABANDON_AFTER_S",
    ):  # fmt: skip
        assert part in message, part
    assert "short" not in message


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("KLING_RELAY_ALLOW_HOSTS", "http://127.0.0.1:9193/", "'http://127.0.0.1:9193/' (a host:"),
        ("KLING_RELAY_PUBLIC_URL", "https://relay:hunter2@host/", "it has a user or a password"),
        ("KLING_RELAY_PARALLEL", "2.5", "'2.5' (a whole number of at least 1)"),
    ],
)
def test_a_setting_that_would_silently_do_something_else_is_refused(
    tmp_path: Path, name: str, value: str, said: str
) -> None:
    config = tmp_path / "relay.toml"
    config.write_text("")
    with pytest.raises(InvalidSettings) as refused:
        load_receiver_settings({"KLING_RELAY_CONFIG": str(config), name: value})
    assert said in str(refused.value)
    assert "hunter2" not in str(refused.value)
