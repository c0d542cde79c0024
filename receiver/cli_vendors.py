"""`kling-relay vendors`: what each vendor takes and can do."""

import click

from receiver.cli import print_json, print_table
from submitter.installed import vendors as installed
from submitter.settings import load_settings
from submitter.vendors.table import capabilities


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def vendors(as_json: bool) -> None:
    """Show what each vendor takes and can do.

    \b
    Name one, or several in the order to try, when you submit:
      kling-relay submit --vendor kling,novita ...
    """
    configured = load_settings().vendors
    known = {name: setup.reader for name, setup in installed().items()}
    chosen = known | {name: settings.vendor for name, settings in configured.items()}
    table = capabilities(chosen)
    table.insert(0, ("credentials", {name: "set" if name in configured else "not set" for name in known}))
    if as_json:
        print_json({name: {row: words[name] for row, words in table} for name in known})
        return
    for name in known:
        click.echo(click.style(name, bold=True))
        rows = [{"about": f"  {row}", "says": words[name]} for row, words in table if words[name]]
        print_table(rows, ("about", "says"), empty="", headed=False)
