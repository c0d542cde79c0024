"""What a person types: each mistake is an error with field, value and remedy, before anything is sent or written."""

import asyncio
import base64
import os
import socket
from pathlib import Path

import click
import msgspec
import pytest
from click.testing import CliRunner, Result

from receiver.cli.follow import check_output
from receiver.cli.main import main
from receiver.cli.submit import submit
from submitter import log
from submitter.ledger.sqlite.ledger import SqliteLedger
from submitter.request import MotionControl, check_types
from submitter.safe_json import read_json

KEY = base64.b64encode(b"k" * 32).decode()
SETTINGS = {
    "KLING_RELAY_KEYS": f"test:{KEY}",
    "KLING_API_KEY": "key",
    "KLING_BASE_URL": "http://127.0.0.1:9",
    "KLING_RELAY_PUBLIC_URL": "http://127.0.0.1:9",
    "KLING_RELAY_ALLOW_HOSTS": "127.0.0.1",
}
SUBMIT = (
    "submit",
    "--image",
    "http://127.0.0.1:9/a.png",
    "--video",
    "http://127.0.0.1:9/b.mp4",
    "--orientation",
    "video",
)


@pytest.fixture(autouse=True)
def no_log_settings_of_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the log's settings: a command runs in this process, and would leave its own behind."""
    monkeypatch.setattr(log, "quiet", lambda: None)
    monkeypatch.setattr(log, "configure", lambda *_: None)


def run(*arguments: str, **environ: str | None) -> Result:
    result = CliRunner().invoke(main, arguments, env=SETTINGS | environ, prog_name="kling-relay")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((*SUBMIT, "--wait", "--output", "nowhere/result.mp4"), ["--output", "nowhere/result.mp4", "must exist"]),
        ((*SUBMIT, "--timeout", "5"), ["--timeout needs --wait"]),
        ((*SUBMIT, "--wait", "--timeout", "-1"), ["--timeout", "-1"]),
        ((*SUBMIT, "--metadata", "order"), ["--metadata", "'order' is not KEY=VALUE"]),
        ((*SUBMIT, "--element", "[1]"), ["--element", "is no JSON object"]),
        ((*SUBMIT, "--prompt", "\udcff"), ["prompt", "valid Unicode text", "Correct its encoding"]),
        (("submit", "--image", "a" * 300 + " b", *SUBMIT[3:]), ["image", "There is no such file"]),
        (("tasks", "list", "--before", "order-9"), ["--before", "'order-9'", "the id of a task in this ledger"]),
        (("tasks", "list", "--vendor", "klin"), ["vendor", "'klin'", "one of kling, novita"]),
        (("tasks", "costs", "--vendor", "klin"), ["vendor", "'klin'", "one of kling, novita"]),
        (("tasks", "wait", "order-9", "--output", "nowhere/r.mp4"), ["--output", "must exist"]),
        (("sandbox", "--fault", "drop=5"), ["--fault", "`$.drop`", "faults are drop"]),
        (("sandbox", "--fault", "drop=x"), ["--fault", "`$.drop`"]),
        (("sandbox", "--fault", "dorp=0.1"), ["--fault", "dorp"]),
        (("sandbox", "--pace", "-1"), ["--pace", "-1"]),
        (("sandbox", "--slots", "0"), ["--slots", "0"]),
        (("sandbox", "--port", "99999"), ["--port", "99999"]),
        (("sandbox", "--secret", "hello"), ["--secret", "whsec_"]),
        (("serve", "--port", "99999"), ["--port", "99999"]),
        (("hooks", "test", "nobody"), ["hook", "'nobody'", "Check the name"]),
        (("hooks", "replay", "nobody"), ["hook", "'nobody'", "Check the name"]),
        (("hooks", "dead", "nobody"), ["hook", "'nobody'", "Check the name"]),
        (("ledger", "copy", "sqlite:///nowhere.db", "sqlite:///new.db"), ["SOURCE", "nowhere.db", "Check the path"]),
        (("ledger", "copy", "nowhere.db", "sqlite:///new.db"), ["SOURCE", "sqlite:///"]),
        (("ledger", "prune", "--days", "0"), ["--days", "0"]),
        (("demo", "--vendor", "klin"), ["vendor", "'klin'"]),
    ],
)  # fmt: skip
def test_a_mistake_is_reported_with_its_field_and_remedy_and_exits_with_2(
    arguments: tuple[str, ...], words: list[str]
) -> None:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    for word in words:
        assert word in result.output
    assert not Path("nowhere.db").exists()
    assert not Path("new.db").exists()


