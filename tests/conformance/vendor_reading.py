"""Conformance of a vendor adapter: it parses its vectors and mutations of them, and builds correct requests."""

import copy
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest
from msgspec.structs import replace

from submitter.errors import RelayError, SubmissionUnknown, Unintelligible, VendorRefused
from submitter.event import task_data
from submitter.observation import Report
from submitter.request import MotionControl
from submitter.schedule import Backoff, PollPolicy
from submitter.task import Task, TaskStatus
from submitter.transition import transition
from submitter.vendors.base import CreateRequest, HttpAnswer, Streams, Vendor
from submitter.vendors.registry import vendors

NOW_S = 1_781_080_794.0
POLL_POLICY = PollPolicy(Backoff(900, 1.5, 3600), Backoff(10, 1.5, 60), 86400)
CALLBACK = "https://relay.example.com/callbacks/x/order-1/k.1.mac"

Vector = dict[str, Any]


def answer(body: Any, status: int = 200) -> HttpAnswer:
    return HttpAnswer(status, {}, body.encode() if isinstance(body, str) else msgspec.json.encode(body))


def read(vendor: Vendor, vector: Vector, body: Any) -> Any:
    """Parse a body with the method for its vector's `door`; return the result in the terms of `expect`."""
    try:
        if vector["door"] == "create":
            return vendor.read_create(answer(body, vector["http_status"]))
        if vector["door"] == "callback":
            return vendor.read_callback(answer(body).body, NOW_S) or "ignored"
        if vector["door"] == "event":
            assert isinstance(vendor, Streams)
            return vendor.read_event(vector["event"], answer(body).body.decode(), NOW_S) or "ignored"
        task = Task("order-1", vendor.name, TaskStatus.SUBMITTED, 0, 0, POLL_POLICY, task_id=expected_task_id(vector))
        (query,) = vendor.queries([task], NOW_S)
        findings = vendor.read_query(query, answer(body, vector["http_status"]), NOW_S)
        if findings.absent or findings.more:
            return "absent"
        return findings.reports.get("order-1") or Unintelligible(findings.unreadable["order-1"])
    except RelayError as error:
        return error


def expected_task_id(vector: Vector) -> str:
    """Return the task id that the vector expects; by default that of the other vectors in its folder."""
    return str(vector["expect"].get("task_id") or vector["task_id"])


def comparable(result: Any) -> Any:
    """Return a result in a form that can be compared."""
    if isinstance(result, VendorRefused):
        return "refused", result.retryable, result.failover
    if isinstance(result, RelayError):
        return type(result).__name__
    return replace(result, raw="") if isinstance(result, Report) else result


def paths_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value inside `value`."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from paths_in(item, (*path, key))


def mutated(body: Any, path: tuple[Any, ...], change: Callable[[Any, Any], None]) -> Any:
    """Return a copy of `body` with `change` applied at `path`."""
    copied = copy.deepcopy(body)
    holder = copied
    for key in path[:-1]:
        holder = holder[key]
    change(holder, path[-1])
    return copied


def put(value: Any) -> Callable[[Any, Any], None]:
    def change(holder: Any, key: Any) -> None:
        holder[key] = value

    return change


def with_unknown_fields(value: Any) -> Any:
    """Return a copy with an unknown field in every object."""
    if isinstance(value, dict):
        return {key: with_unknown_fields(item) for key, item in value.items()} | {"brand_new": {"a": [1, None]}}
    return [with_unknown_fields(item) for item in value] if isinstance(value, list) else value


def with_numbers_as_strings(value: Any) -> Any:
    """Return a copy with all numbers as strings."""
    if isinstance(value, dict):
        return {key: with_numbers_as_strings(item) for key, item in value.items()}
    if isinstance(value, list):
        return [with_numbers_as_strings(item) for item in value]
    return str(value) if type(value) in (int, float) else value


