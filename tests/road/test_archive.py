"""The archive destination, end to end: results are copied before their URLs expire."""

import asyncio
import hashlib
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import boto3
import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from receiver.destinations import open_destination
from receiver.hook import Hook
from submitter.errors import InvalidSettings
from submitter.ledger.base import Delivery
from submitter.media.download import CannotFetch, download
from submitter.sandbox.server import free_socket, listening
from submitter.task import TaskStatus
from tests.torture.proxy import FaultyProxy, Treatment
from tests.world import World


def archive_to(world: World, url: str, more_settings: str = "") -> None:
    """Add an archive hook with three attempts to the world's hooks."""
    world.hooks += f'[[hook]]\nname = "archive"\nurl = "archive:{url}"\nschedule = [0, 0.1, 0.1]\n{more_settings}'


async def test_a_result_is_copied_and_the_copy_emits_task_archived(world: World, tmp_path: Path) -> None:
    archive_to(world, str(tmp_path / "results"))
    await world.start()
    task = await world.submitter.submit(world.request(watermark=True))
    await task.result(timeout=60)
    await world.inbox.until(4)
    *_, archived = world.inbox.events
    assert (archived["type"], archived["sequence"]) == ("task.archived", "0000000004")
    assert archived["data"]["status"] == "succeed"
    (video,) = archived["data"]["videos"]
    for name in ("", "watermark_"):
        copy = Path(unquote(urlsplit(video[f"archived_{name}url"]).path))
        assert copy.parent == tmp_path / "results" / task.external_task_id
        assert hashlib.sha256(copy.read_bytes()).hexdigest() == video[f"archived_{name}sha256"]
    assert video["url"] != video["archived_url"]
    ended = [event for event in world.inbox.events if event["type"] == "task.succeed"]
    assert "archived_url" not in ended[0]["data"]["videos"][0]
    ledger = world.open_ledger()
    assert (await ledger.get(task.external_task_id)).status is TaskStatus.SUCCEED
    await ledger.close()


@pytest.mark.parametrize("library", ["obstore", "boto3"])
async def test_copies_are_stored_in_a_bucket_with_either_library(
    world: World, aws: str, library: str, monkeypatch: pytest.MonkeyPatch, client: httpx.AsyncClient
) -> None:
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    if library == "boto3":  # as in the package for AWS Lambda, which has no obstore
        monkeypatch.setitem(sys.modules, "obstore", None)
    s3 = boto3.client("s3")
    s3.create_bucket(Bucket=f"results-{library}")
    archive_to(world, f"s3://results-{library}/kling", 'events = ["task.succeed"]\n')
    await world.start()
    task = await world.submitter.submit(world.request())
    await task.result(timeout=60)
    await world.inbox.until(4)
    (video,) = world.inbox.events[-1]["data"]["videos"]
    key = f"kling/{task.external_task_id}/0.mp4"
    assert video["archived_url"] == f"s3://results-{library}/{key}"
    stored = s3.get_object(Bucket=f"results-{library}", Key=key)
    assert hashlib.sha256(stored["Body"].read()).hexdigest() == video["archived_sha256"]
    assert stored["ContentType"] == "video/mp4"
    s3.close()


async def test_an_expired_result_becomes_a_dead_letter_with_the_http_error(world: World, tmp_path: Path) -> None:
    archive_to(world, str(tmp_path / "results"))
    await world.start()
    world.faults(expire_s=0)
    task = await world.submitter.submit(world.request())
    await task.result(timeout=60)
    ledger = world.open_ledger()
    found: list[Delivery] = []
    while not found:
        version = ledger.version()
        found = await ledger.deliveries(hook="archive", state="dead", limit=9)
        await ledger.wait_for_change(version, 0.1)
    await ledger.close()
    assert "its URL returned HTTP" in found[0].last_error
    assert not list((tmp_path / "results").rglob("*.mp4"))


