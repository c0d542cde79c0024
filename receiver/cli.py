"""The command line: `kling-relay`."""

import asyncio
import base64
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec

from receiver import log
from submitter.callback_url import KEY_BYTES, redact
from submitter.clock import Clock
from submitter.errors import InvalidRequest, InvalidSettings, RelayError, SubmissionUnknown
from submitter.event import task_data
from submitter.ledger import Ledger, open_ledger
from submitter.request import MotionControl
from submitter.settings import Settings, load_settings
from submitter.submit import Submitter
from submitter.task import SETTLED, Task, TaskStatus

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
    r"""Submit Kling Motion Control tasks, receive their callbacks, and tell your hooks.

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


def print_table(rows: list[dict[str, Any]], columns: tuple[str, ...], *, empty: str) -> None:
    """Print rows under headings, or say that there are none."""
    if not rows:
        click.echo(empty)
        return
    texts = [[str("" if row.get(name) is None else row[name]) for name in columns] for row in rows]
    widths = [max(len(line[i]) for line in [list(columns), *texts]) for i in range(len(columns))]
    for line in [[name.upper().replace("_", " ") for name in columns], *texts]:
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
    r"""Receive callbacks, tell hooks, poll the silent.

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
@click.option("--secret", help="Sign callbacks with this whsec_ secret.")
@click.option("--fault", "faults", multiple=True, metavar="NAME=VALUE", help="Turn a fault on; see below.")
def sandbox(host: str, port: int, pace: float, slots: int, secret: str | None, faults: tuple[str, ...]) -> None:
    r"""Run Kling's stand-in, offline: both generations of its API, and its faults.

    \b
      kling-relay sandbox --fault drop=0.1 --fault create_5xx=0.2
      export KLING_BASE_URL=http://127.0.0.1:8090 KLING_API_KEY=sandbox-key
    \b
    Faults (rates from 0 to 1): drop, repeat, reorder, forge, create_late, create_5xx, create_never,
    no_url, fail; and delay_s, late_s, expire_s, fail_reason, seed. Also, while it runs:
      curl -X POST http://127.0.0.1:8090/sandbox/faults -d '{"drop": 0.5}'
      curl http://127.0.0.1:8090/sandbox/state
    """
    try:
        from submitter.sandbox.app import create_sandbox
        from submitter.sandbox.faults import Faults
        from submitter.sandbox.kling import API_KEY, KlingSandbox
    except ImportError as error:
        raise click.ClickException(f"{error}. Install the sandbox: pip install 'kling-relay[sandbox]'") from error
    import uvicorn

    log.configure()
    pairs = dict(fault.partition("=")[::2] for fault in faults)
    try:
        wanted = msgspec.convert(pairs, Faults, strict=False)
    except msgspec.ValidationError as error:
        raise click.BadParameter(f"{error}; faults are {', '.join(Faults.__struct_fields__)}") from error
    kling = KlingSandbox(faults=wanted, pace_s=pace, slots=slots, secret=secret)
    click.echo(f"export KLING_BASE_URL=http://{host}:{port} KLING_API_KEY={API_KEY}", err=True)
    app = create_sandbox(kling, base_url=f"http://{host}:{port}")
    uvicorn.run(app, host=host, port=port, log_level="warning")


@main.command()
@click.option(
    "--directory",
    type=click.Path(path_type=Path),
    default=Path("demo-output"),
    show_default=True,
    help="Where all is kept.",
)
def demo(directory: Path) -> None:
    """Show the whole road, offline: sandbox, receiver and a hook, and one task through all three."""
    try:
        from receiver.demo import run_demo
    except ImportError as error:
        raise click.ClickException(f"{error}. Install the sandbox: pip install 'kling-relay[sandbox]'") from error
    sys.exit(run(run_demo(directory)))


# -- submit ---------------------------------------------------------------------------------------


