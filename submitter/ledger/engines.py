"""Ledger factory: opens the engine that a URL names (SQLite, PostgreSQL, DynamoDB)."""

from pathlib import Path
from urllib.parse import urlsplit

from submitter.errors import InvalidSettings, Problem
from submitter.extras import install_command
from submitter.ledger.base import Ledger


def without_password(url: str) -> str:
    """Return a ledger's URL without its password and its query, for logs and messages."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")
    user = f"{host[0].partition(':')[0]}@" if host[1] else ""
    return f"{parts.scheme}://{user}{host[2]}{parts.path}"


def file_of(url: str) -> Path | None:
    """Return the file of a SQLite ledger's URL; None for another engine."""
    return Path(url.removeprefix("sqlite:///")) if url.startswith("sqlite:///") else None


def open_ledger(url: str, field: str = "KLING_RELAY_LEDGER") -> Ledger:
    """Open the ledger that `url` names; raise InvalidSettings, which names the `field` that the URL comes from.

    `sqlite:///relative.db` or `sqlite:////absolute.db`; `postgresql://user:password@host/database?schema=...`;
    `dynamodb://table?region=...`.
    """
    scheme = urlsplit(url).scheme
    if scheme == "dynamodb":
        from submitter.ledger.dynamodb.ledger import DynamoLedger

        return DynamoLedger(url)
    if scheme == "sqlite" and url.startswith("sqlite:///") and len(url) > len("sqlite:///"):
        from submitter.ledger.sqlite.ledger import SqliteLedger

        return SqliteLedger(url.removeprefix("sqlite:///"))
    if scheme in ("postgresql", "postgres"):
        try:
            from submitter.ledger.postgres.ledger import PostgresLedger
        except ImportError as error:
            remedy = f"Install it: {install_command('postgres')}."
            problem = Problem(field, f"{scheme}://", f"needs the extra `postgres` ({error})", remedy)
            raise InvalidSettings([problem]) from error

        return PostgresLedger(url)
    remedy = "Use sqlite:///relay.db, sqlite:////an/absolute/path.db, or one of the other schemes."
    limit = "sqlite:///path, postgresql://user:password@host/database or dynamodb://table?region=..."
    raise InvalidSettings([Problem(field, f"scheme {scheme!r}", limit, remedy)])
