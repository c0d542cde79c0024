"""Callback URLs: signed, bound to one task, expiring, valid across key rotation."""

import base64
import hashlib
import hmac

import pytest
from hypothesis import given
from hypothesis import strategies as st

from submitter.callback_url import URL_LIVES_S, Key, KeyRing, callback_url, check, hmac_sha256, mint, redact
from submitter.errors import InvalidSettings, UrlExpired, UrlUnknown

NOW = 1_781_080_800
OLD = Key("old", b"o" * 32)
NEW = Key("new", b"n" * 32)
RING = KeyRing((NEW, OLD))


def token_of(url: str) -> str:
    return url.rpartition("/")[2]


def test_a_url_is_valid_for_its_task_until_it_expires() -> None:
    url = callback_url("https://relay.example.com/", RING, "kling", "order.1~a", NOW)
    assert url.startswith("https://relay.example.com/callbacks/kling/order.1~a/new.")
    check(RING, "kling", "order.1~a", token_of(url), NOW + URL_LIVES_S)
    with pytest.raises(UrlExpired):
        check(RING, "kling", "order.1~a", token_of(url), NOW + URL_LIVES_S + 1)
    for vendor, id in (("novita", "order.1~a"), ("kling", "order.1~b")):
        with pytest.raises(UrlUnknown):
            check(RING, vendor, id, token_of(url), NOW)


def test_a_rotated_key_verifies_until_it_is_removed() -> None:
    token = mint(KeyRing((OLD,)), "kling", "a", NOW + 10)
    check(RING, "kling", "a", token, NOW)
    with pytest.raises(UrlUnknown):
        check(KeyRing((NEW,)), "kling", "a", token, NOW)


def test_a_token_of_one_purpose_is_valid_for_no_other() -> None:
    """Callback and media URLs share the keys: what is signed names the purpose, and can be split in one way only."""
    callback, media = mint(RING, "kling", "a.mp4", NOW + 10), mint(RING, "media", "a.mp4", NOW + 10)
    check(RING, "kling", "a.mp4", callback, NOW)
    check(RING, "media", "a.mp4", media, NOW)
    for purpose, token in (("media", callback), ("kling", media)):
        with pytest.raises(UrlUnknown):
            check(RING, purpose, "a.mp4", token, NOW)
    mac = callback.rpartition(".")[2]
    for vendor, id, expiry in (
        ("kling\na.mp4", str(NOW + 10), ""), ("kling", f"a.mp4\n{NOW + 10}", ""), ("kling", "a.mp4", f"\n{NOW + 10}"),
        ("kling", "a", f"mp4\n{NOW + 10}"), ("", "kling\na.mp4", str(NOW + 10)), ("kling", "a.mp4", f"0{NOW + 10}"),
    ):  # fmt: skip
        with pytest.raises(UrlUnknown):
            check(RING, vendor, id, f"new.{expiry}.{mac}", NOW)
    with pytest.raises(UrlUnknown):  # a key is used under its own name only
        check(RING, "kling", "a.mp4", callback.replace("new.", "old.", 1), NOW)


@given(st.text(max_size=80), st.text(max_size=10), st.text(max_size=10))
def test_any_forged_token_raises_url_unknown(token: str, vendor: str, id: str) -> None:
    with pytest.raises(UrlUnknown):
        check(RING, vendor, id, token, NOW)


@given(st.integers(0, 60), st.sampled_from("ABCxyz019._-"))
def test_a_token_with_one_changed_character_is_rejected(position: int, character: str) -> None:
    token = mint(RING, "kling", "a", NOW + 10)
    changed = token[: position % len(token)] + character + token[position % len(token) + 1 :]
    if changed != token:
        with pytest.raises(UrlUnknown):
            check(RING, "kling", "a", changed, NOW)


@given(st.binary(min_size=1, max_size=200), st.binary(max_size=300))
def test_the_hmac_agrees_with_the_standard_library(key: bytes, message: bytes) -> None:
    assert hmac_sha256(key, message) == hmac.digest(key, message, hashlib.sha256)


def test_redact_hides_the_token_of_every_callback_url() -> None:
    url = callback_url("https://relay.example.com", RING, "kling", "a", NOW)
    hidden = redact(f'{{"webhook":{{"url":"{url}"}}}} and {url} again')
    assert token_of(url) not in hidden
    assert hidden.count("/callbacks/kling/a/[hidden]") == 2


def test_a_key_ring_is_parsed_and_never_shows_its_secrets() -> None:
    text = ",".join(f"{key.id}:{base64.b64encode(key.secret).decode()}" for key in (NEW, OLD))
    ring = KeyRing.read(text)
    assert ring == RING
    assert "nnnn" not in repr(ring)
    short = base64.b64encode(b"s" * 8).decode()
    with pytest.raises(InvalidSettings) as refused:
        KeyRing.read(f"{text},new:{base64.b64encode(b'x' * 32).decode()},x:{short}")
    assert len(refused.value.problems) == 2
    assert short not in str(refused.value)
