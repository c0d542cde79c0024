"""Peer: the source of Kling's callbacks for hookspool, whose intake and dispatcher keep them in SQLite.

`hookspool` loads this module by the name in its config.toml, which `tests.bench.peers.programs` writes.
"""

from typing import Any

from hookspool import verify as checks
from hookspool.plugin import Request, Secrets, dedup

auth_headers = ("webhook-signature",)
secrets = ("secret",)
span = "immediate"
sender_retries = True
dedup_id = dedup.header("webhook-id")


def verify(request: Request, keys: Secrets) -> bool:
    """Return whether Kling signed the callback."""
    id, timestamp, signature = (request.header(f"webhook-{name}") for name in ("id", "timestamp", "signature"))
    return bool(checks.standard_webhooks(id, timestamp, signature, keys["secret"], request.body, now=request.now))


def key(payload: dict[str, Any], request: Request) -> str:
    """Return the task, whose callbacks hookspool delivers in order."""
    return str(payload["external_id"])
