"""The documentation matches the code: settings, events, vendors, destinations, commands; and its links resolve."""

import importlib
import re
import tomllib
from collections import Counter
from typing import Any, cast

import msgspec
import pytest
from prometheus_client import Metric

from receiver.app import create_app
from receiver.destinations import BUILT_IN as DESTINATIONS
from receiver.hook import EVENTS
from receiver.hook_settings import NAMES
from receiver.metrics import PrometheusMetrics
from receiver.verification import Verifier
from submitter import errors
from submitter.callback_url import KeyRing
from submitter.request import MotionControl
from submitter.sandbox.faults import Faults
from submitter.settings import COMMON, OF_VENDOR, RECEIVER
from submitter.task import RANK, TaskStatus
from submitter.vendors import BUILT_IN
from submitter.vendors.capabilities import capabilities
from tests.house.pages import (
    ROOT,
    blocks_of,
    calls_of,
    commands,
    first_column,
    headings_of,
    inline_code,
    links_of,
    prose_of,
    read_pages,
    section,
)

PAGES = read_pages()
README = PAGES["README.md"]
SUBMITTER = PAGES["submitter/README.md"]
VENDORS = PAGES["submitter/vendors/README.md"]
SANDBOX = PAGES["submitter/sandbox/README.md"]
RECEIVER_PAGE = PAGES["receiver/README.md"]
HOOKS = PAGES["receiver/destinations/README.md"]
COMMANDS = PAGES["receiver/cli/README.md"]
UNDIVIDED = {"CHANGELOG.md", "SECURITY.md"}  # pages that the index names whole
CURRENT = {page: text for page, text in PAGES.items() if page != "CHANGELOG.md"}  # a changelog names what is gone
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
SETTINGS = {f"KLING_RELAY_{name.upper()}" for name in (*COMMON, *RECEIVER)} | {"KLING_RELAY_CONFIG"}
OF_TESTS = {"TEST_DYNAMODB_URL"}


# -- the start page -------------------------------------------------------------------------------


def test_the_readme_stays_one_page() -> None:
    assert len(README.encode()) <= 12_288
    assert len(README.splitlines()) <= 200


def test_the_readme_is_readable_where_its_relative_links_do_not_resolve() -> None:
    """A package index renders it as plain Markdown and resolves no relative link: each line names its page."""
    for link in links_of("README.md", README):
        if "://" not in link.target:
            assert f"`{link.target.partition('#')[0]}`" in link.line, link.target
    html = re.findall(r"<(?!!--)/?[a-zA-Z][^>]*>", re.sub(r"`[^`]*`", "", prose_of(README)))
    assert not html


def test_the_index_reaches_every_section_of_every_page() -> None:
    targets = {link.target for link in links_of("README.md", section(README, "I want to ..."))}
    assert {target.partition("#")[0] for target in targets} == set(PAGES) - {"README.md"}
    missing = [
        f"{page}#{anchor}"
        for page, text in CURRENT.items()
        if page not in UNDIVIDED | {"README.md"}
        for anchor in headings_of(text, level=2)
        if f"{page}#{anchor}" not in targets
    ]
    assert not missing


def test_the_readme_lists_every_status() -> None:
    listed = {word for cell in first_column(section(README, "States")) for word in re.findall(r"`(\w+)`", cell)}
    assert listed == {status.value for status in TaskStatus} == {status.value for status in RANK}


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
    assert set(event["data"]["videos"][0]) == {"id", "url", "watermark_url", "duration", "expires_at"}


def test_the_readme_lists_every_extra() -> None:
    assert set(EXTRAS) <= set(re.findall(r"`(\w+)`", section(README, "Install")))


# -- links ----------------------------------------------------------------------------------------


def test_every_relative_link_and_anchor_resolves() -> None:
    broken = []
    for page, text in PAGES.items():
        for link in links_of(page, text):
            if "://" in link.target:
                continue
            path, _, anchor = link.target.partition("#")
            target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
            name = str(target.relative_to(ROOT))
            if not target.exists() or (anchor and anchor not in headings_of(PAGES[name])):
                broken.append(f"{page}: {link.target}")
    assert not broken


