"""Signed requests to AWS without boto3: Signature Version 4, credentials, kept-alive connections.

boto3 takes ten times as long from import to its first response, and a Lambda function pays that at each cold
start. The DynamoDB ledger and the AWS destinations need only a few calls to one host each.

Credentials come from AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, as in a Lambda function. If
these are not set (a profile, single sign-on, a container's or an instance's role), botocore finds them.
"""

import hashlib
import hmac
import os
import select
import socket
import ssl
import threading
from base64 import b64encode
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import cache
from http.client import HTTPConnection, HTTPSConnection
from typing import NamedTuple, cast
from urllib.parse import unquote, urlsplit

from submitter.clock import Clock
from submitter.extras import install_command

SUFFIXES = {"cn-": "amazonaws.com.cn", "eusc-": "amazonaws.eu"}
"""The domains of AWS's regions by the start of their names; the others' is amazonaws.com."""


class NoCredentials(Exception):
    """There are no AWS credentials; the message is the remedy."""


class Credentials(NamedTuple):
    """AWS credentials; `token` is the session token of temporary ones."""

    access_key: str
    secret_key: str
    token: str | None


def find_credentials(environ: Mapping[str, str]) -> Callable[[], Credentials]:
    """Return a function that returns the current credentials: they may change while a process runs.

    It raises NoCredentials if there are none, and so does this function if only botocore could find them and it is
    not installed. It may block.
    """
    if environ.get("AWS_ACCESS_KEY_ID") and environ.get("AWS_SECRET_ACCESS_KEY"):  # empty is unset, as in botocore
        return lambda: Credentials(
            environ["AWS_ACCESS_KEY_ID"], environ["AWS_SECRET_ACCESS_KEY"], environ.get("AWS_SESSION_TOKEN") or None
        )
    remedy = f"Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; for a profile or a role: {install_command('aws')}."
    try:
        from botocore.exceptions import BotoCoreError, ClientError
        from botocore.session import get_session
    except ImportError as error:
        raise NoCredentials(remedy) from error
    get = cache(lambda: get_session().get_credentials() or None)

    def current() -> Credentials:
        try:
            found = get()
            if found is not None:
                return Credentials(*found.get_frozen_credentials()[:3])
        except (BotoCoreError, ClientError, RuntimeError) as error:  # the last: what was refreshed has expired
            raise NoCredentials(f"{error}. {remedy}") from error
        get.cache_clear()  # a role's server may answer later
        raise NoCredentials(remedy)

    return current


def find_region(environ: Mapping[str, str]) -> str | None:
    """Return the region of the environment, else of the profile (with botocore), or None."""
    found = environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION")
    if found:
        return found
    try:
        from botocore.exceptions import BotoCoreError
        from botocore.session import get_session
    except ImportError:
        return None
    try:
        return cast("str | None", get_session().get_config_variable("region"))
    except BotoCoreError:  # the profile does not exist: the first request says so
        return None


def sign(
    host: str,
    headers: Mapping[str, str],
    body: bytes,
    service: str,
    region: str,
    credentials: Credentials,
    now: datetime,
) -> dict[str, str]:
    """Return the headers of a POST to `/` with those that sign it, by AWS Signature Version 4.

    The names in `headers` are in lower case.
    """
    stamp, day = now.strftime("%Y%m%dT%H%M%SZ"), now.strftime("%Y%m%d")
    all_headers = {**headers, "host": host, "x-amz-date": stamp}
    if credentials.token is not None:
        all_headers["x-amz-security-token"] = credentials.token
    all_headers = dict(sorted(all_headers.items()))
    signed = ";".join(all_headers)
    listed = "".join(f"{name}:{value}\n" for name, value in all_headers.items())
    canonical = f"POST\n/\n\n{listed}\n{signed}\n{hashlib.sha256(body).hexdigest()}"
    scope = f"{day}/{region}/{service}/aws4_request"
    text = f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{hashlib.sha256(canonical.encode()).hexdigest()}"
    key = b"AWS4" + credentials.secret_key.encode()
    for part in (day, region, service, "aws4_request"):
        key = hmac.digest(key, part.encode(), "sha256")
    signature = hmac.digest(key, text.encode(), "sha256").hex()
    all_headers["authorization"] = (
        f"AWS4-HMAC-SHA256 Credential={credentials.access_key}/{scope}, SignedHeaders={signed}, Signature={signature}"
    )
    return all_headers


