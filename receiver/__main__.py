"""`python -m receiver` is `kling-relay`."""

from receiver.cli import main

main(prog_name="kling-relay")
