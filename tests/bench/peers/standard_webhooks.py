"""Standard Webhooks for the Python peers: verify a callback's signature, sign a hook's request."""

import base64
import hmac
import os
import time
from collections.abc import Mapping

KEY = base64.b64decode(os.environ.get("HOOK_SECRET", "").removeprefix("whsec_"))
TOLERANCE_S = 300


def signature(id: str, timestamp: str, body: bytes) -> str:
    """Return the value of `webhook-signature`."""
    return "v1," + base64.b64encode(hmac.digest(KEY, f"{id}.{timestamp}.".encode() + body, "sha256")).decode()


def is_signed(body: bytes, headers: Mapping[str, str]) -> bool:
    """Return whether the body is signed with the key, at most `TOLERANCE_S` ago."""
    id, timestamp = headers.get("webhook-id", ""), headers.get("webhook-timestamp", "")
    if not timestamp.isdecimal() or abs(time.time() - int(timestamp)) > TOLERANCE_S:
        return False
    return hmac.compare_digest(headers.get("webhook-signature", ""), signature(id, timestamp, body))


def signed_headers(id: str, body: bytes) -> dict[str, str]:
    """Return the headers of a hook's request, signed now."""
    timestamp = str(int(time.time()))
    return {
        "content-type": "application/json",
        "webhook-id": id,
        "webhook-timestamp": timestamp,
        "webhook-signature": signature(id, timestamp, body),
    }
