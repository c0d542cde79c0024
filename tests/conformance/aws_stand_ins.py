"""AWS's stand-ins on loopback: moto in a thread, ministack as a process with an environment of its own.

Each keeps its own idea of DynamoDB, so what passes on both stands on neither's peculiarities.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.bench.processes import listening_process
from tests.conformance.brokers import free_port

MINISTACK = Path(sys.prefix) / "ministack" / "bin" / "python"


@contextmanager
def run_moto() -> Iterator[str]:
    """Run moto, and give its URL."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@contextmanager
def run_ministack(folder: Path) -> Iterator[str]:
    """Run ministack, and give its URL."""
    port = free_port()
    settings = {"BIND_HOST": "127.0.0.1", "GATEWAY_PORT": str(port), "SERVICES": "dynamodb,sqs", "LOG_LEVEL": "ERROR"}
    log = folder / "ministack.log"
    with listening_process(["-m", "ministack"], port, log, python=str(MINISTACK), settings=settings):
        yield f"http://127.0.0.1:{port}"
