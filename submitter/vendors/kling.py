"""Kling itself, both generations of its API. Pure.

Source: Kling's API reference (motion control, callbacks, error codes, account costs) and what
was seen live, as gathered in 2026. Where the documentation is silent this file takes either
answer: whether a redelivered callback keeps its `webhook-id`, whether `external_id` stands in
every callback, and how the text of 400/1201 is worded.
"""

import base64
import hmac
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar
from urllib.parse import quote, urlencode

import msgspec

from submitter.callback_url import redact
from submitter.errors import InvalidSettings, Problem, SubmissionUnknown, Unintelligible, VendorRefused
from submitter.request import Limits, MediaLimits
from submitter.schedule import Backoff, Patience
from submitter.task import Charge, Report, Source, Task, TaskStatus, Video
from submitter.vendors.base import (
    CallbackSetting,
    Findings,
    HttpAnswer,
    HttpRequest,
    Job,
    Query,
    Rule,
    VendorSetup,
    check_base_url,
    inner,
    json_request,
    number,
    object_or_empty,
    objects,
    read_object,
    refusal,
    refused_create,
    rule_of,
    text,
)

BASE_URL = "https://api-singapore.klingai.com"  # in China: https://api-beijing.klingai.com

# Kling spells success two ways: v2 says succeeded, v1 says succeed.
STATUS = {
    "submitted": TaskStatus.SUBMITTED,
    "processing": TaskStatus.PROCESSING,
    "succeeded": TaskStatus.SUCCEED,
    "succeed": TaskStatus.SUCCEED,
    "failed": TaskStatus.FAILED,
}

RESOLUTION = {"std": "720p", "pro": "1080p"}
PATH_V2 = {"kling-v3": "/motion-control/kling-3.0", "kling-v2-6": "/motion-control/kling-2.6"}
PATH_V1 = "/v1/videos/motion-control"
IDS_PER_QUERY = 20  # 21 are refused with 400/1201, seen live
PAGE_V1 = 500
LAST_PAGE_V1 = 1000
RESULT_LIVES_MS = 30 * 86400 * 1000

# What to do about each code. 500x on create leave open whether there is a task; of them only
# "under maintenance", once the task is surely absent, may send the request to another vendor.
ERRORS: dict[int, Rule] = {
    1000: Rule("Check the API key.", elsewhere=True),
    1001: Rule("Set KLING_API_KEY, or KLING_ACCESS_KEY and KLING_SECRET_KEY.", elsewhere=True),
    1002: Rule("The API takes API keys, or a key pair with KLING_API=v1; check which one this is.", elsewhere=True),
    1003: Rule("The token is not valid yet: set this machine's clock."),
    1004: Rule("The token expired on the way: it is sent once more; then set this machine's clock.", retryable=True),
    1100: Rule("Look at the account in Kling's console.", elsewhere=True),
    1101: Rule("The account is in arrears: pay the bill.", elsewhere=True),
    1102: Rule("The resource pack is used up or expired: buy another.", elsewhere=True),
    1103: Rule("This key may not use this model: ask for the permission in Kling's console.", elsewhere=True),
    1200: Rule("Mend the request."),
    1201: Rule("Mend the request."),
    1202: Rule("Check KLING_API and KLING_BASE_URL."),
    1203: Rule("Check the model, and KLING_BASE_URL."),
    1300: Rule("Kling's policy refuses this input: change it."),
    1301: Rule("Kling's content policy refuses this input: change it."),
    1302: Rule("Requests came too fast: it is tried again by itself.", retryable=True),
    1303: Rule("All slots of the account are taken: it is tried again by itself.", retryable=True, elsewhere=True),
    1304: Rule("Add this machine's address to the allow-list in Kling's console.", elsewhere=True),
    5000: Rule("Kling has an outage; try again later.", retryable=True, ambiguous=True),
    5001: Rule("Kling is under maintenance; try again later.", retryable=True, elsewhere=True, ambiguous=True),
    5002: Rule("Kling has a backlog; try again later.", retryable=True, ambiguous=True),
}

