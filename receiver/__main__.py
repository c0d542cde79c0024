"""Run the command line: `python -m receiver` is the same as `kling-relay`."""

from receiver.cli.main import main

main(prog_name="kling-relay")
