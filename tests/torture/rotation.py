"""Part `rotation`: callback keys, webhook secrets and hook secrets are rotated by restarts while callbacks keep coming.

A rotation is two restarts: one with the new value beside the old one, and one without the old one, once nothing that
was signed with it is under way. Meanwhile nothing that should pass is refused. What is signed with a value that is not
set yet, or no longer, is refused: 404 for a key, 401 for a webhook secret. Each delivery verifies with every hook
secret of its time and with no other one, by the library `standardwebhooks`.
"""

import asyncio
import base64
import os
import random
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import standardwebhooks

from submitter.callback_url import KeyRing
from tests.bench.servers import KEY, WEBHOOK_KEY, callback
from tests.torture.load import exchange
from tests.torture.parts import Round
from tests.torture.receiver_process import encoded
from tests.torture.sqlite_store import SqliteStore
from tests.torture.store_trial import Trial

CYCLES = 2
STAYS_S = 1.5
PROBES = 3
KINDS = ("key", "webhook", "hook")


def run(seed: int, folder: Path) -> Round:
    """Rotate each of the three, several times, in an order by seed."""
    return asyncio.run(rotate(seed, folder))


async def rotate(
    seed: int, folder: Path, kinds: tuple[str, ...] = KINDS, cycles: int = CYCLES, sabotage: str = ""
) -> Round:
    """Rotate `kinds` of values `cycles` times under load."""
    rotation = Rotation(seed, folder, sabotage)
    order = [kind for kind in kinds for _ in range(cycles)]
    rotation.draw.shuffle(order)

    async def attack() -> None:
        for kind in order:
            await rotation.rotate(kind)

    return await rotation.run(attack)


class Rotation:
    """The values that the receiver knows, newest first, those that callbacks are signed with, and those retired."""

    def __init__(self, seed: int, folder: Path, sabotage: str) -> None:
        self.draw = random.Random(seed)
        self.known: dict[str, list[str]] = {
            "key": [f"bench:{KEY}"],
            "webhook": [encoded(WEBHOOK_KEY)],
            "hook": [self._new_secret()],
        }
        self.used = {kind: list(values) for kind, values in self.known.items()}
        self._strange: dict[str, list[str]] = {kind: [] for kind in KINDS}
        self._trial = Trial(folder, SqliteStore(folder, seed), sabotage)
        self._trial.load.make = self._sign
        self._generations: list[tuple[int, list[str], list[str]]] = []
        self._apply()

    async def run(self, attack: Callable[[], Awaitable[None]]) -> Round:
        done = await self._trial.run_during(attack)
        self._judge_deliveries(done)
        return done

    async def rotate(self, kind: str) -> None:
        """Add a new value, then remove the old one."""
        (old,) = self.known[kind]
        new = self._new_key() if kind == "key" else self._new_secret()
        await self._probe(kind, new, "not known yet")
        self.known[kind] = [new, old]
        await self._restart()
        self.used[kind] = [new, old]  # submitters and vendors get it after the receiver
        await asyncio.sleep(STAYS_S)
        self.used[kind] = [new]
        await self._trial.load.drain()
        self.known[kind] = [new]
        self._strange[kind].append(old)
        await self._restart()
        for retired in self._strange[kind]:
            await self._probe(kind, retired, "removed")
        self._trial.done.counts[f"rotations of a {kind}"] += 1
        await asyncio.sleep(STAYS_S)

    async def _restart(self) -> None:
        await self._trial.restart(between=self._apply)

    def _apply(self) -> None:
        """Write the settings that the next start reads; from then on the hook's deliveries are signed by them."""
        receiver, hook = self._trial.receiver, self.known["hook"]
        receiver.environ["KLING_RELAY_KEYS"] = ",".join(self.known["key"])
        receiver.environ["KLING_WEBHOOK_SECRET"] = ",".join(self.known["webhook"])
        names = []
        for number, secret in enumerate(hook):
            receiver.environ[f"HOOK_SECRET_{number}"] = secret
            names.append(f'"env:HOOK_SECRET_{number}"')
        receiver.configure(f"{self._trial.hooks}secret = [{', '.join(names)}]\n")
        self._generations.append((len(self._trial.inbox.requests), list(hook), list(self._strange["hook"])))

    def _sign(self, number: int, status: str) -> bytes:
        return self._request(
            "b", number, status, self.draw.choice(self.used["key"]), self.draw.choice(self.used["webhook"])
        )

    @staticmethod
    def _request(prefix: str, number: int, status: str, key: str, secret: str) -> bytes:
        return callback(prefix, number, status, KeyRing.read(key), base64.b64decode(secret.removeprefix("whsec_")))

    async def _probe(self, kind: str, value: str, why: str) -> None:
        """Send callbacks that only `value` has signed; they must be refused, and change nothing."""
        if kind == "hook":
            return
        expected = 404 if kind == "key" else 401
        for _ in range(PROBES):
            number = self._trial.tasks - 1 - self.draw.randrange(100)  # tasks that the load never reaches
            signed = {name: values[0] for name, values in self.used.items()} | {kind: value}
            request = self._request("b", number, "succeeded", signed["key"], signed["webhook"])
            answer = await exchange(self._trial.receiver.port, request)
            self._trial.done.counts["probes"] += 1
            if answer.status != expected:
                self._trial.done.findings.append(
                    f"a callback signed with a {kind} that is {why} was answered {answer.status}, not {expected}"
                )

    def _judge_deliveries(self, done: Round) -> None:
        requests = self._trial.inbox.requests
        ends = [start for start, _, _ in self._generations[1:]] + [len(requests)]
        for (start, secrets, retired), end in zip(self._generations, ends, strict=True):
            for headers, body in requests[start:end]:
                wrong = [secret for secret in secrets if not _verifies(secret, headers, body)]
                early = [secret for secret in retired if _verifies(secret, headers, body)]
                if wrong or early:
                    done.findings.append(
                        f"the delivery {headers.get('webhook-id')} does not verify with {len(wrong)} of the"
                        f" {len(secrets)} secrets of its time, and with {len(early)} that were removed"
                    )
                    return

    def _new_secret(self) -> str:
        return encoded(self.draw.randbytes(32))

    def _new_key(self) -> str:
        """Return the key that `keys new --rotate` puts first."""
        environ = self._trial.receiver.environ
        command = [sys.executable, "-m", "receiver", "keys", "new", "--rotate"]
        made = subprocess.run(command, env=environ, capture_output=True, text=True, check=True, cwd=os.curdir)
        return made.stdout.strip().partition("=")[2].split(",")[0]


def _verifies(secret: str, headers: dict[str, str], body: bytes) -> bool:
    try:
        standardwebhooks.Webhook(secret).verify(body, headers)
    except standardwebhooks.WebhookVerificationError:
        return False
    return True
