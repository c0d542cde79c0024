"""The JSON schemas of Kling's callbacks, API v1 and v2: types, http(s) URLs, exactly one of the two ids. Pure.

Source: Kling API reference, callback protocol (current and older API), as gathered in 2026. Lenient only
toward unknown fields, and toward null for a field without a value. A body that does not match is
quarantined and polled for. Queries are read more leniently: no later report could correct them.
Published in `receiver/schemas/`, which a test compares with these structs.
"""

from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from submitter.errors import Unintelligible
from submitter.web_address import RESULT_PATTERN

Id = Annotated[str, Meta(min_length=1, max_length=128)]
Url = Annotated[str, Meta(pattern=RESULT_PATTERN)]
Decimal = Annotated[str, Meta(pattern=r"^([0-9]+([.][0-9]+)?)?$", description="a decimal number, or empty")]
Milliseconds = Annotated[int, Meta(ge=0, description="Unix milliseconds")]
V1Status = Annotated[str, Meta(examples=["submitted", "processing", "succeed", "failed"])]
V2Status = Annotated[str, Meta(examples=["submitted", "processing", "succeeded", "failed"])]


class Output(Struct, frozen=True):
    """One output of a v2 task. A `video` has a `url`; other types have fields of their kind."""

    type: str
    id: str | None = None
    url: Url | None = None
    watermark_url: Url | None = None
    duration: Decimal | None = None


class Billing(Struct, frozen=True):
    """One charge of a v2 task."""

    charge_type: str
    amount: Decimal
    cash_type: str | None = None
    currency: str | None = None
    package_type: str | None = None
    list_price: Decimal | None = None


class V2Callback(Struct, frozen=True):
    """The body of a callback of the current API (v2)."""

    id: Id
    status: V2Status
    create_time: Milliseconds
    update_time: Milliseconds
    message: str | None = None
    external_id: str | None = None
    outputs: list[Output] | None = None
    billing: list[Billing] | None = None


class V1Video(Struct, frozen=True):
    """One video of a v1 task."""

    url: Url
    id: str | None = None
    watermark_url: Url | None = None
    duration: Decimal | None = None


class V1Result(Struct, frozen=True):
    """The result of a v1 task; empty until it succeeds."""

    videos: list[V1Video] | None = None
    images: list[dict[str, Any]] | None = None


class V1Info(Struct, frozen=True):
    """What the request of a v1 task said of it."""

    external_task_id: str | None = None
    parent_video: dict[str, Any] | None = None


class V1Deduction(Struct, frozen=True):
    """What a v1 task took from the balance."""

    quota: Decimal | None = None
    list_price: Decimal | None = None


class V1Callback(Struct, frozen=True):
    """The body of a callback of the older API (v1)."""

    task_id: Id
    task_status: V1Status
    created_at: Milliseconds
    updated_at: Milliseconds
    task_status_msg: str | None = None
    task_info: V1Info | None = None
    task_result: V1Result | None = None
    final_unit_deduction: Decimal | None = None
    final_balance_deduction: V1Deduction | None = None


class _Ids(Struct, frozen=True):
    id: Any | UnsetType = UNSET
    task_id: Any | UnsetType = UNSET


_ids = msgspec.json.Decoder(_Ids)
_v1 = msgspec.json.Decoder(V1Callback)
_v2 = msgspec.json.Decoder(V2Callback)


def check_schema(body: bytes) -> None:
    """Raise Unintelligible, which names the field, unless `body` is a callback of v1 or of v2."""
    try:
        ids = _ids.decode(body)
        if (ids.id is UNSET) == (ids.task_id is UNSET):
            found = "neither" if ids.id is UNSET else "both"
            raise Unintelligible(f"expected one of `id` (v2) and `task_id` (v1), found {found}")
        (_v2 if ids.task_id is UNSET else _v1).decode(body)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise Unintelligible(f"not a callback of Kling: {error}") from None


def json_schemas() -> dict[str, dict[str, Any]]:
    """Return the JSON schema of each API's callback, by file name."""
    return {
        f"kling-callback-{name}.json": {"$schema": "https://json-schema.org/draft/2020-12/schema"}
        | msgspec.json.schema(callback)
        | {"not": {"required": [other_id]}}
        for name, callback, other_id in (("v1", V1Callback, "id"), ("v2", V2Callback, "task_id"))
    }
