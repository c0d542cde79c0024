"""AWS's stand-ins on loopback: moto in a thread, ministack as a process with an environment of its own.

Each keeps its own idea of DynamoDB, so what passes on both stands on neither's peculiarities.
"""

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from tests.bench.processes import listening_process
from tests.conformance.brokers import free_port

MINISTACK = Path(sys.prefix) / "ministack" / "bin" / "python"


@contextmanager
def run_moto() -> Iterator[str]:
    """Run moto, and give its URL.

    Of DynamoDB it is asked one thing at a time: a transaction that it refuses takes everything
    back that others wrote meanwhile.
    """
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    moto, one_at_a_time = DomainDispatcherApplication(create_backend_app), threading.Lock()

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        is_dynamodb = environ.get("HTTP_X_AMZ_TARGET", "").startswith("DynamoDB")
        with one_at_a_time if is_dynamodb else nullcontext():
            answer: Iterable[bytes] = moto(environ, start_response)
            return answer

    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=MotoRequestHandler)
    serving = threading.Thread(target=server.serve_forever)
    serving.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    serving.join()


@contextmanager
def run_ministack(folder: Path) -> Iterator[str]:
    """Run ministack, and give its URL."""
    port = free_port()
    settings = {"BIND_HOST": "127.0.0.1", "GATEWAY_PORT": str(port), "SERVICES": "dynamodb,sqs", "LOG_LEVEL": "ERROR"}
    log = folder / "ministack.log"
    with listening_process(["-m", "ministack"], port, log, python=str(MINISTACK), settings=settings):
        yield f"http://127.0.0.1:{port}"