async def test_a_result_that_is_larger_than_the_limit_is_not_saved(world: World, tmp_path: Path) -> None:
    await world.start(receiver=False)
    url, target = f"{world.hook_url}/files/dance.mp4", tmp_path / "result.mp4"
    size = (world.media / "dance.mp4").stat().st_size
    with pytest.raises(CannotFetch, match="larger than"):
        await download(url, target, frozenset({"127.0.0.1"}), size - 1)
    assert list(tmp_path.glob("result*")) == []
    await download(url, target, frozenset({"127.0.0.1"}), size)
    assert target.stat().st_size == size


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        ({"content-type": "text/html; charset=utf-8"}, "a document"),
        ({"content-type": "application/problem+json"}, "a document"),
        ({"content-type": "video/mp4", "content-encoding": "gzip"}, "a compressed body"),
    ],
)
async def test_an_error_page_with_status_200_is_no_result(tmp_path: Path, headers: dict[str, str], reason: str) -> None:
    async def answer(request: Request) -> Response:
        return Response(b"<html>busy</html>", headers=headers)

    bound, url = free_socket()
    async with listening(Starlette(routes=[Route("/v.mp4", answer)]), bound):
        with pytest.raises(CannotFetch, match=reason):
            await download(f"{url}/v.mp4", tmp_path / "result.mp4", frozenset({"127.0.0.1"}))
    assert list(tmp_path.glob("result*")) == []


@pytest.mark.parametrize(
    ("body", "reason"), [(b"", "an empty body"), (b"\r\n <!doctype html>", "a document"), (b'{"code": 1', "a document")]
)
async def test_an_answer_without_a_video_is_no_result_whatever_its_type_says(
    tmp_path: Path, body: bytes, reason: str
) -> None:
    async def answer(request: Request) -> Response:
        return Response(body, media_type="video/mp4")

    bound, url = free_socket()
    async with listening(Starlette(routes=[Route("/v.mp4", answer)]), bound):
        with pytest.raises(CannotFetch, match=f"its URL returned {reason}"):
            await download(f"{url}/v.mp4", tmp_path / "result.mp4", frozenset({"127.0.0.1"}))
    assert list(tmp_path.glob("result*")) == []


async def test_a_result_that_trickles_is_given_up(tmp_path: Path) -> None:
    async def trickle() -> AsyncIterator[bytes]:
        while True:
            yield b"\0"
            await asyncio.sleep(0.01)

    async def answer(request: Request) -> Response:
        return StreamingResponse(trickle(), media_type="video/mp4")

    bound, url = free_socket()
    async with listening(Starlette(routes=[Route("/v.mp4", answer)]), bound):
        with pytest.raises(CannotFetch, match=r"it did not arrive within 0\.3 s"):
            await download(f"{url}/v.mp4", tmp_path / "result.mp4", frozenset({"127.0.0.1"}), max_s=0.3)
    assert list(tmp_path.glob("result*")) == []


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("reset", "ReadError"), ("cut", "RemoteProtocolError: peer closed"), ("refuse", "(Read|Write)Error")],
)
async def test_a_connection_that_ends_too_early_gives_a_clear_reason(
    world: World, tmp_path: Path, kind: str, reason: str
) -> None:
    await world.start(receiver=False)
    async with FaultyProxy() as proxy:
        proxy.target = urlsplit(world.hook_url).port or 0
        proxy.treat(lambda: Treatment(kind, size=2000))
        with pytest.raises(CannotFetch, match=f"was not saved: {reason}"):
            await download(f"{proxy.url}/files/dance.mp4", tmp_path / "result.mp4", frozenset({"127.0.0.1"}))
    assert list(tmp_path.glob("result*")) == []


async def test_an_invalid_or_unwritable_archive_is_reported(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match="an/absolute/directory"):
        open_destination(Hook("archive", "archive:results"), frozenset())
    with pytest.raises(InvalidSettings, match="s3://bucket/prefix"):
        open_destination(Hook("archive", "archive:ftp://host/x"), frozenset())
    (tmp_path / "file").write_text("")
    blocked = open_destination(Hook("archive", f"archive:{tmp_path}/file/x"), frozenset())
    assert "NotADirectoryError" in str(await blocked.reach())
    writable = open_destination(Hook("archive", f"archive:{tmp_path}/results"), frozenset())
    assert await writable.reach() is None
