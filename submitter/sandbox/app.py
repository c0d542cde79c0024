"""The sandbox: an ASGI app that stands in for the vendors, offline.

POST /sandbox/faults   turns faults on (the fields of `Faults`; {} turns all off)
GET  /sandbox/state    what was asked for, created and told
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from submitter.sandbox.faults import Faults
from submitter.sandbox.kling import KlingSandbox


def create_sandbox(kling: KlingSandbox, *, base_url: str) -> Starlette:
    """Make the app; `base_url` is where it can be reached, for the URLs of its results."""
    kling.base_url = base_url.rstrip("/")

    async def set_faults(request: Request) -> Response:
        try:
            faults = msgspec.json.decode(await request.body() or b"{}", type=Faults)
        except msgspec.DecodeError as error:
            return JSONResponse({"error": f"{error}. Faults are {', '.join(Faults.__struct_fields__)}."}, 400)
        kling.set_faults(faults)
        return JSONResponse(msgspec.to_builtins(faults))

    async def show_state(request: Request) -> Response:
        tasks = [
            {
                "id": job.id,
                "external_task_id": job.asked["external_id"],
                "status": job.status,
                "queries": job.queries,
                "callbacks": job.callbacks,
            }
            for job in kling.jobs.values()
        ]
        return JSONResponse({"counts": kling.counts, "faults": msgspec.to_builtins(kling.faults), "tasks": tasks})

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await kling.close()

    return Starlette(
        routes=[
            Route("/sandbox/faults", set_faults, methods=["POST"]),
            Route("/sandbox/state", show_state),
            *kling.routes(),
        ],
        lifespan=lifespan,
    )