@pytest.mark.parametrize(
    ("variable", "remedy"),
    [
        ("KLING_RELAY_LEGDER", "Did you mean 'KLING_RELAY_LEDGER'?"),
        ("KLING_RELAY_PUBLIC_ULR", "Did you mean 'KLING_RELAY_PUBLIC_URL'?"),
        ("KLING_RELAY_FROBNICATE", "Known names: KLING_RELAY_CONFIG, KLING_RELAY_PUBLIC_URL"),
    ],
)
def test_an_unknown_variable_is_an_error_with_a_suggestion(variable: str, remedy: str) -> None:
    result = run("tasks", "list", **{variable: "x"})
    assert (result.exit_code, variable in result.output, remedy in result.output) == (2, True, True), result.output


def test_variables_of_kubernetes_and_of_the_file_are_no_mistakes() -> None:
    of_kubernetes = {
        "KLING_RELAY_SERVICE_HOST": "10.0.0.1",
        "KLING_RELAY_SERVICE_PORT_HTTP": "8080",
        "KLING_RELAY_PORT": "tcp://10.0.0.1:8080",
        "KLING_RELAY_PORT_8080_TCP_ADDR": "10.0.0.1",
        "KLING_RELAY_RECEIVER_SERVICE_PORT": "8080",
    }
    Path("relay.toml").write_text(
        '[[hook]]\nname = "a"\nurl = "https://example.com"\nsecret = "env:KLING_RELAY_MY_HOOK"\n'
    )
    assert run("tasks", "list", KLING_RELAY_MY_HOOK="x", **of_kubernetes).exit_code == 0


@pytest.mark.parametrize(
    ("target", "reason"),
    [("no.such:f", "ModuleNotFoundError"), ("broken:f", "ZeroDivisionError"), ("json:nothing", "AttributeError")],
)
def test_a_python_hook_that_cannot_be_imported_is_one_line(
    target: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(".")
    Path("broken.py").write_text("1 / 0\n")
    Path("relay.toml").write_text(f'[[hook]]\nname = "a"\nurl = "python:{target}"\n')
    for command in (("serve", "--port", "0"), ("deliver", "--once"), ("hooks", "test", "a")):
        result = run(*command)
        assert result.exit_code == 2, result.output
        assert reason in result.output
        assert "Traceback" not in result.output


def test_a_port_that_is_taken_is_reported() -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        result = run("serve", "--port", str(held.getsockname()[1]))
    assert (result.exit_code, "cannot listen on 127.0.0.1" in result.output) == (1, True), result.output
    assert not Path("relay.db").exists()


def test_copying_a_ledger_without_tasks_is_an_error() -> None:
    ledger = SqliteLedger("empty.db")
    asyncio.run(ledger.close())
    result = run("ledger", "copy", "sqlite:///empty.db", "sqlite:///new.db")
    assert (result.exit_code, "a ledger with tasks" in result.output) == (2, True), result.output


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"KLING_RELAY_KEYS": "bad"}, ["settings", "KLING_RELAY_KEYS"]),
        ({"KLING_RELAY_LEDGER": "sqlite:////no/such/folder/relay.db"}, ["ledger", "could not open"]),
        ({"KLING_RELAY_LEDGER": "mysql://x"}, ["settings", "KLING_RELAY_LEDGER"]),
    ],
)
def test_doctor_answers_with_json_whatever_fails(environ: dict[str, str], words: list[str]) -> None:
    result = run("doctor", "--json", **environ)
    findings = msgspec.json.decode(result.stdout)
    failed = [finding for finding in findings if finding["state"] == "fail"]
    assert result.exit_code == 1
    assert all(word in str(failed) for word in words), failed


def test_doctor_never_says_that_all_is_well_without_credentials() -> None:
    result = run("doctor", KLING_API_KEY=None)
    assert "ready for the first callback" not in result.output
    assert "can neither submit nor poll" in result.output


@pytest.mark.parametrize("value", ["", " ", ",", "\n", f"whsec_{KEY}, "])
@pytest.mark.parametrize(
    "variable",
    ["KLING_WEBHOOK_SECRET", "KLING_API_KEY", "KLING_RELAY_KEYS", "KLING_RELAY_TICK_TOKEN", "KLING_RELAY_EVENTS_TOKEN"],
)
def test_a_secret_that_is_set_but_empty_is_an_error_at_start(variable: str, value: str) -> None:
    """An empty one would mean that nothing is checked."""
    result = run("hooks", "list", **{variable: value})
    assert (result.exit_code, f"{variable}: set, but empty" in result.output) == (2, True), result.output


@pytest.mark.parametrize("line", ['secret = "file:empty"', 'secret = "env:EMPTY"', 'secret = ["env:F", "env:COMMA"]'])
def test_an_empty_secret_of_a_hook_is_an_error_at_start(line: str) -> None:
    Path("empty").write_text("\n")
    Path("relay.toml").write_text(f'[[hook]]\nname = "a"\nurl = "https://a.example/"\n{line}\n')
    result = run("hooks", "list", EMPTY="", COMMA=",", F=f"whsec_{KEY}")
    assert (result.exit_code, "hook[a].secret" in result.output) == (2, True), result.output


