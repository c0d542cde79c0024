"""URLs that people and services write: whether they can be opened, and how they are shown. Pure.

`why_not_web` is for http(s) URLs (media, results, hooks, base URLs); `why_not_server` is for those of
databases and brokers, which may hold a password and several hosts. Sources: RFC 3986 (URI), RFC 5890
(international names), RFC 1035 (lengths of names).
"""

import ipaddress
import re

# Patterns, which `re` compiles at their first use and keeps: a serverless function may need none of them.
RESULT_PATTERN = r"^https?://[^\s/?#]+[^\x00-\x1f\x7f]*$"
_BLANK = "[\x00-\x20\x7f\ud800-\udfff]"
_LABEL = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_HOST_AND_PORT = r"(\[[^\[\]]*\]|[^\[\]:]*)(?::([0-9]*))?"
HOST_MAX = 253
NOT_ENCODED = "a / # ? @ [ or ] in its password must be percent-encoded: %2F %23 %3F %40 %5B %5D"


def why_not_web(url: str) -> str | None:
    """Return why `url` is no http(s) URL that can be opened, or None."""
    if not url.startswith(("http://", "https://")):
        return "it does not start with http:// or https://"
    if re.search(_BLANK, url):
        return "it has a space, a control character or invalid Unicode"
    _, hosts, _ = _split(url)
    return _why_not_address(hosts) if hosts else "it has no host"


def why_not_result(url: str) -> str | None:
    """Return why a result's `url` is no http(s) URL, or None. Its path is as the vendor wrote it."""
    return None if re.fullmatch(RESULT_PATTERN, url) else "it has no http(s) scheme and host, or a control character"


def why_not_server(url: str) -> str | None:
    """Return why the hosts and ports of a URL cannot be connected to, or None. The reason shows no password."""
    if re.search(_BLANK, url):
        return "it has a space, a control character or invalid Unicode"
    user, hosts, rest = _split(url)
    if "@" in (rest.partition("?")[0] if user else rest) or set("@[]") & set(user):
        return NOT_ENCODED
    return next(filter(None, map(_why_not_address, hosts.split(",") if hosts else ())), None)


def without_password(url: str) -> str:
    """Return the URL of a database or a broker without its password and its query, for logs and messages."""
    scheme, separator, rest = url.partition("://")
    if scheme == "sqlite" or not separator:
        return url.partition("?")[0]
    credentials, at, place = rest.rpartition("@")  # a password may hold anything, so the last @ ends it
    user = credentials.partition(":")[0] if at else ""
    return f"{scheme}://{user}{at}{re.split('[?#]', place)[0]}"


def _split(url: str) -> tuple[str, str, str]:
    """Return the credentials, the hosts, and what follows them."""
    rest = url.partition("://")[2]
    authority = re.split("[/?#]", rest, maxsplit=1)[0]
    user, _, hosts = authority.rpartition("@")
    return user, hosts, rest[len(authority) :]


def _why_not_address(address: str) -> str | None:
    """Return why `host`, `host:port`, `[IPv6]` or `[IPv6]:port` cannot be connected to, or None."""
    found = re.fullmatch(_HOST_AND_PORT, address)
    if found is None or (found[2] and not 0 < int(found[2][:6]) <= 65535):
        return "its port is no number from 1 to 65535"
    return why_not_host(found[1])


def why_not_host(host: str) -> str | None:
    """Return why `host` is neither an IP address nor a name that can be looked up, or None."""
    is_bracketed = host.startswith("[")
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        if is_bracketed:
            return "its host is no IPv6 address"
    else:
        return None
    if host.lower().startswith("%2f"):  # a Unix socket's folder, as PostgreSQL's clients take it
        return None
    name = host.removesuffix(".")
    if not name.isascii() or "xn--" in name.lower():
        import idna  # rarely needed, and its tables are large

        try:
            name = idna.encode(name.lower()).decode()
            idna.decode(name)
        except UnicodeError:
            return "its host is no valid international name"
    if len(name) > HOST_MAX or not all(re.fullmatch(_LABEL, label) for label in name.split(".")):
        return "its host is no valid name"
    return None
