"""A receiver in a separate process, as `serve` runs it, with a full ledger; what it uses, and what it left behind."""

import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from submitter.task import TaskStatus
from tests.bench.processes import listening_process
from tests.bench.servers import KEY, WEBHOOK, fill
from tests.conformance.brokers import free_port
from tests.torture.parts import Missing

FILES_MAX = 1024
"""The limit of open files of the receiver: the usual one of a shell or a container."""

MEMORY_MAX_MIB = 120
STOP_MAX_S = 10.0
TICK_TOKEN = "tick-0123456789abcdef"
EVENTS_TOKEN = "events-0123456789abcdef"
SECRETS = (KEY, WEBHOOK, TICK_TOKEN, EVENTS_TOKEN, "k" * 32, "w" * 32)
PROGRAM = ("-m", "receiver")

# A secret, the token of a callback URL, or a control character in UTF-8 (C0 but the end of a line, DEL, C1).
UNWANTED = re.compile(
    rb"(?P<secret>%s)|(?P<token>\bbench\.[0-9]{1,12}\.[A-Za-z0-9_-]{43})"
    rb"|(?P<control>[\x00-\x09\x0b-\x1f\x7f]|\xc2[\x80-\x9f])|(?P<exception>Traceback \(most recent call last\))"
    % b"|".join(re.escape(secret.encode()) for secret in SECRETS)
)

Rows = Mapping[str, frozenset[tuple[object, ...]]]
"""All rows of a ledger, by table."""


class Served:
    """A running receiver."""

    def __init__(self, process: "subprocess.Popen[bytes]", port: int, folder: Path) -> None:
        self.process = process
        self.port = port
        self.ledger = folder / "relay.db"
        self.log = folder / "receiver.log"
        self.hooked = folder / "events.jsonl"

    def stop(self) -> float:
        """Terminate the process as a service manager does; return the seconds until it has ended."""
        begun_s = time.monotonic()
        self.process.terminate()
        try:
            self.process.wait(4 * STOP_MAX_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
        return time.monotonic() - begun_s

    def findings_at_end(self) -> list[str]:
        """Stop the process; return what is wrong with its memory, its end, its exit status and its log."""
        if self.process.poll() is not None:
            return [f"the receiver died: exit status {self.process.returncode}: {self.log.read_bytes()[-2000:]!r}"]
        found = [
            f"the receiver has {name} of {mib} MiB, more than {MEMORY_MAX_MIB}"
            for name, mib in memory_mib(self.process.pid).items()
            if mib > MEMORY_MAX_MIB
        ]
        seconds = self.stop()
        if seconds > STOP_MAX_S:
            found.append(f"the receiver ended {seconds:.1f} s after SIGTERM, more than {STOP_MAX_S:g}")
        if self.process.returncode not in (0, -signal.SIGTERM):
            found.append(f"the receiver ended with exit status {self.process.returncode}")
        return found + findings_in_log(self.log.read_bytes())


def memory_mib(pid: int) -> dict[str, int]:
    """Return the memory that a process has now (VmRSS) and had at most (VmHWM), in MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return {name: int(kib) // 1024 for name, kib in re.findall(r"(VmRSS|VmHWM):\s+([0-9]+) kB", status)}


def findings_in_log(log: bytes) -> list[str]:
    """Return the first secret, token, control character and exception in a log, each as a finding."""
    first = {str(match.lastgroup): match for match in reversed(list(UNWANTED.finditer(log)))}
    return [
        f"the log contains {'an' if kind == 'exception' else 'a'} {kind}: "
        f"{log[max(0, match.start() - 200) : match.end() + (3000 if kind == 'exception' else 100)]!r}"
        for kind, match in first.items()
    ]


def read_rows(ledger: Path) -> Rows:
    """Return all rows of all tables."""
    db = sqlite3.connect(f"file:{ledger}?mode=ro", uri=True)
    try:
        names = [name for (name,) in db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
        return {name: frozenset(db.execute(f"SELECT * FROM {name}")) for name in names}
    finally:
        db.close()


def fill_ledger(folder: Path, tasks: Mapping[str, int], *, ended: Sequence[str] = ()) -> None:
    """Create tasks `{prefix}-{number}`, as many of each prefix as given; those of `ended` prefixes have succeeded."""
    for prefix, count in tasks.items():
        status = TaskStatus.SUCCEED if prefix in ended else TaskStatus.SUBMITTED
        fill(folder / "relay.db", prefix, count, status)


@contextmanager
def serving(folder: Path, *, log: str = "json", program: Sequence[str] = PROGRAM) -> Iterator[Served]:
    """Run `serve` with every endpoint on, a hook and a limit of open files, while the block runs."""
    port = free_port()
    (folder / "relay.toml").write_text(f'[[hook]]\nname = "file"\nurl = "file://{folder / "events.jsonl"}"\n')
    (folder / "media").mkdir(exist_ok=True)
    settings = {
        "KLING_RELAY_CONFIG": str(folder / "relay.toml"),
        "KLING_RELAY_LEDGER": f"sqlite:///{folder / 'relay.db'}",
        "KLING_RELAY_KEYS": f"bench:{KEY}",
        "KLING_WEBHOOK_SECRET": f"whsec_{WEBHOOK}",
        "KLING_RELAY_TICK_TOKEN": TICK_TOKEN,
        "KLING_RELAY_EVENTS_TOKEN": EVENTS_TOKEN,
        "KLING_RELAY_MEDIA_STORE": str(folder / "media"),
        "KLING_RELAY_PUBLIC_URL": f"http://127.0.0.1:{port}",
        "KLING_RELAY_ALLOW_HOSTS": "127.0.0.1",
        "KLING_RELAY_LOG": log,
    }
    limited = ["-c", f'ulimit -n {FILES_MAX}; exec "$0" "$@"', sys.executable, *program, "serve", "--port", str(port)]
    log_file = folder / "receiver.log"
    with listening_process(limited, port, log_file, python="sh", settings=settings) as process:
        try:
            yield Served(process, port, folder)
        finally:
            process.kill()


def allow_open_files(count: int) -> None:
    """Let this process have `count` open files; raise Missing where it may not."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        if hard != resource.RLIM_INFINITY and hard < count:
            raise Missing(f"{count} open files are needed, and this user may have {hard}")
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
