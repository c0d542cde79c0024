"""The adapter for Kling, for both versions of its API (v1 and v2). Pure."""

from collections.abc import Mapping

import msgspec

from submitter.errors import InvalidSettings, Problem
from submitter.vendors.base import VendorSetup
from submitter.vendors.kling.credentials import ApiKey, KeyPair
from submitter.vendors.kling.protocol import BASE_URL
from submitter.vendors.kling.v1 import KlingV1
from submitter.vendors.kling.v2 import KlingV2
from submitter.vendors.rest import check_base_url


def configure(settings: Mapping[str, str]) -> KlingV2 | KlingV1 | None:
    """Return the adapter for `api_key`, or for `access_key` and `secret_key`; None if no key is set.

    `api` and `base_url` are optional. Raises InvalidSettings.
    """
    api_key, access_key, secret_key = (settings.get(name, "") for name in ("api_key", "access_key", "secret_key"))
    base_url = settings.get("base_url", BASE_URL)
    api = settings.get("api") or ("v2" if api_key else "v1")
    problems = check_base_url("kling", base_url, BASE_URL)
    if api not in ("v1", "v2"):
        problems.append(Problem("KLING_API", repr(api), "v1 or v2", "Leave it out, or choose one of them."))
    if bool(access_key) != bool(secret_key) and not api_key:
        missing = "KLING_SECRET_KEY" if access_key else "KLING_ACCESS_KEY"
        problems.append(Problem(missing, "not set", "both keys of the pair", "Set both, or KLING_API_KEY."))
    if api == "v2" and not api_key and access_key:
        problems.append(
            Problem(
                "KLING_API", "'v2' with a key pair", "v2 takes API keys only", "Set KLING_API_KEY, or KLING_API=v1."
            )
        )
    if problems:
        raise InvalidSettings(problems)
    if api_key:
        return (KlingV2 if api == "v2" else KlingV1)(ApiKey(api_key), base_url)
    return KlingV1(KeyPair(access_key, secret_key), base_url) if access_key else None


def test_callback(now_ms: int) -> bytes:
    """Return the body that Kling's console sends to test a callback URL."""
    return msgspec.json.encode(
        {"id": "0", "status": "submitted", "outputs": [], "message": "", "create_time": now_ms, "update_time": now_ms}
    )


SETUP = VendorSetup(
    names=("api_key", "access_key", "secret_key", "api", "base_url", "webhook_secret"),
    credentials_remedy="Set KLING_API_KEY, or KLING_ACCESS_KEY and KLING_SECRET_KEY.",
    reader=KlingV2(ApiKey("")),
    configure=configure,
    test_callback=test_callback,
    sandbox="submitter.sandbox.kling:KlingSandbox",
)
