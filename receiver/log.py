"""The only module that configures logging: structlog, JSON lines or a console."""

import asyncio
import logging
import sys
from collections.abc import Callable, MutableMapping
from typing import Any, ClassVar

import msgspec
import structlog

from submitter.callback_url import redact
from submitter.clock import Clock
from submitter.event import timestamp

_clock = Clock()


CLIENTS = ("aiokafka", "aio_pika", "aiormq", "azure", "mqtt")
"""Clients of buses that log each failure. An attempt's outcome says it, once."""


def silence_clients() -> None:
    """Keep what the buses' clients log to themselves."""
    for name in CLIENTS:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)


def configure(style: str | None = None) -> None:
    """Log as `json` or `console` to standard error; None picks the console on a terminal."""
    silence_clients()
    style = style or ("console" if sys.stderr.isatty() else "json")
    processors: list[structlog.typing.Processor]
    factory: Callable[..., structlog.typing.WrappedLogger]
    if style == "json":
        processors, factory = [_render_json], _Lines
    else:
        processors = [
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False),
            structlog.processors.format_exc_info,
            _redact,
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()),
        ]
        factory = structlog.PrintLoggerFactory(sys.stderr)
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=factory,
        cache_logger_on_first_use=True,
    )


def quiet() -> None:
    """Log warnings and errors only, for commands that print their own results."""
    configure("console")
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))


def tell(story: structlog.typing.Processor) -> None:
    """Hand every log event to `story` instead of writing it."""
    structlog.configure(
        processors=[story],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        cache_logger_on_first_use=False,
    )


class _Lines:
    """Writes the lines of one turn of the event loop together: a write for each would cost more than the rest.

    Without a running loop each line is written at once.
    """

    _waiting: ClassVar[list[bytes]] = []

    def __init__(self, *names: object) -> None:
        """Be any logger: none has a name here."""

    def msg(self, line: bytes) -> None:
        """Write `line`, soon."""
        self._waiting.append(line)
        if len(self._waiting) == 1:
            try:
                asyncio.get_running_loop().call_soon(self._flush)
            except RuntimeError:
                self._flush()

    debug = info = warning = error = critical = msg

    @classmethod
    def _flush(cls) -> None:
        lines, cls._waiting = cls._waiting, []
        sys.stderr.buffer.write(b"\n".join([*lines, b""]))
        sys.stderr.buffer.flush()


def _render_json(logger: Any, method: str, event: MutableMapping[str, Any]) -> bytes:
    """Do what a chain of processors would, in one step: this runs once for each callback."""
    if "exc_info" in event:
        structlog.processors.format_exc_info(logger, method, event)
    line = {"timestamp": timestamp(_clock.now_ms()), "level": method, **_redact(logger, method, event)}
    return msgspec.json.encode(line, enc_hook=str)


def _redact(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for name in ("reason", "exception", "answer"):
        if isinstance(event.get(name), str):
            event[name] = redact(event[name])
    return event
