"""Peer: FastAPI verifies a callback and enqueues it in arq (Redis); arq's worker posts it to the hook, with retries.

Run both: `python -m tests.bench.peers.fastapi_arq receive PORT` and `... work`. arq knows a callback that comes again
by its job id, for as long as it keeps the result (an hour).
"""

import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import uvicorn
import uvloop
from arq import Retry, create_pool
from arq.connections import RedisSettings
from arq.worker import Worker
from fastapi import FastAPI, Request, Response

from tests.bench.peers.standard_webhooks import is_signed, signed_headers

REDIS = RedisSettings.from_dsn(os.environ["REDIS_URL"])
HOOK_URL = os.environ["HOOK_URL"]
CONCURRENCY = int(os.environ["CONCURRENCY"])
POLL_S = 0.01
"""arq polls for jobs and starts at most CONCURRENCY of them each time: with its default of 0.5 s, 100 a second."""


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    app.state.redis = await create_pool(REDIS)
    yield
    await app.state.redis.aclose()


app = FastAPI(lifespan=lifespan)


@app.post("/hooks/kling")
async def receive(request: Request) -> Response:
    """Answer 200 once Redis has the callback."""
    body = await request.body()
    if not is_signed(body, request.headers):
        return Response(status_code=401)
    id = request.headers["webhook-id"]
    await app.state.redis.enqueue_job("deliver", id, body, _job_id=id)
    return Response()


async def deliver(ctx: dict[str, Any], id: str, body: bytes) -> None:
    """Post a callback to the hook; try again with exponential backoff."""
    try:
        async with ctx["http"].post(HOOK_URL, data=body, headers=signed_headers(id, body)) as response:
            if response.status < 300:
                return
    except (aiohttp.ClientError, TimeoutError) as error:
        raise Retry(2 ** ctx["job_try"]) from error
    raise Retry(2 ** ctx["job_try"])


async def work() -> None:
    """Run arq's worker until it is terminated."""
    timeout = aiohttp.ClientTimeout(total=10)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=CONCURRENCY), timeout=timeout) as session:
        worker = Worker(
            [deliver],
            redis_settings=REDIS,
            ctx={"http": session},
            max_jobs=CONCURRENCY,
            max_tries=8,
            poll_delay=POLL_S,
        )
        await worker.async_run()


if __name__ == "__main__":
    if sys.argv[1] == "work":
        uvloop.run(work())
    else:
        uvicorn.run(app, port=int(sys.argv[2]), log_level="warning", access_log=False)
