"""Webhook signatures, checked against independent Standard Webhooks implementations."""

import base64
import hmac
import json
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import standardwebhooks
import svix.webhooks
from hypothesis import example, given
from hypothesis import strategies as st

from receiver.signature import PUBLISHED_SECRET, Secret, public_key, read_secret, sign, verify
from submitter.errors import InvalidSettings, SignatureInvalid
from tests.conftest import needs
from tests.world import HOOK_SECRET

NOW = 1781080794
BODY = b'{"id":"1234567890","status":"succeeded","message":"","create_time":1781080778802,"update_time":1781080794151}'
HEADERS = {
    b"webhook-id": b"9876543210",
    b"webhook-timestamp": b"1781080794",
    b"webhook-signature": b"v1,UsKlJP00XoQyOn410NM9xv34sP+Gl0jnOO9Lcpr7NJ4=",
}
SECRET = Secret("v1", base64.b64decode(PUBLISHED_SECRET.removeprefix("whsec_")))
OTHER = Secret("v1", b"o" * 32)
ED = Secret("v1a", b"e" * 32)
JS = Path(__file__).parent.parent / "js"


def test_klings_test_vector_is_accepted() -> None:
    verify([SECRET], HEADERS, BODY, NOW)


def test_klings_public_test_secret_is_refused_in_settings() -> None:
    with pytest.raises(InvalidSettings, match="it is public"):
        read_secret("KLING_WEBHOOK_SECRET", PUBLISHED_SECRET)


@pytest.mark.parametrize(
    "changes",
    [
        {b"webhook-id": b"9876543211"},
        {b"webhook-id": b""},
        {b"webhook-timestamp": b"1781080795"},
        {b"webhook-timestamp": b"1781080794.0"},
        {b"webhook-timestamp": b"-1781080794"},
        {b"webhook-timestamp": b"9" * 400},
        {b"webhook-signature": b"v1"},
        {b"webhook-signature": b"v1,,"},
        {b"webhook-signature": b"v2,UsKlJP00XoQyOn410NM9xv34sP+Gl0jnOO9Lcpr7NJ4="},
        {b"webhook-signature": b"v1,UsKlJP00XoQyOn410NM9xv34sP+Gl0jnOO9Lcpr7NJ5="},
        {b"webhook-signature": "v1,ünïcode".encode()},
    ],
)
def test_a_changed_header_is_refused(changes: dict[bytes, bytes]) -> None:
    with pytest.raises(SignatureInvalid):
        verify([SECRET], HEADERS | changes, BODY, NOW)


@pytest.mark.parametrize("missing", list(HEADERS))
def test_an_unsigned_callback_is_refused(missing: bytes) -> None:
    with pytest.raises(SignatureInvalid, match="not signed"):
        verify([SECRET], {name: value for name, value in HEADERS.items() if name != missing}, BODY, NOW)


@pytest.mark.parametrize("now", [NOW - 301, NOW + 301])
def test_a_timestamp_outside_the_tolerance_is_refused(now: int) -> None:
    with pytest.raises(SignatureInvalid, match="300 s"):
        verify([SECRET], HEADERS, BODY, now)


def test_during_a_rotation_one_matching_secret_is_enough() -> None:
    both = HEADERS[b"webhook-signature"] + b" v1,AAAA"
    verify([OTHER, SECRET], HEADERS | {b"webhook-signature": both}, BODY, NOW)


@given(st.binary(max_size=60), st.binary(max_size=20), st.binary(max_size=80), st.binary(max_size=50))
@example(b"a", b"1781080794", b"v1,\xff\xfe  v1,x,y", b"\xff")
def test_arbitrary_headers_raise_only_signature_invalid(id: bytes, stamp: bytes, signed: bytes, body: bytes) -> None:
    headers = {b"webhook-id": id, b"webhook-timestamp": stamp, b"webhook-signature": signed}
    with pytest.raises(SignatureInvalid):
        verify([SECRET], headers, body, NOW)


def _now() -> int:
    return int(datetime.now(UTC).timestamp())


