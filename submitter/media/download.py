"""Downloads results through the SSRF guard, atomically."""

from pathlib import Path

import httpx

from submitter.egress import guarded_client
from submitter.errors import RelayError


class CannotFetch(RelayError):
    """A result could not be saved; it is still at the vendor."""


async def download(url: str, target: Path, allow_hosts: frozenset[str]) -> None:
    """Save the content of `url` as `target`, completely or not at all; raise CannotFetch."""
    part = target.with_name(f"{target.name}.part")
    try:
        async with (
            guarded_client(allow_hosts, timeout_s=60) as client,
            client.stream("GET", url) as response,
        ):
            if response.status_code != 200:
                raise CannotFetch(f"{target.name} was not saved: its URL returned HTTP {response.status_code}")
            with part.open("wb") as file:
                async for chunk in response.aiter_bytes():
                    file.write(chunk)
        part.replace(target)
    except (httpx.HTTPError, OSError) as error:
        raise CannotFetch(f"{target.name} was not saved: {error}") from error
