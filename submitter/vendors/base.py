"""The `Vendor` protocol: a vendor adapter as a pure codec of its wire format. No network, no clock.

An adapter returns requests as values (`HttpRequest`) and parses answers and callbacks from bytes. For
any bytes, a parser returns a value or raises one of `submitter.errors`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Protocol, runtime_checkable

import msgspec

from submitter.observation import Report
from submitter.request import Limits, MotionControl
from submitter.schedule import PollPolicy
from submitter.task import Task


class HttpRequest(msgspec.Struct, frozen=True):
    """One request to a vendor. Its repr omits the headers, since one is a credential."""

    method: str
    url: str
    headers: dict[str, str]
    body: bytes = b""

    def __repr__(self) -> str:
        return f"HttpRequest({self.method} {self.url})"


class HttpAnswer(msgspec.Struct, frozen=True):
    """One HTTP response of a vendor; header names are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes


class CreateRequest(msgspec.Struct, frozen=True):
    """A request ready to be sent: the mode is set, media are URLs or raw base64."""

    request: MotionControl
    mode: str
    external_task_id: str
    image: str
    video: str
    callback_url: str | None


class Query(msgspec.Struct, frozen=True):
    """One status query for some tasks; `page` counts from 1 if the vendor's API is paginated."""

    request: HttpRequest
    tasks: tuple[Task, ...]
    page: int = 1


class Findings(msgspec.Struct, frozen=True):
    """The parsed answer to a query, by external_task_id.

    `unreadable` holds the reasons why a task could not be parsed. `absent` are tasks that the vendor does
    not know at the moment; a new task may not be visible yet, so this is no failure. `more` are the
    follow-up queries for tasks that the answer left open.
    """

    reports: dict[str, Report] = {}
    unreadable: dict[str, str] = {}
    absent: tuple[str, ...] = ()
    more: tuple[Query, ...] = ()


CallbackSetting = bool | Literal["auto"]
"""Whether a vendor sends callbacks. `auto`: send it a callback URL, and infer from the ledger whether it does."""


class Vendor(Protocol):
    """One vendor's API: builds requests, parses answers and callbacks."""

    @property
    def name(self) -> str:
        """Its name in requests, settings and callback URLs."""
        ...

    @property
    def base_url(self) -> str:
        """The base URL of its API."""
        ...

    @property
    def limits(self) -> Limits:
        """Its limits and features."""
        ...

    @property
    def poll_policy(self) -> PollPolicy:
        """The default poll policy of its tasks."""
        ...

    @property
    def callbacks(self) -> CallbackSetting:
        """Whether it sends callbacks by default; False: its API accepts no callback URL."""
        ...

    @property
    def signs_callbacks(self) -> bool:
        """Whether it can sign its callbacks (Standard Webhooks)."""
        ...

    def create(self, create: CreateRequest, now_s: float) -> HttpRequest:
        """Return the request that creates a task."""
        ...

    def read_create(self, answer: HttpAnswer) -> Report:
        """Parse the answer to create.

        Raises VendorRefused if definitely no task was created, SubmissionUnknown if one may have been.
        """
        ...

    def queries(self, tasks: Sequence[Task], now_s: float) -> list[Query]:
        """Return the fewest queries for `tasks`; tasks that the API cannot be queried for are left out."""
        ...

    def read_query(self, query: Query, answer: HttpAnswer, now_s: float) -> Findings:
        """Parse the answer to a query; raise VendorRefused if the vendor refused it."""
        ...

    def read_callback(self, body: bytes, now_s: float) -> Report | None:
        """Parse a callback; None if it is not about a task's status. Raises Unintelligible."""
        ...

    def probe(self, now_s: float) -> HttpRequest:
        """Return a request that is free of charge and shows whether the credentials are accepted."""
        ...

    def read_probe(self, answer: HttpAnswer) -> str:
        """Return a description of the account from the probe's answer; raise VendorRefused."""
        ...


@runtime_checkable
class Streams(Protocol):
    """The additional methods of a vendor that reports by an event stream (Server-Sent Events)."""

    def stream(self, now_s: float) -> HttpRequest:
        """Return the request that opens the stream."""
        ...

    def read_event(self, name: str, data: str, now_s: float) -> Report | None:
        """Parse one event; None if it is not about a task's status. Raises Unintelligible."""
        ...


class VendorSetup(msgspec.Struct, frozen=True):
    """A vendor as the registry lists it: its setting names and the factory of its adapter.

    `names` are the vendor's settings; `api_key` is `<VENDOR>_API_KEY` in the environment.
    `configure(settings)` returns None without credentials, and raises InvalidSettings for invalid ones.
    `reader` is an adapter without credentials, for parsing callbacks. `test_callback(now_ms)` returns
    the body that the vendor's console sends to test a callback URL; None if there is no such test.
    `sandbox` is the stand-in as `module:class`, or None.
    """

    names: tuple[str, ...]
    credentials_remedy: str
    reader: Vendor
    configure: Callable[[Mapping[str, str]], Vendor | None]
    test_callback: Callable[[int], bytes] | None = None
    sandbox: str | None = None
