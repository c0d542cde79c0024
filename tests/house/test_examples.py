"""The examples of the documentation work: they parse, name what exists, and lead to a first event."""

import ast
import asyncio
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest

from receiver.destinations import Kind
from receiver.hook import Hook
from receiver.hook_settings import read_hooks
from submitter.callback_url import KeyRing
from submitter.errors import Problem
from submitter.request import MotionControl
from submitter.settings import COMMON, OF_VENDOR, RECEIVER
from submitter.task import TaskStatus
from submitter.vendors import BUILT_IN
from submitter.vendors.base import CreateRequest, HttpAnswer, VendorSetup
from tests.conformance.brokers import free_port
from tests.conformance.destinations import NOW_S, event
from tests.conftest import needs
from tests.house.pages import ROOT, Block, blocks_of, calls_of, check_call, inline_code, read_pages
from tests.world import HOOK_SECRET, World

PAGES = read_pages()
BLOCKS = [block for page, text in PAGES.items() for block in blocks_of(page, text)]


def blocks(language: str) -> list[Any]:
    """Return a language's blocks, each as a case with a name."""
    found = [block for block in BLOCKS if block.language == language]
    return [pytest.param(block, id=f"{block.page}-{number}") for number, block in enumerate(found)]


def the_block(page: str, language: str, part: str) -> Block:
    """Return the block of a page that has this part."""
    (found,) = [block for block in BLOCKS if block.page == page and block.language == language and part in block.text]
    return found


# -- they parse, and name what exists -------------------------------------------------------------


@pytest.mark.parametrize("block", blocks("python"))
def test_python_compiles_and_imports_names_that_exist(block: Block) -> None:
    compile(block.text, block.page, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] in (
            "receiver",
            "submitter",
            "tests",
        ):
            module = importlib.import_module(str(node.module))
            for name in node.names:
                assert hasattr(module, name.name), (node.module, name.name)


@pytest.mark.parametrize("block", blocks("toml"))
def test_toml_is_what_the_settings_read(block: Block) -> None:
    table = tomllib.loads(block.text)
    if "project" in table:
        assert set(table["project"]["entry-points"]) <= {"kling_relay.vendors", "kling_relay.destinations"}
        return
    problems: list[Problem] = []
    read_hooks(table.get("hook", []), lambda _, name: name.replace("env:BILLING_SECRET", HOOK_SECRET), problems)
    assert not problems
    assert set(table) <= {*COMMON, *RECEIVER, "vendor", "hook"}
    for vendor, settings in table.get("vendor", {}).items():
        assert set(settings) <= {*OF_VENDOR, *BUILT_IN[vendor].names}


@pytest.mark.parametrize("block", blocks("json"))
def test_json_parses(block: Block) -> None:
    json.loads(block.text)


@pytest.mark.parametrize("block", blocks("js"))
def test_javascript_parses(block: Block, tmp_path: Path) -> None:
    needs("node", is_there=shutil.which("node") is not None)
    script = tmp_path / "example.mjs"
    script.write_text(block.text)
    subprocess.run(["node", "--check", str(script)], check=True, capture_output=True)


@pytest.mark.parametrize("block", blocks("sh"))
def test_shell_parses_and_calls_commands_that_exist(block: Block) -> None:
    subprocess.run(["bash", "-n"], input=block.text, text=True, check=True, capture_output=True)
    for arguments in calls_of(block.text):
        try:
            check_call(arguments, is_complete="..." not in arguments)
        except click.UsageError as error:
            raise AssertionError(f"kling-relay {' '.join(arguments)}: {error.format_message()}") from error


@pytest.mark.parametrize("page", PAGES)
def test_prose_names_commands_that_exist(page: str) -> None:
    for code in inline_code(PAGES[page]):
        for arguments in calls_of(code):
            try:
                check_call(arguments, is_complete=False)
            except click.UsageError as error:
                raise AssertionError(f"`{code}`: {error.format_message()}") from error


# -- they work ------------------------------------------------------------------------------------


def environ_of(**more: str) -> dict[str, str]:
    """Return an environment with this Python's code, and no settings but these."""
    return {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "PYTHONPATH": str(ROOT), **more}


# In place of the `sleep` that a reader of the page is shown. No event says that another process listens.
WAIT = """
import socket, time
while socket.socket().connect_ex(("127.0.0.1", {port})):
    time.sleep(0.05)
"""


