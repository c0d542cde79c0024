"""The command line: `kling-relay`."""

import asyncio
import base64
import sys
from collections.abc import Awaitable, Callable, Coroutine
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec

from receiver import log
from submitter.callback_url import KEY_BYTES, redact
from submitter.clock import Clock
from submitter.errors import InvalidRequest, InvalidSettings, RelayError
from submitter.installed import vendors
from submitter.ledger import Ledger, open_ledger
from submitter.settings import Settings, load_settings

T = TypeVar("T")


class Cli(click.Group):
    """Turns our errors into one line and an exit status: 2 for what the caller must mend, 1 else."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except (InvalidRequest, InvalidSettings) as error:
            click.echo(f"kling-relay: {error}", err=True)
            context.exit(2)
        except RelayError as error:
            click.echo(f"kling-relay: {redact(str(error))}", err=True)
            context.exit(1)


@click.group(
    cls=Cli,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog='Shell completion: eval "$(_KLING_RELAY_COMPLETE=bash_source kling-relay)" (or zsh_source, fish_source).',
)
@click.version_option(package_name="kling-relay")
def main() -> None:
    """Submit Kling Motion Control tasks, receive their callbacks, and tell your hooks.

    \b
    First steps:
      kling-relay demo                    the whole road, offline
      kling-relay keys new                make the keys of your callback URLs
      kling-relay doctor                  check the settings, and say what to mend
      kling-relay serve                   receive callbacks, tell hooks
      kling-relay submit --help           send a task
    """
    log.quiet()


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a command's work."""
    return asyncio.run(work)


def print_json(value: Any) -> None:
    """Print a value as indented JSON."""
    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def print_table(rows: list[dict[str, Any]], columns: tuple[str, ...], *, empty: str, headed: bool = True) -> None:
    """Print rows under headings, or say that there are none."""
    if not rows:
        click.echo(empty)
        return
    texts = [[str("" if row.get(name) is None else row[name]) for name in columns] for row in rows]
    if headed:
        texts.insert(0, [name.upper().replace("_", " ") for name in columns])
    widths = [max(len(line[i]) for line in texts) for i in range(len(columns))]
    for line in texts:
        click.echo("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


async def with_ledger(settings: Settings, work: Callable[[Ledger], Awaitable[T]]) -> T:
    """Open the ledger, do `work` with it, and close it."""
    ledger = open_ledger(settings.ledger)
    try:
        return await work(ledger)
    finally:
        await ledger.close()


# -- serve, poll, deliver, sandbox, demo ----------------------------------------------------------


@main.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option("--port", default=8080, show_default=True, help="The port to listen on.")
def serve(host: str, port: int) -> None:
    """Receive callbacks, tell hooks, poll the silent.

    \b
    Put a proxy with TLS before it, and its URL in KLING_RELAY_PUBLIC_URL:
      kling-relay serve --host 0.0.0.0 --port 8080
    """
    import uvicorn

    from receiver import service

    uvicorn.run(
        service.app(),
        host=host,
        port=port,
        log_level="warning",
        access_log=False,  # its lines hold the URLs' tokens
        server_header=False,
        proxy_headers=False,  # nobody here asks who is calling
        # Longer than any client keeps an idle connection: a callback sent on one that we close is lost.
        timeout_keep_alive=75,
        timeout_graceful_shutdown=30,
    )


@main.command()
@click.option("--once", is_flag=True, help="Ask about what is due now, and end.")
def poll(once: bool) -> None:
    """Ask the vendors about tasks that have been silent too long.

    `serve` does this by itself; run it where no `serve` does, for example with --no-callback.
    """
    count = run(_work("poll", once))
    click.echo(f"asked about {count} task{'' if count == 1 else 's'}")


@main.command()
@click.option("--once", is_flag=True, help="Deliver what is due now, and end.")
def deliver(once: bool) -> None:
    """Deliver events to the hooks of relay.toml. `serve` does this by itself."""
    count = run(_work("deliver", once))
    click.echo(f"made {count} attempt{'' if count == 1 else 's'}")


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
            mark = service.ledger.mark()
            count += await step()
            await service.ledger.changed(mark, 1.0)
        return count
    finally:
        await service.close()


@main.command()
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=8090, show_default=True)
@click.option("--pace", default=1.0, show_default=True, help="Seconds from one status to the next.")
@click.option("--slots", default=5, show_default=True, help="Parallel tasks of the account; more get 429/1303.")
@click.option("--secret", help="Sign Kling's callbacks with this whsec_ secret.")
@click.option("--fault", "faults", multiple=True, metavar="NAME=VALUE", help="Turn a fault on; see below.")
def sandbox(host: str, port: int, pace: float, slots: int, secret: str | None, faults: tuple[str, ...]) -> None:
    """Run the vendors' stand-ins, offline, and their faults.

    Each is at /<vendor>; it prints the environment that leads a relay there.

    \b
      kling-relay sandbox --fault drop=0.1 --fault create_5xx=0.2
      export KLING_BASE_URL=http://127.0.0.1:8090/kling KLING_API_KEY=sandbox-key
    \b
    Faults (rates from 0 to 1): drop, repeat, reorder, forge, hang_up, create_late, create_5xx,
    create_never, no_url, fail, forget; and refuse (balance, permission, capacity, rate,
    maintenance), delay_s, late_s, expire_s, fail_reason, seed. Also, while it runs:
      curl -X POST http://127.0.0.1:8090/sandbox/faults -d '{"drop": 0.5}'
      curl http://127.0.0.1:8090/sandbox/state
    """
    try:
        from submitter.sandbox.app import create_sandbox, sandbox_class
        from submitter.sandbox.faults import Faults
    except ImportError as error:
        raise click.ClickException(f"{error}. Install the sandbox: pip install 'kling-relay[sandbox]'") from error
    import uvicorn

    log.configure()
    pairs = dict(fault.partition("=")[::2] for fault in faults)
    try:
        wanted = msgspec.convert(pairs, Faults, strict=False)
    except msgspec.ValidationError as error:
        raise click.BadParameter(f"{error}; faults are {', '.join(Faults.__struct_fields__)}") from error
    classes = [sandbox_class(name) for name, setup in vendors().items() if setup.sandbox]
    standing = [made(faults=wanted, pace_s=pace, slots=slots, secret=secret) for made in classes]
    app = create_sandbox(standing, base_url=f"http://{host}:{port}")
    for one in standing:
        click.echo("export " + " ".join(f"{name}={value}" for name, value in one.environ().items()), err=True)
    uvicorn.run(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=1)  # a stream never ends