LIMITS_V2 = Limits(
    source="Kling API reference, motion control (current API)",
    image=MediaLimits(
        formats=("png", "jpeg"),
        max_bytes=50 * 1024 * 1024,
        min_side=300,
        min_aspect=(2, 5),
        max_aspect=(5, 2),
    ),
    video=MediaLimits(formats=("mp4", "mov"), max_bytes=100 * 1024 * 1024, min_side=340, max_side=3850),
    durations_s={"video": (3, 30), "image": (3, 10)},
    prompt_chars=2500,
    models=("kling-v3", "kling-v2-6"),
    element_models=("kling-v3",),
    watermark=True,
    inline_image=True,
    own_id=True,
    ids_per_query=IDS_PER_QUERY,
    url_lives="30 days",
)
LIMITS_V1 = msgspec.structs.replace(
    LIMITS_V2,
    source="Kling API reference, motion control (older API)",
    image=msgspec.structs.replace(LIMITS_V2.image, max_bytes=10 * 1024 * 1024, max_side=65536),
    ids_per_query=PAGE_V1,
)

# A job takes 5 to 15 minutes as a rule; nobody documents a maximum.
PATIENCE = Patience(
    silence=Backoff(first_s=900, factor=1.5, max_s=3600),
    asking=Backoff(first_s=10, factor=1.5, max_s=60),
    abandon_after_s=86400,
)


class ApiKey(msgspec.Struct, frozen=True):
    """Kling's API key, for every model of both APIs."""

    secret: str

    def token(self, now_s: float) -> str:
        """Return the bearer token."""
        return self.secret

    def __repr__(self) -> str:
        return "ApiKey([hidden])"


class KeyPair(msgspec.Struct, frozen=True):
    """Kling's access key and secret key, for the v1 API only."""

    access_key: str
    secret_key: str

    def token(self, now_s: float) -> str:
        """Return a JWT that is good for 30 minutes, signed by HS256."""
        head = _base64url(b'{"alg":"HS256","typ":"JWT"}')
        claims = {"iss": self.access_key, "exp": int(now_s) + 1800, "nbf": int(now_s) - 5}
        signed = head + b"." + _base64url(msgspec.json.encode(claims))
        return (signed + b"." + _base64url(hmac.digest(self.secret_key.encode(), signed, "sha256"))).decode()

    def __repr__(self) -> str:
        return "KeyPair([hidden])"


class _Kling(msgspec.Struct, frozen=True):
    """What both generations share."""

    credentials: ApiKey | KeyPair
    base_url: str = BASE_URL

    name: ClassVar[str] = "kling"
    patience: ClassVar[Patience] = PATIENCE
    callbacks: ClassVar[CallbackSetting] = True
    signs_callbacks: ClassVar[bool] = True

    def probe(self, now_s: float) -> HttpRequest:
        """Ask for the account's resource packs of the last day, which costs nothing."""
        now_ms = int(now_s * 1000)
        span = urlencode({"start_time": now_ms - 86_400_000, "end_time": now_ms})
        return self._request("GET", f"/account/costs?{span}", now_s)

    def read_probe(self, answer: HttpAnswer) -> str:
        """Return the resource packs that have something left."""
        data = _data(answer)
        packs = objects(data, "resource_pack_subscribe_infos") if isinstance(data, dict) else []
        left = [
            f"{text(pack, 'resource_pack_name')}: {text(pack, 'remaining_quantity')} left"
            for pack in packs
            if text(pack, "status") == "online"
        ]
        return "; ".join(left) or "no active resource pack"

    def read_callback(self, body: bytes, now_s: float) -> Report:
        """Read either generation's callback, bare: told apart by `id` or `task_id`."""
        return _read_task(read_object(body), "callback")

    def read_create(self, answer: HttpAnswer) -> Report:
        """Read the answer to create, by HTTP status and by `code`."""
        envelope = object_or_empty(answer.body)
        if not _is_success(answer, envelope):
            rule, refused = _refused(answer, envelope)
            is_duplicate = refused.code == "1201" and "exist" in refused.message.lower()
            raise refused_create(refused, msgspec.structs.replace(rule, ambiguous=rule.ambiguous or is_duplicate))
        data = envelope.get("data")
        if not isinstance(data, dict):
            raise SubmissionUnknown("kling accepted the task and did not say which it is")
        id = text(data, "id") or text(data, "task_id")
        if id is None:
            raise SubmissionUnknown("kling accepted the task and gave it no id")
        # Whatever status it begins with, a created task is submitted; reports say the rest.
        return Report(source="create", status=TaskStatus.SUBMITTED, task_id=id)

    def _request(self, method: str, path: str, now_s: float, body: Any = None) -> HttpRequest:
        return json_request(method, self.base_url.rstrip("/") + path, self.credentials.token(now_s), body)


