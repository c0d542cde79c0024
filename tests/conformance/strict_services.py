"""Strict stand-ins for cloud services that cannot run locally: Google Pub/Sub, Azure Event Grid, Azure Service Bus.

Each refuses a request that the documentation of its HTTP API does not allow. `received` has the accepted messages.
"""

import base64
import hashlib
import hmac
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qs, quote_plus, unquote_plus

import msgspec
from cloudevents.core.bindings.http import HTTPMessage, from_structured
from cloudevents.core.formats.json import JSONFormat
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

KEY = base64.b64encode(b"a key with / and + inside: \xff\xfe\xfb").decode()


class Refused(Exception):
    """The refusal of a request, with its HTTP status."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def require(is_valid: object, status: int, reason: str) -> None:
    if not is_valid:
        raise Refused(status, reason)


class StrictService(ABC):
    """One service: its routes, the messages that it received, and whether its topic exists."""

    too_large_bytes: int

    def __init__(self) -> None:
        self.received: list[Mapping[str, Any]] = []
        self.exists = True
        self.missing_status = 404

    async def answer(self, request: Request) -> Response:
        try:
            require(self.exists or "token" in request.url.path, self.missing_status, "the topic does not exist")
            return self.handle(request, await request.body())
        except Refused as refused:
            return JSONResponse({"error": {"code": refused.status, "message": str(refused)}}, refused.status)

    @abstractmethod
    def handle(self, request: Request, body: bytes) -> Response: ...

    def app(self) -> Starlette:
        return Starlette(routes=[Route("/{path:path}", self.answer, methods=["POST", "GET", "HEAD"])])


class MockPubsub(StrictService):
    """Pub/Sub's `publish` and `testIamPermissions`, and Google's token endpoint for a service account."""

    too_large_bytes = 10_000_000

    def __init__(self) -> None:
        super().__init__()
        self.key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self.tokens = 0

    def account(self, url: str) -> str:
        """Return the key file of a service account."""
        pem = self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return json.dumps(
            {
                "type": "service_account",
                "project_id": "acme",
                "private_key_id": "1",
                "private_key": pem.decode(),
                "client_email": "relay@acme.iam.gserviceaccount.com",
                "token_uri": f"{url}/token",
            }
        )

    def handle(self, request: Request, body: bytes) -> Response:
        if request.url.path == "/token":
            return self.token(body)
        authorization = request.headers.get("authorization", "")
        require(authorization in [f"Bearer token-{n + 1}" for n in range(self.tokens)], 401, "UNAUTHENTICATED")
        require(request.headers.get("content-type") == "application/json", 400, "not JSON")
        topic, _, verb = request.url.path.removeprefix("/v1/").partition(":")
        require(topic == "projects/acme/topics/orders", 404, "NOT_FOUND")
        request_body = json.loads(body)
        if verb == "testIamPermissions":
            return JSONResponse({"permissions": request_body["permissions"]})
        require(verb == "publish" and set(request_body) == {"messages"}, 400, "INVALID_ARGUMENT")
        require(len(request_body["messages"]) <= 1000 and len(body) <= 10_000_000, 400, "the request is too large")
        # "All PubsubMessages published in a given PublishRequest must specify the same ordering_key value."
        require(len({message.get("orderingKey") for message in request_body["messages"]}) == 1, 400, "ordering keys")
        for message in request_body["messages"]:
            require(set(message) == {"data", "attributes", "orderingKey"}, 400, "INVALID_ARGUMENT")
            require(0 < len(message["orderingKey"].encode()) <= 1024, 400, "the ordering key is too long")
            for name, value in message["attributes"].items():
                require(len(name.encode()) <= 256 and len(value.encode()) <= 1024, 400, "an attribute is too long")
            self.received.append(message | {"body": base64.b64decode(message["data"], validate=True)})
        return JSONResponse({"messageIds": [str(n) for n in range(len(request_body["messages"]))]})

    def token(self, body: bytes) -> Response:
        """Exchange a signed JWT assertion (RFC 7523) for an access token."""
        form = parse_qs(body.decode())
        head, claims, signature = (part + "==" for part in form["assertion"][0].split("."))
        try:
            self.key.public_key().verify(
                base64.urlsafe_b64decode(signature),
                f"{head[:-2]}.{claims[:-2]}".encode(),
                padding.PKCS1v15(),
                hashes.SHA256(),
            )
        except InvalidSignature:
            return JSONResponse({"error": "invalid_grant"}, 400)
        claim_set = json.loads(base64.urlsafe_b64decode(claims))
        require(claim_set["scope"] == "https://www.googleapis.com/auth/pubsub", 400, "invalid_scope")
        self.tokens += 1
        return JSONResponse({"access_token": f"token-{self.tokens}", "expires_in": 3600, "token_type": "Bearer"})


class MockEventGrid(StrictService):
    """A custom topic and a namespace topic, authenticated by a key or by an Entra ID token."""

    too_large_bytes = 1_048_576

    def handle(self, request: Request, body: bytes) -> Response:
        if request.method == "HEAD":
            return Response(status_code=404)
        if request.url.path == "/msi/token":
            return entra_token(request, "https://eventgrid.azure.net")
        path, query, headers = request.url.path, request.url.query, request.headers
        if headers.get("authorization") != "Bearer entra-token":
            if (path, query) == ("/api/events", "api-version=2018-01-01"):
                require(headers.get("aeg-sas-key") == KEY, 401, "Unauthorized")
            else:
                require(headers.get("authorization") == f"SharedAccessKey {KEY}", 401, "Unauthorized")
        known = {("/api/events", "api-version=2018-01-01"), ("/topics/orders:publish", "api-version=2024-06-01")}
        require((path, query) in known, 404, "NotFound")
        require(headers.get("content-type") == "application/cloudevents-batch+json; charset=utf-8", 415, "type")
        require(len(body) <= 1_048_576, 413, "RequestEntityTooLarge")
        for event in json.loads(body):
            raw = HTTPMessage({"content-type": "application/cloudevents+json"}, json.dumps(event).encode())
            read = from_structured(raw, JSONFormat())  # the reference SDK must be able to read it
            self.received.append({"id": read.get_id(), "body": msgspec.json.encode(event)})
        return Response(status_code=200)


class MockServiceBus(StrictService):
    """One queue, authenticated by a shared access signature or by an Entra ID token."""

    too_large_bytes = 262_145

    def __init__(self, now_s: float) -> None:
        super().__init__()
        self.now_s = now_s
        self.missing_status = 410

    def handle(self, request: Request, body: bytes) -> Response:
        if request.url.path == "/msi/token":
            return entra_token(request, "https://servicebus.azure.net")
        if request.method == "HEAD":
            return Response(status_code=401)
        require(request.url.path == "/orders/messages", 410, "Gone")
        self.authenticate(request.headers.get("authorization", ""))
        require(len(body) <= 262_144, 403, "QuotaExceeded: the message is too large")
        broker = json.loads(request.headers["brokerproperties"])
        require({"MessageId", "SessionId"} <= set(broker), 400, "BadRequest")
        properties = {}
        for name, value in request.headers.items():
            if name.startswith("cloudevents_") or name == "traceparent":
                require(value[:1] == value[-1:] == '"', 400, f"{name} is not a quoted string")
                properties[name] = json.loads(value)
        type = request.headers["content-type"]
        self.received.append({"body": body, "broker": broker, "properties": properties, "type": type})
        return Response(status_code=201)

    def authenticate(self, authorization: str) -> None:
        if authorization == "Bearer entra-token":
            return
        scheme, _, rest = authorization.partition(" ")
        require(scheme == "SharedAccessSignature", 401, "MissingToken")
        fields = dict(part.split("=", 1) for part in rest.split("&"))
        resource = "https://acme.servicebus.windows.net/orders"
        require(unquote_plus(fields["sr"]) == resource and fields["skn"] == "sender", 401, "InvalidToken")
        require(int(fields["se"]) > self.now_s, 401, "ExpiredToken")
        signed = hmac.new(KEY.encode(), f"{quote_plus(resource)}\n{fields['se']}".encode(), hashlib.sha256).digest()
        require(unquote_plus(fields["sig"]) == base64.b64encode(signed).decode(), 401, "InvalidSignature")


def entra_token(request: Request, resource: str) -> Response:
    """Answer like the managed identity endpoint of an Azure container."""
    require(request.headers.get("x-identity-header") == "identity-secret", 401, "no identity header")
    require(request.query_params["resource"] == resource, 400, "another resource")
    return JSONResponse(
        {"access_token": "entra-token", "expires_on": "4102444800", "resource": resource, "token_type": "Bearer"}
    )
