"""JSON from outside (requests, callbacks, answers): one error for whatever is not JSON. Pure."""

import re
from typing import Any

import msgspec

NUL = re.compile(rb"(?<!\\)((?:\\\\)*)\\u0000")
"""The escape of NUL in JSON; after a backslash that is escaped itself, `u0000` is text."""


class NotJson(Exception):
    """The text is not JSON, not UTF-8, or nested too deeply; the message states which."""


def read_json(text: bytes | str) -> Any:
    """Parse JSON of unknown origin; raise NotJson.

    A parser's own errors are not enough: invalid UTF-8 and deep nesting raise other ones. NUL, which PostgreSQL
    cannot store, becomes U+FFFD.
    """
    text = text.encode(errors="surrogatepass") if isinstance(text, str) else text
    if b"\\u0000" in text:
        text = NUL.sub(rb"\1\\ufffd", text)
    try:
        return msgspec.json.decode(text)
    except RecursionError:
        raise NotJson("it is nested too deeply") from None
    except (msgspec.DecodeError, UnicodeError) as error:
        raise NotJson(str(error)) from None
