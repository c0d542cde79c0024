"""Helpers that commands share: the event loop, output of text, JSON and tables, an open ledger.

Vendors and hooks choose parts of what is printed: no command prints it by `click.echo`, which passes control
characters to the terminal.
"""

import asyncio
import errno
import re
import socket
import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import click
import msgspec

from submitter.callback_url import redact
from submitter.errors import IdConflict, InvalidRequest, InvalidSettings, Problem, RelayError
from submitter.ledger import Ledger, open_ledger
from submitter.log import without_controls
from submitter.settings import Settings

T = TypeVar("T")
_IN_JSON = re.compile("[\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in a new event loop, and return its result."""
    return asyncio.run(work)


def echo(text: str, *, err: bool = False) -> None:
    """Print a text, with control characters masked."""
    click.echo(without_controls(text), err=err)


def echo_json(text: str) -> None:
    """Print JSON, with the control characters that JSON may hold as its escapes."""
    click.echo(_IN_JSON.sub(lambda found: f"\\u{ord(found[0]):04x}", text))


def print_json(value: Any) -> None:
    """Print a value as indented JSON."""
    echo_json(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def print_table(rows: list[dict[str, Any]], columns: tuple[str, ...], *, empty: str, headed: bool = True) -> None:
    """Print rows in aligned columns, under headings if `headed`; print `empty` if there are no rows."""
    if not rows:
        click.echo(empty)
        return
    texts = [
        [without_controls(str("" if row.get(name) is None else row[name]), one_line=True) for name in columns]
        for row in rows
    ]
    if headed:
        texts.insert(0, [name.upper().replace("_", " ") for name in columns])
    widths = [max(len(line[i]) for line in texts) for i in range(len(columns))]
    for line in texts:
        click.echo("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


@contextmanager
def errors_as_exit_status() -> Iterator[None]:
    """Print a RelayError on standard error, without a traceback. Exit with 2 for input to correct, else 1."""
    try:
        yield
    except (InvalidRequest, InvalidSettings, IdConflict) as error:
        echo(f"kling-relay: {error}", err=True)
        sys.exit(2)
    except RelayError as error:
        echo(f"kling-relay: {redact(str(error))}", err=True)
        sys.exit(1)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        click.echo(f"kling-relay: cannot write: {error.strerror}", err=True)
        sys.exit(1)


def unknown(field: str, value: str, known: Iterable[str], remedy: str) -> InvalidRequest:
    """Return the error for a value that is none of `known`."""
    return InvalidRequest([Problem(field, repr(value), f"one of {', '.join(known)}", remedy)])


def bound(host: str, port: int) -> socket.socket:
    """Return a listening socket; end the command if the address cannot be listened on."""
    from receiver import server

    try:
        return server.bind(host, port)
    except server.CannotListen as error:
        raise click.ClickException(str(error)) from error


async def with_ledger(settings: Settings, work: Callable[[Ledger], Awaitable[T]]) -> T:
    """Open the ledger, await `work` with it, close it, and return the result."""
    ledger = open_ledger(settings.ledger)
    try:
        return await work(ledger)
    finally:
        await ledger.close()
