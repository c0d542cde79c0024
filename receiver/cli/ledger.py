"""`kling-relay ledger`: schema migration, copy to another engine, retention (pruning)."""

import click

from receiver.cli.console import run, with_ledger
from receiver.settings import load_receiver_settings
from submitter.clock import Clock
from submitter.errors import InvalidSettings, Problem
from submitter.ledger import Ledger, file_of, open_ledger
from submitter.ledger.copying import CopyReport, copy
from submitter.settings import load_settings
from submitter.web_address import without_password

DAY_MS = 86_400_000
PAGE = 500


@click.group()
def ledger() -> None:
    """Migrate, copy or prune the ledger.

    The ledger is the database of tasks, events and deliveries (KLING_RELAY_LEDGER): SQLite, PostgreSQL
    or DynamoDB.
    """


@ledger.command("migrate")
def ledger_migrate() -> None:
    """Create or migrate the schema of the ledger.

    Every command does this when it first opens the ledger. Run it as a deployment step where only
    that step's role may create and alter tables.
    """
    settings = load_settings()
    counts = run(with_ledger(settings, lambda ledger: ledger.counts()))
    open_tasks = sum(count for name, count in counts.items() if name.startswith("task."))
    click.echo(f"{without_password(settings.ledger)} is up to date: {open_tasks} open tasks")


@ledger.command("copy")
@click.argument("source")
@click.argument("target")
def ledger_copy(source: str, target: str) -> None:
    """Copy a ledger to another, empty ledger, and verify the copy.

    Use it to change the engine: SOURCE and TARGET are ledger URLs, as in KLING_RELAY_LEDGER. Stop
    `serve` and every submitter first. Run it with the relay.toml of `serve`: pending events are
    assigned to its hooks before they are copied.

    \b
      kling-relay ledger copy sqlite:///relay.db \\
          postgresql://relay@db.internal/relay
    """
    hooks = load_receiver_settings().hooks

    async def work() -> CopyReport:
        path = file_of(source)
        if path is not None and not path.is_file():
            remedy = (
                "Check the path. A relative one is sqlite:///relay.db, an absolute one sqlite:////var/lib/relay.db."
            )
            raise InvalidSettings([Problem("SOURCE", source, "a ledger file that exists", remedy)])
        opened = [open_ledger(source, "SOURCE"), open_ledger(target, "TARGET")]
        try:
            return await _copy(opened[0], opened[1])
        finally:
            for ledger in opened:
                await ledger.close()

    async def _copy(from_ledger: Ledger, to_ledger: Ledger) -> CopyReport:
        if not await from_ledger.tasks(limit=1):
            remedy = "Check the URL: a ledger that does not exist is created empty."
            raise InvalidSettings([Problem("SOURCE", without_password(source), "a ledger with tasks", remedy)])
        if await to_ledger.tasks(limit=1):
            problem = Problem(
                "TARGET", without_password(target), "an empty ledger", "Choose another file, database or schema."
            )
            raise InvalidSettings([problem])
        now_ms = Clock().now_ms()
        subscriptions = [hook.subscription(0) for hook in hooks]
        while (await from_ledger.claim_deliveries(subscriptions, now_ms, 0)).next_due_ms == now_ms:
            continue  # without capacity, a claim only creates the deliveries of pending events
        return await copy(from_ledger, to_ledger, lambda progress: click.echo(f"{progress.tasks} tasks", err=True))

    copied = run(work())
    click.echo(
        f"copied and verified: {copied.tasks} tasks, {copied.events} events,"
        f" {copied.deliveries} deliveries, {copied.quarantined} in quarantine"
    )
    click.echo("Set KLING_RELAY_LEDGER to the target. Keep the source as a backup.")


@ledger.command("prune")
@click.option("--days", required=True, type=click.IntRange(min=1), help="Keep tasks updated in the last DAYS days.")
def ledger_prune(days: int) -> None:
    """Delete old ended tasks, with their events and deliveries.

    Run it from cron. Open tasks, and tasks with a pending delivery, stay, however old. A task's
    result URL and costs are deleted with it: choose DAYS so that your accounting still has them.

    \b
      kling-relay ledger prune --days 180
    """
    before_ms = Clock().now_ms() - days * DAY_MS

    async def prune(opened: Ledger) -> int:
        total = 0
        while pruned := await opened.prune(before_ms, PAGE):
            total += pruned
        return total

    total = run(with_ledger(load_settings(), prune))
    click.echo(f"deleted {total} task{'' if total == 1 else 's'}")
