"""Adapter for vendors with a plain REST API: POST creates a task, GET returns it, callbacks are optional. Pure.

An `Api` holds one vendor's facts (paths, error codes, limits) and the functions that read and write its
bodies; `RestVendor` implements `Vendor` with them. The common rules are implemented here: a 2xx without
an id and a 5xx leave open whether a task exists, 404 means that the vendor does not know the task, and
each query is for a single task.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, ClassVar
from urllib.parse import quote

import msgspec

from submitter.errors import InvalidSettings, Problem, SubmissionUnknown, Unintelligible, VendorRefused
from submitter.observation import Report, Source
from submitter.request import Limits
from submitter.schedule import Backoff, PollPolicy
from submitter.task import Task, TaskStatus
from submitter.vendors.base import (
    CallbackSetting,
    CreateRequest,
    Findings,
    HttpAnswer,
    HttpRequest,
    Query,
    VendorSetup,
)
from submitter.vendors.reading import object_or_empty, raw, read_object
from submitter.vendors.refusals import Rule, refusal, refused_create, rule_of
from submitter.web_address import why_not_web

POLL_POLICY = PollPolicy(
    while_expected=Backoff(first_s=900, factor=1.5, max_s=3600),
    while_unexpected=Backoff(first_s=15, factor=1.5, max_s=60),
    abandon_after_s=86400,
)
"""For a vendor that sends one callback, at the end, and is queried for one task at a time."""

PROBE_ID = "kling-relay-doctor"
"""The id of a task that does not exist: querying it is free and shows whether the key is accepted."""


class Api(msgspec.Struct, frozen=True):
    """One vendor's REST API.

    `create_path` is the path of the POST, `query_path(task_id)` that of a task. `fresh_query` is a query
    string that requests a fresh answer; it is added after a poll without news, and to confirm a report.
    `errors` maps error codes to rules. `create_body` returns the request body. `read_id` parses the id of
    a created task, `read_error` an error's code and message, `read_task` a task in an answer or a
    callback. `unwrap` returns the task in a callback's body, or None if the callback is not about a
    task's status.
    """

    name: str
    base_url: str
    create_path: str
    query_path: Callable[[str], str]
    errors: Mapping[str, Rule]
    limits: Limits
    create_body: Callable[[CreateRequest], dict[str, Any]]
    read_id: Callable[[Mapping[str, Any]], str | None]
    read_error: Callable[[Mapping[str, Any]], tuple[str, str]]
    read_task: Callable[[Mapping[str, Any], Source, float], Report]
    unwrap: Callable[[dict[str, Any]], dict[str, Any] | None]
    fresh_query: str = ""
    poll_policy: PollPolicy = POLL_POLICY
    callbacks: CallbackSetting = "auto"


class RestVendor(msgspec.Struct, frozen=True):
    """The `Vendor` of an `Api`, with credentials."""

    api: Api
    api_key: str
    base_url: str

    signs_callbacks: ClassVar[bool] = False

    def __repr__(self) -> str:
        return f"RestVendor({self.name!r})"

    @property
    def name(self) -> str:
        return self.api.name

    @property
    def limits(self) -> Limits:
        return self.api.limits

    @property
    def poll_policy(self) -> PollPolicy:
        return self.api.poll_policy

    @property
    def callbacks(self) -> CallbackSetting:
        return self.api.callbacks

    def create(self, create: CreateRequest, now_s: float) -> HttpRequest:
        return self._request("POST", self.api.create_path, self.api.create_body(create))

    def read_create(self, answer: HttpAnswer) -> Report:
        body = object_or_empty(answer.body)
        id = self.api.read_id(body) if 200 <= answer.status < 300 else None
        if id is not None:
            report = created(id, lambda: self.api.read_task(body, "create", 0))
            return msgspec.structs.replace(report, raw=raw(answer.body))
        if 200 <= answer.status < 300 and self.api.read_error(body)[0] not in self.api.errors:
            raise SubmissionUnknown(f"{self.name} accepted the request but returned no task id")
        refused, rule = self._refused(answer, body)
        raise refused_create(refused, rule)

    def queries(self, tasks: Sequence[Task], now_s: float) -> list[Query]:
        """Return one query per task; a task without the vendor's id cannot be queried."""
        return [
            Query(self._request("GET", self._path_of(task.task_id) + self._fresh(task)), (task,))
            for task in tasks
            if task.task_id is not None
        ]

    def read_query(self, query: Query, answer: HttpAnswer, now_s: float) -> Findings:
        body = object_or_empty(answer.body)
        if not 200 <= answer.status < 300:
            refused, rule = self._refused(answer, body)
            if answer.status == 404 and body and not rule.failover:  # inferred; a proxy's 404 is no JSON object
                return Findings(absent=(query.tasks[0].external_task_id,))
            raise refused
        return single_finding(
            query,
            lambda: msgspec.structs.replace(
                self.api.read_task(read_object(answer.body), "poll", now_s), raw=raw(answer.body)
            ),
        )

    def read_callback(self, body: bytes, now_s: float) -> Report | None:
        task = self.api.unwrap(read_object(body))
        if task is None:
            return None
        return msgspec.structs.replace(self.api.read_task(task, "callback", now_s), raw=raw(body))

    def probe(self, now_s: float) -> HttpRequest:
        """Return a query for a task that does not exist."""
        return self._request("GET", self._path_of(PROBE_ID))

    def read_probe(self, answer: HttpAnswer) -> str:
        refused, rule = self._refused(answer, object_or_empty(answer.body))
        if answer.status in (401, 403) or answer.status >= 500 or rule.failover:
            raise refused
        return f"{self.name} does not report a balance"

    def _path_of(self, task_id: str) -> str:
        return self.api.query_path(quote(task_id, safe=""))

    def _fresh(self, task: Task) -> str:
        return self.api.fresh_query if task.polls or task.unconfirmed else ""

    def _request(self, method: str, path: str, body: Any = None) -> HttpRequest:
        return json_request(method, self.base_url.rstrip("/") + path, self.api_key, body)

    def _refused(self, answer: HttpAnswer, body: Mapping[str, Any]) -> tuple[VendorRefused, Rule]:
        code, message = self.api.read_error(body)
        rule = self.api.errors.get(code) or rule_of(answer.status, self.name)
        if answer.status >= 500:  # with any error code: the create may have worked
            rule = msgspec.structs.replace(rule, ambiguous=True)
        return refusal(self.name, answer, rule, code=code or "none", message=message), rule


