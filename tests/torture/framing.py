"""Bytes that are no exact HTTP/1.1 request: conflicting lengths, bad chunks, other protocols, pieces of requests."""

import random

SMUGGLED = b"GET /admin HTTP/1.1\r\nhost: relay\r\n\r\n"
LENGTHS = (
    b"-1",
    b"+5",
    b"0x5",
    b"5, 5",
    b"5,6",
    b"5 5",
    b"1e1",
    b"",
    b" ",
    b"18446744073709551616",
    b"9" * 300,
    b"5\x00",
    b"\xd9\xa5",
    b"9223372036854775807",
    b"999999999",
)
ENCODINGS = (
    b"chunked, chunked",
    b"identity",
    b"gzip, chunked",
    b"chunked, gzip",
    b"xchunked",
    b"Chunked",
    b" chunked ",
    b"chunked\x00",
    b"\x0bchunked",
    b"chunked;q=1",
    b'"chunked"',
    b"",
    b"deflate",
)
CHUNKS = (
    b"-1\r\nx\r\n",
    b"ffffffffffffffffff\r\nx\r\n",
    b"g\r\nx\r\n",
    b"0x1\r\nx\r\n",
    b" 1\r\nx\r\n0\r\n\r\n",
    b"1\r\nxx\r\n0\r\n\r\n",
    b"1\nx\n0\n\n",
    b"1;" + b"a" * 60_000 + b"\r\nx\r\n0\r\n\r\n",
    b"1\r\nx0\r\n\r\n",
    b"7fffffffffffffff\r\nx\r\n",
    b"\r\n",
    b"1\r\n",
    b"00000000000000000000001\r\nx\r\n0\r\n\r\n",
    b"1\r\nx\r\n0\r\na: b\r\ncontent-length: 9\r\n\r\n",
    b"1 ; a\r\nx\r\n0\r\n\r\n",
    b"0\r\n" + b"t: x\r\n" * 20_000 + b"\r\n",
    b"1\r\nx\r\n" * 20_000 + b"0\r\n\r\n",
)
HEADERS = (
    b"a: b\r\n c: d\r\n",
    b"\ta: b\r\n",
    b"a : b\r\n",
    b"a\x00: b\r\n",
    b": b\r\n",
    b"a b: c\r\n",
    b"a\r\n",
    b"a: b\rc: d\r\n",
    b"a: b\nc: d\n",
    b"a: \x01\x02\r\n",
    b"\xff: a\r\n",
    b"content-length: 1\r\nContent-Length: 2\r\n",
    b"a: \x1b[2J\r\n",
    b"connection: close\r\n",
    b"connection: keep-alive, close, upgrade\r\n",
    b"connection: upgrade\r\nupgrade: websocket\r\n",
    b"connection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAA\r\n",
    b"expect: 100-continue\r\n",
    b"expect: x\r\n",
    b"connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-key: AAAA==\r\nsec-websocket-version: 13\r\n",
)
LINES = (
    "GET {} HTTP/1.0",
    "GET {} HTTP/0.9",
    "GET {} HTTP/9.9",
    "GET {} HTTP/2.0",
    "GET {} http/1.1",
    "GET {}",
    "get {} HTTP/1.1",
    "GET  {} HTTP/1.1",
    "GET {} HTTP/1.1 x",
    "GET\t{}\tHTTP/1.1",
    " GET {} HTTP/1.1",
    "\r\n\r\nPOST {} HTTP/1.1",
    "POST {} HTTP/1.1\r",
    "FOO {} HTTP/1.1",
    "G\x00T {} HTTP/1.1",
    "CONNECT relay:80 HTTP/1.1",
    "CONNECT {} HTTP/1.1",
    "OPTIONS * HTTP/1.1",
    "POST * HTTP/1.1",
    "GET http://relay{} HTTP/1.1",
    "GET http://[::1{} HTTP/1.1",
    "GET //{} HTTP/1.1",
    "GET {} \x00 HTTP/1.1",
    "GET {}\x00 HTTP/1.1",
    "GET {}\xe9\u2028 HTTP/1.1",
    "GET {}\ud83d HTTP/1.1",
    "GET {}#a HTTP/1.1",
    "GET relay{} HTTP/1.1",
    "POST {} HTTP/1.1\nhost: a",
    "PRI * HTTP/2.0\r\n\r\nSM\r\n",
    "GET {}?\x7f\x80 HTTP/1.1",
    "GET \x1b]0;owned\x07{} HTTP/1.1",
    "A" * 70_000 + " {} HTTP/1.1",
)
OTHERS = (
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)),
    b"SSH-2.0-x\r\n",
    b"EHLO x\r\n",
    b"\x00",
    b"\n" * 1000,
    b"\x04\x01\x00\x50\x7f\x00\x00\x01\x00",
    b"*1\r\n$4\r\nPING\r\n",
    b"\x80\x2e\x01\x00\x02",
    b"\r\n" * 40_000,
    b"HTTP/1.1 200 OK\r\n\r\n",
    b"PROXY TCP4 127.0.0.1 127.0.0.1 1 2\r\nGET / HTTP/1.1\r\n\r\n",
)


def misframed(chance: random.Random, url: str, good: bytes) -> bytes:
    """Return bytes for a connection to themselves. `good` is a whole request, `url` the path of a callback."""
    line = b"POST %s HTTP/1.1\r\nhost: relay\r\n" % url.encode()
    kind = chance.randrange(10)
    if kind == 0:  # lengths, alone and in conflict
        other = chance.choice((b"", b"content-length: 5\r\n", b"transfer-encoding: chunked\r\n"))
        return line + other + b"content-length: %s\r\n\r\n" % chance.choice(LENGTHS) + b"0\r\n\r\n" + SMUGGLED
    if kind == 1:
        encoding = b"transfer-encoding: %s\r\n" % chance.choice(ENCODINGS)
        length = chance.choice((b"", b"content-length: 4\r\n"))
        both = [length, encoding]
        chance.shuffle(both)
        return line + b"".join(both) + b"\r\n" + b"5\r\nhello\r\n0\r\n\r\n" + SMUGGLED
    if kind == 2:
        return line + b"transfer-encoding: chunked\r\n\r\n" + chance.choice(CHUNKS)
    if kind in (3, 4):
        ending = b"content-length: 2\r\n\r\n{}"
        return line + chance.choice(HEADERS) + chance.choice((b"", b"", chance.choice(HEADERS))) + ending
    if kind in (5, 6):
        start = chance.choice(LINES).replace("{}", url).encode(errors="surrogatepass")
        return start + b"\r\nhost: relay\r\n\r\n" + chance.choice((b"", SMUGGLED))
    if kind == 7:
        return chance.choice((*OTHERS, chance.randbytes(chance.randrange(1, 3000))))
    if kind == 8:
        # Each piece of a request waits for the receiver's bound, 10 s: only one in ten of these.
        whole = chance.randrange(10) > 0
        return b"\r\n" + good + b"\x00" if whole else good[: chance.randrange(1, len(good))]
    return b"".join(
        (chance.choice((line, good)) + chance.choice((b"\r\n", b"\n", b"\0", b"")))
        for _ in range(chance.randrange(1, 40))
    )
