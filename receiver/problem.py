"""Error responses as `application/problem+json` (RFC 9457)."""

import math

import msgspec
from starlette.responses import Response

from submitter.errors import LedgerUnavailable, RelayError, VendorRefused

RETRY_AFTER_S = 30
"""The Retry-After of a temporary refusal without one of the vendor's, in seconds."""


class RequestRefused(Exception):
    """An HTTP error that ends a request before any store is touched."""

    def __init__(self, status: int, title: str) -> None:
        self.status = status
        super().__init__(title)


def problem(status: int, title: str, detail: str) -> Response:
    """Return a problem+json response."""
    content = msgspec.json.encode({"type": "about:blank", "title": title, "status": status, "detail": detail})
    return Response(content, status, media_type="application/problem+json")


_TITLES = {
    400: "invalid request",
    401: "signature invalid",
    403: "callback URL expired",
    404: "not found",
    405: "method not allowed",
    408: "request timeout",
    409: "id conflict",
    413: "body too large",
    422: "refused by the vendor",
    503: "not available at the moment",
}


def shown_to_strangers(error: BaseException) -> str:
    """Return an error's text, unless it may name the operator's files and hosts: those belong in the log."""
    is_shown = isinstance(error, RelayError | RequestRefused) and not isinstance(error, LedgerUnavailable)
    return str(error) if is_shown else "try again later"


def problem_of(error: Exception, detail: str | None = None) -> Response:
    """Return the response to a request that ended in `error`; an unknown error is 500. `detail` replaces its text."""
    status = error.status if isinstance(error, RelayError | RequestRefused) else 500
    response = problem(status, _TITLES.get(status, "error"), detail or shown_to_strangers(error))
    if status == 503:
        after_s = error.retry_after_s if isinstance(error, VendorRefused) else None
        response.headers["retry-after"] = str(math.ceil(after_s or RETRY_AFTER_S))
    return response
