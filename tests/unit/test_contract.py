"""What others build against: settings, imports, the README's tables, the pins."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import msgspec
import pytest

from receiver.destinations import BUILT_IN as DESTINATIONS
from receiver.hooks import EVENTS, NAMES, read_hooks
from receiver.settings import load_receiver_settings
from submitter.errors import InvalidSettings, Problem
from submitter.sandbox.faults import Faults
from submitter.settings import COMMON, OF_VENDOR, RECEIVER
from submitter.task import RANK, TaskStatus
from submitter.vendors import BUILT_IN
from submitter.vendors.table import capabilities
from tests.conftest import HOOK_SECRET

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def loaded_by(module: str) -> set[str]:
    code = f"import sys, {module}; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return {name.partition(".")[0] for name in ran.stdout.split()} | set(ran.stdout.split())


def test_importing_the_app_loads_no_client_sdk_command_line_or_sandbox() -> None:
    loaded = loaded_by("receiver.app")
    forbidden = {"httpx", "httpcore", "click", "boto3", "obstore", "av", "imagesize", "uvicorn", "cryptography"}
    assert not loaded & forbidden
    assert not {name for name in loaded if name.startswith(("submitter.sandbox", "receiver.worker", "receiver.cli"))}


def test_the_service_and_the_submitter_load_no_command_line_and_no_sandbox() -> None:
    for module in ("receiver.service", "submitter.submit"):
        loaded = loaded_by(module)
        assert not {"receiver.cli", "submitter.sandbox.app", "av"} & loaded
        assert (
            not {"redis", "nats", "aio_pika", "aiomqtt", "paho", "boto3"} & loaded
        )  # a bus is loaded by the hook that uses it
    assert "receiver" not in loaded_by("submitter.submit")


def test_the_readme_lists_every_setting() -> None:
    for name in (*COMMON, *RECEIVER):
        assert f"`KLING_RELAY_{name.upper()}`" in README
    listed = set(re.findall(r"`KLING_RELAY_([A-Z_]+)`", README))
    assert listed == {name.upper() for name in (*COMMON, *RECEIVER)} | {"CONFIG"}


def test_the_readme_lists_every_event_hook_field_fault_and_status() -> None:
    for word in (*EVENTS, *NAMES, *Faults.__struct_fields__, *(status.value for status in TaskStatus)):
        assert f"`{word}`" in README, word
    assert set(RANK) == set(TaskStatus)


def test_the_readmes_event_is_whole() -> None:
    example = README.partition("<!-- event -->\n```json\n")[2].partition("```")[0]
    event = msgspec.json.decode(example)
    assert set(event) == {
        "specversion", "id", "source", "type", "subject", "time", "datacontenttype", "sequence", "data",
    }  # fmt: skip
    assert set(event["data"]) == {
        "external_task_id", "task_id", "vendor", "status", "status_message", "videos", "cost", "metadata",
        "created_at", "updated_at",
    }  # fmt: skip
    assert set(event["data"]["videos"][0]) == {"url", "watermark_url", "duration", "expires_at"}


def test_every_dependency_is_pinned_with_hashes_and_no_host_is_named() -> None:
    pins = (ROOT / "requirements.txt").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    asked = [
        *project["project"]["dependencies"],
        *(one for extra in project["project"]["optional-dependencies"].values() for one in extra),
        *project["dependency-groups"]["dev"],
    ]
    for requirement in asked:
        name = re.match(r"[A-Za-z0-9-]+", requirement)
        assert name is not None
        assert re.search(rf"^{name[0]}==", pins, re.MULTILINE), requirement
    assert "://" not in pins


def settings(tmp_path: Path, toml: str = "", **environ: str) -> object:
    config = tmp_path / "relay.toml"
    config.write_text(toml)
    return load_receiver_settings({"KLING_RELAY_CONFIG": str(config), **environ})


def test_the_environment_is_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
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


def test_every_problem_of_the_settings_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings) as wrong:
        settings(
            tmp_path,
            'publik_url = "x"\n[vendor.kling]\nconfirm = "maybe"\nshade = 1\n[vendor.nobody]\n[[hook]]\nname = "a"\n',
            KLING_RELAY_PUBLIC_URL="relay.example.com",
            KLING_RELAY_TICK_TOKEN="short",
            KLING_RELAY_ABANDON_AFTER_S="-1",
        )
    told = str(wrong.value)
    for part in (
        "Did you mean 'public_url'?", "confirm", "vendor.kling.shade", "vendor.nobody", "hook[a].url",
        "KLING_RELAY_PUBLIC_URL", "KLING_RELAY_TICK_TOKEN", "KLING_RELAY_ABANDON_AFTER_S",
    ):  # fmt: skip
        assert part in told, part
    assert "short" not in told


def vendors_as_markdown() -> str:
    """Return the README's table of vendors, from what preflight reads."""
    readers = {name: setup.reader for name, setup in BUILT_IN.items()}
    lines = ["| |" + "".join(f" {name} |" for name in readers), "|---" * (len(readers) + 1) + "|"]
    for row, words in capabilities(readers):
        lines.append(f"| {row} |" + "".join(f" {words[name]} |" for name in readers))
    return "\n".join(lines)


def test_the_readmes_table_of_vendors_is_what_preflight_reads() -> None:
    assert vendors_as_markdown() in README


def test_the_readme_lists_every_vendors_settings() -> None:
    for name, setup in BUILT_IN.items():
        for setting in setup.names:
            assert f"`{name.upper()}_{setting.upper()}`" in README, (name, setting)
    for setting in OF_VENDOR:
        assert f"`{setting}`" in README


def test_the_readme_lists_every_destination() -> None:
    table = README.partition("### Event buses")[2].partition("\n\nAn extra")[0]
    listed = {word for row in table.splitlines()[4:] for word in re.findall(r"`([a-z]+)`", row.split("|")[1])}
    assert listed == set(DESTINATIONS)
    extras = {kind.extra for kind in DESTINATIONS.values() if kind.extra}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert extras <= set(project["project"]["optional-dependencies"])


def test_the_readmes_examples_can_be_read() -> None:
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert len(blocks) > 15
    for language, text in blocks:
        if language == "python":
            compile(text, "README", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        elif language == "toml":
            hooks = tomllib.loads(text).get("hook", [])
            problems: list[Problem] = []
            read_hooks(hooks, lambda _, reference: reference.replace("env:BILLING_SECRET", HOOK_SECRET), problems)
            assert not problems
        elif language == "json":
            json.loads(text)


def test_the_readme_has_a_page_for_every_bus() -> None:
    pages = README.partition("### Use it with your bus")[2].partition("\n### ")[0]
    summaries = " ".join(re.findall(r"<summary>(.*?)</summary>", pages)).lower()
    words = {"amqp": "rabbitmq", "pubsub": "pub/sub", "eventgrid": "event grid", "servicebus": "service bus"}
    words |= {"python": "function", "https": "", "http": ""}
    for scheme in {kind.module: scheme for scheme, kind in reversed(DESTINATIONS.items())}.values():
        assert words.get(scheme, scheme) in summaries, scheme
