"""Checks a simulated day: the ledger's file, by plain SQL, against what vendors, network and hooks saw."""

import re
import sqlite3
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

import msgspec

from submitter.sandbox.base import Job
from tests.torture.day_hooks import SHORT_SCHEDULE_S
from tests.torture.day_plan import END_S, HOUR_S
from tests.torture.virtual_time import BASE_MS

if TYPE_CHECKING:
    from tests.torture.day import Day

WANTED = {"steady": None, "flaky": None, "gone": ("task.succeed", "task.failed"), "short": ("task.succeed",)}
ENDED = {"succeeded": "succeed", "failed": "failed"}
SHOWN_MAX = 20
_OF_URL = re.compile(r"/callbacks/[a-z]+/([^/]+)/")


def check(day: "Day") -> list[str]:
    """Return every broken promise."""
    db = sqlite3.connect(day.path)
    found = [
        *day.findings,
        *(f"the event loop reported: {text}" for text in day.loop.unhandled),
        *(f"an app did not handle an exception: {text}" for text in day.network.failures),
        *day.endpoints.wrong,
        *_check_tasks(day, db),
        *_check_events(db),
        *_check_deliveries(day, db),
        *_check_rest(day, db),
    ]
    for table in ("tasks", "events", "deliveries", "quarantine"):
        for row in db.execute(f"SELECT * FROM {table} ORDER BY 1, 2"):
            day.note(table, row)
    db.close()
    more = len(found) - SHOWN_MAX
    return [*found[:SHOWN_MAX], *([f"and {more} more"] if more > 0 else [])]


def jobs_by_order(day: "Day") -> dict[str, list[Job]]:
    """Return the vendors' tasks by our id, which is in their callback URL."""
    jobs: dict[str, list[Job]] = defaultdict(list)
    for sandbox in day.sandboxes.values():
        for job in sandbox.jobs.values():
            found = _OF_URL.search(job.request.callback_url or "")
            jobs["" if found is None else found[1]].append(job)
    return jobs


def _check_tasks(day: "Day", db: sqlite3.Connection) -> list[str]:
    """Each order has one task at most, and ended as its vendor says; who has a callback is not polled."""
    found = []
    jobs = jobs_by_order(day)
    rows = {
        row[0]: row[1:] for row in db.execute("SELECT external_task_id, status, is_open, poll_at_ms, doc FROM tasks")
    }
    orders = {order.id for order in day.plan.orders}
    found += [f"the ledger has {id}, which was never ordered" for id in rows.keys() - orders]
    found += [f"a vendor has a task of {id!r}, which was never ordered" for id in jobs.keys() - orders]
    for order in day.plan.orders:
        theirs = jobs.get(order.id, [])
        outcomes = day.outcomes[order.id]
        if len(theirs) > 1:
            found.append(
                f"{order.id} was created {len(theirs)} times at {order.vendor}, as {[job.id for job in theirs]}"
            )
        if order.id not in rows:
            if theirs or "ok" in outcomes or "SubmissionUnknown" in outcomes:
                found.append(f"{order.id} is not in the ledger; submit: {outcomes}, vendor's tasks: {len(theirs)}")
            continue
        status, is_open, poll_at_ms, doc = rows[order.id]
        task = msgspec.json.decode(doc)
        if is_open or poll_at_ms is not None or task.get("sender") is not None:
            found.append(f"{order.id} is {status}: open {is_open}, poll at {poll_at_ms}, lease {task.get('sender')}")
        allowed = _allowed(day, order.id, order.vendor, theirs, task)
        if status not in allowed:
            found.append(f"{order.id} is {status} ({task.get('status_message')}), and may only be {sorted(allowed)}")
        waited = [outcome.removeprefix("result ") for outcome in outcomes if outcome.startswith("result ")]
        if any(one not in ("refused", "abandoned", status) for one in waited):
            found.append(f"result() of {order.id} returned {waited}, and the task is {status}")
        if len(theirs) == 1 and theirs[0].queries and _is_quiet(day, order.id, theirs[0]):
            found.append(f"{order.id} had its callbacks, and was polled {theirs[0].queries} times")
    return found


