"""Downloads results through the SSRF guard, atomically."""

import asyncio
from contextlib import suppress
from pathlib import Path

import httpx

from submitter.errors import RelayError
from submitter.guarded_http import guarded_client


class CannotFetch(RelayError):
    """A result could not be saved; it is still at the vendor."""


RESULT_MAX_BYTES = 1024 * 1024 * 1024
RESULT_MAX_S = 3600.0
"""A host that sends a byte now and then breaks no limit of a single read."""


async def download(
    url: str,
    target: Path,
    allow_hosts: frozenset[str],
    max_bytes: int = RESULT_MAX_BYTES,
    *,
    max_s: float = RESULT_MAX_S,
) -> None:
    """Save the content of `url` as `target`, completely or not at all; raise CannotFetch.

    The content may have `max_bytes` and take `max_s` seconds at most. It is read as it was sent: a compressed one is
    not expanded.
    """
    part = target.with_name(f"{target.name}.part")
    try:
        async with (
            asyncio.timeout(max_s),
            guarded_client(allow_hosts, timeout_s=60) as client,
            client.stream("GET", url, headers={"accept-encoding": "identity"}) as response,
        ):
            if response.status_code != 200:
                reason = f"its URL returned HTTP {response.status_code}"
                remedy = "If the URL has expired, `kling-relay tasks refresh` asks the vendor for a new one."
                raise CannotFetch(f"{target.name} was not saved: {reason}. {remedy}")
            wrong = _why_no_video(response)
            if wrong is not None:
                raise CannotFetch(f"{target.name} was not saved: its URL returned {wrong}.")
            size, start = 0, b""
            with part.open("wb") as file:
                async for chunk in response.aiter_raw():
                    size += len(chunk)
                    start = start or chunk[:64].lstrip()
                    if size > max_bytes:
                        raise CannotFetch(f"{target.name} was not saved: it is larger than {max_bytes} bytes")
                    file.write(chunk)
            if size == 0 or start.startswith((b"<", b"{")):  # labelled as a video, or not labelled
                found = "an empty body" if size == 0 else f"a document ({start[:20]!r})"
                raise CannotFetch(f"{target.name} was not saved: its URL returned {found}.")
        part.replace(target)
    except TimeoutError as error:
        raise CannotFetch(f"{target.name} was not saved: it did not arrive within {max_s:g} s") from error
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError, OSError) as error:
        reason = f"{type(error).__name__}: {error}".removesuffix(": ")
        raise CannotFetch(f"{target.name} was not saved: {reason}") from error
    finally:
        with suppress(OSError):  # it would hide why the download failed
            part.unlink(missing_ok=True)


def _why_no_video(response: httpx.Response) -> str | None:
    """Return what a 200 has instead of a video (an error page of a proxy or a storage), or None."""
    encoding = response.headers.get("content-encoding", "identity").lower()
    if encoding != "identity":
        return f"a compressed body ({encoding:.40})"
    kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    is_document = kind.startswith("text/") or kind.endswith(("json", "xml"))
    return f"a document ({kind:.40})" if is_document else None
