"""The hooks of a simulated day: four endpoints that keep what they accept, and misbehave as the plan says."""

import asyncio
import base64
import hashlib
import hmac
from collections import Counter, defaultdict
from typing import Any

from starlette.types import Receive, Scope, Send

from tests.torture.day_plan import Plan
from tests.torture.virtual_time import BASE_MS
from tests.world import HOOK_SECRET

SHORT_SCHEDULE_S = (0, 5)
HOOKS = "".join(
    f'[[hook]]\nname = "{name}"\nurl = "http://hooks.test/{name}"\nsecret = "env:HOOK_SECRET"\n{more}\n'
    for name, more in {
        "steady": "",
        "flaky": "timeout_s = 10",
        "gone": 'events = ["task.succeed", "task.failed"]',
        "short": f'events = ["task.succeed"]\nmode = "binary"\nschedule = {list(SHORT_SCHEDULE_S)}',
    }.items()
)
"""`steady` gets everything, `flaky` has outages, `gone` answers 410 from a moment on, `short` has two attempts."""

_KEY = base64.b64decode(HOOK_SECRET.removeprefix("whsec_"))
_NO_CONTENT = [(b"content-length", b"0")]


class Endpoints:
    """The hooks' server. `accepted` and `refused` count by hook and event; `bodies` holds what an event looked like."""

    def __init__(self, plan: Plan, seed: int) -> None:
        self._plan = plan
        self._seed = seed
        self.is_calm = False
        self.accepted: dict[str, Counter[str]] = defaultdict(Counter)
        self.refused: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        self.bodies: dict[str, set[bytes]] = defaultdict(set)
        self.wrong: list[str] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        hook = scope["path"].strip("/")
        headers: dict[bytes, bytes] = dict(scope["headers"])
        body: bytes = (await receive())["body"]
        event_id = headers[b"webhook-id"].decode()
        now_s = asyncio.get_running_loop().time()
        status, more = self._answer(hook, event_id, now_s)
        if status < 300:
            self._accept(hook, event_id, headers, body)
        else:
            self.refused[hook][event_id].append(status)
        await send({"type": "http.response.start", "status": status, "headers": [*_NO_CONTENT, *more]})
        await send({"type": "http.response.body", "body": b""})

    def _answer(self, hook: str, event_id: str, now_s: float) -> tuple[int, list[tuple[bytes, bytes]]]:
        """Return the status, and more headers. What `short` answers depends on the event, so that some are dead."""
        if hook == "gone" and now_s >= self._plan.gone_at_s:
            return 410, []
        if self.is_calm:
            return 204, []
        if hook == "short":
            draw = hashlib.sha256(f"{self._seed} {event_id}".encode()).digest()[0]
            if draw < 6:
                return 500 if draw < 4 else 413, []
        trouble = self._plan.trouble("flaky", now_s) if hook == "flaky" else None
        if trouble == "429":
            return 429, [(b"retry-after", b"120")]
        return 204, []

    def _accept(self, hook: str, event_id: str, headers: dict[bytes, bytes], body: bytes) -> None:
        self.accepted[hook][event_id] += 1
        if hook != "short":  # in binary mode the body is the data only
            self.bodies[event_id].add(body)
        signed = b"%s.%s.%s" % (event_id.encode(), headers[b"webhook-timestamp"], body)
        signature = b"v1," + base64.b64encode(hmac.digest(_KEY, signed, "sha256"))
        if headers.get(b"webhook-signature") != signature:
            self.wrong.append(f"{hook} got {event_id} with a wrong signature")
        skew_s = abs(int(headers[b"webhook-timestamp"]) - BASE_MS / 1000 - asyncio.get_running_loop().time())
        if skew_s > 3700:
            self.wrong.append(f"{hook} got {event_id} with a timestamp {skew_s:.0f} s off")

    @property
    def attempts(self) -> int:
        """How many requests arrived."""
        refused = sum(len(statuses) for events in self.refused.values() for statuses in events.values())
        return refused + sum(sum(counter.values()) for counter in self.accepted.values())

    @property
    def counts(self) -> dict[str, Any]:
        """The numbers of a round."""
        accepted = sum(sum(counter.values()) for counter in self.accepted.values())
        first = sum(len(counter) for counter in self.accepted.values())
        return {"deliveries accepted": accepted, "deliveries accepted again": accepted - first}
