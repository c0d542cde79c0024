"""Submits on AWS Lambda: `task.requested` from an SQS queue or an EventBridge rule becomes a task.

Of a queue's batch each message has an end of its own (`ReportBatchItemFailures`): what failed
stays in the queue, and goes to its dead letter queue in the end. A task whose creation nobody knows
of is in the ledger and looked for there: its message is done. An event that EventBridge sends
fails as a whole, and Lambda sends it again.

Handler: `submitter.aws_lambda.handler`. Settings come from the environment, as anywhere.
"""

import asyncio
from collections.abc import Mapping, MutableMapping
from functools import cache
from typing import Any

import structlog

from submitter.callback_url import redact
from submitter.errors import RelayError, SubmissionUnknown
from submitter.request import MotionControl
from submitter.requested import read_eventbridge, read_sqs
from submitter.submit import Submitter

LEFT_S = 3.0
"""Left of a function's time, to answer in."""

log = structlog.get_logger("submitter")


def handler(event: Mapping[str, Any], context: Any) -> dict[str, Any] | None:
    """Submit what a batch of SQS records, or an EventBridge event, asks for."""
    budget_s = max(0.1, context.get_remaining_time_in_millis() / 1000 - LEFT_S)
    return _loop().run_until_complete(_handle(event, budget_s))


async def _handle(event: Mapping[str, Any], budget_s: float) -> dict[str, Any] | None:
    if "Records" not in event:
        async with asyncio.timeout(budget_s):
            await _submit(read_eventbridge(event))
        return None
    records = event["Records"]
    results = await asyncio.gather(*(_is_done(record, budget_s) for record in records))
    failed = [record["messageId"] for record, is_done in zip(records, results, strict=True) if not is_done]
    return {"batchItemFailures": [{"itemIdentifier": id} for id in failed]}


async def _is_done(record: Mapping[str, Any], budget_s: float) -> bool:
    try:
        async with asyncio.timeout(budget_s):
            await _submit(read_sqs(record))
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
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            _redact,
            structlog.processors.JSONRenderer(),
        ]
    )
    return Submitter.from_settings()


def _redact(logger: Any, name: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    return {key: redact(value) if isinstance(value, str) else value for key, value in event.items()}


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """One loop for the process: connections live on from one invocation to the next."""
    return asyncio.new_event_loop()
