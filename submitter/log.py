"""Logging configuration (structlog): JSON lines or a console, with callback tokens and control characters masked."""

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
"""Client libraries of buses that log each failure, which the outcome of the attempt already reports."""

_MASKED = (
    {code: 0x2400 + code for code in range(0x20)}  # C0, as the pictures that Unicode has for it
    | {0x7F: 0x2421}
    | dict.fromkeys([*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD)  # C1, bidirectional
)
_MASKED_IN_LINES = {code: mask for code, mask in _MASKED.items() if chr(code) not in "\n\t"}


def without_controls(text: str, *, one_line: bool = False) -> str:
    """Return `text` with visible characters instead of those that a terminal obeys.

    Vendors and hooks choose parts of what is printed. Line breaks and tabs are kept unless `one_line` is set.
    """
    return text if text.isprintable() else text.translate(_MASKED if one_line else _MASKED_IN_LINES)


def silence_clients() -> None:
    """Discard the log output of the buses' client libraries."""
    for name in CLIENTS:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)


def configure(style: str | None = None) -> None:
    """Log as `json` or `console` to standard error. None means console on a terminal, else JSON."""
    silence_clients()
    style = style or ("console" if sys.stderr.isatty() else "json")
    processors: list[structlog.typing.Processor]
    factory: Callable[..., structlog.typing.WrappedLogger]
    if style == "json":
        processors, factory = [_render_json], _LineBuffer
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


def send_to(processor: structlog.typing.Processor) -> None:
    """Pass every log event to `processor` instead of writing it."""
    structlog.configure(
        processors=[processor],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        cache_logger_on_first_use=False,
    )


class _LineBuffer:
    """Batches the lines of one event loop iteration into one write, because a write per line dominates the cost.

    Without a running loop each line is written at once.
    """

    _waiting: ClassVar[list[bytes]] = []

    def __init__(self, *names: object) -> None:
        """Ignore the logger's name."""

    def msg(self, line: bytes) -> None:
        """Buffer `line`, and schedule the write."""
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
    """Render an event in one step: it runs for each callback, and a chain of processors is slower."""
    if "exc_info" in event:
        structlog.processors.format_exc_info(logger, method, event)
    line = {"timestamp": timestamp(_clock.now_ms()), "level": method, **_redact(logger, method, event)}
    return msgspec.json.encode(line, enc_hook=str)


def _redact(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for name in ("reason", "exception", "answer"):
        if isinstance(event.get(name), str):
            event[name] = without_controls(redact(event[name]))
    return event
