"""Webhook signatures (Standard Webhooks): verify inbound, sign outbound. Pure.

Source: the Standard Webhooks specification 1.0. A signature covers the bytes `{id}.{timestamp}.{body}`;
`v1` is HMAC-SHA256 (secret `whsec_<base64>`), `v1a` is Ed25519 (`whsk_` signs, `whpk_` verifies).
"""

import base64
import binascii
import hmac
from collections.abc import Mapping, Sequence

import msgspec

from submitter.callback_url import hmac_sha256
from submitter.errors import InvalidSettings, Problem, SignatureInvalid

TOLERANCE_S = 300
PUBLISHED_SECRET = "whsec_dGVzdHNlY3JldHRlc3RzZWNyZXR0ZXN0c2VjcmV0MTI="
"""The secret of Kling's public test vector; refused in settings."""

LEAST_BYTES = 16


class Secret(msgspec.Struct, frozen=True):
    """One signing secret: `scheme` is `v1` or `v1a`. `repr` hides the key."""

    scheme: str
    key: bytes

    def __repr__(self) -> str:
        return f"Secret({self.scheme})"


def read_secret(field: str, value: str) -> Secret:
    """Parse `whsec_...` or `whsk_...`; raise InvalidSettings, which names `field` and never the value."""
    prefix, _, encoded = value.strip().partition("_")
    try:
        key = base64.b64decode(encoded, validate=True)
    except binascii.Error:
        key = b""
    if value.strip() == PUBLISHED_SECRET:
        raise _problem(field, "the secret of Kling's public test vector", "it is public")
    if prefix == "whsec" and len(key) >= LEAST_BYTES:
        return Secret("v1", key)
    if prefix == "whsk" and len(key) in (32, 64):  # a seed, or a seed followed by its public key
        return Secret("v1a", key[:32])
    raise _problem(field, "not a valid secret", f"whsec_<base64 of {LEAST_BYTES} bytes or more> or whsk_<base64 of 32>")


def verify(secrets: Sequence[Secret], headers: Mapping[bytes, bytes], body: bytes, now_s: float) -> None:
    """Raise SignatureInvalid unless one of `secrets` (v1) signed these bytes within TOLERANCE_S of `now_s`.

    `headers` has lower-case names. Whatever their values, no other error is raised.
    """
    id, timestamp = headers.get(b"webhook-id"), headers.get(b"webhook-timestamp")
    signatures = headers.get(b"webhook-signature")
    if not id or not timestamp or not signatures:
        raise SignatureInvalid(
            "the callback is not signed: webhook-id, webhook-timestamp or webhook-signature is missing"
        )
    if not timestamp.isdigit() or len(timestamp) > 12 or abs(int(timestamp) - now_s) > TOLERANCE_S:
        raise SignatureInvalid(f"webhook-timestamp is malformed, or more than {TOLERANCE_S} s from now")
    signed = b"%s.%s.%s" % (id, timestamp, body)
    expected = [base64.b64encode(hmac_sha256(secret.key, signed)) for secret in secrets if secret.scheme == "v1"]
    for token in signatures.split(b" "):
        version, _, signature = token.partition(b",")
        if version == b"v1" and any(hmac.compare_digest(signature, good) for good in expected):
            return
    raise SignatureInvalid("no signature of the callback matches a configured secret")


def sign(secrets: Sequence[Secret], id: str, timestamp_s: int, body: bytes) -> dict[str, str]:
    """Return the headers that sign `body`: one signature per secret, v1 before v1a."""
    signed = f"{id}.{timestamp_s}.".encode() + body
    signatures = [_sign(secret, signed) for secret in sorted(secrets, key=lambda secret: secret.scheme)]
    headers = {"webhook-id": id, "webhook-timestamp": str(timestamp_s)}
    if signatures:
        headers["webhook-signature"] = " ".join(signatures)
    return headers


def public_key(secret: Secret) -> str:
    """Return the `whpk_...` that verifies what a v1a secret signs."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.from_private_bytes(secret.key).public_key().public_bytes_raw()
    return f"whpk_{base64.b64encode(key).decode()}"


def _sign(secret: Secret, signed: bytes) -> str:
    if secret.scheme == "v1":
        signature = hmac_sha256(secret.key, signed)
    else:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        signature = Ed25519PrivateKey.from_private_bytes(secret.key).sign(signed)
    return f"{secret.scheme},{base64.b64encode(signature).decode()}"


def _problem(field: str, value: str, limit: str) -> InvalidSettings:
    remedy = "Create one with `kling-relay keys new --for hook`, or copy it from the vendor's console."
    return InvalidSettings([Problem(field, value, limit, remedy)])
