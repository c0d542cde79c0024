"""The common part of Kling's API v1 and v2: envelope, error codes, tasks, callbacks. Pure.

Source: Kling's API reference (motion control, callbacks, error codes, account costs) and live
observations, as gathered in 2026. Not documented, so either form is accepted: whether a redelivered
callback keeps its `webhook-id`, whether `external_id` is in every callback, whether the resource packs are
nested in `data` once or twice.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar
from urllib.parse import urlencode

import msgspec

from submitter.callback_url import redact
from submitter.errors import SubmissionUnknown, Unintelligible, VendorRefused
from submitter.observation import Report, Source
from submitter.schedule import Backoff, PollPolicy
from submitter.task import Charge, Task, TaskStatus, Video
from submitter.vendors.base import CallbackSetting, HttpAnswer, HttpRequest
from submitter.vendors.kling.callback_schema import check_schema
from submitter.vendors.kling.credentials import ApiKey, KeyPair
from submitter.vendors.reading import inner, number, object_or_empty, objects, raw, read_object, text, url
from submitter.vendors.refusals import Rule, refusal, refused_create, rule_of
from submitter.vendors.rest import created, json_request, read_status

BASE_URL = "https://api-singapore.klingai.com"  # in China: https://api-beijing.klingai.com
RESULT_TTL_MS = 30 * 86400 * 1000
PACKS_DAYS = 400

# v2 reports succeeded, v1 reports succeed.
STATUS = {
    "submitted": TaskStatus.SUBMITTED,
    "processing": TaskStatus.PROCESSING,
    "succeeded": TaskStatus.SUCCEED,
    "succeed": TaskStatus.SUCCEED,
    "failed": TaskStatus.FAILED,
}

# In answer to a create, 500x leave open whether a task exists. Of these, only 5001 (maintenance) fails
# over to another vendor, after a lookup has shown that the task does not exist.
ERRORS: dict[int, Rule] = {
    1000: Rule("Check the API key.", failover=True),
    1001: Rule("Set KLING_API_KEY, or KLING_ACCESS_KEY and KLING_SECRET_KEY.", failover=True),
    1002: Rule("Check the credentials: an API key, or a key pair with KLING_API=v1.", failover=True),
    1003: Rule("The token is not valid yet. Synchronize this machine's clock."),
    1004: Rule(
        "The token expired. It is retried once; if it fails again, synchronize this machine's clock.", retryable=True
    ),
    1100: Rule("Check the account in Kling's console.", failover=True),
    1101: Rule("The account is in arrears. Pay the bill.", failover=True),
    1102: Rule("The resource pack is used up or expired. Buy another one.", failover=True),
    1103: Rule("This key has no permission for this model. Request it in Kling's console.", failover=True),
    1200: Rule("Correct the request, and submit it with a new id."),
    1201: Rule("Correct the request, and submit it with a new id."),
    1202: Rule("Check KLING_API and KLING_BASE_URL."),
    1203: Rule("Check the model, and KLING_BASE_URL."),
    1300: Rule("Kling's policy rejects this input. Change it."),
    1301: Rule("Kling's content policy rejects this input. Change it."),
    1302: Rule("Too many requests. It is retried automatically.", retryable=True),
    1303: Rule("All slots of the account are in use. It is retried automatically.", retryable=True, failover=True),
    1304: Rule("Add this machine's address to the allow-list in Kling's console.", failover=True),
    5000: Rule("Kling has an outage. Try again later.", retryable=True, ambiguous=True),
    5001: Rule("Kling is under maintenance. Try again later.", retryable=True, failover=True, ambiguous=True),
    5002: Rule("Kling has a backlog. Try again later.", retryable=True, ambiguous=True),
}

# 1201 covers several refusals, which only their text separates. The first row whose words are in the text
# (compared in lower case) applies; any other text is a parameter to correct.
DUPLICATE = Rule("Use a new external_task_id.", duplicate=True)
WORDS_ON_CREATE: tuple[tuple[int, str, Rule], ...] = (
    (1201, "already exist", DUPLICATE),  # "External_task_id order-1 already exists", seen live
)
# In answer to a query by one id: the vendor does not know the task. The text is inferred, so that it must name
# the task: "Account not found" does not mean that there is none. Neither does 1203, the answer to a wrong path.
WORDS_ON_QUERY: tuple[tuple[int, str], ...] = (
    (1201, r"\btask\b.*(not found|not exist)"),
    (1201, r"(no such|unknown)\b.*\btask\b"),
)

# A task usually takes 5 to 15 minutes; no maximum is documented.
POLL_POLICY = PollPolicy(
    while_expected=Backoff(first_s=900, factor=1.5, max_s=3600),
    while_unexpected=Backoff(first_s=10, factor=1.5, max_s=60),
    abandon_after_s=86400,
)


class Kling(msgspec.Struct, frozen=True):
    """The methods that v1 and v2 share."""

    credentials: ApiKey | KeyPair
    base_url: str = BASE_URL

    name: ClassVar[str] = "kling"
    poll_policy: ClassVar[PollPolicy] = POLL_POLICY
    callbacks: ClassVar[CallbackSetting] = True
    signs_callbacks: ClassVar[bool] = True

    def probe(self, now_s: float) -> HttpRequest:
        """Return a query for the account's resource packs, which is free of charge.

        The window filters by the time of purchase, and a pack may be valid for a year.
        """
        now_ms = int(now_s * 1000)
        span = urlencode({"start_time": now_ms - PACKS_DAYS * 86_400_000, "end_time": now_ms})
        return self._request("GET", f"/account/costs?{span}", now_s)

    def read_probe(self, answer: HttpAnswer) -> str:
        """Return the active resource packs and their remaining quantities, as text."""
        data = read_data(answer)
        found = (data, inner(data, "data")) if isinstance(data, dict) else ()
        packs = [pack for source in found for pack in objects(source, "resource_pack_subscribe_infos")]
        left = [
            f"{text(pack, 'resource_pack_name')}: {text(pack, 'remaining_quantity')} left"
            for pack in packs
            if text(pack, "status") == "online"
        ]
        return "; ".join(left) or "no active resource pack"

    def read_callback(self, body: bytes, now_s: float) -> Report:
        """Parse a callback that has the documented schema of v1 (with `task_id`) or v2 (with `id`).

        Kling's console tests a callback URL with the status `submitted` and no external id.
        """
        check_schema(body)
        report = read_task(read_object(body), "callback", body)
        if report.created_at_ms is None and not report.is_test:
            raise Unintelligible("when the task was created is not in Unix milliseconds")
        return report

    def read_create(self, answer: HttpAnswer) -> Report:
        """Parse the answer to create, by HTTP status and `code`."""
        envelope = object_or_empty(answer.body)
        request_id = text(envelope, "request_id")
        if not is_success(answer, envelope):
            raise refused_create(*read_refusal(answer, envelope))
        data = envelope.get("data")
        if not isinstance(data, dict) or (text(data, "id") or text(data, "task_id")) is None:
            raise SubmissionUnknown(f"kling accepted the request but returned no task id (request_id {request_id})")
        report = created(str(text(data, "id") or text(data, "task_id")), lambda: read_task(data, "create", data))
        return msgspec.structs.replace(report, request_id=request_id, raw=raw(answer.body))

    def _request(self, method: str, path: str, now_s: float, body: Any = None) -> HttpRequest:
        return json_request(method, self.base_url.rstrip("/") + path, self.credentials.token(now_s), body)


def read_data(answer: HttpAnswer) -> Any:
    """Return `data` of an answer; raise VendorRefused for an error."""
    envelope = object_or_empty(answer.body)
    if not is_success(answer, envelope):
        raise read_refusal(answer, envelope)[0]
    return envelope.get("data")


def is_success(answer: HttpAnswer, envelope: Mapping[str, Any]) -> bool:
    """Return whether an answer is a success: HTTP 2xx and `code` 0."""
    return 200 <= answer.status < 300 and number(envelope, "code") == 0


def is_absence(refused: VendorRefused) -> bool:
    """Return whether a refused query by one id means that the vendor does not know the task."""
    message = refused.message.lower()
    return any(refused.code == str(code) and re.search(words, message) for code, words in WORDS_ON_QUERY)


def read_refusal(answer: HttpAnswer, envelope: Mapping[str, Any]) -> tuple[VendorRefused, Rule]:
    """Return the exception for an error answer, and the rule that it follows."""
    code = number(envelope, "code")
    message = text(envelope, "message") or ""
    worded = (rule for numeric, words, rule in WORDS_ON_CREATE if numeric == code and words in message.lower())
    rule = next(worded, ERRORS.get(int(code or 0)))
    if rule is None:
        # A 2xx with an unknown code is a refusal; a 2xx without a code is ambiguous.
        rule = rule_of(400 if code and answer.status < 400 else answer.status, "kling")
    if answer.status >= 500 or answer.status == 408:  # with any code
        rule = msgspec.structs.replace(rule, ambiguous=True)
    return refusal(
        "kling",
        answer,
        rule,
        code=text(envelope, "code") or "none",
        message=message,
        request_id=text(envelope, "request_id"),
    ), rule


def match_tasks(tasks: Sequence[Task], data: Any) -> tuple[dict[str, Report], dict[str, str]]:
    """Match `tasks` with a row or a list of rows by id. Return their reports, and the reasons for unreadable rows.

    A task that is in neither is absent. A task that is not found is unreadable, if the data does not prove that it
    is absent: it is no list, or has a row without an id.
    """
    rows = data if isinstance(data, list) else [data]
    by_task_id = {task.task_id: task.external_task_id for task in tasks if task.task_id}
    wanted = {task.external_task_id for task in tasks}
    reports: dict[str, Report] = {}
    unreadable: dict[str, str] = {}
    proves_absence = isinstance(data, list)
    for row in rows:
        own = _external_id(row) if isinstance(row, dict) else None
        task_id = (text(row, "id") or text(row, "task_id") or "") if isinstance(row, dict) else ""
        id = by_task_id.get(task_id) or (own if own in wanted else None)
        if id is None:
            proves_absence = proves_absence and bool(task_id)
            continue
        try:
            reports[id] = read_task(row, "poll", row)
        except Unintelligible as reason:
            unreadable[id] = str(reason)
    if not proves_absence:
        for id in wanted - reports.keys() - unreadable.keys():
            unreadable[id] = "`data` is no list of tasks with an id, so it does not show that the task is absent"
    return reports, unreadable


def created_ms(row: Any) -> int | None:
    """Return when the task of a row was created, in Unix milliseconds; None if the row does not say."""
    if not isinstance(row, dict):
        return None
    return _time_ms(number(row, "created_at" if "task_id" in row else "create_time"))


def _external_id(row: Mapping[str, Any]) -> str | None:
    return text(row, "external_id") or text(inner(row, "task_info"), "external_task_id")


def read_task(row: Mapping[str, Any], source: Source, body: bytes | Mapping[str, Any]) -> Report:
    """Parse one task of v1 (it has `task_id`) or v2 (it has `id`); `body` is what it came in, and is kept."""
    is_v1 = "task_id" in row
    value = text(row, "task_status" if is_v1 else "status")
    id = text(row, "task_id" if is_v1 else "id")
    status = read_status(STATUS, value)
    if id is None:
        raise Unintelligible("no task id: `id` and `task_id` are missing")
    ended_ms = _time_ms(number(row, "updated_at" if is_v1 else "update_time"))
    videos = _videos_v1(row, ended_ms) if is_v1 else _videos_v2(row, ended_ms)
    if status is TaskStatus.SUCCEED and not videos:
        raise Unintelligible("succeed without a video URL")
    own_id = _external_id(row)
    return Report(
        source=source,
        status=status,
        task_id=id,
        external_task_id=own_id,
        message=redact(text(row, "task_status_msg" if is_v1 else "message") or ""),
        videos=videos if status is TaskStatus.SUCCEED else (),
        cost=_cost_v1(row) if is_v1 else _cost_v2(row),
        is_test=source == "callback" and status is TaskStatus.SUBMITTED and own_id is None,
        created_at_ms=created_ms(row),
        raw=raw(body),
    )


def _videos_v2(row: Mapping[str, Any], ended_ms: int | None) -> tuple[Video, ...]:
    return tuple(_video(item, ended_ms) for item in objects(row, "outputs") if _is_video(item))


def _videos_v1(row: Mapping[str, Any], ended_ms: int | None) -> tuple[Video, ...]:
    rows = objects(inner(row, "task_result"), "videos")
    return tuple(_video(item, ended_ms) for item in rows if _is_video(item))


def _is_video(item: Mapping[str, Any]) -> bool:
    return item.get("type") in (None, "video") and url(item, "url") is not None


def _video(item: Mapping[str, Any], ended_ms: int | None) -> Video:
    return Video(
        url=url(item, "url") or "",
        watermark_url=url(item, "watermark_url"),  # missing from the v1 callback, though the v1 query has it
        duration=number(item, "duration"),
        expires_at_ms=None if ended_ms is None else ended_ms + RESULT_TTL_MS,
        id=text(item, "id"),
    )


def _cost_v2(row: Mapping[str, Any]) -> tuple[Charge, ...]:
    return tuple(
        Charge(
            kind=text(item, "charge_type") or "unit",
            amount=text(item, "amount") or "0",
            currency=text(item, "currency"),
            list_price=text(item, "list_price"),
            source=text(item, "cash_type") or text(item, "package_type"),
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
    """Return Unix milliseconds; None for values outside 2001 to 2099."""
    return int(value) if value is not None and 1e12 <= value <= 4.1e12 else None
