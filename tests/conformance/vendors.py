"""What every vendor's adapter and stand-in must do. A vendor's test is a subclass that names it.

The vectors in `tests/vectors/<vendor>/` are bodies with what they mean; the suite asks that they
cover what a vendor must be able to say, and then bends them. The road runs the adapter against
the stand-in over real HTTP, with faults.
"""

import asyncio
import contextlib
import copy
import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import hypothesis
import msgspec
import pytest
from hypothesis import strategies as st
from msgspec.structs import replace

from receiver.app import create_app
from receiver.callback import Door, Verify
from submitter.callback_url import KeyRing, callback_url
from submitter.clock import Clock
from submitter.errors import InvalidRequest, RelayError, SubmissionUnknown, Unintelligible, UrlUnknown, VendorRefused
from submitter.event import task_data
from submitter.http import VendorHttp
from submitter.installed import vendors
from submitter.ledger.sqlite import SqliteLedger
from submitter.request import MotionControl
from submitter.sandbox.faults import Faults
from submitter.sandbox.server import free_socket, listening
from submitter.schedule import Backoff, Patience
from submitter.task import Report, Task, TaskStatus, transition
from submitter.vendors.base import HttpAnswer, Job, Streams, Vendor
from tests.conftest import KEY, World, run_many

NOW_S = 1_781_080_794.0
PATIENCE = Patience(Backoff(900, 1.5, 3600), Backoff(10, 1.5, 60), 86400)
CALLBACK = "https://relay.example.com/callbacks/x/order-1/k.1.mac"
BODIES = 20_000 if os.environ.get("CI") == "true" else 1_000
PER_EXAMPLE = 100

Vector = dict[str, Any]


def answer(body: Any, status: int = 200) -> HttpAnswer:
    return HttpAnswer(status, {}, body.encode() if isinstance(body, str) else msgspec.json.encode(body))


def read(vendor: Vendor, vector: Vector, body: Any) -> Any:
    """Read a body at the door of its vector, and return what it means in the words of `expect`."""
    try:
        if vector["door"] == "create":
            return vendor.read_create(answer(body, vector["http_status"]))
        if vector["door"] == "callback":
            return vendor.read_callback(answer(body).body, NOW_S) or "ignored"
        if vector["door"] == "event":
            assert isinstance(vendor, Streams)
            return vendor.read_event(vector["event"], answer(body).body.decode(), NOW_S) or "ignored"
        task = Task("order-1", vendor.name, TaskStatus.SUBMITTED, 0, 0, PATIENCE, task_id=its_task_id(vector))
        (query,) = vendor.queries([task], NOW_S)
        findings = vendor.read_query(query, answer(body, vector["http_status"]), NOW_S)
        if findings.absent or findings.more:
            return "absent"
        return findings.reports.get("order-1") or Unintelligible(findings.unreadable["order-1"])
    except RelayError as error:
        return error


def its_task_id(vector: Vector) -> str:
    """The id that the vector's own folder speaks of."""
    return str(vector["expect"].get("task_id") or vector["task_id"])


def means(result: Any) -> Any:
    """Return a result so that two can be compared."""
    if isinstance(result, VendorRefused):
        return "refused", result.retryable, result.elsewhere
    if isinstance(result, RelayError):
        return type(result).__name__
    return result


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value inside `value`."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def bent(body: Any, path: tuple[Any, ...], change: Callable[[Any, Any], None]) -> Any:
    """Return a copy of `body`, changed at `path`."""
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


def with_more(value: Any) -> Any:
    """Return a copy with an unknown field in every object."""
    if isinstance(value, dict):
        return {key: with_more(item) for key, item in value.items()} | {"brand_new": {"a": [1, None]}}
    return [with_more(item) for item in value] if isinstance(value, list) else value


def as_text(value: Any) -> Any:
    """Return a copy whose numbers are strings."""
    if isinstance(value, dict):
        return {key: as_text(item) for key, item in value.items()}
    if isinstance(value, list):
        return [as_text(item) for item in value]
    return str(value) if type(value) in (int, float) else value


