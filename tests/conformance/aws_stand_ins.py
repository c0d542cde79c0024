"""AWS stand-ins on loopback: moto in a thread, ministack in a process with a separate environment.

They implement DynamoDB independently: a test that passes on both relies on the quirks of neither.
"""

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from tests.bench.processes import listening_process
from tests.conformance.brokers import free_port

AWS = {
    "AWS_REGION": "us-east-1",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
}
"""The environment variables that AWS's clients need besides AWS_ENDPOINT_URL."""

MINISTACK = Path(sys.prefix) / "ministack" / "bin" / "python"


@contextmanager
def run_moto() -> Iterator[str]:
    """Run moto, and yield its URL.

    DynamoDB calls are serialized: when moto cancels a transaction, it also rolls back concurrent writes.
    """
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    moto, dynamodb_lock = DomainDispatcherApplication(create_backend_app), threading.Lock()

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        is_dynamodb = environ.get("HTTP_X_AMZ_TARGET", "").startswith("DynamoDB")
        with dynamodb_lock if is_dynamodb else nullcontext():
            response: Iterable[bytes] = moto(environ, start_response)
            return response

    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=MotoRequestHandler)
    serving = threading.Thread(target=server.serve_forever)
    serving.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    serving.join()


@contextmanager
def run_ministack(folder: Path) -> Iterator[str]:
    """Run ministack, and yield its URL."""
    port = free_port()
    settings = {"BIND_HOST": "127.0.0.1", "GATEWAY_PORT": str(port), "SERVICES": "dynamodb,sqs", "LOG_LEVEL": "ERROR"}
    log = folder / "ministack.log"
    with listening_process(["-m", "ministack"], port, log, python=str(MINISTACK), settings=settings):
        yield f"http://127.0.0.1:{port}"
