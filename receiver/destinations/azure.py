"""What the Azure destinations share: the URL, and a token of Entra ID where it holds no key.

`?endpoint=https://...` goes to another address than the host's own: a private endpoint, an emulator.
"""

import asyncio
from typing import Any
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

import msgspec

from receiver.destinations.base import wrong
from receiver.hooks import Hook


class Entra:
    """Tokens for one service, as the machine's identity gives them (azure-identity keeps and renews them)."""

    def __init__(self, scope: str) -> None:
        from azure.core.exceptions import ClientAuthenticationError
        from azure.identity import DefaultAzureCredential

        self.refused = ClientAuthenticationError
        self._scope = scope
        self._credential: Any = DefaultAzureCredential()

    async def token(self) -> str:
        """Return a token; raise PermissionError when there is none to be had."""
        try:
            return str((await asyncio.to_thread(self._credential.get_token, self._scope)).token)
        except self.refused as error:
            raise PermissionError(f"no token of Entra ID: {str(error).partition(chr(10))[0]}") from error

    async def close(self) -> None:
        """Close its connections."""
        await asyncio.to_thread(self._credential.close)


class Address(msgspec.Struct, frozen=True):
    """Where a hook's URL leads: its parts, the service's host, the address that is called, and the key."""

    parts: SplitResult
    host: str
    endpoint: str
    key: str | None


def read_url(hook: Hook, shape: str, domain: str = "") -> Address:
    """Read a hook's URL; a host without a dot is one of `domain`."""
    parts, asked = urlsplit(hook.url), parse_qs(hook.url.partition("?")[2])
    host = parts.hostname or ""
    host = host if "." in host else host + domain
    endpoint = asked.get("endpoint", [f"https://{host}"])[0].rstrip("/")
    if set(asked) - {"endpoint"} or urlsplit(endpoint).scheme not in ("https", "http"):
        raise wrong(hook, "url", f"?{parts.query}", f"{shape}?endpoint=https://...", "Mend it, or leave it out.")
    return Address(parts, host, endpoint, unquote(parts.password) if parts.password else None)
