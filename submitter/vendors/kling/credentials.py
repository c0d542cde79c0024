"""Kling's credentials: an API key, or a key pair that signs a JWT (HS256). Pure."""

import base64
import hmac

import msgspec


class ApiKey(msgspec.Struct, frozen=True):
    """An API key, valid for every model of both API versions."""

    secret: str

    def token(self, now_s: float) -> str:
        """Return the bearer token."""
        return self.secret

    def __repr__(self) -> str:
        return "ApiKey([hidden])"


class KeyPair(msgspec.Struct, frozen=True):
    """An access key and a secret key, valid for the v1 API only."""

    access_key: str
    secret_key: str

    def token(self, now_s: float) -> str:
        """Return a JWT that is valid for 30 minutes, signed with HS256."""
        head = _base64url(b'{"alg":"HS256","typ":"JWT"}')
        claims = {"iss": self.access_key, "exp": int(now_s) + 1800, "nbf": int(now_s) - 5}
        signed = head + b"." + _base64url(msgspec.json.encode(claims))
        return (signed + b"." + _base64url(hmac.digest(self.secret_key.encode(), signed, "sha256"))).decode()

    def __repr__(self) -> str:
        return "KeyPair([hidden])"


def _base64url(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")
