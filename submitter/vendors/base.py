"""What a vendor is: one pure reader and writer of its wire format. No network, no clock.

Requests go out as values (`HttpRequest`), answers and callbacks come in as bytes. Whatever the
bytes, a reader returns a value or raises one of `submitter.errors`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import msgspec

from submitter.callback_url import redact
from submitter.errors import Problem, SubmissionUnknown, Unintelligible, VendorRefused
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
    """A request made ready to send: its mode decided, media as the vendor takes them (a URL, or raw base64)."""

    request: MotionControl
    mode: str
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
    visible yet. `more` are the questions that the answer leaves to ask about these tasks.
    """

    reports: dict[str, Report] = {}
    unreadable: dict[str, str] = {}
    absent: tuple[str, ...] = ()
    more: tuple[Query, ...] = ()


CallbackSetting = bool | Literal["auto"]
"""Whether a vendor calls back: `auto` is "send it the URL, and learn from the ledger whether it does"."""


class Vendor(Protocol):
    """One vendor's API in both directions."""

    @property
    def name(self) -> str:
        """The name that requests, settings and callback URLs give it."""
        ...

    @property
    def base_url(self) -> str:
        """Where the vendor is reached."""
        ...

    @property
    def limits(self) -> Limits:
        """What it takes and can do."""
        ...

    @property
    def patience(self) -> Patience:
        """How long its tasks may be silent, unless the settings say otherwise."""
        ...

    @property
    def callbacks(self) -> CallbackSetting:
        """Whether it calls back, as far as is known; False is "it takes no callback URL"."""
        ...

    @property
    def signs_callbacks(self) -> bool:
        """Whether it can sign its callbacks, by Standard Webhooks."""
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
        """Return the fewest requests that ask about `tasks`; those that it cannot be asked about are in none."""
        ...

    def read_query(self, query: Query, answer: HttpAnswer, now_s: float) -> Findings:
        """Return what the answer says of the query's tasks; raise VendorRefused when it says nothing."""
        ...

    def read_callback(self, body: bytes, now_s: float) -> Report | None:
        """Return what a callback says, None when it is about something else; raise Unintelligible."""
        ...

    def probe(self, now_s: float) -> HttpRequest:
        """Return a free request that shows whether the credentials are accepted."""
        ...

    def read_probe(self, answer: HttpAnswer) -> str:
        """Return what the probe's answer says of the account; raise VendorRefused."""
        ...


@runtime_checkable
class Streams(Protocol):
    """What a vendor has besides, when it tells of its tasks by a stream of Server-Sent Events."""

    def stream(self, now_s: float) -> HttpRequest:
        """Return the request whose answer is the stream."""
        ...

    def read_event(self, name: str, data: str, now_s: float) -> Report | None:
        """Return what one event says, None when it is about something else; raise Unintelligible."""
        ...


class VendorSetup(msgspec.Struct, frozen=True):
    """How a vendor is made from its settings (`API_KEY` in the environment is `api_key` here).

    `configure` returns None without credentials, and raises InvalidSettings for wrong ones.
    `reader` has no credentials, and reads callbacks. `sandbox` names its stand-in, as
    `module:class`, where it has one.
    """

    names: tuple[str, ...]
    credentials_remedy: str
    reader: Vendor
    configure: Callable[[Mapping[str, str]], Vendor | None]
    sandbox: str | None = None


class Rule(msgspec.Struct, frozen=True):
    """What an error of a vendor means: what to do, whether the same request may succeed later
    without a person, whether another vendor may take it, and whether it leaves open that the
    create made a task.
    """

    remedy: str
    retryable: bool = False
    elsewhere: bool = False
    ambiguous: bool = False


def rule_of(status: int, name: str) -> Rule:
    """Return what an HTTP status means where the vendor's own word says nothing more."""
    match status:
        case 401:
            return Rule(f"Check {name.upper()}_API_KEY.", elsewhere=True)
        case 402:
            return Rule(f"The balance at {name} is used up: top it up.", elsewhere=True)
        case 403:
            return Rule(f"This key may not use this model: ask {name} for the permission.", elsewhere=True)
        case 404:
            return Rule(f"Check {name.upper()}_BASE_URL.")
        case 408:
            return Rule("It took too long.", retryable=True, ambiguous=True)
        case 429:
            return Rule("Requests came too fast: it is tried again by itself.", retryable=True)
        case _ if status >= 500 or status < 400:  # what a 2xx or 3xx without sense means is as open
            return Rule(f"{name} has an outage; try again later.", retryable=True, ambiguous=True)
    return Rule("Mend the request.")


def refusal(name: str, answer: HttpAnswer, rule: Rule, *, code: str, message: str) -> VendorRefused:
    """Return the error that says what a vendor answered."""
    wish = answer.headers.get("retry-after", "")
    return VendorRefused(
        name,
        http_status=answer.status,
        code=code,
        message=redact(message)[:500],
        remedy=rule.remedy,
        retryable=rule.retryable,
        elsewhere=rule.elsewhere,
        retry_after_s=float(wish) if wish.isascii() and wish.isdigit() else None,
    )


def refused_create(refused: VendorRefused, rule: Rule) -> VendorRefused | SubmissionUnknown:
    """Return what a refusal means for a create: surely no task, or nobody knows."""
    if rule.ambiguous:
        return SubmissionUnknown(f"{refused.vendor} may have made the task: {refused}", refused)
    return refused


def findings_of_one(query: Query, read: Callable[[], Report]) -> Findings:
    """Return what an answer about the query's one task says, as `read` reads it."""
    (task,) = query.tasks
    id = task.external_task_id
    try:
        report = read()
    except Unintelligible as reason:
        return Findings(unreadable={id: str(reason)})
    if report.task_id != task.task_id:
        return Findings(unreadable={id: f"it is about the task {report.task_id}"})
    return Findings({id: report})


def json_request(method: str, url: str, token: str, body: Any = None) -> HttpRequest:
    """Return a request with a bearer token, and a JSON body when there is one."""
    headers = {"authorization": f"Bearer {token}"}
    if body is None:
        return HttpRequest(method, url, headers)
    return HttpRequest(method, url, headers | {"content-type": "application/json"}, msgspec.json.encode(body))


def check_base_url(name: str, url: str, default: str) -> list[Problem]:
    """Return what is wrong with a vendor's base URL."""
    if url.startswith(("http://", "https://")):
        return []
    return [Problem(f"{name.upper()}_BASE_URL", repr(url), "an http(s) URL", f"The default is {default}.")]


def read_object(body: bytes | str) -> dict[str, Any]:
    """Return a JSON object; raise Unintelligible when `body` is none."""
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise Unintelligible(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise Unintelligible(f"a JSON object was expected, not {type(value).__name__}")
    return value


def object_or_empty(body: bytes) -> dict[str, Any]:
    """Return a JSON object, or an empty one when `body` is none."""
    try:
        return read_object(body)
    except Unintelligible:
        return {}


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


def inner(source: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a field's object, or an empty one."""
    value = source.get(name)
    return value if isinstance(value, dict) else {}