@pytest.mark.parametrize("body", [BODY, '{"prompt":"ü, 猫"}'.encode()])
@pytest.mark.parametrize("secrets", [[OTHER], [OTHER, ED], [SECRET, OTHER]])
def test_two_python_libraries_verify_our_signatures(secrets: list[Secret], body: bytes) -> None:
    headers = sign(secrets, "evt_1", _now(), body)
    encoded = base64.b64encode(OTHER.key).decode()
    standardwebhooks.Webhook(encoded).verify(body, headers)
    named = {name.replace("webhook", "svix"): value for name, value in headers.items()}
    svix.webhooks.Webhook(encoded).verify(body, named)


def test_we_verify_the_librarys_signatures() -> None:
    moment = datetime.now(UTC)
    signature = standardwebhooks.Webhook(base64.b64encode(OTHER.key).decode()).sign("m1", moment, BODY.decode())
    headers = {
        b"webhook-id": b"m1",
        b"webhook-timestamp": str(int(moment.timestamp())).encode(),
        b"webhook-signature": signature.encode(),
    }
    verify([OTHER], headers, BODY, moment.timestamp())


def test_the_npm_library_verifies_our_signatures(tmp_path: Path) -> None:
    needs("node with npm", is_there=bool(shutil.which("node") and shutil.which("npm")))
    shutil.copytree(JS, tmp_path / "js")
    install = subprocess.run(
        ["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts"],
        cwd=tmp_path / "js",
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    needs("npm's registry", is_there=install.returncode == 0)
    secret = read_secret("test", HOOK_SECRET)
    given: dict[str, Any] = {
        "secret": HOOK_SECRET,
        "body": BODY.decode(),
        "headers": sign([secret, ED], "evt_1", _now(), BODY),
    }

    def verify_in_node() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["node", "verify.mjs"],
            cwd=tmp_path / "js",
            input=json.dumps(given),
            capture_output=True,
            text=True,
            check=False,
        )

    verified = verify_in_node()
    assert verified.stdout.strip() == "verified", verified.stderr
    given["body"] += " "
    assert verify_in_node().returncode != 0


def test_v1a_is_ed25519_and_comes_after_v1() -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    first, second = sign([ED, OTHER], "evt_1", NOW, BODY)["webhook-signature"].split(" ")
    assert first.startswith("v1,")
    version, _, signature = second.partition(",")
    assert version == "v1a"
    key = Ed25519PublicKey.from_public_bytes(base64.b64decode(public_key(ED).removeprefix("whpk_")))
    key.verify(base64.b64decode(signature), b"evt_1.%d." % NOW + BODY)


def test_a_key_of_one_scheme_is_never_used_for_the_other() -> None:
    """The public key of v1a is known to every consumer: taken for the secret of v1, it would let them sign."""
    signed = b"m1.%d." % NOW + BODY
    public = base64.b64decode(public_key(ED).removeprefix("whpk_"))
    for key in (public, public_key(ED).encode(), ED.key):
        signature = base64.b64encode(hmac.digest(key, signed, "sha256"))
        for version in (b"v1", b"v1a"):
            headers = {
                b"webhook-id": b"m1",
                b"webhook-timestamp": str(NOW).encode(),
                b"webhook-signature": version + b"," + signature,
            }
            for secrets in ([ED], [ED, OTHER]):
                with pytest.raises(SignatureInvalid):
                    verify(secrets, headers, BODY, NOW)
    signatures = dict(one.split(",") for one in sign([OTHER, ED], "m1", NOW, BODY)["webhook-signature"].split())
    right = base64.b64encode(hmac.digest(OTHER.key, signed, "sha256")).decode()
    assert signatures["v1"] == right
    assert len(base64.b64decode(signatures["v1a"])) == 64  # Ed25519, no HMAC
    with pytest.raises(InvalidSettings):
        read_secret("test", public_key(ED))


def test_repr_and_errors_hide_secrets() -> None:
    assert "bytes" not in repr(OTHER)
    assert str(OTHER.key) not in repr(OTHER)
    with pytest.raises(InvalidSettings) as refused:
        read_secret("hook[a].secret", "whsec_c2hvcnQ=")
    assert "c2hvcnQ" not in str(refused.value)
