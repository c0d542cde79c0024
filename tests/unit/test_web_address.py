"""URLs as people write them: what can be opened, what a password breaks, and what is shown of them."""

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from submitter.web_address import (
    HOST_MAX,
    NOT_ENCODED,
    why_not_host,
    why_not_result,
    why_not_server,
    why_not_web,
    without_password,
)


@pytest.mark.parametrize(
    "url",
    [
        "https://cdn.example.com/a.mp4", "http://127.0.0.1:8080/a b".replace(" ", "%20"), "http://[::1]:8080/x",
        "https://a.example./x", "https://my_bucket.example.com/x?a=b@c#d", "https://user:pw@a.example/x",
        "https://bücher.example/x", "https://xn--bcher-kva.example/x", "http://localhost", "https://cdn.example/@x/1.mp4",
        "https://cdn.example:/x",
    ],
)  # fmt: skip
def test_a_valid_web_address_passes(url: str) -> None:
    assert why_not_web(url) is None


@pytest.mark.parametrize(
    "url",
    [
        "ftp://a.example/x", "//a.example/x", "http://", "http:///x", "http://a..b/x", "http://.a/x", "http://xn--a/x",
        "http://xn--/x", "http://a:99999/x", "http://a:0/x", "http://a:port/x", "http://[::1/x", "http://[::zz]/x",
        "https://a b/", "http://%zz/", "http://a\nb/", "https://a.example/\x00", "https://a.example/\udcff",
        f"http://{'a' * 64}.example/", f"http://{'a.' * 127}example/", "http://-a.example/", "http://a:80:80/",
    ],
)  # fmt: skip
def test_an_invalid_web_address_has_a_reason(url: str) -> None:
    assert why_not_web(url)


@given(
    st.text(alphabet=st.characters(exclude_categories=()), max_size=40), st.sampled_from(["", "http://", "https://"])
)
def test_what_passes_can_be_given_to_an_http_client(rest: str, scheme: str) -> None:
    url = scheme + rest
    if why_not_web(url) is None:
        request = httpx.Client().build_request("GET", url)
        assert request.url.host
        request.url.host.encode("idna" if request.url.host.isascii() else "utf-8")


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://relay:p%2Fw@db.example:5432/relay?schema=x", "postgresql:///relay", "redis://:pw@127.0.0.1/0",
        "kafka://u:p@a.example:9092,b.example:9092/topic", "amqp://guest@[::1]:5672/%2F",
    ],
)  # fmt: skip
def test_a_valid_server_passes(url: str) -> None:
    assert why_not_server(url) is None


@pytest.mark.parametrize("password", ["pa/ss", "12/34", "pa#ss", "pa?ss", "p@x/y", "pa@ss", "p[a", "a]b", "#", "/@"])
def test_a_password_that_breaks_its_url_is_reported_and_never_shown(password: str) -> None:
    url = f"postgresql://relay:{password}@db.example:5432/relay"
    assert why_not_server(url) == NOT_ENCODED
    assert without_password(url) == "postgresql://relay@db.example:5432/relay"


@pytest.mark.parametrize(
    "url", ["postgresql://db:99999/x", "postgresql://[::1/x", "postgresql://u:p@a..b/x", "x://a b"]
)
def test_an_invalid_server_has_a_reason(url: str) -> None:
    assert why_not_server(url)


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="@"), min_size=1, max_size=20))
def test_no_password_is_shown(password: str) -> None:
    secret = f"S3{password}T"
    assert secret not in without_password(f"amqp://me:{secret}@broker.example/x?y={secret}")


@given(st.text(max_size=300))
def test_any_text_is_a_host_or_has_a_reason(host: str) -> None:
    reason = why_not_host(host)
    assert reason is None or reason.startswith("its host is no")
    assert len(host) <= HOST_MAX + 1 or reason


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://relay@%2Fvar%2Frun%2Fpostgresql/relay",
        "amqp://me:secret@broker/events?client=me@here",
    ],
)
def test_sockets_and_queries_with_an_at_sign_are_accepted(url: str) -> None:
    assert why_not_server(url) is None


@pytest.mark.parametrize(
    ("url", "is_accepted"),
    [
        ("https://cdn.example.com/a video.mp4?x=1", True),
        ("https://my_bucket.example.com/v.mp4", True),
        ("javascript:alert(1)", False),
        ("https:///v.mp4", False),
        ("https://cdn.example.com/v.mp4\nSet-Cookie: x", False),
    ],
)
def test_a_results_url_is_as_the_vendor_wrote_it(url: str, is_accepted: bool) -> None:
    assert (why_not_result(url) is None) is is_accepted