def test_every_page_leads_back_to_the_start_page() -> None:
    for page, text in CURRENT.items():
        targets = {((ROOT / page).parent / link.target).resolve() for link in links_of(page, text)}
        assert page == "README.md" or ROOT / "README.md" in targets, page


def test_every_path_and_module_that_a_page_names_exists() -> None:
    missing = []
    for page, text in CURRENT.items():
        for code in inline_code(text):
            path = re.fullmatch(r"(submitter|receiver|tests|infra)/[\w./-]*", code)
            dotted = re.fullmatch(r"((?:submitter|receiver|tests)(?:\.\w+)+)(\(.*\))?", code)
            if (path and not (ROOT / code).exists()) or (dotted and not _resolves(dotted[1])):
                missing.append(f"{page}: {code}")
    assert not missing


def _resolves(dotted: str) -> bool:
    """Return whether a dotted name is a module, or an attribute of one."""
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for name in parts[count:]:
            found = getattr(found, name, None)
        return found is not None
    return False


def test_the_architecture_table_names_every_module() -> None:
    table = section(RECEIVER_PAGE, "Architecture")
    for folder in ("submitter", "receiver"):
        for path in (ROOT / folder).iterdir():
            if path.suffix == ".py" and not path.name.startswith("__"):
                assert re.search(rf"[`/]{re.escape(path.name)}`", table), path
            if path.is_dir() and (path / "__init__.py").exists():
                assert f"`{folder}/{path.name}/`" in table, path


# -- settings -------------------------------------------------------------------------------------


def test_every_setting_is_listed() -> None:
    table = section(RECEIVER_PAGE, "Settings")
    for name in SETTINGS:
        assert f"`{name}`" in table
    assert set(re.findall(r"`(KLING_RELAY_[A-Z_]+)`", table)) == SETTINGS


@pytest.mark.parametrize("page", CURRENT)
def test_every_setting_that_a_page_names_exists(page: str) -> None:
    assert set(re.findall(r"(?<!_)KLING_RELAY_[A-Z_]*[A-Z]", CURRENT[page])) <= SETTINGS | OF_TESTS


def test_every_vendors_settings_are_listed() -> None:
    table = section(RECEIVER_PAGE, "Settings")
    for name, setup in BUILT_IN.items():
        for setting in setup.names:
            assert f"`{name.upper()}_{setting.upper()}`" in table, (name, setting)
    for setting in OF_VENDOR:
        assert f"`{setting}`" in table


# -- submitting -----------------------------------------------------------------------------------


def test_every_field_of_a_request_is_listed() -> None:
    listed = first_column(section(SUBMITTER, "Request fields"))
    assert listed == [f"`{field.name}`" for field in msgspec.structs.fields(MotionControl)]


def test_every_error_is_listed() -> None:
    raised = {
        name
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.RelayError) and not name.startswith("_")
    }
    assert raised <= set(re.findall(r"`(?:submitter\.errors\.)?(\w+)`", section(SUBMITTER, "Errors")))


def vendors_as_markdown() -> str:
    """Return the table of vendors, from the same values that preflight reads."""
    readers = {name: setup.reader for name, setup in BUILT_IN.items()}
    lines = ["| |" + "".join(f" {name} |" for name in readers), "|---" * (len(readers) + 1) + "|"]
    for row, words in capabilities(readers):
        shown = {name: f"`{text}`" if "<" in text else text for name, text in words.items()}
        lines.append(f"| {row} |" + "".join(f" {shown[name]} |" for name in readers))
    return "\n".join(lines)


def with_table_of_vendors(page: str) -> str:
    """Return the page with the present table between its markers."""
    before, start, rest = page.partition("<!-- vendors -->\n")
    _, end, after = rest.partition("<!-- /vendors -->")
    assert start
    assert end
    return f"{before}{start}{vendors_as_markdown()}\n{end}{after}"


def test_the_table_of_vendors_shows_what_preflight_reads() -> None:
    assert with_table_of_vendors(VENDORS) == VENDORS, "run: .venv/bin/python -m tests.house.test_documentation"


def test_every_fault_of_the_sandbox_is_listed() -> None:
    assert first_column(section(SANDBOX, "Faults")) != []
    assert set(first_column(section(SANDBOX, "Faults"))) == {f"`{name}`" for name in Faults.__struct_fields__}


