"""Ledger factory: opens the engine that a URL names (SQLite, PostgreSQL, DynamoDB)."""

from pathlib import Path

from submitter.errors import InvalidSettings, Problem
from submitter.extras import install_command
from submitter.ledger.base import Ledger
from submitter.web_address import why_not_server


def file_of(url: str) -> Path | None:
    """Return the file of a SQLite ledger's URL; None for another engine."""
    return Path(url.removeprefix("sqlite:///")) if url.startswith("sqlite:///") else None


def open_ledger(url: str, field: str = "KLING_RELAY_LEDGER") -> Ledger:
    """Open the ledger that `url` names; raise InvalidSettings, which names the `field` that the URL comes from.

    `sqlite:///relative.db` or `sqlite:////absolute.db`; `postgresql://user:password@host/database?schema=...`;
    `dynamodb://table?region=...`.
    """
    scheme = url.partition(":")[0]
    wrong = None if scheme == "sqlite" else why_not_server(url)
    if wrong is not None:
        raise InvalidSettings(
            [Problem(field, f"{scheme}://", f"a URL that can be opened: {wrong}", "Correct the URL.")]
        )
    if scheme == "dynamodb":
        from submitter.ledger.dynamodb.ledger import DynamoLedger

        return DynamoLedger(url)
    if scheme == "sqlite" and url.startswith("sqlite:///") and len(url) > len("sqlite:///") and "?" not in url:
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
    remedy = "Use sqlite:///relay.db, sqlite:////an/absolute/path.db (without options), or one of the other schemes."
    limit = "sqlite:///path, postgresql://user:password@host/database or dynamodb://table?region=..."
    shown = repr(url) if scheme == "sqlite" else f"scheme {scheme!r}"
    raise InvalidSettings([Problem(field, shown, limit, remedy)])
