"""`kling-relay vendors`: capabilities and limits of each installed vendor."""

import click

from receiver.cli.console import print_json, print_table
from submitter.settings import load_settings
from submitter.vendors.capabilities import capabilities
from submitter.vendors.registry import vendors as installed


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def vendors(as_json: bool) -> None:
    """Show each vendor's capabilities, limits and credentials.

    Use it to choose a vendor, or a failover order: models, modes, media limits, how the vendor reports
    a task's progress, and whether its credentials are set.

    \b
      kling-relay vendors
      kling-relay submit --vendor kling,novita ...     kling first, novita as failover
    """
    configured = load_settings().vendors
    known = {name: setup.reader for name, setup in installed().items()}
    chosen = known | {name: settings.vendor for name, settings in configured.items()}
    table = capabilities(chosen)
    table.insert(0, ("credentials", {name: "set" if name in configured else "not set" for name in known}))
    if as_json:
        print_json({name: {row: cells[name] for row, cells in table} for name in known})
        return
    for name in known:
        click.echo(click.style(name, bold=True))
        rows = [{"capability": f"  {row}", "value": cells[name]} for row, cells in table if cells[name]]
        print_table(rows, ("capability", "value"), empty="", headed=False)
