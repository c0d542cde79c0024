"""DynamoDB client on the standard library's HTTP client, with AWS Signature Version 4 and retries.

boto3 takes ten times as long from import to its first response, and a Lambda function pays that at
each cold start. The ledger needs only a few JSON calls to one host: sign, post, read, retry.

Credentials come from AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, as in a Lambda
function. If these are not set (a profile, a container's or an instance's role), botocore finds them.
"""

import asyncio
import hashlib
import hmac
import socket
import ssl
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any, NamedTuple, cast
from urllib.parse import urlsplit

import msgspec

from submitter.clock import Clock
from submitter.errors import InvalidSettings, LedgerUnavailable, Problem
from submitter.extras import install_command

CONNECTIONS = 32
CONNECT_TIMEOUT_S = 3.0
READ_TIMEOUT_S = 10.0
GIVE_UP_AFTER_S = 8.0
BACKOFF_S = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Exponential backoff: the longest delay before each retry; the last one repeats."""

RETRYABLE_CODES = frozenset(
    {
        "ProvisionedThroughputExceededException",
        "ThrottlingException",
        "RequestLimitExceeded",
        "InternalServerError",
        "InternalFailure",
        "ServiceUnavailable",
        "TransactionConflictException",
        "TransactionInProgressException",
        "ReplicatedWriteConflictException",
    }
)
RETRYABLE_REASONS = frozenset({"None", "TransactionConflict", "ThrottlingError", "ProvisionedThroughputExceeded"})
"""A cancelled transaction is retried if every item's cancellation reason is one of these."""


class Refused(Exception):
    """An error response of DynamoDB: its `code`, and a cancelled transaction's reason for each item."""

    def __init__(self, code: str, message: str, reasons: list[str]) -> None:
        self.code = code
        self.reasons = reasons
        super().__init__(f"{code}: {message}"[:500])

    @property
    def is_conflict(self) -> bool:
        """Whether a conditional write failed: the item changed since it was read."""
        return self.code == "ConditionalCheckFailedException" or "ConditionalCheckFailed" in self.reasons

    @property
    def is_transient(self) -> bool:
        """Whether a retry can succeed: throttling, a transaction conflict, or a server error."""
        return self.code in RETRYABLE_CODES or (bool(self.reasons) and set(self.reasons) <= RETRYABLE_REASONS)


class Credentials(NamedTuple):
    """AWS credentials; `token` is the session token of temporary ones."""

    access_key: str
    secret_key: str
    token: str | None


def sign(host: str, target: str, body: bytes, region: str, credentials: Credentials, now: datetime) -> dict[str, str]:
    """Return the headers of a POST to `/` at DynamoDB, signed with AWS Signature Version 4."""
    stamp, day = now.strftime("%Y%m%dT%H%M%SZ"), now.strftime("%Y%m%d")
    headers = {"content-type": "application/x-amz-json-1.0", "host": host, "x-amz-date": stamp}
    if credentials.token is not None:
        headers["x-amz-security-token"] = credentials.token
    headers["x-amz-target"] = target
    signed = ";".join(headers)
    listed = "".join(f"{name}:{value}\n" for name, value in headers.items())
    canonical = f"POST\n/\n\n{listed}\n{signed}\n{hashlib.sha256(body).hexdigest()}"
    scope = f"{day}/{region}/dynamodb/aws4_request"
    text = f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{hashlib.sha256(canonical.encode()).hexdigest()}"
    key = b"AWS4" + credentials.secret_key.encode()
    for part in (day, region, "dynamodb", "aws4_request"):
        key = hmac.digest(key, part.encode(), "sha256")
    signature = hmac.digest(key, text.encode(), "sha256").hex()
    headers["authorization"] = (
        f"AWS4-HMAC-SHA256 Credential={credentials.access_key}/{scope}, SignedHeaders={signed}, Signature={signature}"
    )
    return headers


