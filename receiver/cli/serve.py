"""`kling-relay serve`, `poll` and `deliver`: run the receiver, or one of its background loops."""

import socket
import sys
import tempfile
from pathlib import Path

import click

from receiver.cli.console import bound, run
from receiver.settings import ReceiverSettings
from submitter import log
from submitter.clock import Clock
from submitter.errors import InvalidRequest, Problem
from submitter.web_address import without_password

ENDPOINTS = ("/callbacks", "/events", "/tick", "/media", "/healthz", "/readyz", "/metrics", "/asyncapi.yaml")


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", default=8080, show_default=True, type=click.IntRange(0, 65535), help="Port to listen on; 0 chooses one."
)
@click.option(
    "--workers",
    type=int,
    help="Server processes on the one address, 1 to 64; more than one are run by a supervisor."
    "  [default: KLING_RELAY_WORKERS, or 1]",
)
def serve(host: str, port: int, workers: int | None) -> None:
    """Receive callbacks, notify hooks, poll vendors for overdue tasks.

    This is the receiver. It serves POST /callbacks, stores each verified callback before it answers, delivers events to
    the hooks of relay.toml, and polls vendors for tasks whose callback is overdue. Run it behind a
    proxy with TLS, and set KLING_RELAY_PUBLIC_URL to the proxy's URL. SIGTERM stops it gracefully.

    With KLING_RELAY_DELIVER=inline (for serverless) no loop runs: hooks are notified within the
    callback's request, and POST /tick delivers and polls the rest.

    With --workers 2 or more SIGHUP replaces the processes one after the other: they read the settings again.

    \b
      kling-relay serve
      kling-relay serve --host 0.0.0.0 --port 8080
      kling-relay serve --workers 2
    """
    from receiver import server
    from receiver.service import app
    from receiver.settings import WORKERS_MAX, load_receiver_settings

    settings = load_receiver_settings()
    workers = settings.workers if workers is None else workers
    if not 1 <= workers <= WORKERS_MAX:
        limit, remedy = f"1 to {WORKERS_MAX}", "Use the number of processors that the receiver may keep busy."
        raise InvalidRequest([Problem("--workers", str(workers), limit, remedy)])
    with bound(host, port) as listening:
        if workers > 1:
            sys.exit(_supervise(settings, listening, workers))
        created = app(settings)
        for line in describe(settings, server.url_of(listening)):
            click.echo(line, err=True)
        if not server.serve(created, listening, on_closed=created.state.metrics.connection_closed):
            raise click.ClickException("the server did not start; the reason is in the log above")


def _supervise(settings: ReceiverSettings, listening: socket.socket, workers: int) -> int:
    """Run `workers` server processes until a signal; return the exit status."""
    from receiver import server
    from receiver.supervisor import Supervisor

    settings.require_keys()
    log.configure(settings.log)
    for line in [*describe(settings, server.url_of(listening)), f"  processes: {workers}"]:
        click.echo(line, err=True)
    try:
        metrics = tempfile.TemporaryDirectory(prefix="kling-relay-", ignore_cleanup_errors=True)
    except OSError as error:
        remedy = "the processes share their metrics there; set TMPDIR to a directory that can be written to"
        raise click.ClickException(f"no temporary directory ({error}): {remedy}") from error
    with metrics:
        return run(Supervisor(listening, workers, Path(metrics.name), Clock()).run())


def describe(settings: ReceiverSettings, url: str) -> list[str]:
    """Return what `serve` says at its start: where it listens, what it serves, how it is reached."""
    common = settings.common
    signed = [name for name, secrets in settings.secrets.items() if secrets]
    off = [name for name, token in (("/tick", settings.tick_token), ("/events", settings.events_token)) if not token]
    hooks = [hook.name for hook in settings.hooks]
    reached = common.public_url or "KLING_RELAY_PUBLIC_URL is not set: tasks of this receiver get no callback URL"
    return [
        f"listening on {url}",
        f"  reached by vendors at {reached}",
        f"  callbacks: signatures are required of {', '.join(signed) or 'no vendor'}; secret URLs of all",
        f"  off: {' '.join(off) or 'nothing'}; on: {' '.join(name for name in ENDPOINTS if name not in off)}",
        f"  hooks: {', '.join(hooks) or 'none'}; notified by {settings.deliver}",
        f"  ledger: {without_password(common.ledger)}; vendors to poll: {', '.join(common.vendors) or 'none'}",
    ]


@click.command()
@click.option("--once", is_flag=True, help="Poll the tasks that are due now, then exit.")
def poll(once: bool) -> None:
    """Poll vendors for tasks whose callback is overdue.

    `serve` includes this loop, unless KLING_RELAY_DELIVER=inline. Run it where no `serve` runs, for
    example after `submit --no-callback`, or from cron with --once.

    \b
      kling-relay poll --once
    """
    count = run(_work("poll", once))
    click.echo(f"polled {count} task{'' if count == 1 else 's'}")


@click.command()
@click.option("--once", is_flag=True, help="Make the deliveries that are due now, then exit.")
def deliver(once: bool) -> None:
    """Deliver due events to the hooks of relay.toml.

    `serve` includes this loop, unless KLING_RELAY_DELIVER=inline. Run it where no `serve` runs, or
    from cron with --once.

    \b
      kling-relay deliver --once
    """
    count = run(_work("deliver", once))
    click.echo(f"made {count} delivery attempt{'' if count == 1 else 's'}")


async def _work(which: str, once: bool) -> int:
    from receiver.service import open_service
    from receiver.settings import load_receiver_settings

    settings = load_receiver_settings()
    if not once:
        log.configure(settings.log)
    service = open_service(settings)
    step = service.worker.poll if which == "poll" else service.worker.deliver
    try:
        count = await step()
        while not once:
            version = service.ledger.version()
            count += await step()
            await service.ledger.wait_for_change(version, 1.0)
        return count
    finally:
        await service.close()