# -- hooks and destinations -----------------------------------------------------------------------


def test_every_hook_field_and_event_is_listed() -> None:
    table = section(HOOKS, "Hook fields")
    listed = {word for cell in first_column(table) for word in re.findall(r"`(\w+)`", cell)}
    assert listed == set(NAMES)
    for event in EVENTS:
        assert f"`{event}`" in table, event


def test_every_destination_is_listed() -> None:
    rows = [line for line in section(HOOKS, "Destinations").splitlines() if line.startswith("| [`")]
    listed = {scheme: row for row in rows for scheme in re.findall(r"`([a-z]+)`", row.split("|")[1])}
    assert set(listed) == set(DESTINATIONS)
    for scheme, row in listed.items():
        extra = DESTINATIONS[scheme].extra
        assert row.split("|")[4].strip() == (f"`{extra}`" if extra else ""), scheme
    assert {kind.extra for kind in DESTINATIONS.values() if kind.extra} <= set(EXTRAS)


def test_every_destination_has_a_section() -> None:
    sections = headings_of(section(HOOKS, "Destinations"), level=3)
    rows = [line for line in section(HOOKS, "Destinations").splitlines() if line.startswith("| [`")]
    for row in rows:
        (link,) = links_of("hooks", row)
        assert link.target.removeprefix("#") in sections, row
    titles = " ".join(sections.values()).lower()
    words = {"amqp": "rabbitmq", "pubsub": "pub/sub", "eventgrid": "event grid", "servicebus": "service bus"}
    words |= {"python": "function", "https": "http", "http": "http"}
    for scheme in {kind.module: scheme for scheme, kind in reversed(DESTINATIONS.items())}.values():
        assert words.get(scheme, scheme) in titles, scheme
    for title in sections.values():
        text = section(HOOKS, title)
        assert "*Arrives as*" in text or "*Stored*" in text, title
        assert "*Requires*" in text, title


# -- operating ------------------------------------------------------------------------------------


def test_every_endpoint_is_listed() -> None:
    app = create_app(cast(Any, None), Verifier(KeyRing(()), {}))
    table = section(RECEIVER_PAGE, "Endpoints")
    for route in app.routes:
        assert re.search(rf" {re.escape(cast(Any, route).path)}[`?]", table), route
    assert "/callbacks/{vendor}/{external_task_id}/{token}`" in table


def test_every_metric_is_listed() -> None:
    found: list[Metric] = list(PrometheusMetrics()._registry.collect())
    names = {metric.name + ("_total" if metric.type == "counter" else "") for metric in found}
    assert set(first_column(section(RECEIVER_PAGE, "Metrics and alarms"))) == {f"`{name}`" for name in names}


# -- commands -------------------------------------------------------------------------------------


def test_every_command_is_listed() -> None:
    assert sorted(first_column(section(COMMANDS, "All commands"))) == sorted(f"`{command}`" for command in commands())


def test_shell_scripts_are_split_into_calls() -> None:
    script = """
export $(kling-relay keys new)   # kling-relay nothing
A=1 /opt/bin/kling-relay serve --port 1 & sleep 2
docker run --rm host/kling-relay:0.1 keys new >> relay.env; docker build -t kling-relay .
docker compose exec relay python -m receiver tasks \\
    list
curl -d '{"a": 1,
  "b": 2}' && kling-relay poll
"""
    assert list(calls_of(script)) == [
        ["keys", "new"], ["serve", "--port", "1"], ["keys", "new"], ["tasks", "list"], ["poll"],
    ]  # fmt: skip


def test_every_code_block_is_found_and_has_a_known_language() -> None:
    """So that the checks of `test_examples.py` miss none."""
    for page, text in PAGES.items():
        assert text.count("```") == 2 * len(blocks_of(page, text)), page
    found = Counter(block.language for page, text in PAGES.items() for block in blocks_of(page, text))
    assert set(found) == {"", "sh", "python", "toml", "json", "js"}
    assert found[""] == 1  # the picture
    assert sum(found.values()) > 40


if __name__ == "__main__":  # writes the table of vendors into its page
    (ROOT / "submitter/vendors/README.md").write_text(with_table_of_vendors(VENDORS))
