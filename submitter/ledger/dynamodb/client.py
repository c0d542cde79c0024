"""DynamoDB client: signed JSON calls to one host, from a thread pool, with retries. See `submitter.aws`."""

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from typing import Any

import msgspec

from submitter.aws import Credentials, Endpoint, NoCredentials, find_credentials
from submitter.clock import Clock
from submitter.errors import InvalidSettings, LedgerUnavailable, Problem

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


class DynamoClient:
    """Calls DynamoDB from a thread pool."""

    def __init__(self, region: str, credentials: Callable[[], Credentials], clock: Clock) -> None:
        self._endpoint = Endpoint(
            "dynamodb",
            region,
            credentials,
            clock,
            variable="DYNAMODB",
            connect_timeout_s=CONNECT_TIMEOUT_S,
            read_timeout_s=READ_TIMEOUT_S,
        )
        self._clock = clock
        self._threads = ThreadPoolExecutor(CONNECTIONS, "dynamodb")

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
            except (NoCredentials, OSError, HTTPException, msgspec.DecodeError) as error:
                reason = error
            if loop.time() > give_up_at:
                raise LedgerUnavailable(
                    f"DynamoDB at {self._endpoint.host}: {type(reason).__name__}: {reason}"
                ) from reason
            await self.back_off(attempt)
            attempt += 1

    async def back_off(self, attempt: int) -> None:
        """Sleep before retry number `attempt` (from 0), with full jitter."""
        await asyncio.sleep(BACKOFF_S[min(attempt, len(BACKOFF_S) - 1)] * self._clock.chance())

    def close(self) -> None:
        """Stop the threads and close the connections."""
        self._threads.shutdown()
        self._endpoint.close()

    def _post(self, operation: str, body: bytes) -> dict[str, Any]:
        headers = {"content-type": "application/x-amz-json-1.0", "x-amz-target": f"DynamoDB_20120810.{operation}"}
        status, content = self._endpoint.post(headers, body)
        if status == 200:
            decoded: dict[str, Any] = msgspec.json.decode(content)
            return decoded
        raise _refusal(status, content)


def open_client(region: str, clock: Clock) -> DynamoClient:
    """Return a client; raise InvalidSettings if there are no AWS credentials."""
    try:
        credentials = find_credentials(os.environ)
        credentials()
    except NoCredentials as error:
        problem = Problem("KLING_RELAY_LEDGER", "dynamodb", "needs AWS credentials", str(error))
        raise InvalidSettings([problem]) from error
    return DynamoClient(region, credentials, clock)


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