def _allowed(day: "Day", id: str, vendor: str, theirs: list[Job], task: dict[str, Any]) -> set[str]:
    """Return the statuses that a task may have at the end."""
    if not theirs:
        if day.acknowledged[id] or task.get("task_id"):
            return set()
        # A create without an answer may have made a task as far as the relay can know.
        return {"refused", "abandoned"}
    ends = {ENDED[job.status] for job in theirs if job.status in ENDED}
    cannot_be_found = vendor == "novita" and not task.get("task_id") and not day.acknowledged[id]
    return ends | {"abandoned"} if cannot_be_found else ends


def _is_quiet(day: "Day", id: str, job: Job) -> bool:
    """Return whether nothing happened to a task of a vendor with signed callbacks that is a reason to poll."""
    creates, outcomes = day.creates[id], [one for one in day.outcomes[id] if not one.startswith("result ")]
    begun_s, ended_s = (job.created_ms - BASE_MS) / 1000, (job.updated_ms - BASE_MS) / 1000
    is_skewed = any(start_s - HOUR_S < ended_s and begun_s < end_s + HOUR_S for (start_s, end_s), _ in day.plan.jumps)
    reported = {one.partition(":")[0] for one in job.callbacks}
    return (
        day.sandboxes["kling"].jobs.get(job.id) is job
        and not is_skewed
        and creates.sent == creates.accepted == 1
        and set(outcomes) == {"ok"}
        and all(one.endswith(":200") for one in job.callbacks if not one.startswith("forged"))
        and {"submitted", "processing", job.status} <= reported
    )


def _check_events(db: sqlite3.Connection) -> list[str]:
    """A task's events are numbered without a gap, the last one has the task's status, and ids are unique."""
    found = []
    events: dict[str, list[tuple[int, str]]] = defaultdict(list)
    ids: Counter[str] = Counter()
    for task_id, sequence, id, type in db.execute(
        "SELECT external_task_id, sequence, id, type FROM events ORDER BY seq"
    ):
        events[task_id].append((sequence, type))
        ids[id] += 1
    found += [f"{count} events have the id {id}" for id, count in ids.items() if count > 1]
    for task_id, status, doc in db.execute("SELECT external_task_id, status, doc FROM tasks"):
        last = msgspec.json.decode(doc).get("sequence", 0)
        if [sequence for sequence, _ in events[task_id]] != list(range(1, last + 1)):
            found.append(f"{task_id} changed {last} times, and its events are {events[task_id]}")
        elif last and events[task_id][-1][1] != f"task.{status}":
            found.append(f"{task_id} is {status}, and its last event is {events[task_id][-1][1]}")
        ends = [type for _, type in events[task_id] if type in ("task.succeed", "task.failed")]
        if len(ends) > 1:
            found.append(f"{task_id} has several ends: {ends}")
    return found


def _check_deliveries(day: "Day", db: sqlite3.Connection) -> list[str]:
    """Each hook accepted each event that it subscribes to, unchanged, or has it as a dead letter for a reason."""
    found = []
    states: dict[tuple[str, str], tuple[str, int, str]] = {}
    for hook, id, *delivery in db.execute(
        "SELECT d.hook, e.id, d.state, d.attempts, d.last_error FROM deliveries AS d JOIN events AS e"
        " ON e.seq = d.event_seq"
    ):
        states[hook, id] = tuple(delivery)
    bodies = {}
    for id, type, body in db.execute("SELECT id, type, body FROM events"):
        bodies[id] = body.encode()
        for hook, wanted in WANTED.items():
            if wanted is not None and type not in wanted:
                if (hook, id) in states or id in day.endpoints.accepted[hook]:
                    found.append(f"{hook} got {id}, a {type}, which it does not want")
                continue
            wrong = _wrong_delivery(day, hook, id, states.get((hook, id)))
            if wrong is not None:
                found.append(f"{type} {id} at {hook}: {wrong}")
    for hook in WANTED:
        seen = {*day.endpoints.accepted[hook], *day.endpoints.refused[hook]}
        found += [f"{hook} got {id}, which is not in the ledger" for id in sorted(seen - bodies.keys())]
    for id, seen_bodies in day.endpoints.bodies.items():
        if seen_bodies != {bodies.get(id)}:
            found.append(f"{id} was delivered with other bytes than the ledger has")
    return found


