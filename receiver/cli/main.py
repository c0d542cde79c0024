"""The entry point of the command line: the root group, its error handling and its exit statuses."""

import sys
from typing import Any

import click

from receiver.cli.console import errors_as_exit_status
from receiver.cli.demo import demo
from receiver.cli.doctor import doctor
from receiver.cli.hooks import hooks
from receiver.cli.keys import keys
from receiver.cli.ledger import ledger
from receiver.cli.sandbox import sandbox
from receiver.cli.serve import deliver, poll, serve
from receiver.cli.submit import submit
from receiver.cli.tasks import tasks
from receiver.cli.vendors import vendors
from submitter import log


class Cli(click.Group):
    """A group whose commands end with a message and an exit status instead of a traceback."""

    def invoke(self, context: click.Context) -> Any:
        with errors_as_exit_status():
            return super().invoke(context)

    def main(self, *arguments: Any, **options: Any) -> Any:
        """Refuse arguments that are no valid text before any command uses them."""
        for given in sys.argv[1:]:
            if not _is_text(given):
                click.echo(f"kling-relay: {given!a} is no valid UTF-8: correct this argument", err=True)
                sys.exit(2)
        return super().main(*arguments, **options)


def _is_text(argument: str) -> bool:
    try:
        argument.encode()
    except UnicodeEncodeError:
        return False
    return True


@click.group(
    cls=Cli,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog='Shell completion: eval "$(_KLING_RELAY_COMPLETE=bash_source kling-relay)" (or zsh_source, fish_source).',
)
@click.version_option(package_name="kling-relay")
def main() -> None:
    """Submit Kling Motion Control tasks, receive their callbacks, notify your hooks.

    \b
    First steps:
      kling-relay demo             run the whole pipeline offline; nothing is billed
      kling-relay keys new         generate KLING_RELAY_KEYS, which sign callback URLs
      kling-relay serve            run the receiver behind your public URL
      kling-relay doctor           check the setup, and show how to fix each problem
      kling-relay submit --help    submit a task
      kling-relay tasks list       list tasks and their status

    Settings are environment variables (KLING_API_KEY, KLING_RELAY_PUBLIC_URL, ...), which override
    relay.toml. Each command documents itself with --help.

    Exit status: 0 for success, 1 for a failure, 2 for invalid input or settings.
    """
    log.quiet()


for command in (serve, submit, tasks, hooks, ledger, vendors, keys, doctor, poll, deliver, sandbox, demo):
    main.add_command(command)
