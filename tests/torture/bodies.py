"""Bodies of callbacks: authentic ones with their signature, and those that are made to break a parser."""

import base64
import gzip
import hmac
import itertools

from submitter.callback_url import URL_LIVES_S, KeyRing, mint
from tests.bench.servers import KEY, WEBHOOK_KEY, callback_body

RING = KeyRing.read(f"bench:{KEY}")
LIMIT = 64 * 1024


def path_of(prefix: str, number: int, now_s: float, *, lives_s: int = URL_LIVES_S) -> str:
    """Return the path of a task's callback URL."""
    id = f"{prefix}-{number}"
    return f"/callbacks/kling/{id}/{mint(RING, 'kling', id, int(now_s) + lives_s)}"


_ids = itertools.count()


def signed(body: bytes, now_s: float, key: bytes = WEBHOOK_KEY) -> bytes:
    """Return the header lines that sign a body."""
    id, timestamp = f"msg_{next(_ids)}", int(now_s)
    signature = hmac.digest(key, f"{id}.{timestamp}.".encode() + body, "sha256")
    return (
        f"webhook-id: {id}\r\nwebhook-timestamp: {timestamp}\r\n"
        f"webhook-signature: v1,{base64.b64encode(signature).decode()}\r\n"
    ).encode()


def post(path: str, head: bytes, body: bytes) -> bytes:
    """Return a request with a body; `head` has further header lines."""
    length = b"content-length: %d\r\n\r\n" % len(body)
    return b"POST %s HTTP/1.1\r\nhost: relay\r\n" % path.encode() + head + length + body


def callback(prefix: str, number: int, status: str, now_s: float) -> bytes:
    """Return an authentic callback as a request."""
    body = callback_body(prefix, number, status, now_s)
    return post(path_of(prefix, number, now_s), b"content-type: application/json\r\n" + signed(body, now_s), body)


def _nested(opening: bytes, closing: bytes, depth: int) -> bytes:
    return opening * depth + closing * depth


def broken_bodies() -> tuple[list[bytes], list[bytes]]:
    """Return small and large bodies that are no callback; the large ones fill the limit of a body."""
    good = callback_body("none", 0, "processing", 1e9)
    fields = good[1:-1]
    small = [
        b"",
        b" ",
        b"{",
        b"}",
        b"[]",
        b"{}",
        b"null",
        b"true",
        b"0",
        b'""',
        b"-",
        b"\0",
        b"\xff\xfe",
        b"\xef\xbb\xbf{}",
        good[:-1],
        good[: len(good) // 2],
        good + b"}",
        good + b"\0",
        b"\xef\xbb\xbf" + good,
        good.decode().encode("utf-16"),
        gzip.compress(good),
        b"--x\r\n\r\n{}\r\n--x--",
        b"a=b&c=d",
        b"<?xml version='1.0'?>",
        b"NaN",
        b'{"id": NaN}',
        b'{"id": Infinity}',
        b'{"id": -Infinity, "status": 1e999}',
        b'{"id": 1e999999999, "status": "processing"}',
        b'{"id": ' + b"9" * 5000 + b"}",
        b'{"id": -0.0e-0, "status": []}',
        b'{"id": "\\ud800", "status": "\\udfff\\ud800"}',
        b'{"\\ud800": 1}',
        b'{"id": "\xed\xa0\x80"}',
        b'{"id": "\xc0\xaf"}',
        b'{"id": "\xf4\x90\x80\x80"}',
        b'{"id": "a\nb"}',
        b'{"id": "\\u0000", "status": "\\u0000"}',
        b'{"id": "1", "id": "2", "status": "processing", "status": "unheard"}',
        b'{"id": "1", "task_id": "1"}',
        b'{"status": "\\u001b]0;owned\\u0007\\u001b[2J", "id": "1"}',
        b'{"status": "\xc2\x9b31mowned\x7f", "id": "1"}',
        b'{"status": "x\\r\\n{\\"level\\": \\"error\\"}", "id": "1"}',
        b'{"id": {"$gt": ""}, "status": {"$ne": 1}}',
        b'{"id": "\'; DROP TABLE tasks; --", "status": "%s%n%x"}',
        b'{"__proto__": {"id": "1"}, "status": "processing"}',
        b'{"create_time": 99999999999999999999999, ' + fields + b"}",
        b"{" + fields + b', "create_time": "yesterday"}',
        b"{" + fields + b', "outputs": [{"url": "file:///etc/passwd"}], "status": "succeeded"}',
        b"{" + fields + b', "outputs": {"url": []}, "status": 7}',
        b"{" + fields + b', "message": "\\u001b[2J\xc2\x9b2J\x7f", "status": "\xc2\x9b2J"}',
    ]
    large = [
        _nested(b"[", b"]", LIMIT // 2),
        b"[" * LIMIT,
        _nested(b'{"a":', b"}", LIMIT // 6)[:LIMIT],
        b'{"a":' * (LIMIT // 5),
        b'{"id": ' + _nested(b"[", b"]", 20_000) + b', "status": "processing"}',
        b"[" + b"0," * (LIMIT // 2 - 2) + b"0]",
        b'{"id": "' + b"a" * (LIMIT - 30) + b'"}',
        b'{"status": "' + b"\\u001b" * 10_000 + b'", "id": "1"}',
        b"{" + b",".join(b'"%d":0' % n for n in range(7000)) + b"}",
        b'{"outputs": [' + b",".join([b"{}"] * 20_000) + b'], "id": "1", "status": "succeeded"}',
        b" " * LIMIT,
        b'"' + b"\\ud83d\\ude00" * 5000 + b'"',
        b"-" + b"9" * (LIMIT - 1),
        b"1e" + b"9" * (LIMIT - 2),
        b"0." + b"1" * (LIMIT - 2),
        b"\xf0\x9f\x98\x80" * (LIMIT // 4),
        gzip.compress(b"\0" * 10_000_000),
    ]
    return small, large
