"""Callback URLs: capability URLs signed with HMAC, one per task, verified without reading the ledger. Pure.

    {public_url}/callbacks/{vendor}/{external_task_id}/{key id}.{expiry}.{mac}

`mac` is HMAC-SHA256 over the vendor, the external_task_id and the expiry (Unix seconds), in
unpadded base64url. The key ring's first key signs; all keys verify, so that keys can be rotated.
"""

import base64
import binascii
import hashlib
import hmac
import re
from functools import lru_cache

import msgspec

from submitter.errors import InvalidSettings, Problem, UrlExpired, UrlUnknown

URL_LIVES_S = 30 * 86400
"""As long as Kling keeps a result: a result reported later could no longer be downloaded."""

KEY_BYTES = 32
_SLASH = r"(?:\\?/|\\u002[fF])"  # as JSON may hold it
_PART = r"[^/\s\"'\\]+"
_TOKEN = (  # compiled when a text first needs it, as in `web_address`
    rf"({_SLASH}callbacks{_SLASH}{_PART}{_SLASH}{_PART}{_SLASH})[A-Za-z0-9_.~-]+"
    rf"|({_SLASH}media{_SLASH}{_PART}{_SLASH})[A-Za-z0-9_~-]+\.[0-9]+\.[A-Za-z0-9_-]{{40,}}"
)


class Key(msgspec.Struct, frozen=True):
    """One named signing key. Its secret never appears in repr()."""

    id: str
    secret: bytes

    def __repr__(self) -> str:
        return f"Key({self.id!r})"


class KeyRing(msgspec.Struct, frozen=True):
    """The signing keys of callback URLs: the first key signs, all keys verify."""

    keys: tuple[Key, ...]

    @classmethod
    def read(cls, text: str) -> "KeyRing":
        """Parse `id:base64,id:base64`; raise InvalidSettings, which names the key but never its secret."""
        keys: list[Key] = []
        problems: list[Problem] = []
        for position, entry in enumerate(filter(None, (part.strip() for part in text.split(","))), start=1):
            id, _, encoded = entry.partition(":")
            try:
                secret = base64.b64decode(encoded, validate=True)
            except binascii.Error:
                secret = b""
            if not re.fullmatch(r"[A-Za-z0-9_-]{1,32}", id) or len(secret) < KEY_BYTES:
                problems.append(
                    Problem(
                        field="KLING_RELAY_KEYS",
                        value=f"key {position} in the list",
                        limit=f"id:base64 with at least {KEY_BYTES} bytes",
                        remedy="Create one with `kling-relay keys new`.",
                    )
                )
            elif any(key.id == id for key in keys):
                problems.append(
                    Problem(
                        field="KLING_RELAY_KEYS",
                        value=f"id {id!r} twice",
                        limit="the id of each key is unique",
                        remedy="Rename one of them.",
                    )
                )
            keys.append(Key(id, secret))
        if problems:
            raise InvalidSettings(problems)
        return cls(tuple(keys))


def mint(ring: KeyRing, vendor: str, external_task_id: str, expires_at_s: int) -> str:
    """Return the token of one task's URL, signed by the ring's first key."""
    key = ring.keys[0]
    return f"{key.id}.{expires_at_s}.{_mac(key, vendor, external_task_id, str(expires_at_s))}"


def callback_url(public_url: str, ring: KeyRing, vendor: str, external_task_id: str, now_s: float) -> str:
    """Return the URL for the callbacks of `vendor` about this task, valid for URL_LIVES_S seconds."""
    token = mint(ring, vendor, external_task_id, int(now_s) + URL_LIVES_S)
    return f"{public_url.rstrip('/')}/callbacks/{vendor}/{external_task_id}/{token}"


def check(ring: KeyRing, vendor: str, external_task_id: str, token: str, now_s: float) -> None:
    """Raise UrlUnknown or UrlExpired unless `token` was minted for this vendor and task."""
    key_id, _, rest = token.partition(".")
    expiry, _, mac = rest.partition(".")
    for key in ring.keys:
        if key.id == key_id:
            minted = _mac(key, vendor, external_task_id, expiry)
            if not hmac.compare_digest(minted.encode(), mac.encode(errors="replace")):
                break
            if int(expiry) < now_s:  # digits, because the MAC is valid
                raise UrlExpired("this callback URL has expired")
            return
    raise UrlUnknown("no such callback URL")


def redact(text: str) -> str:
    """Return `text` with the tokens of callback and media URLs replaced by `[hidden]`."""
    return re.sub(_TOKEN, r"\1\2[hidden]", text) if "callbacks" in text or "media" in text else text


def redact_body(body: bytes) -> bytes:
    """Do as `redact` does, with a body of any bytes."""
    return redact(body.decode(errors="surrogateescape")).encode(errors="surrogateescape")


def _mac(key: Key, vendor: str, external_task_id: str, expiry: str) -> str:
    signed = f"{vendor}\n{external_task_id}\n{expiry}".encode(errors="replace")
    return base64.urlsafe_b64encode(hmac_sha256(key.secret, signed)).rstrip(b"=").decode()


def hmac_sha256(key: bytes, message: bytes) -> bytes:
    """Return HMAC-SHA256 (RFC 2104). The hash state of the key is cached, which cuts the time to a third."""
    inner, outer = _prepared(key)
    inner, outer = inner.copy(), outer.copy()
    inner.update(message)
    outer.update(inner.digest())
    return outer.digest()


@lru_cache(maxsize=64)
def _prepared(key: bytes) -> "tuple[hashlib._Hash, hashlib._Hash]":
    block = (hashlib.sha256(key).digest() if len(key) > 64 else key).ljust(64, b"\0")
    return hashlib.sha256(block.translate(_INNER)), hashlib.sha256(block.translate(_OUTER))


_INNER = bytes(byte ^ 0x36 for byte in range(256))
_OUTER = bytes(byte ^ 0x5C for byte in range(256))
