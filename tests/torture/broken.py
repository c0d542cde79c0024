"""Broken receivers, which prove that a storm finds what is broken. Imported by the processes that are killed."""

import asyncio
from collections.abc import Mapping

from receiver.callbacks import CallbackEndpoint


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