class Endpoint:
    """One AWS service in one region. Threads share its kept-alive connections.

    `service` is its name in host names and signatures. AWS_ENDPOINT_URL_<variable>, else AWS_ENDPOINT_URL, replaces
    its URL. HTTPS_PROXY, NO_PROXY and AWS_CA_BUNDLE are followed.
    """

    def __init__(
        self,
        service: str,
        region: str,
        credentials: Callable[[], Credentials],
        clock: Clock,
        *,
        variable: str,
        connect_timeout_s: float,
        read_timeout_s: float,
    ) -> None:
        suffix = next((one for start, one in SUFFIXES.items() if region.startswith(start)), "amazonaws.com")
        replaced = os.environ.get(f"AWS_ENDPOINT_URL_{variable}") or os.environ.get("AWS_ENDPOINT_URL")
        url = urlsplit(replaced or f"https://{service}.{region}.{suffix}")
        self.host = url.netloc
        self._is_https = url.scheme == "https"
        self._service = service
        self._region = region
        self._credentials = credentials
        self._clock = clock
        self._connect_timeout_s = connect_timeout_s
        self._read_timeout_s = read_timeout_s
        self._idle: list[HTTPConnection] = []
        self._tls: ssl.SSLContext | None = None
        self._lock = threading.Lock()

    def post(self, headers: Mapping[str, str], body: bytes) -> tuple[int, bytes]:
        """Return the status and the body of the response. Raises NoCredentials, OSError, HTTPException. Blocks."""
        now = datetime.fromtimestamp(self._clock.now_s(), UTC)
        signed = sign(self.host, headers, body, self._service, self._region, self._credentials(), now)
        with self._lock:
            connection = self._idle.pop() if self._idle else self._new_connection()
        try:
            if connection.sock is not None and _is_closed(connection.sock):
                connection.close()
            if connection.sock is None:
                connection.connect()
                cast("socket.socket", connection.sock).settimeout(self._read_timeout_s)
            connection.request("POST", "/", body, signed)
            response = connection.getresponse()
            answer = response.status, response.read()
        except BaseException:
            connection.close()
            raise
        with self._lock:
            self._idle.append(connection)
        return answer

    def close(self) -> None:
        """Close the connections."""
        for connection in self._idle:
            connection.close()

    def _new_connection(self) -> HTTPConnection:
        if not self._is_https:
            return HTTPConnection(self.host, timeout=self._connect_timeout_s)
        self._tls = self._tls or ssl.create_default_context(cafile=os.environ.get("AWS_CA_BUNDLE"))
        proxy = self._proxy()
        if proxy is None:
            return HTTPSConnection(self.host, timeout=self._connect_timeout_s, context=self._tls)
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        login = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}".encode()
        headers = {} if parts.username is None else {"Proxy-Authorization": f"Basic {b64encode(login).decode()}"}
        place = parts.netloc.rpartition("@")[2]
        connection = HTTPSConnection(place, timeout=self._connect_timeout_s, context=self._tls)
        connection.set_tunnel(self.host, headers=headers)
        return connection

    def _proxy(self) -> str | None:
        if not any(name.upper() in ("HTTPS_PROXY", "ALL_PROXY") for name in os.environ):
            return None
        from urllib.request import getproxies, proxy_bypass  # a function without a proxy starts without it

        return None if proxy_bypass(self.host) else getproxies().get("https")


def _is_closed(connected: socket.socket) -> bool:
    """Return whether the server has closed an idle connection: there is something to read, its end."""
    poll = select.poll()
    poll.register(connected, select.POLLIN)
    return bool(poll.poll(0))