def _metadata(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    metadata = {}
    for value in values:
        key, equals, text = value.partition("=")
        if not key or not equals:
            raise click.BadParameter(f"{value!r} is not KEY=VALUE")
        metadata[key] = text
    return metadata


@main.command()
@click.option("--image", required=True, help="The character: a URL, a PNG or JPEG file, or base64.")
@click.option("--video", required=True, help="The motion: a URL, or (with a media store) an MP4 or MOV file.")
@click.option(
    "--orientation", required=True, type=click.Choice(["image", "video"]), help="Whose facing the result keeps."
)
@click.option("--mode", default="std", show_default=True, type=click.Choice(["std", "pro"]), help="720p or 1080p.")
@click.option("--model", default="kling-v3", show_default=True, help="kling-v3 or kling-v2-6.")
@click.option("--prompt", default="", help="What else to say of the scene.")
@click.option("--negative-prompt", default="", help="What to avoid, where the vendor takes it.")
@click.option("--sound/--no-sound", default=True, show_default=True, help="Keep the reference video's sound.")
@click.option("--element-id", help="One element (kling-v3, orientation video).")
@click.option("--watermark", is_flag=True, help="Make a watermarked copy too.")
@click.option("--external-task-id", help="Your own id; repeating it never makes a second task. Default: a UUIDv7.")
@click.option("--metadata", multiple=True, metavar="KEY=VALUE", callback=_metadata, help="Comes back in every event.")
@click.option("--vendor", default="kling", show_default=True)
@click.option("--no-callback", is_flag=True, help="Follow the task by polling alone; needs no public URL.")
@click.option("--wait", is_flag=True, help="Wait for the end; exit status 0 only for succeed.")
@click.option("--timeout", type=float, help="Seconds to wait at the most.")
@click.option("--output", type=click.Path(path_type=Path), help="Save the result video here (with --wait).")
@click.option("--dry-run", is_flag=True, help="Print the request that would be sent, and send nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the task as an event's data does.")
def submit(
    image: str,
    video: str,
    orientation: str,
    sound: bool,
    no_callback: bool,
    wait: bool,
    timeout: float | None,
    output: Path | None,
    dry_run: bool,
    as_json: bool,
    **rest: Any,
) -> None:
    r"""Send one task.

    \b
      kling-relay submit --image girl.png --video https://example.com/dance.mp4 \\
          --orientation video --mode pro --prompt "on a beach" --metadata order=42 --wait
      kling-relay submit --image girl.png --video dance.mp4 --orientation image --dry-run
    """
    request = MotionControl(
        image=image, video=video, character_orientation=orientation, keep_original_sound=sound, **rest
    )
    if output is not None and not wait:
        raise click.UsageError("--output needs --wait: without it there is no result to save yet")
    sys.exit(run(_submit(request, not no_callback, wait, timeout, output, dry_run, as_json)))


async def _submit(
    request: MotionControl,
    callback: bool,
    wait: bool,
    timeout: float | None,
    output: Path | None,
    dry_run: bool,
    as_json: bool,
) -> int:
    settings = load_settings()
    if callback:
        settings.require_callbacks()
    async with Submitter.from_settings(settings) as submitter:
        prepared = await submitter.prepare(request)
        for warning in prepared.warnings:
            click.echo(f"warning: {warning}", err=True)
        if dry_run:
            would = await submitter.request_of(prepared, callback=callback, publish=False)
            _print_request(would.method, would.url, would.body)
            return 0
        # Said before anything is sent: whoever is interrupted can ask again with the same id.
        click.echo(f"external_task_id {prepared.external_task_id}", err=True)
        try:
            task = (await submitter.submit_prepared(prepared, callback=callback)).task
        except SubmissionUnknown as error:
            if not wait:
                raise
            click.echo(f"warning: {error}", err=True)
            task = (await submitter.task(prepared.external_task_id)).task
    return await follow(settings, task, timeout, output, as_json) if wait else _show(task, as_json)


def _show(task: Task, as_json: bool) -> int:
    if as_json:
        print_json(task_data(task))
    else:
        click.echo(f"{task.status.value}  task_id {task.task_id}")
        click.echo(f"follow it: kling-relay tasks wait {task.external_task_id}", err=True)
    return 0


def _print_request(method: str, url: str, body: bytes) -> None:
    def shorten(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: shorten(item) for key, item in value.items()}
        if isinstance(value, list):
            return [shorten(item) for item in value]
        if isinstance(value, str) and len(value) > 3000:
            return f"{value[:32]}... ({len(value)} characters of base64)"
        return redact(value) if isinstance(value, str) else value

    click.echo(f"{method} {url}")
    print_json(shorten(msgspec.json.decode(body)))


async def follow(settings: Settings, task: Task, timeout: float | None, output: Path | None, as_json: bool) -> int:
    """Wait for a task's end with a progress line, and return the exit status."""
    return await with_ledger(settings, lambda ledger: _follow(ledger, settings, task, timeout, output, as_json))


async def _follow(
    ledger: Ledger, settings: Settings, task: Task, timeout: float | None, output: Path | None, as_json: bool
) -> int:
    begun = time.monotonic()
    polling = None if task.has_callback else asyncio.create_task(_poll_meanwhile(ledger, settings))
    live = sys.stderr.isatty()
    line = "\r" if live else ""
    said: TaskStatus | None = None
    try:
        while True:
            mark = ledger.mark()
            task = await ledger.get(task.external_task_id)
            elapsed_s = time.monotonic() - begun
            if task.status is not said:
                said = task.status
                click.echo(f"{line}{elapsed_s:6.1f} s  {said.value:<20}", err=True)
            elif live:
                click.echo(f"\r{elapsed_s:6.1f} s  {said.value} ...", err=True, nl=False)
            if task.status in SETTLED:
                break
            if timeout is not None and elapsed_s >= timeout:
                waited = f"no end after {timeout:g} s; the task goes on: kling-relay tasks wait {task.external_task_id}"
                click.echo(waited, err=True)
                return 1
            await ledger.changed(mark, min(1.0, (timeout or 1e9) - elapsed_s))
    finally:
        if polling is not None:
            polling.cancel()
    return await _show_end(task, settings, output, as_json)


async def _show_end(task: Task, settings: Settings, output: Path | None, as_json: bool) -> int:
    if as_json:
        print_json(task_data(task))
    elif task.status is TaskStatus.SUCCEED:
        for video in task.videos:
            click.echo(video.url)
        cost = ", ".join(f"{charge.amount} {charge.currency or charge.kind}" for charge in task.cost)
        click.echo(f"cost: {cost or 'not said'}", err=True)
    else:
        click.echo(f"{task.status.value}: {task.status_message or 'no reason given'}", err=True)
    if task.status is TaskStatus.SUCCEED and output is not None:
        from submitter.media import download

        await download(task.videos[0].url, output, settings.allow_hosts)
        click.echo(f"saved {output}", err=True)
    return 0 if task.status is TaskStatus.SUCCEED else 1


async def _poll_meanwhile(ledger: Ledger, settings: Settings) -> None:
    from receiver.poll import Poller
    from submitter.http import VendorHttp

    http = VendorHttp()
    poller = Poller(ledger, settings.vendors, http, Clock())
    try:
        while True:
            mark = ledger.mark()
            await ledger.changed(mark, await poller.poll())
    finally:
        await http.close()


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
    r"""Print a new key as a line for your environment.

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
    from receiver.cli_tasks import hooks, tasks
    from receiver.doctor import doctor

    for command in (tasks, hooks, doctor):
        main.add_command(command)


_register()
