"""`kling-relay sandbox`: run the vendors' stand-ins (mock servers) offline, with fault injection."""

from urllib.parse import urlsplit

import click
import msgspec

from receiver.cli.console import bound
from receiver.signature import read_secret
from submitter import log
from submitter.extras import install_command
from submitter.vendors.registry import vendors

FOR_THE_RELAY = (
    "export KLING_RELAY_ALLOW_HOSTS={host} KLING_RELAY_PUBLIC_URL=http://127.0.0.1:8080 KLING_RELAY_MEDIA_STORE=media",
    "export $(kling-relay keys new)",
    "# then: kling-relay serve & kling-relay submit --image girl.png --video dance.mp4 --orientation video --wait",
)


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8090, show_default=True, type=click.IntRange(0, 65535), help="Port to listen on.")
@click.option(
    "--pace",
    default=1.0,
    show_default=True,
    type=click.FloatRange(min=0),
    help="Seconds between status changes of a task.",
)
@click.option(
    "--slots",
    default=5,
    show_default=True,
    type=click.IntRange(min=1),
    help="Concurrent tasks per vendor; a create beyond gets 429 (Kling: code 1303).",
)
@click.option("--secret", help="Sign Kling's callbacks with this webhook secret (whsec_...).")
@click.option("--fault", "faults", multiple=True, metavar="NAME=VALUE", help="Inject a fault (repeatable): see above.")
def sandbox(host: str, port: int, pace: float, slots: int, secret: str | None, faults: tuple[str, ...]) -> None:
    """Run mock servers of all vendors offline, with fault injection.

    Use it to develop and test without an account: each vendor's stand-in is at /<vendor>, checks
    requests and real media like the vendor, and renders a playable result. At the start it prints the
    environment variables that point kling-relay to it. It needs the extra `sandbox`.

    \b
      kling-relay sandbox
      kling-relay sandbox --fault drop=0.1 --fault create_5xx=0.2
      export KLING_BASE_URL=http://127.0.0.1:8090/kling KLING_API_KEY=sandbox-key

    \b
    Faults with a rate from 0 to 1:
      drop          lose a callback or stream event
      repeat        send it twice
      reorder       send a task's end before its `processing`
      forge         send a forged callback besides the true one
      hang_up       close the event stream after an event
      create_late   answer create late_s seconds after accepting it
      create_5xx    answer 500 after accepting a create
      create_never  accept a create, and never answer
      create_failed answer a create with a task that has failed
      no_url        succeed without a result URL
      fail          fail with fail_reason
      forget        answer 404 to queries for an ended task
    \b
    Faults with another value:
      refuse        refuse each create: balance, permission, capacity, rate or maintenance
      delay_s       seconds before each callback or stream event
      late_s        seconds of create_late
      expire_s      seconds that a result can be downloaded
      fail_reason   message of a failed task
      seed          seed of the random draws
    \b
    Change the faults, or show counts and tasks, while it runs:
      curl -X POST http://127.0.0.1:8090/sandbox/faults -d '{"drop": 0.5}'
      curl http://127.0.0.1:8090/sandbox/state
    """
    try:
        from submitter.sandbox.app import create_sandbox, sandbox_class
        from submitter.sandbox.faults import Faults
    except ImportError as error:
        raise click.ClickException(f"{error}. Install the sandbox: {install_command('sandbox')}") from error
    from receiver import server

    log.configure()
    pairs = dict(fault.partition("=")[::2] for fault in faults)
    try:
        initial = msgspec.convert(pairs, Faults, strict=False)
    except msgspec.ValidationError as error:
        known = ", ".join(Faults.__struct_fields__)
        raise click.BadParameter(f"{error}; faults are {known}", param_hint="--fault") from error
    if secret is not None:
        read_secret("--secret", secret)
    with bound(host, port) as listening:
        url = server.url_of(listening).replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
        classes = [sandbox_class(name) for name, setup in vendors().items() if setup.sandbox]
        sandboxes = [kind(faults=initial, pace_s=pace, slots=slots, secret=secret) for kind in classes]
        app = create_sandbox(sandboxes, base_url=url)
        click.echo(f"# The vendors' stand-ins listen on {url}. In a second terminal:", err=True)
        for one in sandboxes:
            click.echo("export " + " ".join(f"{name}={value}" for name, value in one.environ().items()), err=True)
        for line in FOR_THE_RELAY:
            click.echo(line.format(host=urlsplit(url).hostname), err=True)
        server.serve(app, listening, stop_s=1)  # event streams stay open
