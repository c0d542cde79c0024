"""Requests of strangers, by a seed: forged, malformed and hostile ones, with the answers that each may get.

Those with an exact framing (`is_framed`) follow each other on kept connections. Each of the others has a connection
to itself, because nothing can be said of what follows it.
"""

import random
from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec

from submitter.callback_url import mint
from tests.bench.servers import callback_body
from tests.torture.bodies import LIMIT, RING, broken_bodies, callback, path_of, post, signed
from tests.torture.framing import misframed

METHODS = ("GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "PROPFIND", "PURGE", "TRACE", "M-SEARCH", "REPORT")
ENDPOINTS = (
    "/tick",
    "/events",
    "/healthz",
    "/readyz",
    "/metrics",
    "/asyncapi.yaml",
    "/media/a.mp4/x",
    "/",
    "/callbacks/",
)
PIECES = (
    "..",
    ".",
    "%2e%2e",
    "%2f",
    "%5c",
    "..%2f..%2f",
    "%00",
    "%0d%0a",
    "%1b[2J",
    "%ff%fe",
    "%c0%af",
    "%ed%a0%80",
    "%",
    "%u002e",
    "callbacks",
    "kling",
    "novita",
    "open-1",
    "media",
    "etc",
    "passwd",
    "events",
    "tick",
    ";",
    "~",
    "$",
    "{}",
    "*",
    "|",
    "@",
    ":80",
    "?",
    "&a=b",
    "=",
    "%F0%9F%98%80",
    "a" * 300,
    "0",
    "",
    "//",
    "\\",
    "%252e",
    "bench.1.x",
    "<script>",
    "metrics",
    "readyz",
)
TIMES = ("", "0", "-1", "1e9", "99999999999999999999", "٣", "١٦٠٠٠٠٠٠٠٠", "0x10", "nan", "1 ", "\x7f")
SIGNATURES = (
    "",
    "v1",
    "v1,",
    "v1a,AAAA",
    "v1,=",
    "v2,x",
    "v1,\xff\xfe",
    " " * 500,
    "v1,A " * 2000,
    "v1,%s" % ("A" * 44),
)
QUERIES = ("", "?budget_s=1", "?access_token=x", "?access_token=%ff%00", "?" + "a&" * 3000, "?budget_s=%d9%a3")
RANGES = ("0-", "-1", "9-1", "x", "0-0," * 3000, "-" * 500, ",".join(f"{n}-{n}" for n in range(0, 4000, 2)))
HEADS = (
    "",
    "authorization: Bearer x\r\n",
    "authorization: Bearer \r\n",
    "authorization: \xff\r\n",
    "aeg-event-type: SubscriptionValidation\r\n",
    "webhook-request-origin: *\r\n",
    *(f"range: bytes={ranges}\r\n" for ranges in RANGES),
    *(f"range: bytes={ranges}\r\nif-range: \x80\r\n" for ranges in RANGES),
)

T = TypeVar("T")


class Hostile(msgspec.Struct, frozen=True):
    """One request; `allowed` are the statuses that may answer it (None: any below 500, or no answer)."""

    kind: str
    data: bytes
    allowed: frozenset[int] | None = None
    is_head: bool = False
    is_framed: bool = True


class Targets(msgspec.Struct, frozen=True):
    """Tasks in the ledger: those that nothing may change, those that have ended, those that get broken bodies."""

    now_s: float
    open: int = 400
    done: int = 100
    odd: int = 50


NOT_FOUND, FORBIDDEN, UNSIGNED = frozenset({404}), frozenset({403}), frozenset({401})
ACCEPTED, TOO_LARGE, NO_METHOD = frozenset({200}), frozenset({413}), frozenset({405})
REFUSED = frozenset(range(400, 500))


class Strangers:
    """Makes requests. The same seed makes the same ones."""

    def __init__(self, seed: int, targets: Targets) -> None:
        self._random = random.Random(seed)
        self._now_s = now_s = targets.now_s
        self._targets = targets
        self._small, self._large = broken_bodies()
        self._urls = [path_of("open", n, now_s) for n in range(targets.open)]
        self._expired = [path_of("open", n, now_s, lives_s=-1) for n in range(targets.open)]
        self._odd = [path_of("odd", n, now_s) for n in range(targets.odd)]
        self._replays = [
            callback("done", n, s, now_s) for n in range(targets.done) for s in ("processing", "succeeded")
        ]
        self._mutable: list[bytes] = [*self._replays, *(post(url, b"", b"{}") for url in self._urls[:50])]
        makers: dict[Callable[[], Hostile], float] = {
            self.wrong_token: 30, self.expired: 6, self.unsigned: 8, self.wrongly_signed: 14, self.of_another_task: 6,
            self.replayed: 5, self.replayed_late: 3, self.broken: 2, self.wrong_method: 4, self.too_large: 0.3,
            self.wild_path: 8, self.endpoint: 6, self.wild_headers: 4, self.misframed: 3, self.mutated: 4,
        }  # fmt: skip
        self._makers, self._weights = list(makers), list(makers.values())

    def make(self, count: int) -> list[Hostile]:
        """Return the next `count` requests."""
        return [maker() for maker in self._random.choices(self._makers, self._weights, k=count)]

    # -- callback URLs ------------------------------------------------------------------------

    def wrong_token(self) -> Hostile:
        pick, url = self._random.random, self._pick(self._urls)
        base, _, token = url.rpartition("/")
        place = int(pick() * len(token))
        token = self._pick([
            self._pick(self._urls).rpartition("/")[2] + "x",
            token[:place] + chr(ord(token[place]) ^ 1) + token[place + 1 :] if token[place] not in "./" else token[1:],
            token[:-1], token + "=", token.replace("bench", "relay"), token.replace(".", ".9", 1), "", "..", token * 3,
            token.upper(), "bench.." + token.rpartition(".")[2], mint(RING, "oxen", "open-1", int(self._now_s) + 999),
            "A" * 60,
        ])  # fmt: skip
        path = f"{base}/{token}" if pick() < 0.8 else f"/callbacks/{self._pick(PIECES[9:18])}/open-1/{token}"
        if pick() < 0.2:
            method = self._pick(METHODS)
            data = f"{method} {path} HTTP/1.1\r\nhost: relay\r\n\r\n".encode()
            return Hostile("wrong token", data, NOT_FOUND | {403, 400}, is_head=method == "HEAD")
        body = self._body()
        head = signed(body, self._now_s) if pick() < 0.3 else b""
        return Hostile("wrong token", self._framed(path, head, body), NOT_FOUND | {403, 400})

    def expired(self) -> Hostile:
        return Hostile("expired URL", self._framed(self._pick(self._expired), b"", self._body()), FORBIDDEN)

    def unsigned(self) -> Hostile:
        return Hostile("unsigned", self._framed(self._pick(self._urls), b"", self._body()), UNSIGNED)

    def wrong_method(self) -> Hostile:
        method = self._pick(METHODS)
        data = f"{method} {self._pick(self._urls)} HTTP/1.1\r\nhost: relay\r\n\r\n".encode()
        return Hostile("wrong method", data, NO_METHOD, is_head=method == "HEAD")

    # -- signatures ---------------------------------------------------------------------------

    def wrongly_signed(self) -> Hostile:
        number, now_s = self._number(self._targets.open), self._now_s
        body = callback_body("open", number, "succeeded", now_s)
        good = signed(body, now_s)
        id, timestamp, signature = good.splitlines(keepends=True)
        head = self._pick([
            signed(body, now_s, b"v" * 32), signed(body + b" ", now_s), signed(b"", now_s), timestamp + signature,
            id + signature, id + timestamp, good.replace(b"v1,", b"v1a,"), good.replace(b"msg_", b"msg-"),
            id + b"webhook-timestamp: %s\r\n" % self._pick(TIMES).encode() + signature,
            id + timestamp + b"webhook-signature: %s\r\n" % self._pick(SIGNATURES).encode(),
            good + b"webhook-signature: v1,AAAA\r\n", good + b"webhook-timestamp: 1\r\n",
        ])  # fmt: skip
        return Hostile("wrong signature", self._framed(self._urls[number], head, body), UNSIGNED | {400})

    def of_another_task(self) -> Hostile:
        body = callback_body("open", self._number(self._targets.open), "succeeded", self._now_s)
        done = self._number(self._targets.done)
        path = path_of("done", done, self._now_s)
        return Hostile("body of another task", self._framed(path, signed(body, self._now_s), body), NOT_FOUND)

    def replayed(self) -> Hostile:
        return Hostile("replayed", self._pick(self._replays), ACCEPTED)

    def replayed_late(self) -> Hostile:
        number, then_s = self._number(self._targets.open), self._now_s - 301 - self._number(10**6)
        body = callback_body("open", number, "failed", then_s)
        return Hostile("replayed late", post(self._urls[number], signed(body, then_s), body), UNSIGNED)

    def broken(self) -> Hostile:
        body = self._body()
        data = self._framed(self._pick(self._odd), signed(body, self._now_s), body)
        return Hostile("signed, not a callback", data, ACCEPTED | NOT_FOUND)

    # -- everything else ----------------------------------------------------------------------

    def too_large(self) -> Hostile:
        body = b"[" * (LIMIT + 1 + self._number(LIMIT))
        return Hostile("too large", self._framed(self._pick(self._urls), b"", body), TOO_LARGE)

    def wild_path(self) -> Hostile:
        pieces = self._random.choices(PIECES, k=self._random.choice((1, 2, 3, 5, 8, 60)))
        path = self._pick(("/", "/", "/callbacks/", "/media/", "")) + self._pick(("/", "", "%2f")).join(pieces)
        method = self._pick(("GET", "POST", *METHODS))
        data = f"{method} {path} HTTP/1.1\r\nhost: relay\r\ncontent-length: 0\r\n\r\n".encode()
        return Hostile("wild path", data, is_head=method == "HEAD", is_framed=path.startswith("/"))

    def endpoint(self) -> Hostile:
        method, path = self._pick(("GET", "POST", *METHODS)), self._pick(ENDPOINTS)
        head = self._pick(HEADS)
        body = self._body() if method == "POST" else b""
        line = f"{method} {path}{self._pick(QUERIES)} HTTP/1.1\r\nhost: relay\r\ncontent-length: {len(body)}\r\n"
        is_open = path in ("/healthz", "/readyz", "/metrics", "/asyncapi.yaml")
        data = f"{line}{head}\r\n".encode("latin-1") + body
        return Hostile("endpoint", data, None if is_open else REFUSED, is_head=method == "HEAD")

    def wild_headers(self) -> Hostile:
        body, url = self._body(), self._pick(self._urls)
        many = b"".join(b"x-%d: %d\r\n" % (n, n) for n in range(self._pick((1, 50, 1000))))
        head = self._pick([
            b"a: " + b"x" * self._pick((1, 5000, 60_000)) + b"\r\n", many, b"host: other\r\nhost: third\r\n",
            b"content-encoding: gzip\r\ncontent-type: application/json; charset=utf-7\r\n", b"a: \x80\xff\xfe\r\n",
            b"x-forwarded-for: 127.0.0.1\r\nx-forwarded-host: evil\r\n", b"cookie: " + b"a=b;" * 5000 + b"\r\n",
            b"accept: */*\r\naccept: \r\naccept:\r\n", b"a:\r\n" * 400, b"te: trailers\r\n",
        ])  # fmt: skip
        return Hostile("wild headers", self._framed(url, head, body), UNSIGNED | {400, 431})

    def misframed(self) -> Hostile:
        return Hostile(
            "misframed",
            misframed(self._random, self._pick(self._urls), self._pick(self._replays)),
            None,
            is_framed=False,
        )

    def mutated(self) -> Hostile:
        data = bytearray(self._pick(self._mutable))
        for _ in range(self._random.choice((1, 1, 2, 5))):
            place, length = self._number(len(data)), self._random.choice((1, 1, 2, 10))
            change = self._number(4)
            if change == 0:
                data[place : place + length] = self._random.randbytes(length)
            elif change == 1:
                del data[place : place + length]
            elif change == 2:
                data[place:place] = data[place : place + 20 * length]
            else:
                data[place:place] = self._pick(
                    (b"\r\n", b"\0", b"\r\n ", b": ", b"\r\n\r\n", b"\x80", b"chunked", b"0")
                )
        return Hostile("mutated", bytes(data), None, is_framed=False)

    # -- parts --------------------------------------------------------------------------------

    def _pick(self, values: Sequence[T]) -> T:
        return values[int(self._random.random() * len(values))]

    def _number(self, below: int) -> int:
        return int(self._random.random() * below)

    def _body(self) -> bytes:
        return self._pick(self._large if self._random.random() < 0.03 else self._small)

    def _framed(self, path: str, head: bytes, body: bytes) -> bytes:
        """Return a request with this body, some of them in chunks."""
        if self._random.random() < 0.9 or not body:
            return post(path, head, body)
        size = self._number(len(body)) + 1
        extension = self._pick((b"", b"", b";a=b", b";x"))
        chunks = [body[at : at + size] for at in range(0, len(body), size)][:200]
        rest = body[200 * size :]
        sent = b"".join(b"%x%s\r\n%s\r\n" % (len(c), extension, c) for c in ([*chunks, rest] if rest else chunks))
        start = b"POST %s HTTP/1.1\r\nhost: relay\r\n" % path.encode()
        return start + head + b"transfer-encoding: chunked\r\n\r\n" + sent + b"0\r\n\r\n"