@main.command()
@click.option(
    "--directory",
    type=click.Path(path_type=Path),
    default=Path("demo-output"),
    show_default=True,
    help="Where all is kept.",
)
@click.option("--vendor", default="kling", show_default=True, help="Whose stand-in renders.")
def demo(directory: Path, vendor: str) -> None:
    """Show the whole road, offline: sandbox, receiver and a hook, and one task through all three."""
    try:
        from receiver.demo import run_demo
    except ImportError as error:
        raise click.ClickException(f"{error}. Install the sandbox: pip install 'kling-relay[sandbox]'") from error
    sys.exit(run(run_demo(directory, vendor)))


# -- keys -----------------------------------------------------------------------------------------


@main.group()
def keys() -> None:
    """Make the keys of callback URLs, and the secrets of hooks."""


@keys.command("new")
@click.option(
    "--for",
    "purpose",
    type=click.Choice(["callbacks", "hook", "v1a"]),
    default="callbacks",
    show_default=True,
    help="callbacks: KLING_RELAY_KEYS. hook: a whsec_ secret. v1a: a whsk_ secret and its whpk_.",
)
@click.option("--rotate", is_flag=True, help="Put the new key before those in KLING_RELAY_KEYS, which still verify.")
def keys_new(purpose: str, rotate: bool) -> None:
    """Print a new key as a line for your environment.

    \b
      kling-relay keys new >> .env
      kling-relay keys new --rotate            the old keys go on verifying
      kling-relay keys new --for hook          the secret of a hook
    """
    from receiver.signature import public_key, read_secret

    clock = Clock()
    fresh = base64.b64encode(clock.new_key(KEY_BYTES)).decode()
    if purpose == "hook":
        click.echo(f"whsec_{fresh}")
        return
    if purpose == "v1a":
        click.echo(f"whsk_{fresh}")
        click.echo(f"its consumers verify with {public_key(read_secret('new', f'whsk_{fresh}'))}", err=True)
        return
    old = load_settings().ring if rotate else None
    taken = {key.id for key in old.keys} if old else set()
    id = datetime.fromtimestamp(clock.now_s(), UTC).strftime("k%Y%m%d")
    id = next(name for name in (id, *(f"{id}-{n}" for n in range(2, 1000))) if name not in taken)
    rest = [f"{key.id}:{base64.b64encode(key.secret).decode()}" for key in old.keys] if old else []
    click.echo("KLING_RELAY_KEYS=" + ",".join([f"{id}:{fresh}", *rest]))


def _register() -> None:
    from receiver.cli_hooks import hooks
    from receiver.cli_ledger import ledger
    from receiver.cli_submit import submit
    from receiver.cli_tasks import tasks
    from receiver.cli_vendors import vendors
    from receiver.doctor import doctor

    for command in (submit, tasks, hooks, ledger, vendors, doctor):
        main.add_command(command)


_register()
