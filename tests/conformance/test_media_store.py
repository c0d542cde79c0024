"""Media stores: an S3 bucket with presigned URLs, a directory that the receiver publishes, and invalid stores."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from moto.server import ThreadedMotoServer

from submitter.callback_url import KeyRing
from submitter.clock import Clock
from submitter.errors import InvalidSettings
from submitter.media.store import open_media_store
from tests.world import KEY

RING = KeyRing.read(f"test:{KEY}")


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A stand-in for S3 with the bucket `media`. Its credentials are in the environment, as AWS's tools expect."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    for name, value in {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ALLOW_HTTP": "true",
    }.items():
        monkeypatch.setenv(name, value)
    httpx.put(f"{endpoint}/media", trust_env=False).raise_for_status()
    yield "s3://media/kling"
    server.stop()


async def test_a_bucket_returns_a_presigned_url_and_stores_a_file_once(
    s3: str, tmp_path: Path, client: httpx.AsyncClient
) -> None:
    video = tmp_path / "dance.mp4"
    video.write_bytes(b"a video")
    store = open_media_store(s3, public_url=None, ring=None, clock=Clock())
    url = await store.publish(video, "abc", "mp4")
    assert "X-Amz-Signature=" in url
    downloaded = await client.get(url)
    assert (downloaded.content, downloaded.headers["content-type"]) == (b"a video", "video/mp4")
    video.write_bytes(b"never uploaded: its digest is already stored")
    again = await store.publish(video, "abc", "mp4")
    assert (await client.get(again)).content == b"a video"


async def test_an_unwritable_store_is_an_invalid_setting_with_a_remedy(s3: str, tmp_path: Path) -> None:
    video = tmp_path / "dance.mp4"
    video.write_bytes(b"a video")
    missing = open_media_store("s3://no-such-bucket", public_url=None, ring=None, clock=Clock())
    with pytest.raises(InvalidSettings, match="Check the bucket"):
        await missing.publish(video, "abc", "mp4")
    (tmp_path / "a-file").write_text("")
    blocked = open_media_store(str(tmp_path / "a-file" / "x"), public_url="https://x", ring=RING, clock=Clock())
    with pytest.raises(InvalidSettings, match="writable"):
        await blocked.publish(video, "abc", "mp4")


def test_a_directory_requires_a_public_url(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match="KLING_RELAY_PUBLIC_URL"):
        open_media_store(str(tmp_path), public_url=None, ring=RING, clock=Clock())


@pytest.mark.parametrize("url", ["ftp://x/y", "s3://", "nothing://bucket"])
def test_an_invalid_store_url_is_an_invalid_setting_with_a_remedy(url: str) -> None:
    with pytest.raises(InvalidSettings, match="s3://bucket/prefix"):
        open_media_store(url, public_url="https://x", ring=RING, clock=Clock())