class KlingV2(_Kling, frozen=True):
    """The current API: the model is in the path; takes API keys only."""

    limits: ClassVar[Limits] = LIMITS_V2

    def create(self, job: Job, now_s: float) -> HttpRequest:
        """Return `POST /motion-control/kling-3.0`."""
        request = job.request
        contents: list[dict[str, str]] = [
            {"type": "image", "url": job.image},
            {"type": "video", "url": job.video},
        ]
        if request.prompt:
            contents.insert(0, {"type": "prompt", "text": request.prompt})
        if request.element_id is not None:
            contents.append({"type": "element", "element_id": request.element_id, "id": "element_1"})
        options: dict[str, Any] = {
            "external_task_id": job.external_task_id,
            "watermark_info": {"enabled": request.watermark},
        }
        if job.callback_url is not None:
            options["callback_url"] = job.callback_url
        body = {
            "contents": contents,
            "settings": {
                "character_orientation": request.character_orientation,
                "audio": "original" if request.keep_original_sound else "off",
                "resolution": RESOLUTION[job.mode],
            },
            "options": options,
        }
        return self._request("POST", PATH_V2[request.model], now_s, body)

    def queries(self, tasks: Sequence[Task], now_s: float) -> list[Query]:
        """Ask by task_ids, and by external_task_ids for those that have none: the two exclude each other."""
        known = [task for task in tasks if task.task_id is not None]
        unknown = [task for task in tasks if task.task_id is None]
        queries = []
        for group, field in ((known, "task_ids"), (unknown, "external_task_ids")):
            for start in range(0, len(group), IDS_PER_QUERY):
                batch = tuple(group[start : start + IDS_PER_QUERY])
                ids = ",".join(quote(task.task_id or task.external_task_id, safe="") for task in batch)
                queries.append(Query(self._request("GET", f"/tasks?{field}={ids}", now_s), batch))
        return queries

    def read_query(self, query: Query, answer: HttpAnswer, now_s: float) -> Findings:
        """Read the array of tasks; match by id, never by place."""
        data = _data(answer)
        reports, unreadable = _match(query.tasks, [data] if isinstance(data, dict) else data)
        absent = tuple(
            task.external_task_id
            for task in query.tasks
            if task.external_task_id not in reports and task.external_task_id not in unreadable
        )
        return Findings(reports, unreadable, absent)


class KlingV1(_Kling, frozen=True):
    """The older API: the model is in the body; takes API keys and key pairs."""

    limits: ClassVar[Limits] = LIMITS_V1

    def create(self, job: Job, now_s: float) -> HttpRequest:
        """Return `POST /v1/videos/motion-control`."""
        request = job.request
        body: dict[str, Any] = {
            "model_name": request.model,
            "image_url": job.image,
            "video_url": job.video,
            "keep_original_sound": "yes" if request.keep_original_sound else "no",
            "character_orientation": request.character_orientation,
            "mode": job.mode,
            "watermark_info": {"enabled": request.watermark},
            "external_task_id": job.external_task_id,
        }
        if request.prompt:
            body["prompt"] = request.prompt
        if request.element_id is not None:
            body["element_list"] = [{"element_id": int(request.element_id)}]
        if job.callback_url is not None:
            body["callback_url"] = job.callback_url
        return self._request("POST", PATH_V1, now_s, body)

    def queries(self, tasks: Sequence[Task], now_s: float) -> list[Query]:
        """Ask about one task by its id, about several by the list."""
        if not tasks:
            return []
        if len(tasks) == 1:
            id = quote(tasks[0].task_id or tasks[0].external_task_id, safe="")
            return [Query(self._request("GET", f"{PATH_V1}/{id}", now_s), tuple(tasks))]
        return [self._page(tuple(tasks), 1, now_s)]

    def read_query(self, query: Query, answer: HttpAnswer, now_s: float) -> Findings:
        """Read one task or a page of the list; a task that v1 does not know is 400/1201 (or 404/1203)."""
        try:
            data = _data(answer)
        except VendorRefused as refused:
            if len(query.tasks) == 1 and refused.code in ("1201", "1203"):
                return Findings(absent=(query.tasks[0].external_task_id,))
            raise
        rows = [data] if isinstance(data, dict) else data
        reports, unreadable = _match(query.tasks, rows)
        left = tuple(t for t in query.tasks if t.external_task_id not in reports | unreadable)
        is_list = len(query.tasks) > 1 or query.page > 1
        if left and is_list and isinstance(rows, list) and len(rows) >= PAGE_V1 and query.page < LAST_PAGE_V1:
            return Findings(reports, unreadable, more=(self._page(left, query.page + 1, now_s),))
        return Findings(reports, unreadable, tuple(task.external_task_id for task in left))

    def _page(self, tasks: tuple[Task, ...], page: int, now_s: float) -> Query:
        path = f"{PATH_V1}?pageNum={page}&pageSize={PAGE_V1}"
        return Query(self._request("GET", path, now_s), tasks, page)


