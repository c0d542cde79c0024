"""Runs an ASGI app on loopback inside this process, for the demo and the tests."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn


def free_socket(host: str = "127.0.0.1", port: int = 0) -> tuple[socket.socket, str]:
    """Return a bound socket and the URL that it will be reached by."""
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind((host, port))
    return bound, f"http://{host}:{bound.getsockname()[1]}"


@asynccontextmanager
async def listening(app: Any, bound: socket.socket) -> AsyncIterator[None]:
    """Serve `app` on `bound` while the block runs."""
    config = uvicorn.Config(app, log_level="error", lifespan="on", timeout_keep_alive=75, timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve(sockets=[bound]))
    try:
        while not server.started:
            if serving.done():
                raise RuntimeError("the server did not start")
            await asyncio.sleep(0.005)
        yield
    finally:
        server.should_exit = True
        await serving
        bound.close()
