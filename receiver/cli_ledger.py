"""`kling-relay ledger`: migrate it, copy it to another engine, prune what ended long ago."""

import click

from receiver.cli import run, with_ledger
from receiver.settings import load_receiver_settings
from submitter.clock import Clock
from submitter.errors import InvalidSettings, Problem
from submitter.ledger import Ledger, open_ledger, shown
from submitter.ledger.copying import Copied, copy
from submitter.settings import load_settings

DAY_MS = 86_400_000
PAGE = 500


@click.group()
def ledger() -> None:
    """Migrate the ledger, copy it to another engine, prune what ended long ago."""


@ledger.command("migrate")
def ledger_migrate() -> None:
    """Bring the ledger to this version's schema.

    Every command does so at its first use; here it can be done before a deployment, by whoever may change tables.
    """
    settings = load_settings()
    counts = run(with_ledger(settings, lambda ledger: ledger.counts()))
    open_tasks = sum(count for name, count in counts.items() if name.startswith("task."))
    click.echo(f"{shown(settings.ledger)} is up to date: {open_tasks} open tasks")


@ledger.command("copy")
@click.argument("source")
@click.argument("target")
def ledger_copy(source: str, target: str) -> None:
    """Copy everything from one ledger to an empty other one, and verify it.

    Stop `serve` and every submitter first. Events that no hook was given yet are given to those of
    relay.toml first, so run it where `serve` runs.

    \b
      kling-relay ledger copy sqlite:///relay.db postgresql://relay@db.internal/relay
    """
    hooks = load_receiver_settings().hooks

    async def work() -> Copied:
        opened = [open_ledger(source), open_ledger(target)]
        try:
            return await _copy(opened[0], opened[1])
        finally:
            for one in opened:
                await one.close()

    async def _copy(from_ledger: Ledger, to_ledger: Ledger) -> Copied:
        if await to_ledger.tasks(limit=1):
            problem = Problem("TARGET", shown(target), "an empty ledger", "Choose another file, database or schema.")
            raise InvalidSettings([problem])
        now_ms = Clock().now_ms()
        routes = [hook.route(0) for hook in hooks]
        while (await from_ledger.claim_deliveries(routes, now_ms, 0)).next_due_ms == now_ms:
            continue
        return await copy(from_ledger, to_ledger, lambda so_far: click.echo(f"{so_far.tasks} tasks", err=True))

    copied = run(work())
    click.echo(
        f"copied and verified: {copied.tasks} tasks, {copied.events} events,"
        f" {copied.deliveries} deliveries, {copied.quarantined} in quarantine"
    )
    click.echo("Set KLING_RELAY_LEDGER to the new one, and keep the old until you are sure.")


@ledger.command("prune")
@click.option("--days", required=True, type=click.IntRange(min=1), help="Keep what was updated in the last DAYS days.")
def ledger_prune(days: int) -> None:
    """Delete tasks that ended long ago, with their events and deliveries.

    What is open, or still on its way to a hook, stays, however old. A result's URL and cost go with
    its task: keep longer than you may be asked about them.
    """
    before_ms = Clock().now_ms() - days * DAY_MS

    async def prune(opened: Ledger) -> int:
        total = 0
        while pruned := await opened.prune(before_ms, PAGE):
            total += pruned
        return total

    total = run(with_ledger(load_settings(), prune))
    click.echo(f"deleted {total} task{'' if total == 1 else 's'}")
