"""`kling-relay submit`: submit one task, and optionally wait for its result."""

import sys
from pathlib import Path
from typing import Any

import click
import msgspec

from receiver.cli.console import echo, print_json, run
from receiver.cli.follow import OUTPUT, SECONDS, check_output, follow
from submitter.callback_url import redact
from submitter.errors import SubmissionUnknown
from submitter.event import task_data
from submitter.request import MotionControl
from submitter.settings import load_settings
from submitter.submit import Submitter
from submitter.task import Task, TaskStatus


def _metadata(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    metadata = {}
    for value in values:
        key, equals, text = value.partition("=")
        if not key or not equals:
            raise click.BadParameter(f"{value!r} is not KEY=VALUE")
        metadata[key] = text
    return metadata


def _object(context: click.Context, parameter: click.Parameter, value: str | None) -> dict[str, Any] | None:
    try:
        return None if value is None else msgspec.json.decode(value, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeError) as error:
        raise click.BadParameter(f"{value!r:.80} is no JSON object: {error}") from error


@click.command()
@click.option("--image", required=True, help="Reference image of the character: a URL, a PNG or JPEG file, or base64.")
@click.option(
    "--video",
    required=True,
    help="Reference video of the motion: a URL, or an MP4 or MOV file (needs KLING_RELAY_MEDIA_STORE).",
)
@click.option(
    "--orientation",
    required=True,
    type=click.Choice(["image", "video"]),
    help="Facing of the character: as in the image or as in the video. Decides the allowed video length.",
)
@click.option(
    "--mode",
    type=click.Choice(["std", "pro"]),
    help="std: 720p. pro: 1080p. Default: the first mode that the vendor has.",
)
@click.option("--model", default="kling-v3", show_default=True, help="Kling model: kling-v3 or kling-v2-6.")
@click.option("--prompt", default="", help="Text prompt for the scene.")
@click.option("--negative-prompt", default="", help="Text prompt for what to avoid, for vendors that support it.")
@click.option("--sound/--no-sound", default=True, show_default=True, help="Keep the sound of the reference video.")
@click.option(
    "--element-id",
    help="Id of an element of Kling's library, for kling-v3 with --orientation video; cite it as <<<element_1>>>.",
)
@click.option(
    "--element",
    callback=_object,
    help="An element as a JSON object, for Oxen.ai with --orientation video; cite it as @Element1.",
)
@click.option("--watermark", is_flag=True, help="Render a watermarked copy as well.")
@click.option(
    "--external-task-id", help="Idempotency key: repeating it never creates a second task. Default: a UUIDv7."
)
@click.option(
    "--metadata", multiple=True, metavar="KEY=VALUE", callback=_metadata, help="Returned in every event (repeatable)."
)
@click.option(
    "--vendor", default="kling", show_default=True, help="Vendor, or a comma-separated failover order: kling,novita."
)
@click.option("--no-callback", is_flag=True, help="Use polling only; needs no public URL.")
@click.option("--wait", is_flag=True, help="Wait until the task ends; exit status 0 only for succeed.")
@click.option("--timeout", type=SECONDS, help="Seconds to wait for the result at most, once submitted (with --wait).")
@click.option("--output", type=OUTPUT, callback=check_output, help="File to save the result video to (with --wait).")
@click.option("--dry-run", is_flag=True, help="Print the request to the vendor without sending it.")
@click.option("--json", "as_json", is_flag=True, help="Print the task as JSON, like `data` of its events.")
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
    """Submit one Motion Control task.

    Checks the request and its media against the vendor's limits before anything is sent.

    To retry after a timeout or a crash, repeat the same --external-task-id: the task is never created
    twice. A new id can create, and bill, a second task.

    \b
      kling-relay submit --image girl.png --video https://example.com/dance.mp4 \\
          --orientation video --mode pro --prompt "on a beach" \\
          --external-task-id order-42 --wait --output result.mp4
      kling-relay submit --image girl.png --video https://example.com/dance.mp4 \\
          --orientation image --vendor kling,novita --no-callback --wait
      kling-relay submit --image girl.png --video https://example.com/dance.mp4 \\
          --orientation image --dry-run

    Exit status: 0 submitted (with --wait: succeeded), 1 failure or timeout, 2 invalid input or settings.
    """
    request = MotionControl(
        image=image, video=video, character_orientation=orientation, keep_original_sound=sound, **rest
    )
    for name, value in (("--output", output), ("--timeout", timeout)):
        if value is not None and not wait:
            raise click.UsageError(f"{name} needs --wait: without it, the task is submitted and not waited for")
    if output is not None and str(output) in [str(Path(source).resolve()) for source in (image, video) if source]:
        raise click.UsageError(f"--output {output} is an input of the task, which it would replace")
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
    async with Submitter.from_settings(settings) as submitter:
        prepared = await submitter.prepare(request)
        for warning in prepared.warnings:
            echo(f"warning: {warning}", err=True)
        if dry_run:
            unsent = await submitter.request_of(prepared, callback=callback, publish=False)
            _print_request(unsent.method, unsent.url, unsent.body)
            return 0
        # Printed before anything is sent: after an interruption the same id makes the retry idempotent.
        echo(f"external_task_id {prepared.external_task_id}", err=True)
        try:
            task = (await submitter.submit_prepared(prepared, callback=callback)).task
        except SubmissionUnknown as error:
            if not wait:
                raise
            echo(f"warning: {error}", err=True)
            task = (await submitter.task(prepared.external_task_id)).task
    return await follow(settings, task, timeout, output, as_json) if wait else _show(task, as_json)


def _show(task: Task, as_json: bool) -> int:
    id = task.external_task_id
    hints = {  # the vendor may answer the create with `failed`; a task that was submitted before may have ended
        TaskStatus.FAILED: f"{task.status_message}. To submit it again: kling-relay tasks retry {id}",
        TaskStatus.ABANDONED: f"{task.status_message}. To ask the vendor: kling-relay tasks refresh {id}",
        TaskStatus.SUCCEED: f"this task was submitted before; its result: kling-relay tasks show {id}",
    }
    if as_json:
        print_json(task_data(task))
    else:
        echo(f"{task.status.value}  task_id {task.task_id}")
        echo(hints.get(task.status, f"wait for the result: kling-relay tasks wait {id}"), err=True)
    return 1 if task.status in (TaskStatus.FAILED, TaskStatus.ABANDONED) else 0


def _print_request(method: str, url: str, body: bytes) -> None:
    def shorten(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: shorten(item) for key, item in value.items()}
        if isinstance(value, list):
            return [shorten(item) for item in value]
        if isinstance(value, str) and len(value) > 3000:
            return f"{value[:32]}... ({len(value)} characters of base64)"
        return redact(value) if isinstance(value, str) else value

    echo(f"{method} {url}")
    print_json(shorten(msgspec.json.decode(body)))
