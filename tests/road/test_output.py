"""What a command prints, on a closed pipe and on a full disk; arguments of any bytes."""

import asyncio
import os
import sys
from pathlib import Path

from tests.road.test_processes import spawn


async def test_demo_ends_quietly_when_its_output_is_closed(tmp_path: Path) -> None:
    process = await spawn({}, "demo", "--directory", str(tmp_path / "out"))
    assert process.stdout is not None
    assert process.stderr is not None
    await process.stdout.readline()
    pipe = process._transport.get_pipe_transport(1)  # type: ignore[attr-defined]
    pipe.close()  # as `| head -1` does
    async with asyncio.timeout(60):
        err = await process.stderr.read()
        assert await process.wait() == 0
    assert err == b""


async def test_a_full_disk_and_an_argument_of_any_bytes_end_a_command_with_a_message(tmp_path: Path) -> None:
    environ = {"KLING_RELAY_LEDGER": f"sqlite:///{tmp_path / 'relay.db'}"}
    root = str(Path(__file__).parents[2])
    for arguments, message in (
        ("tasks list > /dev/full", b"cannot write: No space left on device"),
        ("tasks show $'\\xff'", b"no valid UTF-8"),
    ):
        process = await asyncio.create_subprocess_exec(
            "bash", "-c", f"{sys.executable} -m receiver {arguments}",
            env=os.environ | {"PYTHONPATH": root} | environ,
            stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        _, err = await process.communicate()
        assert (message in err, b"Traceback" in err) == (True, False), err
