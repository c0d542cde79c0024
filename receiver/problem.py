"""Error responses as `application/problem+json` (RFC 9457)."""

import msgspec
from starlette.responses import Response

from submitter.errors import RelayError


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
    400: "body refused",
    401: "signature invalid",
    403: "callback URL expired",
    404: "not found",
    405: "method not allowed",
    408: "request timeout",
    413: "body too large",
    503: "ledger unavailable",
}


def problem_of(error: Exception) -> Response:
    """Return the response to a request that ended in `error`; an unknown error is 500."""
    status = error.status if isinstance(error, RelayError | RequestRefused) else 500
    # A LedgerUnavailable names the operator's files and hosts: they belong in the log, not in a response.
    detail = "try again later" if status == 503 else str(error)
    return problem(status, _TITLES.get(status, "error"), detail)
