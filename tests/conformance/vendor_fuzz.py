"""Fuzzes the receiver with callback bodies: each is observed, quarantined or refused."""

import asyncio
import itertools
import json
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from receiver.app import create_app
from receiver.verification import VendorCheck, Verifier
from submitter.callback_url import KeyRing, callback_url
from submitter.clock import Clock
from submitter.errors import RelayError, Unintelligible, UrlUnknown
from submitter.ledger.sqlite.ledger import SqliteLedger
from submitter.observation import Report
from submitter.sandbox.server import free_socket, listening
from submitter.task import Task, TaskStatus
from submitter.transition import transition
from submitter.vendors.base import Vendor
from tests.conformance.vendor_reading import POLL_POLICY, Reading, Vector, mutated, paths_in, put, read
from tests.world import KEY

PER_EXAMPLE = 100


class Fuzz(Reading):
    """Sends mutated and random bodies to the real receiver."""

    @pytest.mark.parametrize("count", [1_000, pytest.param(20_000, marks=pytest.mark.slow)])
    def test_any_callback_body_is_observed_quarantined_or_refused(self, tmp_path: Path, count: int) -> None:
        """The receiver never answers 5xx, and never stores a status that the adapter did not parse."""
        vectors = [vector for vector in self.vectors().values() if vector["door"] != "create"]
        task_id = vectors[0]["task_id"]
        adapter = self.adapters()[0]
        ring = KeyRing.read(f"test:{KEY}")
        verifier = Verifier(ring, {adapter.name: VendorCheck(adapter, (), "never")})
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
                Task(id, adapter.name, TaskStatus.SUBMITTED, now_ms, now_ms, POLL_POLICY, task_id=task_id) for id in ids
            ]
            await asyncio.gather(*(ledger.reserve(blank) for blank in blanks))
            pairs = list(zip(blanks, bodies, strict=True))
            await asyncio.gather(*(check_on_one_connection(ledger, port, pairs[start::10]) for start in range(10)))

        async def check_on_one_connection(ledger: SqliteLedger, port: int, pairs: list[tuple[Task, bytes]]) -> None:
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
                server = listening(create_app(ledger, verifier), bound)
                await server.__aenter__()
                return server, ledger, bound.getsockname()[1]

            server, ledger, port = runner.run(start())

            # No shrinking: the assertion shows the body, and shrinking a batch of 100 takes minutes.
            phases = (hypothesis.Phase.generate,)

            @hypothesis.settings(max_examples=count // PER_EXAMPLE, database=None, phases=phases)
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


class Batch(list[bytes]):
    """Bodies that are drawn together, because each example has a fixed cost."""

    def __repr__(self) -> str:
        return f"{len(self)} bodies"


def read_bytes(adapter: Vendor, vector: Vector, body: bytes) -> Any:
    try:
        text: Any = body.decode()
    except UnicodeDecodeError:
        text = ""
    return read(adapter, vector, text)


def expected_of(adapter: Vendor, task: Task, body: bytes) -> tuple[TaskStatus, int]:
    """Return the task's expected status after a callback, and the expected HTTP status."""
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


STATUSES = ["succeeded", "succeed", "failed", "completed", "TASK_STATUS_SUCCEED", "cancelled", "processing"]
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(STATUSES),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)


def bodies_like(vectors: list[Vector]) -> st.SearchStrategy[bytes]:
    """Draw mutations of the vectors' bodies, with one value replaced or removed, and random bodies."""
    originals = [(vector["body"], list(paths_in(vector["body"]))) for vector in vectors]
    originals = [(body, paths) for body, paths in originals if paths]

    def mutate(drawn: tuple[tuple[Any, list[Any]], int, Any, bool]) -> bytes:
        (body, paths), at, value, is_removed = drawn
        path = paths[at % len(paths)]
        changed = mutated(body, path, lambda holder, key: holder.pop(key) if is_removed else put(value)(holder, key))
        try:
            return json.dumps(changed).encode()
        except UnicodeEncodeError:
            return b"{}"

    similar = st.tuples(st.sampled_from(originals), st.integers(0, 60), VALUES, st.booleans()).map(mutate)
    return st.one_of(
        similar, similar, similar, st.binary(max_size=60), VALUES.map(lambda value: json.dumps(value).encode())
    )
