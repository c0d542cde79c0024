"""infra/ matches the program: settings, routes, DynamoDB table, image versions."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from cfnlint.decode import cfn_yaml

from receiver.cli.server_process import DRAIN_S
from receiver.server import STOP_S
from receiver.worker import CLAIM_TIMEOUT_S, STOP_TIMEOUT_S
from submitter.ledger.dynamodb.items import table_of
from submitter.settings import COMMON, RECEIVER
from submitter.vendors.registry import vendors

INFRA = Path(__file__).parents[2] / "infra"
FILES = [path for path in INFRA.rglob("*") if path.is_file() and "build" not in path.parts and path.suffix != ".txt"]
ROUTES = {"/healthz", "/readyz", "/metrics", "/tick", "/events", "/callbacks", "/media"}


def template() -> Any:
    """Return the CloudFormation template, as cfn-lint parses it."""
    return cfn_yaml.load(str(INFRA / "aws" / "template.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(INFRA)))
def test_every_setting_in_infra_exists(path: Path) -> None:
    known = {f"KLING_RELAY_{name.upper()}" for name in (*COMMON, *RECEIVER)} | {"KLING_RELAY_CONFIG"}
    text = path.read_text()
    assert set(re.findall(r"KLING_RELAY_[A-Z_]+[A-Z]", text)) <= known
    prefixes = "|".join(name.upper() for name in vendors())
    of_vendors = {"KLING_API_KEY", "KLING_WEBHOOK_SECRET", "NOVITA_API_KEY"}
    assert set(re.findall(rf"\b(?:{prefixes})_(?!RELAY)[A-Z_]+\b", text)) <= of_vendors


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(INFRA)))
def test_every_route_in_infra_exists(path: Path) -> None:
    assert set(re.findall(r"path: ['\"]?(/[a-z]+)\b", path.read_text())) <= ROUTES


def test_the_templates_table_equals_the_one_that_the_ledger_creates() -> None:
    table = template()["Resources"]["Table"]["Properties"]
    created = table_of("relay")
    for name in ("BillingMode", "AttributeDefinitions", "KeySchema", "GlobalSecondaryIndexes"):
        assert table[name] == created[name]
    assert table["TimeToLiveSpecification"] == {"AttributeName": "ttl", "Enabled": True}


def test_the_function_behind_the_public_url_has_no_vendor_api_key() -> None:
    resources = template()["Resources"]
    receiver = resources["Receiver"]["Properties"]
    assert receiver["FunctionUrlConfig"] == {"AuthType": "NONE"}
    assert not [name for name in receiver["Environment"]["Variables"] if name.endswith(("API_KEY", "SECRET_KEY"))]
    for name in ("Ticker", "Submitter"):
        assert "KLING_API_KEY" in resources[name]["Properties"]["Environment"]["Variables"]
        assert "FunctionUrlConfig" not in resources[name]["Properties"]


def test_all_yaml_parses_and_the_image_is_pinned_and_does_not_run_as_root() -> None:
    for path in INFRA.rglob("*.yaml"):
        assert path.name == "template.yaml" or list(yaml.safe_load_all(path.read_text()))
    assert "\nUSER 10001:10001\n" in (INFRA / "Dockerfile").read_text()
    for image in re.findall(r"^FROM (\S+)|image: (\S+:\S+)", (INFRA / "Dockerfile").read_text(), re.MULTILINE):
        assert re.search(r":\d+\.\d+", "".join(image))


def test_every_grace_period_is_longer_than_the_longest_stop() -> None:
    longest_s = DRAIN_S + STOP_S + CLAIM_TIMEOUT_S + STOP_TIMEOUT_S
    texts = {name: (INFRA / name).read_text() for name in ("systemd/kling-relay.service", "compose.yaml")}
    kubernetes = yaml.safe_load_all((INFRA / "kubernetes" / "relay.yaml").read_text())
    pods = [one["spec"]["template"]["spec"] for one in kubernetes if one["kind"] == "Deployment"]
    given_s = [
        *re.findall(r"TimeoutStopSec=(\d+)", texts["systemd/kling-relay.service"]),
        *re.findall(r"stop_grace_period: (\d+)s", texts["compose.yaml"]),
        *(pod["terminationGracePeriodSeconds"] for pod in pods),
    ]
    assert len(given_s) == 4
    assert all(int(seconds) > longest_s for seconds in given_s)
