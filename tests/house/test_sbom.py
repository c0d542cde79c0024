"""The bills of materials match CycloneDX's schema, and list what is pinned, with its hashes."""

import json
import re

import pytest
from packaging.utils import canonicalize_name

from tests.house.sbom import ROOT, SOURCES, bill_of, invalid_in


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES.keys())
def test_the_bill_of_materials_is_valid_and_lists_every_pin(source: str) -> None:
    bill = bill_of(source)
    assert invalid_in(bill) is None
    read = json.loads(bill)
    assert read["metadata"]["component"]["name"] == "kling-relay"
    listed = {
        (canonicalize_name(one["name"]), one["version"]): {
            item["content"] for reference in one["externalReferences"] for item in reference["hashes"]
        }
        for one in read["components"]
    }
    pins = re.findall(r"^(\S+)==(\S+)((?:.*\\\n)+.*)", (ROOT / source).read_text(), re.MULTILINE)
    expected = {
        (canonicalize_name(name), version): set(re.findall(r"sha256:(\w+)", rest)) for name, version, rest in pins
    }
    assert listed == expected
    assert all(listed.values())


def test_a_bill_that_is_invalid_is_found() -> None:
    bill = {"bomFormat": "CycloneDX", "specVersion": "1.6", "components": [{"type": "library"}]}
    assert "name" in str(invalid_in(json.dumps(bill)))
