"""A receiver in a process that a part can stop, kill, and start again with other settings at the same port."""

import asyncio
import base64
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

from tests.bench.servers import KEY, WEBHOOK_KEY
from tests.conformance.brokers import free_port
from tests.torture.load import get
from tests.torture.parts import Round

ROOT = Path(__file__).parents[2]
START_S = 30.0
STOP_S = 45.0


def encoded(secret: bytes) -> str:
    """Return a secret as settings hold it."""
    return f"whsec_{base64.b64encode(secret).decode()}"


class ReceiverProcess:
    """`kling-relay serve`. `sabotage` is Python code that breaks it first, to prove that a part notices."""

    def __init__(self, folder: Path, environ: Mapping[str, str], hooks: str, sabotage: str = "") -> None:
        self.port = free_port()
        self._sabotage = sabotage
        self._process: subprocess.Popen[bytes] | None = None
        self._config = folder / "relay.toml"
        self.configure(hooks)
        self.environ = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("KLING_", "AWS_"))},
            "PYTHONPATH": str(ROOT),
            "KLING_RELAY_CONFIG": str(self._config),
            "KLING_RELAY_KEYS": f"bench:{KEY}",
            "KLING_WEBHOOK_SECRET": encoded(WEBHOOK_KEY),
            "KLING_RELAY_ALLOW_HOSTS": "127.0.0.1",
            "KLING_RELAY_LOG": "json",
            **environ,
        }
        self.log: list[str] = []

    def configure(self, hooks: str) -> None:
        """Set the hooks that the next start reads."""
        self._config.write_text(hooks)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def launch(self) -> subprocess.Popen[bytes]:
        """Start the process. Its log is read through a pipe, so that no limit of files is one of the log."""
        code = f"{self._sabotage}\nfrom receiver.cli.main import main\nmain()"
        command = [sys.executable, "-c", code, "serve", "--port", str(self.port)]
        self._process = subprocess.Popen(
            command, cwd=self._config.parent, env=self.environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self._reading = threading.Thread(target=self._read_log, args=(self._process,), daemon=True)
        self._reading.start()
        return self._process

    async def start(self) -> None:
        """Start it, and wait until it is ready."""
        process = self.launch()
        async with asyncio.timeout(START_S):
            while (await get(self.port, "/readyz")).status != 200:
                if process.poll() is not None:
                    raise RuntimeError("\n".join(self.log))
                await asyncio.sleep(0.05)

    @property
    def ended_with(self) -> int | None:
        """The exit status of a process that has ended by itself; None while it runs."""
        return None if self._process is None else self._process.poll()

    async def stop(self, how: int = signal.SIGTERM) -> None:
        if self._process is not None:
            if self._process.poll() is None:
                self._process.send_signal(how)
            await asyncio.to_thread(self._process.wait, STOP_S)
            self._process = None

    def whole_log(self) -> str:
        """Return the log of a process that has ended, to its end."""
        self._reading.join()
        return "".join(self.log)

    def kill(self) -> None:
        """End it at once, whatever state it is in."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def judge_log(self, done: Round) -> None:
        """Report the first traceback in the log, with what surrounds it."""
        found = [number for number, line in enumerate(self.log) if "Traceback" in line]
        if found:
            lines = self.log[max(0, found[0] - 2) : found[0] + 60]
            done.findings.append(f"the log has {len(found)} tracebacks, first this one: {''.join(lines)[:4000]}")

    def _read_log(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                self.log.append(line.decode(errors="replace"))
