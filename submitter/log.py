"""Logging: JSON lines, or structlog for a console; callback tokens and control characters are masked.

structlog is imported by the first event that it gets, so that JSON lines do without it: its import takes a
fifth of what the receiver adds to a serverless function's cold start.
"""

import asyncio
import logging
import sys
import traceback
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec

from submitter.callback_url import redact
from submitter.clock import Clock
from submitter.event import timestamp

if TYPE_CHECKING:
    import structlog

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


class Logger:
    """Logs the events of one component: as JSON lines after `configure("json")`, else through structlog.

    So an application that never calls `configure` gets them as it has configured structlog.
    """

    as_json: ClassVar[bool] = False

    def __init__(self, name: str) -> None:
        self._name = name

    def info(self, event: str, **fields: Any) -> None:
        """Log an event of normal operation."""
        self._log("info", event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        """Log a failure that is handled."""
        self._log("warning", event, fields)

    def error(self, event: str, **fields: Any) -> None:
        """Log a failure that a person must see."""
        self._log("error", event, fields)

    def exception(self, event: str, **fields: Any) -> None:
        """Log an error with the traceback of the exception that is being handled."""
        self.error(event, exc_info=True, **fields)

    def _log(self, level: str, event: str, fields: dict[str, Any]) -> None:
        if self.as_json:
            _Lines.write(_render_json(level, event, fields))
            return
        import structlog

        getattr(structlog.get_logger(self._name), level)(event, **fields)


def configure(style: str | None = None) -> None:
    """Log as `json` or `console` to standard error. None means console on a terminal, else JSON."""
    silence_clients()
    style = style or ("console" if sys.stderr.isatty() else "json")
    Logger.as_json = style == "json"
    if not Logger.as_json:
        _configure_console(logging.INFO)


def quiet() -> None:
    """Log warnings and errors only, for commands that print their own results."""
    silence_clients()
    Logger.as_json = False
    _configure_console(logging.WARNING)


def _configure_console(level: int) -> None:
    import structlog

    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False),
            structlog.processors.format_exc_info,
            _redact,
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


def send_to(processor: "structlog.typing.Processor") -> None:
    """Pass every log event to `processor` instead of writing it."""
    import structlog

    Logger.as_json = False
    structlog.configure(
        processors=[processor],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
    )


class _Lines:
    """Batches the lines of one event loop iteration into one write, because a write per line dominates the cost.

    Without a running loop each line is written at once.
    """

    _waiting: ClassVar[list[bytes]] = []

    @classmethod
    def write(cls, line: bytes) -> None:
        """Buffer `line`, and schedule the write."""
        cls._waiting.append(line)
        if len(cls._waiting) == 1:
            try:
                asyncio.get_running_loop().call_soon(cls._flush)
            except RuntimeError:
                cls._flush()

    @classmethod
    def _flush(cls) -> None:
        lines, cls._waiting = cls._waiting, []
        sys.stderr.buffer.write(b"\n".join([*lines, b""]))
        sys.stderr.buffer.flush()


def _render_json(level: str, event: str, fields: dict[str, Any]) -> bytes:
    if fields.pop("exc_info", False):
        fields["exception"] = traceback.format_exc().removesuffix("\n")
    line = {"timestamp": timestamp(_clock.now_ms()), "level": level, "event": event, **_redact(None, level, fields)}
    return msgspec.json.encode(line, enc_hook=str)


def _redact(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for name in ("reason", "exception", "answer"):
        if isinstance(event.get(name), str):
            event[name] = without_controls(redact(event[name]))
    return event