@pytest.mark.parametrize("key", [f"sk-{KEY}\n", f"sk-{KEY} x", f"sk-{KEY}\u00e9", f"sk-{KEY}\x1b"])
def test_an_api_key_that_no_header_can_hold_is_an_error_at_start_and_is_not_shown(key: str) -> None:
    result = run(*SUBMIT, KLING_API_KEY=key)
    assert (result.exit_code, "KLING_API_KEY: [hidden]" in result.output) == (2, True), result.output
    assert KEY not in result.output


@pytest.mark.parametrize("url", ["http://", "http://a:99999", "http://a:80a", "http://a\n", "ftp://a"])
@pytest.mark.parametrize("variable", ["KLING_BASE_URL", "KLING_RELAY_PUBLIC_URL"])
def test_a_base_url_that_cannot_be_opened_is_an_error_at_start(variable: str, url: str) -> None:
    result = run(*SUBMIT, **{variable: url})
    assert (result.exit_code, variable in result.output) == (2, True), result.output


def test_an_output_that_is_no_regular_file_is_refused_before_anything_is_sent() -> None:
    os.mkfifo("fifo")
    Path("girl.png").write_bytes(b"x")
    Path("link.mp4").symlink_to("target.mp4")
    for output in ("fifo", "/dev/null", "", "girl.png", "./girl.png"):
        result = run(*SUBMIT, "--image", "girl.png", "--wait", "--output", output)
        assert (result.exit_code, "--output" in result.output) == (2, True), result.output
    assert Path("fifo").is_fifo()
    (option,) = (one for one in submit.params if one.name == "output")
    assert check_output(click.Context(submit), option, Path("link.mp4")) == Path("target.mp4").resolve()


@pytest.mark.parametrize("timeout", ["nan", "inf", "-1", "1e9", "soon"])
def test_a_timeout_that_is_no_number_of_seconds_is_refused(timeout: str) -> None:
    result = run("tasks", "wait", "order-1", "--timeout", timeout)
    assert (result.exit_code, "--timeout" in result.output) == (2, True), result.output


def test_rotation_needs_the_old_keys_and_says_what_to_do_next() -> None:
    missing = run("keys", "new", "--rotate", KLING_RELAY_KEYS=None)
    assert (missing.exit_code, "KLING_RELAY_KEYS: not set" in missing.output) == (2, True)
    rotated = run("keys", "new", "--rotate")
    assert (rotated.exit_code, f",test:{KEY}" in rotated.output, "Next: " in rotated.output) == (0, True, True)


def test_the_sandbox_prints_every_export_that_a_second_terminal_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    from receiver import server

    monkeypatch.setattr(server, "serve", lambda app, listening, **_: listening.close())
    result = run("sandbox", "--port", "0", "--secret", f"whsec_{KEY}")
    exports = [line for line in result.output.splitlines() if line.startswith("export ")]
    named = {pair.partition("=")[0] for line in exports for pair in line.removeprefix("export ").split()}
    assert named >= {
        "KLING_BASE_URL", "KLING_API_KEY", "KLING_WEBHOOK_SECRET", "NOVITA_BASE_URL", "OXEN_API_KEY",
        "KLING_RELAY_ALLOW_HOSTS", "KLING_RELAY_PUBLIC_URL", "KLING_RELAY_MEDIA_STORE", "$(kling-relay",
    }  # fmt: skip


def test_hooks_list_shows_no_path_of_an_http_endpoint() -> None:
    """The path of a chat's webhook is its secret."""
    Path("relay.toml").write_text('[[hook]]\nname = "a"\nurl = "https://hooks.example.com/services/T0/B0/S3CRET"\n')
    result = run("hooks", "list")
    assert ("https://hooks.example.com" in result.output, "S3CRET" in result.output) == (True, False), result.output


@pytest.mark.parametrize(("text", "is_accepted"), [("C:\\u0000x", True), ("a\0b", False), ("a\\\0b", False)])
def test_the_text_of_an_escape_is_not_the_character(text: str, is_accepted: bool) -> None:
    problems, _ = check_types(MotionControl(image="a.png", video="b.mp4", character_orientation="video", prompt=text))
    assert (problems == []) is is_accepted
    assert read_json(msgspec.json.encode(text)) == text.replace("\0", "\ufffd")


@pytest.mark.parametrize("value", ["2592001", "-1", "soon"])
def test_a_poll_beyond_a_month_is_an_error_at_start(value: str) -> None:
    result = run("hooks", "list", KLING_RELAY_POLL_AFTER_S=value)
    assert (result.exit_code, "a number from 0.01 to 2592000" in result.output) == (2, True), result.output