def find_credentials(environ: Mapping[str, str]) -> Callable[[], Credentials]:
    """Return a function that returns the current credentials: they may change while a process runs.

    Raises InvalidSettings if there are none.
    """
    if "AWS_ACCESS_KEY_ID" in environ and "AWS_SECRET_ACCESS_KEY" in environ:
        return lambda: Credentials(
            environ["AWS_ACCESS_KEY_ID"], environ["AWS_SECRET_ACCESS_KEY"], environ.get("AWS_SESSION_TOKEN")
        )
    remedy = f"Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; for a profile or a role: {install_command('aws')}."
    try:
        from botocore.session import get_session
    except ImportError as error:
        raise InvalidSettings([Problem("KLING_RELAY_LEDGER", "dynamodb", "needs AWS credentials", remedy)]) from error
    found = get_session().get_credentials()
    if found is None:
        raise InvalidSettings([Problem("KLING_RELAY_LEDGER", "dynamodb", "needs AWS credentials", remedy)])
    return lambda: Credentials(*found.get_frozen_credentials()[:3])


class DynamoClient:
    """Calls DynamoDB from a thread pool, over kept-alive connections."""

    def __init__(self, region: str, endpoint: str | None, credentials: Callable[[], Credentials], clock: Clock) -> None:
        suffix = "amazonaws.com.cn" if region.startswith("cn-") else "amazonaws.com"
        url = urlsplit(endpoint or f"https://dynamodb.{region}.{suffix}")
        self._host = url.netloc
        self._is_https = url.scheme == "https"
        self._region = region
        self._credentials = credentials
        self._clock = clock
        self._threads = ThreadPoolExecutor(CONNECTIONS, "dynamodb")
        self._idle: list[HTTPConnection] = []
        self._tls: ssl.SSLContext | None = None
        self._lock = threading.Lock()

    async def call(self, operation: str, **parameters: Any) -> dict[str, Any]:
        """Return the response to a call. A retry may execute it twice: it must be safe to repeat.

        Raises Refused for an error that is not transient, LedgerUnavailable after GIVE_UP_AFTER_S.
        """
        body = msgspec.json.encode(parameters)
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + GIVE_UP_AFTER_S
        attempt = 0
        while True:
            try:
                return await loop.run_in_executor(self._threads, self._post, operation, body)
            except Refused as error:
                if not error.is_transient:
                    raise
                reason: Exception = error
            except (OSError, HTTPException, msgspec.DecodeError) as error:
                reason = error
            if loop.time() > give_up_at:
                raise LedgerUnavailable(f"DynamoDB at {self._host}: {type(reason).__name__}: {reason}") from reason
            await self.back_off(attempt)
            attempt += 1

    async def back_off(self, attempt: int) -> None:
        """Sleep before retry number `attempt` (from 0), with full jitter."""
        await asyncio.sleep(BACKOFF_S[min(attempt, len(BACKOFF_S) - 1)] * self._clock.chance())

    def close(self) -> None:
        """Stop the threads and close the connections."""
        self._threads.shutdown()
        for connection in self._idle:
            connection.close()

    def _post(self, operation: str, body: bytes) -> dict[str, Any]:
        with self._lock:
            connection = self._idle.pop() if self._idle else self._connect()
        now = datetime.fromtimestamp(self._clock.now_s(), UTC)
        headers = sign(self._host, f"DynamoDB_20120810.{operation}", body, self._region, self._credentials(), now)
        try:
            if connection.sock is None:
                connection.connect()
                cast("socket.socket", connection.sock).settimeout(READ_TIMEOUT_S)
            connection.request("POST", "/", body, headers)
            response = connection.getresponse()
            status, content = response.status, response.read()
        except BaseException:
            connection.close()
            raise
        with self._lock:
            self._idle.append(connection)
        if status == 200:
            decoded: dict[str, Any] = msgspec.json.decode(content)
            return decoded
        raise _refusal(status, content)

    def _connect(self) -> HTTPConnection:
        if not self._is_https:
            return HTTPConnection(self._host, timeout=CONNECT_TIMEOUT_S)
        self._tls = self._tls or ssl.create_default_context()
        return HTTPSConnection(self._host, timeout=CONNECT_TIMEOUT_S, context=self._tls)


def _refusal(status: int, content: bytes) -> Refused:
    """Return the error in a response; every 5xx counts as InternalServerError, which is retried."""
    try:
        error = msgspec.json.decode(content)
        code = str(error["__type"]).rpartition("#")[2]
    except (msgspec.DecodeError, KeyError, TypeError):
        return Refused("InternalServerError" if status >= 500 else f"HTTP {status}", repr(content[:200]), [])
    message = error.get("message") or error.get("Message") or ""
    reasons = [str(reason.get("Code")) for reason in error.get("CancellationReasons", ())]
    return Refused("InternalServerError" if status >= 500 else code, message, reasons)
