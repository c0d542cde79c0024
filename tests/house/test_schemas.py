"""The published JSON schemas of Kling's callbacks are those that the receiver verifies.

`.venv/bin/python -m tests.house.test_schemas` writes them.
"""

import json
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest

from submitter.errors import Unintelligible
from submitter.vendors.kling.callback_schema import check_schema, json_schemas

ROOT = Path(__file__).parents[2]
SCHEMAS = ROOT / "receiver/schemas"
VECTORS = {
    path.stem: vector
    for path in sorted((ROOT / "tests/vectors/kling").glob("*.json"))
    if (vector := json.loads(path.read_text()))["door"] == "callback"
}


def rendered(schema: dict[str, Any]) -> str:
    return msgspec.json.format(msgspec.json.encode(schema, order="sorted"), indent=2).decode() + "\n"


def test_the_published_schemas_are_those_of_the_code() -> None:
    published = {path.name: path.read_text() for path in SCHEMAS.glob("*.json")}
    expected = {name: rendered(schema) for name, schema in json_schemas().items()}
    assert published == expected, "run: .venv/bin/python -m tests.house.test_schemas"


@pytest.mark.parametrize("vector", VECTORS.values(), ids=VECTORS.keys())
def test_another_validator_agrees_about_every_vector(vector: dict[str, Any]) -> None:
    body = vector["body"]
    valid = any(jsonschema.Draft202012Validator(schema).is_valid(body) for schema in json_schemas().values())
    try:
        check_schema(json.dumps(body).encode())
    except Unintelligible:
        assert not valid
    else:
        assert valid


if __name__ == "__main__":
    for name, schema in json_schemas().items():
        (SCHEMAS / name).write_text(rendered(schema))
