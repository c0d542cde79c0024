"""The adapter for Oxen.ai: its queue API and its event stream, not its blocking API. Pure.

Source: Oxen.ai's documentation of its queue, its events and this model, as gathered in 2026.
Inferred, so either form is accepted: the form of errors (`error` as text or object, `error_message`,
`message`, `title`, `detail`). Inferred: an element of Kling's element library is not supported,
`input_image` accepts only a URL, the media limits are Kling's, and the fields of an object in `elements`,
which is passed on as it is.

It sends no callbacks. The event stream reports ends, except `cancelled`, and does not repeat missed
events, so polling is the fallback. Older deployments answer 404 for a generation that has ended: then
the stream is the only report. No documented answer reports the cost of a task. Results do not expire.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar
from urllib.parse import quote

import msgspec

from submitter.callback_url import redact
from submitter.errors import InvalidSettings, SubmissionUnknown, Unintelligible, VendorRefused
from submitter.observation import Report, Source
from submitter.request import Limits
from submitter.schedule import Backoff, PollPolicy
from submitter.task import Task, TaskStatus, Video
from submitter.vendors.base import CallbackSetting, CreateRequest, Findings, HttpAnswer, HttpRequest, Query, VendorSetup
from submitter.vendors.kling.v1 import LIMITS as KLING_LIMITS
from submitter.vendors.reading import inner, object_or_empty, objects, raw, read_object, text, url
from submitter.vendors.refusals import Rule, refusal, refused_create, rule_of
from submitter.vendors.rest import check_base_url, created, json_request, read_status

BASE_URL = "https://hub.oxen.ai"
QUEUE = "/api/ai/queue"
EVENTS = "/api/events"
MODEL = "kling-video-v3-pro-motion-control"
ENDED = "media_generation_completed"  # the stream also has events of other types

STATUS = {
    "queued": TaskStatus.SUBMITTED,
    "processing": TaskStatus.PROCESSING,
    "succeeded": TaskStatus.SUCCEED,
    "failed": TaskStatus.FAILED,
    "cancelled": TaskStatus.FAILED,
}

LIMITS = Limits(
    source="Oxen.ai documentation, queue and Kling V3 Pro motion control; media limits as Kling's",
    image=KLING_LIMITS.image,
    video=KLING_LIMITS.video,
    durations_s=KLING_LIMITS.durations_s,
    prompt_chars=2500,
    prompt_required=True,
    models=("kling-v3",),
    modes=("pro",),
    ids_per_query=None,
    url_lives="does not expire",
    element_object=True,
    element_cited_as="@Element1",
    notes=("media limits are not documented; Kling's are used", "parameters are checked only when the job runs"),
)
# The stream reports an end at once. If no receiver listens to it, the first poll after 600 s is early enough.
POLL_POLICY = PollPolicy(
    while_expected=Backoff(first_s=600, factor=1.5, max_s=3600),
    while_unexpected=Backoff(first_s=15, factor=1.5, max_s=60),
    abandon_after_s=86400,
)


class Oxen(msgspec.Struct, frozen=True):
    """The `Vendor` of Oxen.ai. `namespace` is the optional target namespace of results."""

    api_key: str
    base_url: str = BASE_URL
    namespace: str = ""

    name: ClassVar[str] = "oxen"
    limits: ClassVar[Limits] = LIMITS
    poll_policy: ClassVar[PollPolicy] = POLL_POLICY
    callbacks: ClassVar[CallbackSetting] = False
    signs_callbacks: ClassVar[bool] = False

    def __repr__(self) -> str:
        return "Oxen()"

    def create(self, create: CreateRequest, now_s: float) -> HttpRequest:
        """Return `POST /api/ai/queue`."""
        request = create.request
        body: dict[str, Any] = {
            "model": MODEL,
            "prompt": request.prompt,
            "input_image": create.image,
            "input_video": create.video,
            "character_orientation": request.character_orientation,
            "keep_original_sound": request.keep_original_sound,
            "num_generations": 1,
        }
        if request.element:
            body["elements"] = [request.element]
        if self.namespace:
            body["target_namespace"] = self.namespace
        return self._request("POST", QUEUE, body)

    def read_create(self, answer: HttpAnswer) -> Report:
        """Parse `{"generations": [{"generation_id", "status"}]}`."""
        body = object_or_empty(answer.body)
        if not 200 <= answer.status < 300:
            refused, rule = _refused(answer, body)
            raise refused_create(refused, rule)
        rows = [row for row in (*objects(body, "generations"), body) if text(row, "generation_id") is not None]
        if not rows:
            raise SubmissionUnknown("oxen accepted the request but returned no task id")
        report = created(str(text(rows[0], "generation_id")), lambda: _read_generation(rows[0], "create"))
        return msgspec.structs.replace(report, raw=raw(answer.body))

    def queries(self, tasks: Sequence[Task], now_s: float) -> list[Query]:
        """Return a query by id for a single task, a query of the list for several."""
        known = tuple(task for task in tasks if task.task_id is not None)
        if len(known) > 1:
            return [Query(self._request("GET", QUEUE), known)]
        return [self._one(task) for task in known]

    def read_query(self, query: Query, answer: HttpAnswer, now_s: float) -> Findings:
        """Parse one generation or the list; `more` queries the tasks that are not in the list one by one."""
        body = object_or_empty(answer.body)
        is_list = len(query.tasks) > 1
        if answer.status == 404 and body and not is_list:  # a proxy's 404 is no JSON object
            return Findings(absent=(query.tasks[0].external_task_id,))
        if not 200 <= answer.status < 300:
            raise _refused(answer, body)[0]
        if is_list and not isinstance(body.get("generations"), list):
            raise Unintelligible("`generations` is no list")
        rows = objects(body, "generations") if is_list else [body]
        by_id = {text(row, "generation_id"): row for row in rows}
        reports: dict[str, Report] = {}
        unreadable: dict[str, str] = {}
        left: list[Task] = []
        for task in query.tasks:
            id = task.external_task_id
            row = by_id.get(task.task_id)
            if row is None and is_list:
                left.append(task)
                continue
            try:
                reports[id] = msgspec.structs.replace(_read_generation(row or {}, "poll"), raw=raw(row or {}))
            except Unintelligible as reason:
                unreadable[id] = str(reason)
        return Findings(reports, unreadable, more=tuple(self._one(task) for task in left))

    def read_callback(self, body: bytes, now_s: float) -> Report:
        """Raise Unintelligible: Oxen.ai sends no callbacks."""
        raise Unintelligible("oxen sends no callbacks")

    def stream(self, now_s: float) -> HttpRequest:
        """Return `GET /api/events`."""
        return self._request("GET", EVENTS)

    def read_event(self, name: str, data: str, now_s: float) -> Report | None:
        """Parse one event of the stream: the end of a generation, or None for other types."""
        if name != ENDED:
            return None
        return msgspec.structs.replace(_read_generation(read_object(data), "stream"), raw=raw(data))

    def probe(self, now_s: float) -> HttpRequest:
        """Return a query of the queue, which is free of charge."""
        return self._request("GET", QUEUE)

    def read_probe(self, answer: HttpAnswer) -> str:
        """Return the number of generations in the queue, as text."""
        body = object_or_empty(answer.body)
        if not 200 <= answer.status < 300:
            raise _refused(answer, body)[0]
        return f"{len(objects(body, 'generations'))} generations in the queue"

    def _one(self, task: Task) -> Query:
        return Query(self._request("GET", f"{QUEUE}/{quote(task.task_id or '', safe='')}"), (task,))

    def _request(self, method: str, path: str, body: Any = None) -> HttpRequest:
        return json_request(method, self.base_url.rstrip("/") + path, self.api_key, body)


def configure(settings: Mapping[str, str]) -> Oxen | None:
    """Return the adapter for `api_key`, or None; `base_url` and `target_namespace` are optional."""
    base_url = settings.get("base_url", BASE_URL)
    problems = check_base_url("oxen", base_url, BASE_URL)
    if problems:
        raise InvalidSettings(problems)
    api_key, namespace = settings.get("api_key"), settings.get("target_namespace", "")
    return Oxen(api_key, base_url, namespace) if api_key else None


SETUP = VendorSetup(
    names=("api_key", "base_url", "target_namespace"),
    credentials_remedy="Set OXEN_API_KEY.",
    reader=Oxen(""),
    configure=configure,
    sandbox="submitter.sandbox.oxen:OxenSandbox",
)


def _refused(answer: HttpAnswer, body: Mapping[str, Any]) -> tuple[VendorRefused, Rule]:
    rule = rule_of(answer.status, "oxen")
    return refusal(
        "oxen", answer, rule, code=text(inner(body, "error"), "type") or "none", message=_message_of(body)
    ), rule


def _message_of(body: Mapping[str, Any]) -> str:
    """Return the message of an error, from any field that may hold it."""
    for row in (body, inner(body, "error")):
        for name in ("error_message", "error", "message", "detail", "title", "status_message"):
            if isinstance(row.get(name), str) and row[name]:
                return str(row[name])
    return ""


def _read_generation(row: Mapping[str, Any], source: Source) -> Report:
    """Parse a generation, in the form of the queue and the stream."""
    id, value = text(row, "generation_id"), text(row, "status")
    status = read_status(STATUS, value)
    if id is None:
        raise Unintelligible("no task id: `generation_id` is missing")
    if status is TaskStatus.FAILED:
        return Report(source=source, status=status, task_id=id, message=redact(_message_of(row) or value or ""))
    found = url(row, "result_url") or url(row, "url")
    if status is TaskStatus.SUCCEED and found is None:
        raise Unintelligible("succeed without a video URL")
    videos = (Video(found),) if status is TaskStatus.SUCCEED and found else ()
    return Report(source=source, status=status, task_id=id, videos=videos)
