"""A damaged SQLite file: opening it fails with a clear error, or nothing that it cannot hold is acknowledged."""

import asyncio
import random
import shutil
import sqlite3
from contextlib import closing, suppress
from pathlib import Path

from submitter.callback_url import KeyRing
from submitter.ledger import open_ledger
from tests.bench.servers import KEY, WEBHOOK_KEY, callback
from tests.road.many_processes import fill
from tests.torture.load import exchange, get
from tests.torture.parts import Round
from tests.torture.receiver_process import START_S, ReceiverProcess

PAGE = 4096
TASKS = 400
SENT = 60


async def damage_trial(seed: int, folder: Path, damages: int = 4, sabotage: str = "") -> Round:
    """Damage a copy of a file several times, and send callbacks about its tasks to a receiver on each."""
    done, draw = Round(), random.Random(seed)
    whole = folder / "whole.db"
    ledger = open_ledger(f"sqlite:///{whole}")
    await fill(ledger, "b", TASKS)
    await ledger.close()
    for number in range(damages):
        file = folder / f"damaged-{number}.db"
        shutil.copyfile(whole, file)
        what = damage(file, draw)
        receiver = ReceiverProcess(folder, {"KLING_RELAY_LEDGER": f"sqlite:///{file}"}, "", sabotage)
        try:
            await _one(receiver, file, what, draw, done)
        finally:
            receiver.kill()
        receiver.judge_log(done)
        done.counts["damaged files"] += 1
    return done


def damage(file: Path, draw: random.Random) -> str:
    """Overwrite the header, or some pages with zeros or noise; return a description."""
    pages = file.stat().st_size // PAGE
    kind = draw.choice(("header", "zeros", "noise", "cut short"))
    if kind == "cut short":
        with file.open("r+b") as opened:
            opened.truncate(draw.randrange(1, pages) * PAGE)
        return "cut short"
    chosen = [0] if kind == "header" else sorted(draw.sample(range(1, pages), max(1, pages // 8)))
    with file.open("r+b") as opened:
        for page in chosen:
            opened.seek(page * PAGE)
            opened.write(draw.randbytes(PAGE) if kind != "zeros" else bytes(PAGE))
    return f"{kind} in {len(chosen)} of {pages} pages"


async def _one(receiver: ReceiverProcess, file: Path, what: str, draw: random.Random, done: Round) -> None:
    process = receiver.launch()
    async with asyncio.timeout(START_S):
        while process.poll() is None and (await get(receiver.port, "/healthz")).status != 200:
            await asyncio.sleep(0.05)
    if process.poll() is not None:
        said = receiver.whole_log()
        if process.returncode == 0 or f"could not open the ledger '{file}'" not in said:
            done.findings.append(f"{what}: the process ended with {process.returncode} and said {said[-500:]!r}")
        done.counts["damage refused at the start"] += 1
        return
    ring = KeyRing.read(f"bench:{KEY}")
    numbers = draw.sample(range(TASKS), SENT)
    answers = {n: await exchange(receiver.port, callback("b", n, "succeeded", ring, WEBHOOK_KEY)) for n in numbers}
    await receiver.stop()
    for number, answer in answers.items():
        done.counts[f"answers {answer.status}"] += 1
        if answer.status not in (200, 503):
            shown = answer.body[:300].decode(errors="replace")
            done.findings.append(f"{what}: the callback of b-{number} was answered {answer.status} {shown}")
        elif answer.is_accepted and not _holds(file, f"b-{number}", answer.headers.get("kling-relay-result", "")):
            done.findings.append(f"{what}: the callback of b-{number} was answered {answer}, and cannot be read back")
    done.findings = done.findings[:10]


def _holds(file: Path, task: str, result: str) -> bool:
    """Return whether the file, damaged as it is, holds what a callback said."""
    sql = "SELECT count(*) FROM tasks WHERE external_task_id = ? AND status = 'succeed'"
    if result == "quarantined":
        sql = "SELECT count(*) FROM quarantine WHERE external_task_id = ?"
    with closing(sqlite3.connect(file)) as db, suppress(sqlite3.DatabaseError):
        return bool(db.execute(sql, (task,)).fetchone()[0])
    return False