class VendorSuite:
    """The promises of `submitter.vendors.base.Vendor`, and of the vendor's stand-in."""

    vendor: ClassVar[str]
    vectors_in: ClassVar[Path] = Path(__file__).parents[1] / "vectors"

    @classmethod
    def adapters(cls) -> list[Vendor]:
        """Return the vendor's adapters: one for each form of its API."""
        made = vendors()[cls.vendor].configure({"api_key": "the-key"})
        assert made is not None
        return [made]

    @classmethod
    def vectors(cls) -> dict[str, Vector]:
        found: dict[str, Vector] = {
            path.stem: json.loads(path.read_text()) for path in sorted((cls.vectors_in / cls.vendor).glob("*.json"))
        }
        task_id = next(v["expect"]["task_id"] for v in found.values() if "task_id" in v["expect"])
        return {name: {"task_id": task_id, **vector} for name, vector in found.items()}

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Run each test that asks for `adapter` or `vector` once for each."""
        if "adapter" in metafunc.fixturenames:
            metafunc.parametrize("adapter", self.adapters(), ids=lambda adapter: type(adapter).__name__)
        if "vector" in metafunc.fixturenames:
            found = self.vectors()
            metafunc.parametrize("vector", found.values(), ids=found.keys())

    # -- what it says --------------------------------------------------------------------------

    def test_a_vector_means_what_it_says(self, adapter: Vendor, vector: Vector) -> None:
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
            for video in result.videos:
                for field in ("url", "duration", "expires_at_ms"):
                    assert getattr(video, field) == expect[field]
                assert video.watermark_url == expect.get("watermark_url")
                assert [[charge.kind, charge.amount, charge.currency] for charge in result.cost] == expect["cost"]
        elif "refused" in expect:
            assert means(result) == ("refused", expect["refused"], expect.get("elsewhere", False))
            assert "the-key" not in str(result)
        elif "unknown" in expect:
            assert isinstance(result, SubmissionUnknown)
        elif expect.keys() & {"unintelligible", "unreadable"}:
            assert isinstance(result, Unintelligible)
            assert (expect.get("unintelligible") or expect["unreadable"]) in str(result)
        else:
            assert result == next(iter(expect))

    def test_the_vectors_cover_what_a_vendor_says(self) -> None:
        doors: dict[str, list[Any]] = {}
        for vector in self.vectors().values():
            doors.setdefault(vector["door"], []).append(vector["expect"])
        assert {expect.get("status") for expect in doors["query"]} >= {"submitted", "processing", "succeed", "failed"}
        assert any("absent" in expect for expect in doors["query"])
        assert any("unreadable" in expect or expect.get("unfinished") for expect in doors["query"])
        told = doors.get("event") if isinstance(self.adapters()[0], Streams) else doors["callback"]
        assert told is not None
        assert {expect.get("status") for expect in told} >= {"succeed", "failed"}
        assert any("unintelligible" in expect for expect in told)
        created = doors["create"]
        assert any(expect.get("status") == "submitted" for expect in created)
        assert any("unknown" in expect for expect in created)
        refusals = {(expect["refused"], expect.get("elsewhere", False)) for expect in created if "refused" in expect}
        assert refusals >= {(False, False), (False, True), (True, False)}

    def test_unknown_fields_change_nothing(self, adapter: Vendor, vector: Vector) -> None:
        assert means(read(adapter, vector, with_more(vector["body"]))) == means(read(adapter, vector, vector["body"]))

    def test_numbers_may_come_as_strings(self, adapter: Vendor, vector: Vector) -> None:
        assert means(read(adapter, vector, as_text(vector["body"]))) == means(read(adapter, vector, vector["body"]))

    def test_a_status_that_is_not_known_is_no_end(self, adapter: Vendor, vector: Vector) -> None:
        if "status" not in vector["expect"] or vector["door"] == "create":
            return
        words = {"status", "task_status"}
        for path in places(vector["body"]):
            if path[-1] in words:
                result = read(adapter, vector, bent(vector["body"], path, put("brand_new")))
                assert isinstance(result, Unintelligible)
                return
        raise AssertionError("the vector has no status")

    def test_a_field_that_is_missing_or_of_another_type_is_never_another_end(
        self, adapter: Vendor, vector: Vector
    ) -> None:
        honest = vector.get("says") or vector["expect"].get("status")
        for path in places(vector["body"]):
            for value in (None, [], {}, "", "x", 0, -1, 1.5, True, [None], {"a": 1}):
                self._check_bent(adapter, vector, bent(vector["body"], path, put(value)), honest)
            self._check_bent(adapter, vector, bent(vector["body"], path, lambda holder, key: holder.pop(key)), honest)

    def _check_bent(self, adapter: Vendor, vector: Vector, body: Any, honest: str | None) -> None:
        result = read(adapter, vector, body)
        if isinstance(result, Report):
            end = result.status.value if result.status in (TaskStatus.SUCCEED, TaskStatus.FAILED) else None
            assert end in (None, honest), (result, body)
            if end == "succeed":
                assert all(isinstance(video.url, str) and video.url for video in result.videos)
                assert result.videos
        else:
            assert isinstance(result, RelayError) or result in ("ignored", "absent")

    def test_reports_in_any_order_and_number_end_the_same_way(self, adapter: Vendor) -> None:
        reports = [
            result
            for vector in self.vectors().values()
            if vector["expect"].get("status") and isinstance(result := read(adapter, vector, vector["body"]), Report)
        ]
        told = [report for report in reports if report.source != "create" and report.status is not TaskStatus.FAILED]
        some = list({(report.status, report.source): report for report in told}.values())[:6]
        for order in itertools.permutations([*some, some[-1]]):
            task = Task("order-1", adapter.name, TaskStatus.SUBMITTED, 0, 0, PATIENCE, task_id=some[0].task_id)
            ends = 0
            for report in order:
                changed = transition(task, report, 1)
                if changed is not None:
                    msgspec.json.encode(task_data(changed.task))
                    ends += changed.event_type == "task.succeed"
                    task = changed.task
            assert (task.status, ends) == (TaskStatus.SUCCEED, 1)

    # -- what is asked -------------------------------------------------------------------------

    def test_a_create_says_what_was_asked(self, adapter: Vendor) -> None:
        limits = adapter.limits
        request = MotionControl(
            image="i", video="v", character_orientation="video", prompt="on a beach", model=limits.models[0]
        )
        job = Job(request, limits.modes[0], "order-1", "https://e.com/i.png", "https://e.com/v.mp4", CALLBACK)
        sent = adapter.create(job, NOW_S)
        text = sent.body.decode()
        assert (sent.method, sent.url.startswith(adapter.base_url)) == ("POST", True)
        assert "https://e.com/i.png" in text
        assert "https://e.com/v.mp4" in text
        assert (CALLBACK in text) is (adapter.callbacks is not False)
        assert ("order-1" in text.replace(CALLBACK, "")) is limits.own_id
        assert CALLBACK not in adapter.create(replace(job, callback_url=None), NOW_S).body.decode()
        silent = replace(job, request=replace(request, keep_original_sound=False))
        assert adapter.create(silent, NOW_S).body != sent.body
        other = replace(job, request=replace(request, character_orientation="image"))
        assert adapter.create(other, NOW_S).body != sent.body
        for mode in limits.modes[1:]:
            made = adapter.create(replace(job, mode=mode), NOW_S)
            assert (made.url, made.body) != (sent.url, sent.body)
        assert "the-key" not in repr(sent) + repr(adapter)

    def test_a_task_without_an_id_is_asked_about_only_where_yours_is_known(self, adapter: Vendor) -> None:
        task = Task("order-1", adapter.name, TaskStatus.CREATED, 0, 0, PATIENCE)
        assert bool(adapter.queries([task], NOW_S)) is adapter.limits.own_id
        assert adapter.queries([], NOW_S) == []

    def test_every_task_is_in_one_query_and_ids_are_quoted(self, adapter: Vendor) -> None:
        tasks = [
            Task(f"order-{i}", adapter.name, TaskStatus.SUBMITTED, 0, 0, PATIENCE, task_id=f"{i}/?&") for i in range(45)
        ]
        queries = adapter.queries(tasks, NOW_S)
        assert sorted(t.external_task_id for query in queries for t in query.tasks) == sorted(
            task.external_task_id for task in tasks
        )
        assert all("/?&" not in query.request.url for query in queries)

    def test_only_a_clear_no_is_a_no(self, adapter: Vendor) -> None:
        for body in ("", "<html>", "null", "[]", '{"error": null}', '{"data": {}}'):
            for status in (200, 201, 301, 408, 500, 502, 503, 504, 520):
                with pytest.raises(SubmissionUnknown):
                    adapter.read_create(answer(body, status))
            for status in (400, 401, 402, 403, 404, 422, 429):
                with pytest.raises(VendorRefused) as refused:
                    adapter.read_create(answer(body, status))
                assert refused.value.retryable is (status == 429)
                assert refused.value.elsewhere is (status in (401, 402, 403))

    # -- whatever arrives ----------------------------------------------------------------------

    def test_whatever_arrives_is_an_observation_a_quarantine_or_a_refusal(self, tmp_path: Path) -> None:
        """At the real receiver: never a 5xx, never a state that the adapter did not read."""
        vectors = [vector for vector in self.vectors().values() if vector["door"] != "create"]
        task_id = vectors[0]["task_id"]
        adapter = self.adapters()[0]
        ring = KeyRing.read(f"test:{KEY}")
        app_verify = Verify(ring, {adapter.name: Door(adapter, (), "never")})
        numbers = itertools.count()

        async def post(reader: Any, writer: Any, url: str, body: bytes) -> int:
            path = url.partition("/callbacks/")[2]
            head = f"POST /callbacks/{path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            status = int((await reader.readline()).split()[1])
            length = 0
            while (line := await reader.readline()) != b"\r\n":
                name, _, value = line.partition(b":")
                length = int(value) if name.lower() == b"content-length" else length
            await reader.readexactly(length)
            return status

        async def check(ledger: SqliteLedger, port: int, bodies: list[bytes]) -> None:
            now_ms = Clock().now_ms()
            ids = [f"order-{next(numbers)}" for _ in bodies]
            blanks = [
                Task(id, adapter.name, TaskStatus.SUBMITTED, now_ms, now_ms, PATIENCE, task_id=task_id) for id in ids
            ]
            await asyncio.gather(*(ledger.reserve(blank) for blank in blanks))
            pairs = list(zip(blanks, bodies, strict=True))
            await asyncio.gather(*(check_some(ledger, port, pairs[start::10]) for start in range(10)))

        async def check_some(ledger: SqliteLedger, port: int, pairs: list[tuple[Task, bytes]]) -> None:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                for blank, body in pairs:
                    id = blank.external_task_id
                    url = callback_url("http://x", ring, adapter.name, id, blank.created_at_ms / 1000)
                    status = await post(reader, writer, url, body)
                    expected, http = expected_of(adapter, blank, body)
                    assert status == http, body
                    assert (await ledger.get(id)).status is expected, body
            finally:
                writer.close()
                await writer.wait_closed()

        with asyncio.Runner() as runner:

            async def start() -> tuple[Any, SqliteLedger, int]:
                ledger = SqliteLedger(tmp_path / "fuzz.db")
                bound, _ = free_socket()
                server = listening(create_app(ledger, app_verify), bound)
                await server.__aenter__()
                return server, ledger, bound.getsockname()[1]

            server, ledger, port = runner.run(start())

            # Not shrunk: the assertion names the body, and a hundred of them are shrunk for minutes.
            only = (hypothesis.Phase.generate,)

            @hypothesis.settings(max_examples=max(1, BODIES // PER_EXAMPLE), database=None, phases=only)
            @hypothesis.given(st.lists(bodies_like(vectors), min_size=PER_EXAMPLE, max_size=PER_EXAMPLE).map(Batch))
            def fuzz(bodies: Batch) -> None:
                for body in bodies:
                    for vector in vectors[:: max(1, len(vectors) // 4)]:
                        result = read_bytes(adapter, vector, body)
                        assert isinstance(result, Report | RelayError) or result in ("ignored", "absent")
                runner.run(check(ledger, port, bodies))

            try:
                fuzz()
            finally:
                runner.run(server.__aexit__(None, None, None))
                runner.run(ledger.close())

    # -- the road ------------------------------------------------------------------------------

    async def test_a_task_goes_the_whole_road(self, world: World, media: Path) -> None:
        sandbox = world.stand_in(self.vendor)
        await world.start()
        task = await world.submitter.submit(world.request(vendor=self.vendor, metadata={"order": "42"}))
        done = await task.result(timeout=20)
        assert (done.status, done.vendor) == (TaskStatus.SUCCEED, self.vendor)
        assert done.videos[0].url.startswith(sandbox.base_url)
        while "task.succeed" not in [event["type"] for event in world.inbox.events]:
            await world.inbox.until(len(world.inbox.requests) + 1)
        (event,) = [event for event in world.inbox.events if event["type"] == "task.succeed"]
        assert event["source"] == f"/kling-relay/{self.vendor}"
        assert event["data"]["task_id"] == next(iter(sandbox.jobs))
        assert sandbox.counts["created"] == 1

    async def test_a_failure_says_why(self, world: World) -> None:
        world.stand_in(self.vendor)
        world.faults(fail=1, fail_reason="no person in the video")
        await world.start()
        done = await (await world.submitter.submit(world.request(vendor=self.vendor))).result(timeout=20)
        assert (done.status, done.status_message) == (TaskStatus.FAILED, "no person in the video")

    async def test_a_lost_answer_is_never_paid_for_twice(self, world: World) -> None:
        sandbox = world.stand_in(self.vendor)
        await world.start()
        adapter = world.settings.common.vendors[self.vendor].vendor
        for number, fault in enumerate(({"create_5xx": 1.0}, {"create_never": 1.0})):
            world.faults(**fault)
            world.submitter.creator.http = VendorHttp(answer_timeout_s=1)
            request = world.request(vendor=self.vendor, external_task_id=f"order-{number}")
            if adapter.limits.own_id:
                await world.submitter.submit(request)
            else:
                with contextlib.suppress(SubmissionUnknown):  # unless a callback was quicker than the timeout
                    await world.submitter.submit(request)
                world.faults()
                with contextlib.suppress(SubmissionUnknown):  # asked again, it is not sent again
                    await world.submitter.submit(request)
                if not adapter.callbacks:  # no callback settles it: a person says which task it is
                    await world.submitter.adopt(f"order-{number}", list(sandbox.jobs)[number])
            task = await world.submitter.task(f"order-{number}")
            done = await task.result(timeout=20)
            assert done.status is TaskStatus.SUCCEED
            assert sandbox.counts["created"] == number + 1
            await world.submitter.creator.http.close()

    @pytest.mark.parametrize("kind", ["balance", "permission"])
    async def test_a_sure_refusal_goes_to_the_next_vendor(self, world: World, kind: Any) -> None:
        first, second = world.stand_in(self.vendor), world.stand_in(self._other())
        await world.start()
        first.set_faults(Faults(refuse=kind))
        second.pace_s = 0.5  # so that its first status is seen
        task = await world.submitter.submit(world.request(vendor=f"{self.vendor},{self._other()}"))
        assert task.task.vendor == self._other()
        assert task.task.tried[0].vendor == self.vendor
        assert f"refused by {self.vendor}" in task.task.status_message
        assert (await task.result(timeout=20)).status is TaskStatus.SUCCEED
        assert (first.counts["created"], second.counts["created"]) == (0, 1)

    async def test_an_ambiguous_create_stays_where_it_is(self, world: World) -> None:
        first, second = world.stand_in(self.vendor), world.stand_in(self._other())
        await world.start()
        first.set_faults(Faults(create_5xx=1))
        request = world.request(vendor=f"{self.vendor},{self._other()}", external_task_id="order-1")
        with contextlib.suppress(SubmissionUnknown):
            await world.submitter.submit(request)
        assert (await world.submitter.task("order-1")).task.vendor == self.vendor
        assert (first.counts["created"], second.counts["created"]) == (1, 0)

    async def test_a_wrong_key_is_told_with_its_remedy(self, world: World) -> None:
        sandbox = world.stand_in(self.vendor)
        world.environ[f"{self.vendor.upper()}_API_KEY"] = "wrong"
        await world.start()
        with pytest.raises(VendorRefused, match="API") as refused:
            await world.submitter.submit(world.request(vendor=self.vendor))
        assert not refused.value.retryable
        assert sandbox.counts["created"] == 0
        configured = world.settings.common.vendors[self.vendor].vendor
        http = VendorHttp()
        probed = await http.run(configured.probe(Clock().now_s()))
        assert isinstance(probed, HttpAnswer)
        with pytest.raises(VendorRefused):
            configured.read_probe(probed)
        await http.close()

    async def test_a_right_key_passes_the_probe(self, world: World) -> None:
        world.stand_in(self.vendor)
        await world.start(receiver=False)
        configured = world.settings.common.vendors[self.vendor].vendor
        http = VendorHttp()
        probed = await http.run(configured.probe(Clock().now_s()))
        assert isinstance(probed, HttpAnswer)
        assert configured.read_probe(probed)
        await http.close()

    async def test_what_it_cannot_do_is_refused_and_names_who_can(self, world: World) -> None:
        sandbox = world.stand_in(self.vendor)
        await world.start(receiver=False)
        adapter = world.settings.common.vendors[self.vendor].vendor
        limits = adapter.limits
        wishes: dict[str, Any] = {
            "negative_prompt": "rain", "element_id": "829836802793406551", "watermark": True, "model": "kling-v2-6",
        }  # fmt: skip
        able = {
            "negative_prompt": bool(limits.negative_prompt_chars), "element_id": bool(limits.element_models),
            "watermark": limits.watermark, "model": "kling-v2-6" in limits.models,
        }  # fmt: skip
        for field, value in wishes.items():
            request = world.request(vendor=self.vendor, **{field: value})
            if able[field]:
                await world.submitter.prepare(request)
                continue
            with pytest.raises(InvalidRequest) as refused:
                await world.submitter.prepare(request)
            (problem,) = refused.value.problems
            assert problem.field == field
            assert "Or use" in problem.remedy
        assert sandbox.counts["created"] == 0

    async def test_two_hundred_tasks_with_faults_all_end_right_and_none_is_created_twice(self, world: World) -> None:
        await run_many(world, 200, self.vendor)

    def _other(self) -> str:
        return "kling" if self.vendor != "kling" else "novita"


class Batch(list[bytes]):
    """Bodies that are drawn together, since each example has a cost of its own."""

    def __repr__(self) -> str:
        return f"{len(self)} bodies"


def read_bytes(adapter: Vendor, vector: Vector, body: bytes) -> Any:
    try:
        text: Any = body.decode()
    except UnicodeDecodeError:
        text = ""
    return read(adapter, vector, text)


def expected_of(adapter: Vendor, task: Task, body: bytes) -> tuple[TaskStatus, int]:
    """Return the state that a callback must leave a task in, and the status of its answer."""
    try:
        report = adapter.read_callback(body, Clock().now_s())
    except Unintelligible:
        return task.status, 200
    if report is None or report.task_id != task.task_id:
        return task.status, UrlUnknown.status if report and report.external_task_id else 200
    if report.external_task_id not in (None, task.external_task_id):
        return task.status, UrlUnknown.status
    changed = transition(task, report, task.updated_at_ms)
    return (changed.task.status if changed else task.status), 200


WORDS = ["succeeded", "succeed", "failed", "completed", "TASK_STATUS_SUCCEED", "cancelled", "processing"]
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)


def bodies_like(vectors: list[Vector]) -> st.SearchStrategy[bytes]:
    """Draw bodies that are nearly those of the vectors: one or two values are others, or missing."""
    wholes = [(vector["body"], list(places(vector["body"]))) for vector in vectors]
    wholes = [(body, paths) for body, paths in wholes if paths]

    def bend(drawn: tuple[tuple[Any, list[Any]], int, Any, bool]) -> bytes:
        (body, paths), at, value, is_gone = drawn
        path = paths[at % len(paths)]
        made = bent(body, path, lambda holder, key: holder.pop(key) if is_gone else put(value)(holder, key))
        try:
            return json.dumps(made).encode()
        except UnicodeEncodeError:
            return b"{}"

    nearly = st.tuples(st.sampled_from(wholes), st.integers(0, 60), VALUES, st.booleans()).map(bend)
    return st.one_of(
        nearly, nearly, nearly, st.binary(max_size=60), VALUES.map(lambda value: json.dumps(value).encode())
    )