def setup(api: Api, *, sandbox: str | None = None) -> VendorSetup:
    """Return the setup of a vendor with the settings `<NAME>_API_KEY` and, optionally, `<NAME>_BASE_URL`."""

    def configure(settings: Mapping[str, str]) -> RestVendor | None:
        base_url = settings.get("base_url", api.base_url)
        problems = check_base_url(api.name, base_url, api.base_url)
        if problems:
            raise InvalidSettings(problems)
        return RestVendor(api, settings["api_key"], base_url) if settings.get("api_key") else None

    return VendorSetup(
        names=("api_key", "base_url"),
        credentials_remedy=f"Set {api.name.upper()}_API_KEY.",
        reader=RestVendor(api, "", api.base_url),
        configure=configure,
        sandbox=sandbox,
    )


def read_status(statuses: Mapping[str, TaskStatus], value: str | None) -> TaskStatus:
    """Map a vendor's status; raise Unintelligible if it is unknown."""
    status = statuses.get(value or "")
    if status is None:
        raise Unintelligible(f"unknown status {value!r}")
    return status


def created(id: str, read: Callable[[], Report]) -> Report:
    """Return the report of an accepted create: `submitted`, or the failure that the answer states already."""
    with suppress(Unintelligible):
        report = read()
        if report.status is TaskStatus.FAILED:
            return report
    return Report(source="create", status=TaskStatus.SUBMITTED, task_id=id)


def single_finding(query: Query, read: Callable[[], Report]) -> Findings:
    """Return the findings of a query for a single task, whose answer `read` parses."""
    (task,) = query.tasks
    id = task.external_task_id
    try:
        report = read()
    except Unintelligible as reason:
        return Findings(unreadable={id: str(reason)})
    if report.task_id != task.task_id:
        return Findings(unreadable={id: f"the answer is about another task, {report.task_id}"})
    return Findings({id: report})


def json_request(method: str, url: str, token: str, body: Any = None) -> HttpRequest:
    """Return a request with a bearer token and an optional JSON body."""
    headers = {"authorization": f"Bearer {token}"}
    if body is None:
        return HttpRequest(method, url, headers)
    return HttpRequest(method, url, headers | {"content-type": "application/json"}, msgspec.json.encode(body))


def check_base_url(name: str, url: str, default: str) -> list[Problem]:
    """Return the problems of a vendor's base URL."""
    wrong = why_not_web(url)
    if wrong is None:
        return []
    remedy = f"Correct the URL. The default is {default}."
    return [Problem(f"{name.upper()}_BASE_URL", repr(url), f"an http(s) URL: {wrong}", remedy)]
