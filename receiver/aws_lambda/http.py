"""Converts Lambda HTTP events to ASGI and back: API Gateway (payload 1.0 and 2.0), function URLs, ALB. Pure.

Sources: API Gateway's "Lambda proxy integration" (1.0 and 2.0), Lambda's "Function URLs" (payload
2.0), Elastic Load Balancing's "Lambda functions as targets".
"""

import base64
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote, urlencode

import msgspec


class FunctionRequest(msgspec.Struct, frozen=True):
    """A request as an ASGI scope and a body. `multi`: the response must have `multiValueHeaders`."""

    scope: dict[str, Any]
    body: bytes
    multi: bool


def read_http(event: Mapping[str, Any]) -> FunctionRequest | None:
    """Return the HTTP request in a Lambda event, or None when the event is not HTTP."""
    context = event.get("requestContext")
    if not isinstance(context, dict):
        return None
    if "http" in context:  # payload 2.0
        stage, path = context.get("stage", "$default"), event["rawPath"]
        path = path if stage == "$default" else path.removeprefix(f"/{stage}")
        method, query, multi = context["http"]["method"], event.get("rawQueryString", ""), False
        headers = list((event.get("headers") or {}).items())
    elif "httpMethod" in event:  # payload 1.0, and ALB
        path, method = event["path"], event["httpMethod"]
        lists = event.get("multiValueHeaders")
        multi = lists is not None
        if lists is None:
            headers = list((event.get("headers") or {}).items())
        else:
            headers = [(name, value) for name, values in lists.items() for value in values]
        parameters = event.get("multiValueQueryStringParameters") or event.get("queryStringParameters") or {}
        if "elb" in context:  # ALB does not decode the query
            parameters = {unquote(name): _unquoted(value) for name, value in parameters.items()}
        query = urlencode(parameters, doseq=True)
    else:
        return None
    body = event.get("body") or ""
    return FunctionRequest(
        {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "https",
            "path": unquote(path),
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": query.encode(),
            "headers": [(name.lower().encode("latin-1"), str(value).encode("latin-1")) for name, value in headers],
            "server": None,
            "client": None,
        },
        base64.b64decode(body) if event.get("isBase64Encoded") else body.encode(),
        multi,
    )


def _unquoted(value: str | list[str]) -> list[str]:
    return [unquote(one) for one in ([value] if isinstance(value, str) else value)]


def write_http(
    request: FunctionRequest, status: int, headers: list[tuple[bytes, bytes]], body: bytes
) -> dict[str, Any]:
    """Return a response in the form that Lambda expects."""
    try:
        text, is_base64 = body.decode(), False
    except UnicodeDecodeError:
        text, is_base64 = base64.b64encode(body).decode(), True
    lists: dict[str, list[str]] = {}
    for name, value in headers:
        lists.setdefault(name.decode("latin-1"), []).append(value.decode("latin-1"))
    header_field = (
        {"multiValueHeaders": lists}
        if request.multi
        else {"headers": {name: ", ".join(values) for name, values in lists.items()}}
    )
    return {"statusCode": status, "body": text, "isBase64Encoded": is_base64, **header_field}