def configure(settings: Mapping[str, str]) -> KlingV2 | KlingV1 | None:
    """Make the vendor from `api_key`, or `access_key` and `secret_key`; `api` and `base_url` are optional."""
    api_key, access_key, secret_key = (settings.get(name, "") for name in ("api_key", "access_key", "secret_key"))
    base_url = settings.get("base_url", BASE_URL)
    api = settings.get("api") or ("v2" if api_key else "v1")
    problems = check_base_url("kling", base_url, BASE_URL)
    if api not in ("v1", "v2"):
        problems.append(Problem("KLING_API", repr(api), "v1 or v2", "Leave it out, or choose one of them."))
    if bool(access_key) != bool(secret_key) and not api_key:
        missing = "KLING_SECRET_KEY" if access_key else "KLING_ACCESS_KEY"
        problems.append(Problem(missing, "not set", "both keys of the pair", "Set both, or KLING_API_KEY."))
    if api == "v2" and not api_key and access_key:
        problems.append(
            Problem(
                "KLING_API", "'v2' with a key pair", "v2 takes API keys only", "Set KLING_API_KEY, or KLING_API=v1."
            )
        )
    if problems:
        raise InvalidSettings(problems)
    if api_key:
        return (KlingV2 if api == "v2" else KlingV1)(ApiKey(api_key), base_url)
    return KlingV1(KeyPair(access_key, secret_key), base_url) if access_key else None


SETUP = VendorSetup(
    names=("api_key", "access_key", "secret_key", "api", "base_url", "webhook_secret"),
    credentials_remedy="Set KLING_API_KEY, or KLING_ACCESS_KEY and KLING_SECRET_KEY.",
    reader=KlingV2(ApiKey("")),
    configure=configure,
    sandbox="submitter.sandbox.kling:KlingSandbox",
)


def _data(answer: HttpAnswer) -> Any:
    """Return an answer's `data`; raise VendorRefused."""
    envelope = object_or_empty(answer.body)
    if not _is_success(answer, envelope):
        raise _refused(answer, envelope)[1]
    return envelope.get("data")


def _is_success(answer: HttpAnswer, envelope: Mapping[str, Any]) -> bool:
    """Success is HTTP 2xx and `code` 0."""
    return 200 <= answer.status < 300 and number(envelope, "code") == 0


def _refused(answer: HttpAnswer, envelope: Mapping[str, Any]) -> tuple[Rule, VendorRefused]:
    code = number(envelope, "code")
    rule = ERRORS.get(int(code or 0))
    if rule is None:
        # A 2xx with a code that we do not know is a refusal; one without any leaves all open.
        rule = rule_of(400 if code and answer.status < 400 else answer.status, "kling")
    if answer.status >= 500 or answer.status == 408:  # whatever the code says
        rule = msgspec.structs.replace(rule, ambiguous=True)
    message = text(envelope, "message") or ""
    return rule, refusal("kling", answer, rule, code=text(envelope, "code") or "none", message=message)