def _wrong_delivery(day: "Day", hook: str, id: str, delivery: tuple[str, int, str] | None) -> str | None:
    """Return what is wrong with the delivery of an event that the hook wants."""
    if delivery is None:
        return "there is no delivery"
    state, attempts, error = delivery
    accepted, refused = day.endpoints.accepted[hook][id], day.endpoints.refused[hook].get(id, [])
    if state == "done":
        return None if accepted else f"done, and the hook never accepted it (it refused {refused})"
    if state != "dead":
        return f"still {state} after {attempts} attempts: {error}"
    if hook == "gone":
        return None if "410" in error else f"dead: {error}"
    if hook == "short":
        is_over = attempts >= len(SHORT_SCHEDULE_S) or 413 in refused
        return None if is_over else f"dead after {attempts} attempts: {error}"
    return f"dead after {attempts} attempts: {error}"


def _check_rest(day: "Day", db: sqlite3.Connection) -> list[str]:
    """Nothing is left to do, nothing forged was accepted, nothing is in quarantine."""
    found = []
    (upto,), (last,) = (
        db.execute(sql).fetchone() for sql in ("SELECT upto FROM routed", "SELECT max(seq) FROM events")
    )
    if upto != last:
        found.append(f"events after {upto} of {last} were never routed to hooks")
    for sandbox in day.sandboxes.values():
        for job in sandbox.jobs.values():
            found += [f"a forged callback of {job.id} got {one}" for one in job.callbacks if one.startswith("forged:2")]
            if job.is_open:
                found.append(f"the stand-in's task {job.id} has not ended")
    for id, reason in db.execute("SELECT external_task_id, reason FROM quarantine"):
        found.append(f"{id} is in quarantine: {reason}")
    return found


def counts(day: "Day") -> Counter[str]:
    """Return the numbers of a day."""
    jobs = [job for sandbox in day.sandboxes.values() for job in sandbox.jobs.values()]
    forged = sum(one.startswith("forged") for job in jobs for one in job.callbacks)
    found: Counter[str] = Counter(
        {
            "tasks": len(day.plan.orders),
            "tasks at vendors": len(jobs),
            "callbacks sent": day.counts["callbacks sent"],
            "callbacks acknowledged": day.counts["callbacks acknowledged"],
            "callbacks forged": forged,
            "polled tasks": sum(job.queries > 0 for job in jobs),
            "polls": sum(job.queries for job in jobs),
            "commits": day.commits,
            "simulated hours": int(END_S / HOUR_S),
            **day.endpoints.counts,
        }
    )
    with sqlite3.connect(day.path) as db:
        for status, count in db.execute("SELECT status, count(*) FROM tasks GROUP BY status"):
            found[f"tasks {status}"] = count
        for state, count in db.execute("SELECT state, count(*) FROM deliveries GROUP BY state"):
            found[f"deliveries {state}"] = count
        (found["events"],) = db.execute("SELECT count(*) FROM events").fetchone()
    for name, count in sorted([*day.counts.items(), *day.network.counts.items()]):
        if name.startswith(("fault ", "submit ", "queries ")):
            found[name] = count
    found["fault callback dropped"] = sum(sandbox.counts["callbacks_dropped"] for sandbox in day.sandboxes.values())
    return found
