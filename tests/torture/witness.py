"""What the vendor and the hooks saw of a run with Kling's stand-in: acknowledged callbacks, received events, tasks."""

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import httpx
import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from submitter.sandbox.base import Sandbox
from tests.torture.check import Acknowledged, Received, Seen, VendorTask

WORDS = {"succeeded": "succeed"}


class Witness:
    """Watches a stand-in's callbacks, and is the endpoint of the hooks at `/{hook}`."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self.acknowledged: list[Acknowledged] = []
        self.received: list[Received] = []
        sandbox._client.event_hooks["response"].append(self._answered)

    async def _answered(self, response: httpx.Response) -> None:
        """Note a callback that was acknowledged as applied, or as known already."""
        if response.headers.get("kling-relay-result") in ("applied", "unchanged"):
            status = msgspec.json.decode(response.request.content)["status"]
            id = response.request.url.path.split("/")[3]
            self.acknowledged.append(Acknowledged(id, WORDS.get(status, status), time.time_ns() // 1_000_000))

    async def receive(self, request: Request) -> Response:
        """Note an event that arrived with its whole body."""
        with suppress(ClientDisconnect):  # its sender was killed, or its connection was cut
            body = await request.body()
            self.received.append(Received(request.path_params["hook"], request.headers["webhook-id"], body))
        return Response(status_code=204)

    def seen(self, hooks: Sequence[str], archive: Path, *, acknowledged: Sequence[Acknowledged] | None = None) -> Seen:
        """Return what the vendor, the hooks and the archive have; other acknowledgements can be given."""
        jobs = self._sandbox.jobs.values()
        return Seen(
            [VendorTask(str(job.request.external_id), job.id, WORDS.get(job.status, job.status)) for job in jobs],
            self.acknowledged if acknowledged is None else acknowledged,
            self.received,
            hooks,
            read_results(archive),
        )


def read_results(folder: Path) -> Mapping[str, bytes]:
    """Return the videos in a folder by their path in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.mp4")}
