"""One server process of `serve --workers N`, which `receiver.supervisor` starts; no command of its users.

Arguments: the file descriptors of the listening socket and of the connection to the supervisor, this process's
number, and `polls` if it is the one that polls vendors.
"""

import os
import shutil
import signal
import socket
import sys
import threading
from contextlib import suppress

from receiver.cli.console import errors_as_exit_status

DRAIN_S = 3.0
"""How long idle connections may bring one more request when this process is replaced or stopped."""


def main() -> None:
    """Serve until SIGTERM, or until the supervisor is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the supervisor too, which ends this process
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # before the server is started, and once it has stopped
    listening = socket.socket(fileno=int(sys.argv[1]))
    supervisor = socket.socket(fileno=int(sys.argv[2]))
    number, polls = int(sys.argv[3]), sys.argv[4:] == ["polls"]
    orphaned = threading.Event()

    def watch_supervisor() -> None:
        with suppress(OSError):
            supervisor.recv(1)  # it sends nothing: this returns when it has ended
        orphaned.set()
        os.kill(os.getpid(), signal.SIGTERM)

    async def beat() -> None:
        with suppress(OSError):  # it has ended, or is stopped and reads nothing
            supervisor.send(b".", socket.MSG_DONTWAIT)

    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # it is for the supervisor, also where it comes to the whole group
    threading.Thread(target=watch_supervisor, daemon=True).start()
    with errors_as_exit_status():
        from receiver import server
        from receiver.service import app
        from receiver.settings import load_receiver_settings

        try:
            created = app(load_receiver_settings(), number=number, polls=polls)
            closed = created.state.metrics.connection_closed
            is_started = server.serve(created, listening, drain_s=DRAIN_S, on_closed=closed, beat=beat)
        finally:
            if orphaned.is_set():
                shutil.rmtree(os.environ["PROMETHEUS_MULTIPROC_DIR"], ignore_errors=True)
    sys.exit(0 if is_started else 1)


if __name__ == "__main__":
    main()
