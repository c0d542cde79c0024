"""In-process HTTP server: runs an ASGI app on loopback, for the demo and the tests."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import uvicorn


def free_socket(host: str = "127.0.0.1", port: int = 0) -> tuple[socket.socket, str]:
    """Return a bound socket (port 0: any free port) and its URL."""
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind((host, port))
    return bound, f"http://{host}:{bound.getsockname()[1]}"


def listening(app: Any, bound: socket.socket) -> AbstractAsyncContextManager[None]:
    """Serve `app` on the socket `bound` while the block runs, then close it."""
    return all_listening((app, bound))


@asynccontextmanager
async def all_listening(*apps: tuple[Any, socket.socket]) -> AsyncIterator[None]:
    """Serve each app on its socket while the block runs, then stop all of them together."""
    servers = [
        uvicorn.Server(
            uvicorn.Config(app, log_level="error", lifespan="on", timeout_keep_alive=75, timeout_graceful_shutdown=1)
        )
        for app, _ in apps
    ]
    serving = [
        asyncio.create_task(server.serve(sockets=[bound])) for server, (_, bound) in zip(servers, apps, strict=True)
    ]
    try:
        while not all(server.started for server in servers):
            if any(task.done() for task in serving):
                raise RuntimeError("a server did not start")
            await asyncio.sleep(0.005)
        yield
    finally:
        for server in servers:
            server.should_exit = True
        await asyncio.gather(*serving)
        for _, bound in apps:
            bound.close()
