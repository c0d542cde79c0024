"""DynamoDB's API over the standard library's HTTP client, signed here (AWS Signature Version 4).

AWS's own client takes ten times as long from import to its first answer, which a function pays
at each cold start. What is asked here is a handful of JSON calls to one host, so that this is
all of it: sign, post, read, and try again what AWS asks to have tried again.

Credentials are read as in a function: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN.
Where these are not set (a profile, a container's role, an instance's), botocore finds them.
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

CONNECTIONS = 32
CONNECT_TIMEOUT_S = 3.0
ANSWER_TIMEOUT_S = 10.0
GIVE_UP_AFTER_S = 8.0
BACKOFF_S = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Before each further attempt, up to this long; the last one for all that follow."""

TRY_AGAIN = frozenset(
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
TRY_AGAIN_REASONS = frozenset({"None", "TransactionConflict", "ThrottlingError", "ProvisionedThroughputExceeded"})
"""Why a transaction may be refused that is worth making again, each of its items for one of these."""


class Refused(Exception):
    """DynamoDB's refusal of a call: its `code`, and of a transaction the reason for each item."""

    def __init__(self, code: str, message: str, reasons: list[str]) -> None:
        self.code = code
        self.reasons = reasons
        super().__init__(f"{code}: {message}"[:500])

    @property
    def is_conflict(self) -> bool:
        """Whether a condition did not hold: what was read is out of date."""
        return self.code == "ConditionalCheckFailedException" or "ConditionalCheckFailed" in self.reasons

    @property
    def is_transient(self) -> bool:
        """Whether the same call is worth making again: it came too fast, or at the same time as another."""
        return self.code in TRY_AGAIN or (bool(self.reasons) and set(self.reasons) <= TRY_AGAIN_REASONS)


class Credentials(NamedTuple):
    """What signs a request."""

    access_key: str
    secret_key: str
    token: str | None


def sign(host: str, target: str, body: bytes, region: str, credentials: Credentials, now: datetime) -> dict[str, str]:
    """Return the headers of a signed POST of `/` to DynamoDB."""
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
    """Return what finds the credentials, anew for each request: they change while a process runs."""
    if "AWS_ACCESS_KEY_ID" in environ and "AWS_SECRET_ACCESS_KEY" in environ:
        return lambda: Credentials(
            environ["AWS_ACCESS_KEY_ID"], environ["AWS_SECRET_ACCESS_KEY"], environ.get("AWS_SESSION_TOKEN")
        )
    remedy = "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; for a profile or a role: pip install 'kling-relay[aws]'."
    try:
        from botocore.session import get_session
    except ImportError as error:
        raise InvalidSettings([Problem("KLING_RELAY_LEDGER", "dynamodb", "needs AWS credentials", remedy)]) from error
    found = get_session().get_credentials()
    if found is None:
        raise InvalidSettings([Problem("KLING_RELAY_LEDGER", "dynamodb", "needs AWS credentials", remedy)])
    return lambda: Credentials(*found.get_frozen_credentials()[:3])


class DynamoClient:
    """Calls DynamoDB in threads that keep their connections."""

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

    async def call(self, operation: str, **asked: Any) -> dict[str, Any]:
        """Return the answer to a call; every call made here may be made twice.

        Raises Refused for what AWS refuses, LedgerUnavailable when no answer comes in time.
        """
        body = msgspec.json.encode(asked)
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
        """Wait before attempt number `attempt` + 2, for a part that is drawn."""
        await asyncio.sleep(BACKOFF_S[min(attempt, len(BACKOFF_S) - 1)] * self._clock.chance())

    def close(self) -> None:
        """Let the threads end and close their connections."""
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
                cast("socket.socket", connection.sock).settimeout(ANSWER_TIMEOUT_S)
            connection.request("POST", "/", body, headers)
            answer = connection.getresponse()
            status, content = answer.status, answer.read()
        except BaseException:
            connection.close()
            raise
        with self._lock:
            self._idle.append(connection)
        if status == 200:
            read: dict[str, Any] = msgspec.json.decode(content)
            return read
        raise _refusal(status, content)

    def _connect(self) -> HTTPConnection:
        if not self._is_https:
            return HTTPConnection(self._host, timeout=CONNECT_TIMEOUT_S)
        self._tls = self._tls or ssl.create_default_context()
        return HTTPSConnection(self._host, timeout=CONNECT_TIMEOUT_S, context=self._tls)


def _refusal(status: int, content: bytes) -> Refused:
    try:
        said = msgspec.json.decode(content)
        code = str(said["__type"]).rpartition("#")[2]
    except (msgspec.DecodeError, KeyError, TypeError):
        return Refused("InternalServerError" if status >= 500 else f"HTTP {status}", repr(content[:200]), [])
    message = said.get("message") or said.get("Message") or ""
    reasons = [str(reason.get("Code")) for reason in said.get("CancellationReasons", ())]
    return Refused("InternalServerError" if status >= 500 else code, message, reasons)
