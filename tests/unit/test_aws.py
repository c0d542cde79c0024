"""Requests to AWS without boto3: kept-alive connections, proxies, missing credentials, error responses."""

import asyncio
import os
import subprocess
import sys

import pytest
from botocore.exceptions import ClientError

from receiver.destinations.aws import read_error
from submitter.aws import Credentials, Endpoint, NoCredentials, find_credentials
from submitter.clock import Clock
from tests.loopback import tcp_server

ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


class OneAnswerEach:
    """A server that answers one request on each connection, and then closes it without announcing it."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.closed = asyncio.Event()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        self.lines.extend(head.decode().splitlines())
        if head.startswith(b"POST"):
            await reader.readexactly(2)
            writer.write(ANSWER)
        writer.close()
        await writer.wait_closed()
        self.closed.set()


def endpoint(region: str = "eu-west-1") -> Endpoint:
    credentials = Credentials("AKID", "secret", None)
    return Endpoint("sqs", region, lambda: credentials, Clock(), variable="SQS", connect_timeout_s=5, read_timeout_s=5)


async def test_a_kept_connection_that_the_server_closed_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    server = OneAnswerEach()
    async with tcp_server(server.answer) as port:
        monkeypatch.setenv("AWS_ENDPOINT_URL_SQS", f"http://127.0.0.1:{port}")
        opened = endpoint()
        for _ in range(3):
            server.closed.clear()
            assert await asyncio.to_thread(opened.post, {}, b"{}") == (200, b"ok")
            await server.closed.wait()
        opened.close()
    assert sum(line.startswith("POST") for line in server.lines) == 3


async def test_a_proxy_of_the_environment_is_used_with_its_login(monkeypatch: pytest.MonkeyPatch) -> None:
    server = OneAnswerEach()
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_SQS", "NO_PROXY", "no_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    async with tcp_server(server.answer) as port:
        monkeypatch.setenv("HTTPS_PROXY", f"http://me:p%40ss@127.0.0.1:{port}")
        with pytest.raises(ConnectionError):  # it refuses the tunnel
            await asyncio.to_thread(endpoint().post, {}, b"{}")
    assert server.lines[0].startswith("CONNECT sqs.eu-west-1.amazonaws.com:443 ")
    assert "Proxy-Authorization: Basic bWU6cEBzcw==" in server.lines


@pytest.mark.parametrize(
    ("region", "host"),
    [("eu-west-1", "sqs.eu-west-1.amazonaws.com"), ("cn-north-1", "sqs.cn-north-1.amazonaws.com.cn")],
)
def test_the_host_is_that_of_the_region(region: str, host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_SQS"):
        monkeypatch.delenv(name, raising=False)
    assert endpoint(region).host == host


SCRIPT = """
import sys
if "without" in sys.argv: sys.modules["botocore"] = sys.modules["boto3"] = None
from receiver.destinations import open_destination
from receiver.hook import Hook
from submitter.errors import InvalidSettings
for url in ("sqs://q", "sns://arn:aws:sns:eu-west-1:123456789012:t", "kinesis://s", "eventbridge://b"):
    try:
        open_destination(Hook("bus", url), frozenset())
    except InvalidSettings as error:
        print(error)
print(sorted({"boto3", "botocore"} & {name for name, module in sys.modules.items() if module}))
"""


@pytest.mark.parametrize(
    ("arguments", "environ", "expected"),
    [
        (["without"], {}, "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; for a profile or a role: pip install"),
        ([], {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}, "[]"),
        ([], {}, "['botocore']"),
    ],
)
def test_botocore_is_loaded_only_to_find_credentials(
    arguments: list[str], environ: dict[str, str], expected: str
) -> None:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        env=inherited | environ | {"AWS_REGION": "eu-west-1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert expected in ran.stdout


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"__type": "com.amazonaws.sqs#QueueDoesNotExist", "message": "no queue"}', "QueueDoesNotExist: no queue"),
        (b'{"__type": "AccessDenied", "Message": "no"}', "AccessDenied: no"),
        (b"<E><Error><Code>NotFound</Code><Message>no topic</Message></Error></E>", "NotFound: no topic"),
        (b"<html>bad gateway</html>", "HTTP 502: <html>bad gateway</html>"),
        (b"[]", "HTTP 502: []"),
    ],
)
def test_an_error_response_is_read_in_every_format(content: bytes, expected: str) -> None:
    assert read_error(502, content) == expected


def test_an_empty_variable_of_the_environment_is_no_credential(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, "/nonexistent")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    assert find_credentials(keys | {"AWS_SESSION_TOKEN": ""})() == Credentials("a", "b", None)
    with pytest.raises(NoCredentials):
        find_credentials(keys | {"AWS_ACCESS_KEY_ID": ""})()


def test_a_role_that_may_not_be_assumed_is_missing_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    class Denied:
        def get_credentials(self) -> None:
            raise ClientError({"Error": {"Code": "AccessDenied", "Message": "not authorized"}}, "AssumeRole")

    monkeypatch.setattr("botocore.session.get_session", Denied)
    with pytest.raises(NoCredentials, match="not authorized"):
        find_credentials({})()
