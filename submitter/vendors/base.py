"""What a vendor is: one pure reader and writer of its wire format. No network, no clock.

Requests go out as values (`HttpRequest`), answers and callbacks come in as bytes. Whatever the
bytes, a reader returns a value or raises one of `submitter.errors`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import msgspec

from submitter.errors import Unintelligible
from submitter.request import Limits, MotionControl
from submitter.schedule import Patience
from submitter.task import Report, Task


class HttpRequest(msgspec.Struct, frozen=True):
    """One request to a vendor. Its repr shows no header, since one of them is a credential."""

    method: str
    url: str
    headers: dict[str, str]
    body: bytes = b""

    def __repr__(self) -> str:
        return f"HttpRequest({self.method} {self.url})"


class HttpAnswer(msgspec.Struct, frozen=True):
    """One answer of a vendor; header names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes


class Job(msgspec.Struct, frozen=True):
    """A request made ready to send: media as the vendor takes them (a URL, or raw base64)."""

    request: MotionControl
    external_task_id: str
    image: str
    video: str
    callback_url: str | None


class Query(msgspec.Struct, frozen=True):
    """One question about some tasks; `page` counts from 1 where the vendor answers in pages."""

    request: HttpRequest
    tasks: tuple[Task, ...]
    page: int = 1


class Findings(msgspec.Struct, frozen=True):
    """A query's answer, by external_task_id: reports, what could not be read, what is not there.

    `absent` means that the vendor does not know the task now, which is no failure: it may not be
    visible yet. `more` is the next page, when these tasks may be on it.
    """

    reports: dict[str, Report] = {}
    unreadable: dict[str, str] = {}
    absent: tuple[str, ...] = ()
    more: Query | None = None


class Vendor(Protocol):
    """One vendor's API in both directions."""

    name: ClassVar[str]
    limits: ClassVar[Limits]
    patience: ClassVar[Patience]
    signs_callbacks: ClassVar[bool]

    @property
    def base_url(self) -> str:
        """Where the vendor is reached."""
        ...

    def create(self, job: Job, now_s: float) -> HttpRequest:
        """Return the request that makes `job` a task."""
        ...

    def read_create(self, answer: HttpAnswer) -> Report:
        """Return what the vendor said; raise VendorRefused when it surely made no task,
        SubmissionUnknown when it may have.
        """
        ...

    def queries(self, tasks: Sequence[Task], now_s: float) -> list[Query]:
        """Return the fewest requests that ask about `tasks`."""
        ...

    def read_query(self, query: Query, answer: HttpAnswer, now_s: float) -> Findings:
        """Return what the answer says of the query's tasks; raise VendorRefused when it says nothing."""
        ...

    def read_callback(self, body: bytes) -> Report:
        """Return what a callback says; raise Unintelligible when it cannot be understood."""
        ...

    def probe(self, now_s: float) -> HttpRequest:
        """Return a free request that shows whether the credentials are accepted."""
        ...

    def read_probe(self, answer: HttpAnswer) -> str:
        """Return what the probe's answer says of the account; raise VendorRefused."""
        ...


class VendorSetup(msgspec.Struct, frozen=True):
    """How a vendor is made from its settings (`API_KEY` in the environment is `api_key` here).

    `configure` returns None without credentials, and raises InvalidSettings for wrong ones.
    `reader` has no credentials, and reads callbacks.
    """

    names: tuple[str, ...]
    credentials_remedy: str
    reader: Vendor
    configure: Callable[[Mapping[str, str]], Vendor | None]


def read_object(body: bytes) -> dict[str, Any]:
    """Return a JSON object; raise Unintelligible when `body` is none."""
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Unintelligible(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise Unintelligible(f"a JSON object was expected, not {type(value).__name__}")
    return value


def text(source: Mapping[str, Any], name: str) -> str | None:
    """Return a field as text: ids and amounts come as strings or as numbers; "" and null are None."""
    value = source.get(name)
    if type(value) is str:
        return value or None
    return str(value) if type(value) in (int, float) else None


def number(source: Mapping[str, Any], name: str) -> float | None:
    """Return a field as a finite number, whether it came as a number or as a string."""
    try:
        value = float(text(source, name) or "")
    except ValueError:
        return None
    return value if abs(value) < 1e18 else None


def objects(source: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """Return a field's objects: a list's, or the one that stands alone; null and anything else are none."""
    value = source.get(name)
    found = value if isinstance(value, list) else [value]
    return [item for item in found if isinstance(item, dict)]
