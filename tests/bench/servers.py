"""The HTTP servers that the benchmark compares, each in its own process.

Run one with `python -m tests.bench.servers NAME PORT DIRECTORY`.
"""

import asyncio
import base64
import hmac
import os
import sqlite3
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from receiver.http_limits import Front, bounded_protocol
from submitter.callback_url import KeyRing, callback_url
from submitter.task import Task, TaskStatus
from submitter.vendors.kling.protocol import POLL_POLICY

KEY = base64.b64encode(b"k" * 32).decode()
WEBHOOK_KEY = b"w" * 32
WEBHOOK = base64.b64encode(WEBHOOK_KEY).decode()
FIRST_ID = 893605946402811985
"""The vendor's id of the task with number 0."""


def bare() -> Starlette:
    """Return the baseline: a bare Starlette route that reads the body and answers."""

    async def endpoint(request: Request) -> Response:
        await request.body()
        return Response(headers={"kling-relay-result": "applied"})

    return Starlette(routes=[Route("/callbacks/{vendor}/{id}/{token}", endpoint, methods=["POST"])])


def transaction(directory: Path) -> Starlette:
    """Return a naive receiver: each body is stored in a separate fsynced transaction, in a thread."""
    db = sqlite3.connect(directory / "plain.db", isolation_level=None, check_same_thread=False)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    db.execute("CREATE TABLE IF NOT EXISTS callbacks (id TEXT PRIMARY KEY, body BLOB)")
    executor = ThreadPoolExecutor(1)

    def store(id: str, body: bytes) -> None:
        db.execute("BEGIN IMMEDIATE")
        db.execute("INSERT OR REPLACE INTO callbacks VALUES (?, ?)", (id, body))
        db.execute("COMMIT")

    async def endpoint(request: Request) -> Response:
        body = await request.body()
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(executor, store, request.path_params["id"], body)
        return Response(headers={"kling-relay-result": "applied"})

    return Starlette(routes=[Route("/callbacks/{vendor}/{id}/{token}", endpoint, methods=["POST"])])


def receiver(directory: Path) -> Any:
    """Return the receiver's app with verification, logging and its worker; `main` adds the bounds of `serve`."""
    from receiver import service

    os.environ.update(environment(directory), KLING_RELAY_LOG="json")
    return service.app()


def sink(directory: Path) -> Starlette:
    """Return a hook's endpoint that appends each body to a file as a line, unbuffered, then answers."""
    file = (directory / "events.jsonl").open("ab", buffering=0)

    async def endpoint(request: Request) -> Response:
        file.write(await request.body() + b"\n")
        return Response(status_code=204)

    return Starlette(routes=[Route("/events", endpoint, methods=["POST"])])


def environment(directory: Path) -> dict[str, str]:
    """Return the receiver's settings as environment variables."""
    config = directory / "relay.toml"
    if not config.exists():
        config.write_text("")
    return {
        "KLING_RELAY_CONFIG": str(config),
        "KLING_RELAY_LEDGER": os.environ.get("BENCH_LEDGER", f"sqlite:///{directory / 'relay.db'}"),
        "KLING_RELAY_KEYS": f"bench:{KEY}",
        "KLING_RELAY_ALLOW_HOSTS": "127.0.0.1",
        "KLING_WEBHOOK_SECRET": f"whsec_{WEBHOOK}",
        "HOOK_SECRET": f"whsec_{WEBHOOK}",
    }


def fill(path: Path, prefix: str, count: int, status: TaskStatus = TaskStatus.SUBMITTED) -> None:
    """Create `count` tasks in the SQLite ledger at `path`, submitted or (with another `status`) ended."""
    from submitter.ledger.sqlite.ledger import SqliteLedger, _columns

    ledger = SqliteLedger(path)
    db = sqlite3.connect(path, isolation_level=None)
    now_ms = time.time_ns() // 1_000_000
    db.execute("BEGIN IMMEDIATE")
    for i in range(count):
        task = Task(
            external_task_id=f"{prefix}-{i}",
            vendor="kling",
            status=status,
            created_at_ms=now_ms,
            updated_at_ms=now_ms,
            poll_policy=POLL_POLICY,
            task_id=str(FIRST_ID + i),
            sequence=1,
            poll_at_ms=now_ms + 900_000 if status is TaskStatus.SUBMITTED else None,
            request={"image": "https://example.com/girl.png", "video": "https://example.com/dance.mp4"},
            metadata={"order": str(i)},
        )
        id, status_value, is_open, poll_at_ms, doc = _columns(task)
        db.execute(
            "INSERT INTO tasks (external_task_id, vendor, status, is_open, created_at_ms, poll_at_ms, doc)"
            " VALUES (?, 'kling', ?, ?, ?, ?, ?)",
            (id, status_value, is_open, now_ms, poll_at_ms, doc),
        )
    db.execute("COMMIT")
    db.close()
    asyncio.run(ledger.close())


def callbacks(prefix: str, count: int, first: int = 0) -> list[bytes]:
    """Return signed callback requests: `processing` for each task, then `succeeded` for each."""
    ring = KeyRing.read(f"bench:{KEY}")
    numbers = range(first, first + count)
    return [callback(prefix, n, status, ring, WEBHOOK_KEY) for status in ("processing", "succeeded") for n in numbers]


def callback(prefix: str, number: int, status: str, ring: KeyRing, secret: bytes) -> bytes:
    """Return one callback request of Kling, with its URL signed by `ring` and its body by `secret`."""
    now_s = time.time()
    timestamp = str(int(now_s))
    body = callback_body(prefix, number, status, now_s)
    id = str(FIRST_ID + number)
    signed = f"{id}-{status}.{timestamp}.".encode() + body
    signature = base64.b64encode(hmac.digest(secret, signed, "sha256")).decode()
    path = callback_url("", ring, "kling", f"{prefix}-{number}", now_s)
    head = (
        f"POST {path} HTTP/1.1\r\nhost: relay\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nwebhook-id: {id}-{status}\r\nwebhook-timestamp: {timestamp}\r\n"
        f"webhook-signature: v1,{signature}\r\n\r\n"
    )
    return head.encode() + body


def callback_body(prefix: str, number: int, status: str, now_s: float) -> bytes:
    """Return the body of Kling's callback about a task."""
    id, now_ms = str(FIRST_ID + number), int(now_s * 1000)
    task: dict[str, object] = {
        "id": id,
        "status": status,
        "message": "",
        "create_time": now_ms,
        "update_time": now_ms + 1,
        "external_id": f"{prefix}-{number}",
        "outputs": [],
        "billing": [],
    }
    if status == "succeeded":
        url = f"https://cdn.example.com/{id}.mp4?signature=0123456789abcdef0123456789abcdef"
        task["outputs"] = [{"type": "video", "id": id, "url": url, "duration": "5.041"}]
        task["billing"] = [{"charge_type": "unit", "amount": "4.5", "package_type": "video"}]
    return msgspec.json.encode(task)


def main() -> None:
    """Run the server that the command line names."""
    name, port, directory = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    factories = {"transaction": transaction, "receiver": receiver, "unbounded": receiver, "sink": sink}
    app: Any = bare() if name == "bare" else factories[name](directory)
    http: Any = bounded_protocol(Front()) if name == "receiver" else "auto"
    uvicorn.run(
        app,
        host="127.0.0.1",
        port=port,
        http=http,
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
    )


if __name__ == "__main__":
    main()
