"""Broken products, which prove that a part finds what is broken. Imported by the processes of `children.py`."""

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
from msgspec.structs import replace

import receiver.destinations.archive
import submitter.media.download
from receiver.callbacks import CallbackEndpoint
from receiver.destinations import http
from receiver.destinations.outcome import Outcome
from receiver.poller import Poller
from submitter.create import Creator


def acknowledge_before_the_commit() -> None:
    """Answer 2xx first, and store a moment later."""
    accept = CallbackEndpoint._accept
    later: set[asyncio.Task[str]] = set()

    async def early(self: CallbackEndpoint, vendor: str, id: str, headers: Mapping[bytes, bytes], body: bytes) -> str:
        async def store() -> str:
            await asyncio.sleep(0.3)
            return await accept(self, vendor, id, headers, body)

        later.add(asyncio.create_task(store()))
        return "applied"

    setattr(CallbackEndpoint, "_accept", early)  # noqa: B010 - a method, by intent


def send_again_without_asking() -> None:
    """Send a create again when its answer was not clear, without asking the vendor whether the task exists."""

    async def find_nothing(self: Creator, task: object, vendor: object) -> None:
        """Return that the vendor has no such task."""

    setattr(Creator, "_look_up", find_nothing)  # noqa: B010


def keep_what_arrives() -> None:
    """Save what arrived of a result, whatever it is and however its connection ended."""

    async def download(url: str, target: Path, *_: object) -> None:
        with suppress(httpx.HTTPError), target.open("wb") as file:
            async with httpx.AsyncClient(timeout=1) as client, client.stream("GET", url) as response:
                async for chunk in response.aiter_raw():
                    file.write(chunk)

    for module in (receiver.destinations.archive, submitter.media.download):
        setattr(module, "download", download)  # noqa: B010


def count_a_cut_request_as_delivered() -> None:
    """Believe that a hook has an event although the connection ended before its answer."""
    post = http.post

    async def hopeful(*given: Any, **named: Any) -> tuple[Outcome, bytes]:
        outcome, body = await post(*given, **named)
        return replace(outcome, is_delivered=outcome.is_delivered or "Error" in outcome.answer), body

    setattr(http, "post", hopeful)  # noqa: B010


def forget_polls() -> None:
    """Send no query to a vendor."""

    async def forget(self: Poller, name: str, tasks: object) -> None:
        """Do nothing."""

    setattr(Poller, "_poll_vendor", forget)  # noqa: B010


def give_no_reason() -> None:
    """Report a failed attempt without its reason."""
    post = http.post

    async def silent(*given: Any, **named: Any) -> tuple[Outcome, bytes]:
        outcome, body = await post(*given, **named)
        return (outcome if outcome.is_delivered else replace(outcome, answer="ReadError: ")), body

    setattr(http, "post", silent)  # noqa: B010
