"""The sandbox: an ASGI app that stands in for the vendors, offline.

POST /sandbox/faults   turns faults on (the fields of `Faults`; {} turns all off)
GET  /sandbox/state    what was asked for, created and told
"""

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from importlib import import_module

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route

from submitter.errors import InvalidSettings, Problem
from submitter.installed import vendors
from submitter.sandbox.base import Sandbox
from submitter.sandbox.faults import Faults


def sandbox_class(vendor: str) -> type[Sandbox]:
    """Return the stand-in of a vendor; raise InvalidSettings when it has none."""
    setup = vendors().get(vendor)
    if setup is None or setup.sandbox is None:
        able = ", ".join(name for name, known in vendors().items() if known.sandbox)
        raise InvalidSettings([Problem("vendor", repr(vendor), f"one of {able}", "Choose one that has a stand-in.")])
    module, _, name = setup.sandbox.partition(":")
    found: type[Sandbox] = getattr(import_module(module), name)
    return found


def create_sandbox(sandboxes: Iterable[Sandbox], *, base_url: str) -> Starlette:
    """Make the app; `base_url` is where it can be reached, for the URLs of its results.

    Each vendor is at `/{vendor}`, and at the root as well, where the first of those with one API answers.
    """
    standing = list(sandboxes)
    for sandbox in standing:
        sandbox.base_url = f"{base_url.rstrip('/')}/{sandbox.name}"

    async def set_faults(request: Request) -> Response:
        try:
            faults = msgspec.json.decode(await request.body() or b"{}", type=Faults)
        except msgspec.DecodeError as error:
            return JSONResponse({"error": f"{error}. Faults are {', '.join(Faults.__struct_fields__)}."}, 400)
        for sandbox in standing:
            sandbox.set_faults(faults)
        return JSONResponse(msgspec.to_builtins(faults))

    async def show_state(request: Request) -> Response:
        tasks = [
            {
                "vendor": sandbox.name,
                "id": job.id,
                "external_task_id": job.asked.external_id,
                "status": job.status,
                "queries": job.queries,
                "callbacks": job.callbacks,
            }
            for sandbox in standing
            for job in sandbox.jobs.values()
        ]
        counts = {sandbox.name: sandbox.counts for sandbox in standing}
        return JSONResponse({"counts": counts, "faults": msgspec.to_builtins(standing[0].faults), "tasks": tasks})

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        for sandbox in standing:
            await sandbox.close()

    return Starlette(
        routes=[
            Route("/sandbox/faults", set_faults, methods=["POST"]),
            Route("/sandbox/state", show_state),
            *(Mount(f"/{one.name}", routes=[*one.routes(), one.result_route()]) for one in standing),
            *(route for one in standing for route in one.routes()),
        ],
        lifespan=lifespan,
    )
