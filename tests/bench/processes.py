"""Helpers of the benchmark: server processes and temporary folders."""

import io
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def listening_process(
    arguments: Sequence[str],
    port: int,
    log: Path,
    *,
    python: str = sys.executable,
    settings: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process, of Python unless `python` is another program, while the block runs.

    The block starts once the process listens at `port`. That is asked again and again: no event says so.
    """
    with log.open("w") as file:
        environ = os.environ | (settings or {})
        process = subprocess.Popen([python, *arguments], stdout=file, stderr=file, env=environ)
        try:
            deadline = time.monotonic() + 30
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                except OSError:
                    if time.monotonic() > deadline or process.poll() is not None:
                        raise RuntimeError(log.read_text()) from None
                    time.sleep(0.02)
            yield process
        finally:
            process.terminate()
            process.wait()


@contextmanager
def serving(
    arguments: Sequence[str], workers: int, log: Path, settings: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """Run `kling-relay serve` with these arguments; the block starts once all of its processes serve."""
    command = [sys.executable, "-m", "receiver", "serve", "--workers", str(workers), *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=os.environ | settings) as process:
        started = _Copy(process, log, b'"service.started"', workers)
        try:
            if not started.is_ready.wait(60) or process.poll() is not None:
                raise RuntimeError(log.read_text())
            yield process
        finally:
            process.terminate()
            process.wait()
            started.join()


class _Copy(threading.Thread):
    """Copies a process's standard error to a file. `is_ready` is set once it has `text` so many times, or has ended."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path, text: bytes, times: int) -> None:
        super().__init__(daemon=True)
        assert isinstance(process.stderr, io.BufferedReader)
        self._source, self._log, self._text, self._left = process.stderr, log, text, times
        self.is_ready = threading.Event()
        self.start()

    def run(self) -> None:
        with self._log.open("wb", buffering=0) as file:
            while not self.is_ready.is_set() and (line := self._source.readline()):
                file.write(line)
                self._left -= self._text in line
                if not self._left:
                    self.is_ready.set()
            while data := self._source.read1(1 << 16):
                file.write(data)
        self.is_ready.set()


@contextmanager
def folder() -> Iterator[Path]:
    """Yield a temporary folder on the disk of the working directory: /tmp may be in memory."""
    created = Path(tempfile.mkdtemp(dir=Path.cwd(), prefix=".bench-"))
    try:
        yield created
    finally:
        shutil.rmtree(created)


def memory_kib(pid: int) -> int:
    """Return the resident memory (RSS) of a process and its children, in KiB."""
    total = 0
    for one in _family(pid):
        for line in Path(f"/proc/{one}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                total += int(line.split()[1])
    return total


def cpu_s(pid: int) -> float:
    """Return the CPU time of a process and its children, in seconds."""
    ticks = 0
    for one in _family(pid):
        fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _family(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(one for child in children for one in _family(int(child)))]
