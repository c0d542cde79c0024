"""AWS Lambda handler that submits tasks: `task.requested` events from an SQS queue or an EventBridge rule.

SQS: failures are reported per message (`ReportBatchItemFailures`), so that a failed message is
retried and finally moves to the dead letter queue. If the outcome of a create is unknown, the
message counts as processed: the ledger has the task, and the poller looks it up. EventBridge: an
event that fails raises, and Lambda retries it.

Handler: `submitter.aws_lambda.handler`. Settings come from the environment and relay.toml.
"""

import asyncio
from collections.abc import Mapping
from functools import cache
from typing import Any

from submitter.errors import RelayError, SubmissionUnknown
from submitter.log import Logger, configure
from submitter.request import MotionControl
from submitter.request_event import read_eventbridge, read_sqs
from submitter.submit import Submitter
from submitter.vendors.registry import limits_by_vendor

RESERVE_S = 3.0
"""The part of the function's time, in seconds, that is reserved for the response."""

log = Logger("submitter")


def handler(event: Mapping[str, Any], context: Any) -> dict[str, Any] | None:
    """Submit the tasks of a batch of SQS records, or the task of an EventBridge event."""
    budget_s = max(0.1, context.get_remaining_time_in_millis() / 1000 - RESERVE_S)
    return _loop().run_until_complete(_handle(event, budget_s))


async def _handle(event: Mapping[str, Any], budget_s: float) -> dict[str, Any] | None:
    if "Records" not in event:
        async with asyncio.timeout(budget_s):
            await _submit(read_eventbridge(event, limits_by_vendor()))
        return None
    records = event["Records"]
    results = await asyncio.gather(*(_submitted(record, budget_s) for record in records))
    failed = [record["messageId"] for record, submitted in zip(records, results, strict=True) if not submitted]
    return {"batchItemFailures": [{"itemIdentifier": id} for id in failed]}


async def _submitted(record: Mapping[str, Any], budget_s: float) -> bool:
    try:
        async with asyncio.timeout(budget_s):
            await _submit(read_sqs(record, limits_by_vendor()))
    except (RelayError, TimeoutError) as error:
        reason = str(error) or f"not submitted within {budget_s:.0f} s"
        log.error("request.failed", message_id=record["messageId"], reason=reason)
        return False
    return True


async def _submit(request: MotionControl) -> None:
    try:
        await _submitter().submit(request)
    except SubmissionUnknown as error:
        log.warning("request.unknown", external_task_id=request.external_task_id, reason=str(error))


@cache
def _submitter() -> Submitter:
    configure("json")
    return Submitter.from_settings()


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """Return the process's event loop: its connections are reused by later invocations."""
    return asyncio.new_event_loop()