class Reading:
    """Checks the protocol `submitter.vendors.base.Vendor`, without HTTP."""

    vendor: ClassVar[str]
    strict_callbacks: ClassVar[bool] = False
    """Whether a callback must have the documented types: numbers as numbers, ids as text."""
    vectors_in: ClassVar[Path] = Path(__file__).parents[1] / "vectors"

    @classmethod
    def adapters(cls) -> list[Vendor]:
        """Return the vendor's adapters, one for each version of its API."""
        adapter = vendors()[cls.vendor].configure({"api_key": "the-key"})
        assert adapter is not None
        return [adapter]

    @classmethod
    def vectors(cls) -> dict[str, Vector]:
        found: dict[str, Vector] = {
            path.stem: json.loads(path.read_text()) for path in sorted((cls.vectors_in / cls.vendor).glob("*.json"))
        }
        task_id = next(v["expect"]["task_id"] for v in found.values() if "task_id" in v["expect"])
        return {name: {"task_id": task_id, **vector} for name, vector in found.items()}

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Parametrize the tests by adapter and by vector. A vector may name the only adapter that reads it."""
        adapters = {type(adapter).__name__: adapter for adapter in self.adapters()}
        if "vector" in metafunc.fixturenames:
            cases = [
                pytest.param(adapter, vector, id=f"{adapter_name}-{name}")
                for name, vector in self.vectors().items()
                for adapter_name, adapter in adapters.items()
                if vector.get("adapter", adapter_name) == adapter_name
            ]
            metafunc.parametrize(("adapter", "vector"), cases)
        elif "adapter" in metafunc.fixturenames:
            metafunc.parametrize("adapter", adapters.values(), ids=adapters.keys())

    # -- parsing -------------------------------------------------------------------------------

    def test_a_vector_is_parsed_as_expected(self, adapter: Vendor, vector: Vector) -> None:
        assert vector["source"]
        assert vector["certainty"] in ("documented", "seen", "inferred")
        expect, result = vector["expect"], read(adapter, vector, vector["body"])
        if "status" in expect:
            assert isinstance(result, Report), result
            assert (result.status.value, result.task_id) == (expect["status"], expect["task_id"])
            assert result.external_task_id == expect.get("external_task_id")
            assert result.message == expect.get("message", "")
            assert result.unfinished is expect.get("unfinished", False)
            assert bool(result.videos) is ("url" in expect)
            assert result.raw
            assert "secret" not in result.raw
            assert result.request_id in (None, "r")
            for video in result.videos:
                for field in ("url", "duration", "expires_at_ms"):
                    assert getattr(video, field) == expect[field]
                assert video.watermark_url == expect.get("watermark_url")
                assert [[charge.kind, charge.amount, charge.currency] for charge in result.cost] == expect["cost"]
        elif "refused" in expect:
            assert comparable(result) == ("refused", expect["refused"], expect.get("elsewhere", False))
            assert "the-key" not in str(result)
        elif "duplicate" in expect:
            assert isinstance(result, VendorRefused)
            assert result.duplicate
        elif "unknown" in expect:
            assert isinstance(result, SubmissionUnknown)
        elif expect.keys() & {"unintelligible", "unreadable"}:
            assert isinstance(result, Unintelligible)
            assert (expect.get("unintelligible") or expect["unreadable"]) in str(result)
        else:
            assert result == next(iter(expect))

    def test_the_vectors_cover_every_kind_of_answer(self) -> None:
        doors: dict[str, list[Any]] = {}
        for vector in self.vectors().values():
            doors.setdefault(vector["door"], []).append(vector["expect"])
        assert {expect.get("status") for expect in doors["query"]} >= {"submitted", "processing", "succeed", "failed"}
        assert any("absent" in expect for expect in doors["query"])
        assert any("unreadable" in expect or expect.get("unfinished") for expect in doors["query"])
        pushed = doors.get("event") if isinstance(self.adapters()[0], Streams) else doors["callback"]
        assert pushed is not None
        assert {expect.get("status") for expect in pushed} >= {"succeed", "failed"}
        assert any("unintelligible" in expect for expect in pushed)
        created = doors["create"]
        assert any(expect.get("status") == "submitted" for expect in created)
        assert any("unknown" in expect for expect in created)
        refusals = {(expect["refused"], expect.get("elsewhere", False)) for expect in created if "refused" in expect}
        assert refusals >= {(False, False), (False, True), (True, False)}

    def test_unknown_fields_are_ignored(self, adapter: Vendor, vector: Vector) -> None:
        assert comparable(read(adapter, vector, with_unknown_fields(vector["body"]))) == comparable(
            read(adapter, vector, vector["body"])
        )

    def test_numbers_may_be_strings(self, adapter: Vendor, vector: Vector) -> None:
        changed = with_numbers_as_strings(vector["body"])
        result = read(adapter, vector, changed)
        if self.strict_callbacks and vector["door"] == "callback" and changed != vector["body"]:
            assert isinstance(result, Unintelligible)
        else:
            assert comparable(result) == comparable(read(adapter, vector, vector["body"]))

    def test_an_unknown_status_is_unintelligible(self, adapter: Vendor, vector: Vector) -> None:
        if "status" not in vector["expect"] or vector["door"] == "create":
            return
        fields = {"status", "task_status"}
        for path in paths_in(vector["body"]):
            if path[-1] in fields:
                result = read(adapter, vector, mutated(vector["body"], path, put("brand_new")))
                assert isinstance(result, Unintelligible)
                return
        raise AssertionError("the vector has no status")

    def test_a_missing_or_mistyped_field_never_changes_the_final_status(self, adapter: Vendor, vector: Vector) -> None:
        original = vector.get("says") or vector["expect"].get("status")
        for path in paths_in(vector["body"]):
            for value in (None, [], {}, "", "x", 0, -1, 1.5, True, [None], {"a": 1}):
                self._check_mutated(adapter, vector, mutated(vector["body"], path, put(value)), original)
            self._check_mutated(
                adapter, vector, mutated(vector["body"], path, lambda holder, key: holder.pop(key)), original
            )

    def _check_mutated(self, adapter: Vendor, vector: Vector, body: Any, original: str | None) -> None:
        result = read(adapter, vector, body)
        if isinstance(result, Report):
            final = result.status.value if result.status in (TaskStatus.SUCCEED, TaskStatus.FAILED) else None
            assert final in (None, original), (result, body)
            if final == "succeed":
                assert all(isinstance(video.url, str) and video.url for video in result.videos)
                assert result.videos
        else:
            assert isinstance(result, RelayError) or result in ("ignored", "absent")

    def test_reports_in_any_order_reach_the_same_final_status(self, adapter: Vendor) -> None:
        reports = [
            result
            for vector in self.vectors().values()
            if vector["expect"].get("status") and isinstance(result := read(adapter, vector, vector["body"]), Report)
        ]
        later = [report for report in reports if report.source != "create" and report.status is not TaskStatus.FAILED]
        some = list({(report.status, report.source): report for report in later}.values())[:6]
        for order in itertools.permutations([*some, some[-1]]):
            task = Task("order-1", adapter.name, TaskStatus.SUBMITTED, 0, 0, POLL_POLICY, task_id=some[0].task_id)
            successes = 0
            for report in order:
                changed = transition(task, report, 1)
                if changed is not None:
                    msgspec.json.encode(task_data(changed.task))
                    successes += changed.event_type == "task.succeed"
                    task = changed.task
            assert (task.status, successes) == (TaskStatus.SUCCEED, 1)

    # -- requests ------------------------------------------------------------------------------

    def test_the_create_request_contains_every_field(self, adapter: Vendor) -> None:
        limits = adapter.limits
        request = MotionControl(
            image="i", video="v", character_orientation="video", prompt="on a beach", model=limits.models[0]
        )
        create = CreateRequest(
            request, limits.modes[0], "order-1", "https://e.com/i.png", "https://e.com/v.mp4", CALLBACK
        )
        sent = adapter.create(create, NOW_S)
        text = sent.body.decode()
        assert (sent.method, sent.url.startswith(adapter.base_url)) == ("POST", True)
        assert "https://e.com/i.png" in text
        assert "https://e.com/v.mp4" in text
        assert (CALLBACK in text) is (adapter.callbacks is not False)
        assert ("order-1" in text.replace(CALLBACK, "")) is limits.own_id
        assert CALLBACK not in adapter.create(replace(create, callback_url=None), NOW_S).body.decode()
        muted = replace(create, request=replace(request, keep_original_sound=False))
        assert adapter.create(muted, NOW_S).body != sent.body
        other = replace(create, request=replace(request, character_orientation="image"))
        assert adapter.create(other, NOW_S).body != sent.body
        for mode in limits.modes[1:]:
            request_of_mode = adapter.create(replace(create, mode=mode), NOW_S)
            assert (request_of_mode.url, request_of_mode.body) != (sent.url, sent.body)
        assert "the-key" not in repr(sent) + repr(adapter)

    def test_a_task_without_a_vendor_id_is_queried_only_if_own_ids_are_supported(self, adapter: Vendor) -> None:
        task = Task("order-1", adapter.name, TaskStatus.CREATED, 0, 0, POLL_POLICY)
        assert bool(adapter.queries([task], NOW_S)) is adapter.limits.own_id
        assert adapter.queries([], NOW_S) == []

    def test_every_task_is_in_one_query_and_ids_are_url_quoted(self, adapter: Vendor) -> None:
        tasks = [
            Task(f"order-{i}", adapter.name, TaskStatus.SUBMITTED, 0, 0, POLL_POLICY, task_id=f"{i}/?&")
            for i in range(45)
        ]
        queries = adapter.queries(tasks, NOW_S)
        assert sorted(t.external_task_id for query in queries for t in query.tasks) == sorted(
            task.external_task_id for task in tasks
        )
        assert all("/?&" not in query.request.url for query in queries)

    def test_only_a_definite_refusal_is_a_refusal(self, adapter: Vendor) -> None:
        for body in ("", "<html>", "null", "[]", '{"error": null}', '{"data": {}}'):
            for status in (200, 201, 301, 408, 500, 502, 503, 504, 520):
                with pytest.raises(SubmissionUnknown):
                    adapter.read_create(answer(body, status))
            for status in (400, 401, 402, 403, 404, 422, 429):
                with pytest.raises(VendorRefused) as refused:
                    adapter.read_create(answer(body, status))
                assert refused.value.retryable is (status == 429)
                assert refused.value.failover is (status in (401, 402, 403))
