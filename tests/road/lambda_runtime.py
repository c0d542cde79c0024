"""A stand-in for AWS Lambda's Runtime API, used by AWS's own runtime client (awslambdaric)."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from submitter.clock import Clock
from submitter.sandbox.server import free_socket, listening

VECTORS = Path(__file__).parents[1] / "vectors" / "aws"
ROOT = Path(__file__).parents[2]
TIMEOUT_S = 30.0


class InvocationFailed(Exception):
    """The function raised an error; `report` is the runtime client's report of it."""

    def __init__(self, report: dict[str, Any]) -> None:
        self.report = report
        super().__init__(f"{report.get('errorType')}: {report.get('errorMessage')}")


class LambdaRuntime:
    """Sends one event at a time to a function in a separate process, as Lambda does; see `invoke`."""

    def __init__(self) -> None:
        self._events: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._ends: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue()
        self.timeout_s = TIMEOUT_S

    def app(self) -> Starlette:
        """Return the Runtime API, version 2018-06-01."""
        root = "/2018-06-01/runtime"
        return Starlette(
            routes=[
                Route(f"{root}/invocation/next", self._next),
                Route(f"{root}/invocation/{{id}}/{{end}}", self._end, methods=["POST"]),
                Route(f"{root}/init/error", self._end, methods=["POST"]),
            ]
        )

    async def _next(self, request: Request) -> Response:
        event = await self._events.get()
        if event is None:
            return Response(status_code=410)
        deadline_ms = Clock().now_ms() + int(self.timeout_s * 1000)
        headers = {
            "lambda-runtime-aws-request-id": "8476a536-e9f4-11e8-9739-2dfe598c3fcd",
            "lambda-runtime-deadline-ms": str(deadline_ms),
            "lambda-runtime-invoked-function-arn": "arn:aws:lambda:us-east-1:123456789012:function:relay",
            "lambda-runtime-trace-id": "Root=1-5bef4de7-ad49b0e87f6ef6c87fc2e700;Parent=9a9197af755a6419;Sampled=1",
        }
        return Response(event, headers=headers, media_type="application/json")

    async def _end(self, request: Request) -> Response:
        await self._ends.put((request.path_params.get("end", "error"), await request.body()))
        return Response(status_code=202)

    def end(self) -> None:
        """Stop a function that waits for an event."""
        self._events.put_nowait(None)

    async def invoke(self, event: Mapping[str, Any]) -> Any:
        """Return the function's response to an event; raise InvocationFailed."""
        await self._events.put(msgspec.json.encode(event))
        async with asyncio.timeout(TIMEOUT_S + 10):
            end, body = await self._ends.get()
        answer = msgspec.json.decode(body)
        if end == "error":
            raise InvocationFailed(answer)
        return answer


@asynccontextmanager
async def lambda_function(
    handler: str,
    environ: Mapping[str, str],
    folder: Path,
    *,
    python: Sequence[str] = (sys.executable,),
    task: Path = ROOT,
) -> AsyncIterator[LambdaRuntime]:
    """Run a function, `module.name` below `task`, under the runtime client while the block runs."""
    runtime, (bound, url) = LambdaRuntime(), free_socket()
    inherited = {name: value for name, value in os.environ.items() if name.startswith(("PATH", "AWS_", "PYTHON"))}
    of_lambda = {"AWS_LAMBDA_RUNTIME_API": url.removeprefix("http://"), "LAMBDA_TASK_ROOT": str(task)}
    async with listening(runtime.app(), bound):
        with (folder / "function.log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *python,
                "-m",
                "awslambdaric",
                handler,
                env={**inherited, **of_lambda, **environ},
                cwd=task,
                stdout=log,
                stderr=log,
            )
            try:
                yield runtime
            finally:
                process.kill()
                await process.wait()
                runtime.end()


def aws_event(name: str, **changes: Any) -> Any:
    """Return the event of a test vector, with its placeholders (in capitals) replaced by `changes`."""

    def fill(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: fill(one) for key, one in value.items()}
        if isinstance(value, list):
            return [fill(one) for one in value]
        if isinstance(value, str):
            for mark, change in changes.items():
                if value == mark:
                    return change
                if isinstance(change, str):
                    value = value.replace(mark, change)
        return value

    return fill(msgspec.json.decode((VECTORS / f"{name}.json").read_bytes())["event"])


def answer_of(response: Mapping[str, Any]) -> httpx.Response:
    """Return a function's HTTP response as its client sees it."""
    lists = response.get("multiValueHeaders", {})
    headers = response.get("headers") or [(name, value) for name, values in lists.items() for value in values]
    assert response["isBase64Encoded"] is False
    return httpx.Response(response["statusCode"], headers=headers, text=response["body"])
