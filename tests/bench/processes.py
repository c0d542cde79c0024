"""Helpers of the benchmark: server processes and temporary folders."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
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
