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
