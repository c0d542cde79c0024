"""The only module that configures logging: structlog, JSON lines or a console."""

import logging
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog

from submitter.callback_url import redact


def configure(style: str | None = None) -> None:
    """Log as `json` or `console` to standard error; None picks the console on a terminal."""
    style = style or ("console" if sys.stderr.isatty() else "json")
    renderer: structlog.typing.Processor
    if style == "json":
        renderer = structlog.processors.JSONRenderer()
    else:
        renderer = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            _redact,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
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


def _redact(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for name in ("reason", "exception", "answer"):
        if isinstance(event.get(name), str):
            event[name] = redact(event[name])
    return event
