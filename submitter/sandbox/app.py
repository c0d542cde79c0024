"""The sandbox: an ASGI app with the vendors' stand-ins (mock servers), offline.

/{vendor}/...           the vendor's API
POST /sandbox/faults    sets the faults (the fields of `Faults`; {} clears all)
GET  /sandbox/state     shows counts, faults, and each task with its queries and callbacks
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
from submitter.sandbox.base import Sandbox
from submitter.sandbox.faults import Faults
from submitter.vendors.registry import vendors


def sandbox_class(vendor: str) -> type[Sandbox]:
    """Return the class of a vendor's stand-in; raise InvalidSettings when it has none."""
    setup = vendors().get(vendor)
    if setup is None or setup.sandbox is None:
        available = ", ".join(name for name, known in vendors().items() if known.sandbox)
        remedy = "Choose a vendor that has a stand-in."
        raise InvalidSettings([Problem("vendor", repr(vendor), f"one of {available}", remedy)])
    module, _, name = setup.sandbox.partition(":")
    found: type[Sandbox] = getattr(import_module(module), name)
    return found


def create_sandbox(sandboxes: Iterable[Sandbox], *, base_url: str) -> Starlette:
    """Create the app. `base_url` is its own URL, which result URLs begin with.

    Each vendor is at `/{vendor}`, and at the root as well: there the first stand-in with the route answers, and
    the first one refuses every other request.
    """
    stand_ins = list(sandboxes)
    for sandbox in stand_ins:
        sandbox.base_url = f"{base_url.rstrip('/')}/{sandbox.name}"

    async def set_faults(request: Request) -> Response:
        try:
            faults = msgspec.json.decode(await request.body() or b"{}", type=Faults)
        except msgspec.DecodeError as error:
            return JSONResponse({"error": f"{error}. Faults are {', '.join(Faults.__struct_fields__)}."}, 400)
        for sandbox in stand_ins:
            sandbox.set_faults(faults)
        return JSONResponse(msgspec.to_builtins(faults))

    async def show_state(request: Request) -> Response:
        tasks = [
            {
                "vendor": sandbox.name,
                "id": job.id,
                "external_task_id": job.request.external_id,
                "status": job.status,
                "queries": job.queries,
                "callbacks": job.callbacks,
            }
            for sandbox in stand_ins
            for job in sandbox.jobs.values()
        ]
        counts = {sandbox.name: sandbox.counts for sandbox in stand_ins}
        return JSONResponse({"counts": counts, "faults": msgspec.to_builtins(stand_ins[0].faults), "tasks": tasks})

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        for sandbox in stand_ins:
            await sandbox.close()

    return Starlette(
        routes=[
            Route("/sandbox/faults", set_faults, methods=["POST"]),
            Route("/sandbox/state", show_state),
            *(
                Mount(f"/{one.name}", routes=[*one.routes(), one.result_route(), one.fallback_route()])
                for one in stand_ins
            ),
            *(route for one in stand_ins for route in one.routes()),
            stand_ins[0].fallback_route(),
        ],
        lifespan=lifespan,
    )