def test_the_offline_quickstart_leads_to_a_first_event(tmp_path: Path) -> None:
    """Run as it is written, but for the ports, and for a server that is waited for instead of slept for."""
    block = the_block("README.md", "sh", "kling-relay sandbox &")
    sandbox, receiver = free_port(), free_port()
    script = block.text.replace("kling-relay sandbox &", f"kling-relay sandbox --port {sandbox} &")
    script = script.replace("kling-relay serve &", f"kling-relay serve --port {receiver} &")
    script = script.replace("8090", str(sandbox)).replace("8080", str(receiver)).replace("sleep 2", "python wait.py")
    (tmp_path / "wait.py").write_text(WAIT.format(port=receiver))
    (tmp_path / "bin").mkdir()
    for name, module in (("kling-relay", "-m receiver"), ("python", "")):
        (tmp_path / "bin" / name).write_text(f'#!/bin/sh\nexec {sys.executable} {module} "$@"\n')
        (tmp_path / "bin" / name).chmod(0o755)
    environ = environ_of(PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    log = (tmp_path / "log").open("wb")
    ended, alive = os.pipe()  # every process of the script holds `alive`
    with (
        log,
        open(ended, "rb") as until_all_have_ended,
        subprocess.Popen(
            ["bash", "-e", "-c", script],
            cwd=tmp_path, env=environ, stdout=log, stderr=log, start_new_session=True, pass_fds=[alive],
        ) as shell,
    ):  # fmt: skip
        os.close(alive)
        try:
            status = shell.wait(timeout=120)
        finally:
            os.killpg(shell.pid, signal.SIGTERM)  # the sandbox and the receiver that it left in the background
        until_all_have_ended.read()
    assert status == 0, (tmp_path / "log").read_text()
    # The last event is delivered a moment after its task has ended: by `serve`, or by this, if it was stopped before.
    subprocess.run(["kling-relay", "deliver", "--once"], cwd=tmp_path, env=environ, check=True, capture_output=True)
    lines = (tmp_path / "events.jsonl").read_bytes().splitlines()
    types = [msgspec.json.decode(line)["type"] for line in lines]
    assert types == ["task.submitted", "task.processing", "task.succeed"]


async def test_the_python_quickstart_leads_to_an_event_that_its_verifier_accepts(world: World, tmp_path: Path) -> None:
    await world.start()
    (tmp_path / "quickstart.py").write_text(the_block("README.md", "python", "asyncio.run(main())").text)
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(tmp_path / "quickstart.py"),
        cwd=world.media, env=environ_of(**world.environ), stdout=pipe, stderr=pipe,
    )  # fmt: skip
    async with asyncio.timeout(60):
        out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    assert "succeed (Video(url='http" in out.decode()
    await world.inbox.until(3)
    headers, body = world.inbox.requests[-1]
    names: dict[str, Any] = {"headers": headers, "body": body}
    verifier = the_block("README.md", "python", "standardwebhooks").text.replace("whsec_...", HOOK_SECRET)
    exec(compile(verifier, "README.md", "exec"), names)
    assert names["event"] == msgspec.json.decode(body)
    names["body"] = body + b" "
    with pytest.raises(Exception, match="signature"):
        exec(compile(verifier, "README.md", "exec"), names)


def test_keys_are_made_by_python_alone() -> None:
    calls = [line for line in PAGES["infra/README.md"].splitlines() if line.startswith("python3 -c")]
    assert len(calls) == 1
    made = subprocess.run(["bash", "-c", calls[0]], capture_output=True, text=True, check=True).stdout
    name, _, value = made.strip().partition("=")
    assert name == "KLING_RELAY_KEYS"
    assert len(KeyRing.read(value).keys) == 1


def test_the_example_vendor_reads_and_writes() -> None:
    names: dict[str, Any] = {}
    exec(compile(the_block("submitter/vendors/README.md", "python", "SETUP").text, "acme", "exec"), names)
    setup = names["SETUP"]
    assert isinstance(setup, VendorSetup)
    acme = setup.configure({"api_key": "k"})
    assert acme is not None
    request = MotionControl(image="i", video="v", character_orientation="video")
    sent = acme.create(CreateRequest(request, "std", "order-1", "i", "v", "https://relay/callbacks/x"), 0)
    assert sent.url == "https://api.acme.example.com/v1/jobs"
    assert b"https://relay/callbacks/x" in sent.body
    assert acme.read_create(HttpAnswer(200, {}, b'{"id": "7"}')).task_id == "7"
    report = acme.read_callback(b'{"id": "7", "state": "done", "url": "https://cdn/7.mp4"}', 0)
    assert report is not None
    assert (report.status, report.videos[0].url) == (TaskStatus.SUCCEED, "https://cdn/7.mp4")


async def test_the_example_destination_sends_to_allowed_hosts_alone(world: World) -> None:
    await world.start(receiver=False)
    names: dict[str, Any] = {}
    exec(compile(the_block("receiver/destinations/README.md", "python", "KIND").text, "acme_bus", "exec"), names)
    assert isinstance(names["KIND"], Kind)
    hook = Hook("acme", world.hook_url.replace("http://", "acme://"))
    allowed, refused = (names["open"](hook, frozenset(hosts)) for hosts in ({"127.0.0.1"}, set[str]()))
    for destination in (allowed, refused):
        destination._url = f"{world.hook_url}/events"
    assert (await allowed.send(event(), NOW_S)).answer == "HTTP 204"
    assert "KLING_RELAY_ALLOW_HOSTS" in (await refused.send(event(), NOW_S)).answer
    await allowed.close()
    await refused.close()
