"""Shared by the Azure destinations: URL parsing, and Microsoft Entra ID tokens when the URL has no key.

`?endpoint=https://...` replaces the address derived from the host, for a private endpoint or an emulator.
"""

import asyncio
from typing import Any
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

import msgspec

from receiver.destinations.base import invalid_hook
from receiver.hook import Hook


class Entra:
    """Microsoft Entra ID access tokens of the machine's identity; azure-identity caches and renews them."""

    def __init__(self, scope: str) -> None:
        from azure.core.exceptions import ClientAuthenticationError
        from azure.identity import DefaultAzureCredential

        self.refused = ClientAuthenticationError
        self._scope = scope
        self._credential: Any = DefaultAzureCredential()

    async def token(self) -> str:
        """Return a token; raise PermissionError if the identity gets none."""
        try:
            return str((await asyncio.to_thread(self._credential.get_token, self._scope)).token)
        except self.refused as error:
            raise PermissionError(f"no Microsoft Entra ID token: {str(error).partition(chr(10))[0]}") from error

    async def close(self) -> None:
        """Close its connections."""
        await asyncio.to_thread(self._credential.close)


class Address(msgspec.Struct, frozen=True):
    """A parsed hook URL: its parts, the service's host, the endpoint that is called, and the key."""

    parts: SplitResult
    host: str
    endpoint: str
    key: str | None


def read_url(hook: Hook, url_format: str, domain: str = "") -> Address:
    """Parse a hook's URL; append `domain` to a host without a dot. Raise InvalidSettings for an invalid option."""
    parts, options = urlsplit(hook.url), parse_qs(hook.url.partition("?")[2])
    host = parts.hostname or ""
    host = host if "." in host else host + domain
    endpoint = options.get("endpoint", [f"https://{host}"])[0].rstrip("/")
    if set(options) - {"endpoint"} or urlsplit(endpoint).scheme not in ("https", "http"):
        limit, remedy = f"{url_format}?endpoint=https://...", "Use no option but `endpoint`, with an HTTP(S) URL."
        raise invalid_hook(hook, "url", f"?{parts.query}", limit, remedy)
    return Address(parts, host, endpoint, unquote(parts.password) if parts.password else None)
