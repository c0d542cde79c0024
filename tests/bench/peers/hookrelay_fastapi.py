"""Peer: hookrelay's FastAPI router stores callbacks in Redis, and its worker posts them to the hook, with retries.

Run both: `python -m tests.bench.peers.hookrelay_fastapi receive PORT` and `... work`. Of the backends that
are safe with a separate worker (PostgreSQL, Redis), Redis is the one that the other peers use too.
"""

import asyncio
import json
import os
import sys

import aiohttp
import uvicorn
import uvloop
from fastapi import FastAPI
from hookrelay import RetryPolicy, WebhookEvent, Worker
from hookrelay.backends.redis import RedisBackend
from hookrelay.fastapi import create_webhook_router
from redis.asyncio import Redis

from tests.bench.peers.standard_webhooks import is_signed, signed_headers

HOOK_URL = os.environ["HOOK_URL"]
CONCURRENCY = int(os.environ["CONCURRENCY"])
POLL_S = 0.01
"""How long an idle worker waits; hookrelay's default is 1 s."""
LEASE_S = 300.0


def backend() -> RedisBackend:
    return RedisBackend(
        Redis.from_url(os.environ["REDIS_URL"]), RetryPolicy(max_attempts=8), claim_lease_seconds=LEASE_S
    )


def callback_id(payload: dict[str, str]) -> str:
    """Return what a repeated callback is known by: the router passes the body only."""
    return f"{payload['id']}-{payload['status']}"


def app() -> FastAPI:
    """Return the receiver."""
    made = FastAPI()
    router = create_webhook_router(
        backend=backend(), source="kling", path="/kling", verify_signature=is_signed, idempotency_key=callback_id
    )
    made.include_router(router, prefix="/hooks")
    return made


async def work() -> None:
    """Run hookrelay's worker, and give back what a killed one had claimed."""
    store = backend()
    timeout = aiohttp.ClientTimeout(total=10)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=CONCURRENCY), timeout=timeout) as session:

        async def deliver(event: WebhookEvent) -> None:
            body = json.dumps(event.payload).encode()
            headers = signed_headers(callback_id(event.payload), body)
            async with session.post(HOOK_URL, data=body, headers=headers) as response:
                response.raise_for_status()

        async def reap() -> None:
            while True:
                await store.reap_stale_claims()
                await asyncio.sleep(LEASE_S / 2)

        worker = Worker(store, deliver, batch_size=CONCURRENCY, concurrency=CONCURRENCY, poll_interval=POLL_S)
        await asyncio.gather(worker.run_forever(), reap())


if __name__ == "__main__":
    if sys.argv[1] == "work":
        uvloop.run(work())
    else:
        uvicorn.run(app(), port=int(sys.argv[2]), log_level="warning", access_log=False)