def _match(tasks: Sequence[Task], rows: Any) -> tuple[dict[str, Report], dict[str, str]]:
    by_task_id = {task.task_id: task.external_task_id for task in tasks if task.task_id}
    wanted = {task.external_task_id for task in tasks}
    reports: dict[str, Report] = {}
    unreadable: dict[str, str] = {}
    for row in rows if isinstance(rows, list) else []:
        if not isinstance(row, dict):
            continue
        own = _external_id(row)
        id = by_task_id.get(text(row, "id") or text(row, "task_id") or "") or (own if own in wanted else None)
        if id is None:
            continue
        try:
            reports[id] = _read_task(row, "poll")
        except Unintelligible as reason:
            unreadable[id] = str(reason)
    return reports, unreadable


def _external_id(row: Mapping[str, Any]) -> str | None:
    return text(row, "external_id") or text(inner(row, "task_info"), "external_task_id")


def _read_task(row: Mapping[str, Any], source: Source) -> Report:
    """Read one task in either generation's form; a v1 task has `task_id`, a v2 task `id`."""
    is_v1 = "task_id" in row
    word = text(row, "task_status" if is_v1 else "status")
    id = text(row, "task_id" if is_v1 else "id")
    status = STATUS.get(word or "")
    if id is None:
        raise Unintelligible("it names no task: neither `id` nor `task_id`")
    if status is None:
        raise Unintelligible(f"its status {word!r} is not one that we know")
    ended_ms = _time_ms(number(row, "updated_at" if is_v1 else "update_time"))
    videos = _videos_v1(row, ended_ms) if is_v1 else _videos_v2(row, ended_ms)
    if status is TaskStatus.SUCCEED and not videos:
        raise Unintelligible("it says succeed and has no video URL")
    return Report(
        source=source,
        status=status,
        task_id=id,
        external_task_id=_external_id(row),
        message=redact(text(row, "task_status_msg" if is_v1 else "message") or ""),
        videos=videos if status is TaskStatus.SUCCEED else (),
        cost=_cost_v1(row) if is_v1 else _cost_v2(row),
    )


def _videos_v2(row: Mapping[str, Any], ended_ms: int | None) -> tuple[Video, ...]:
    return tuple(_video(item, ended_ms) for item in objects(row, "outputs") if _is_video(item))


def _videos_v1(row: Mapping[str, Any], ended_ms: int | None) -> tuple[Video, ...]:
    rows = objects(inner(row, "task_result"), "videos")
    return tuple(_video(item, ended_ms) for item in rows if _is_video(item))


def _is_video(item: Mapping[str, Any]) -> bool:
    return text(item, "url") is not None and text(item, "type") in (None, "video")


def _video(item: Mapping[str, Any], ended_ms: int | None) -> Video:
    return Video(
        url=text(item, "url") or "",
        watermark_url=text(item, "watermark_url"),  # missing from the v1 callback, though the v1 query has it
        duration=number(item, "duration"),
        expires_at_ms=None if ended_ms is None else ended_ms + RESULT_LIVES_MS,
    )


def _cost_v2(row: Mapping[str, Any]) -> tuple[Charge, ...]:
    return tuple(
        Charge(
            kind=text(item, "charge_type") or "unit",
            amount=text(item, "amount") or "0",
            currency=text(item, "currency"),
            list_price=text(item, "list_price"),
        )
        for item in objects(row, "billing")
        if text(item, "amount") is not None
    )


def _cost_v1(row: Mapping[str, Any]) -> tuple[Charge, ...]:
    charges = []
    units = text(row, "final_unit_deduction")
    if units is not None:
        charges.append(Charge(kind="unit", amount=units))
    for item in objects(row, "final_balance_deduction"):
        quota = text(item, "quota")
        if quota is not None:
            charges.append(Charge(kind="cash", amount=quota, list_price=text(item, "list_price")))
    return tuple(charges)


def _time_ms(value: float | None) -> int | None:
    """Return Unix milliseconds between 2001 and 2100, or None for what cannot be a time of ours."""
    return int(value) if value is not None and 1e12 <= value <= 4.1e12 else None


def _base64url(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")
