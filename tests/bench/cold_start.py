"""Cold start on AWS Lambda: from process start to the first answered callback, under Lambda's runtime client.

The functions run from the package that `make package` builds. The interpreter sees no other packages.
"""

import asyncio
import os
import shutil
import statistics
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from submitter.ledger import open_ledger
from tests.bench import servers
from tests.bench.processes import folder
from tests.conformance.aws_stand_ins import run_ministack
from tests.road.lambda_runtime import lambda_function
from tests.road.many_processes import fill
from tests.road.test_aws_lambda import callback

PACKAGE = Path("infra/aws/build")
CLIENT = ("awslambdaric", "runtime_client*", "simplejson", "snapshot_restore_py.py")
AWS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}


@contextmanager
def paths(directory: Path) -> Iterator[str]:
    """Yield a function's PYTHONPATH: the runtime client, the bare function, and the package."""
    here = directory / "client"
    here.mkdir()
    (installed,) = (path for path in map(Path, sys.path) if (path / "awslambdaric").exists())
    for pattern in CLIENT:
        for found in installed.glob(pattern):
            (here / found.name).symlink_to(found)
    shutil.copy(Path(__file__).with_name("bare_function.py"), here)
    yield f"{here}:{PACKAGE.absolute()}"


async def first_answer(handler: str, environ: dict[str, str], directory: Path, position: int) -> float:
    """Return the time until a new process has answered one callback, in ms."""
    raw = servers.callbacks("b", position + 1)[position]
    event = callback("function_url", raw)
    python = (os.path.realpath(sys.executable), "-S")
    begun = time.perf_counter()
    async with lambda_function(handler, environ, directory, python=python, task=PACKAGE) as runtime:
        answer = await runtime.invoke(event)
        took = (time.perf_counter() - begun) * 1000
    assert answer["statusCode"] == 200, answer
    return took


def show_cold_start(rounds: int) -> None:
    """Print the median cold starts of interleaved rounds, and their ratios to the bare route."""
    with folder() as directory, run_ministack(directory) as aws, paths(directory) as path:
        os.environ.update(AWS, AWS_ENDPOINT_URL=aws)
        common = AWS | servers.environment(directory) | {"PYTHONPATH": path, "AWS_ENDPOINT_URL": aws}
        table = f"dynamodb://relay-{uuid.uuid4().hex[:8]}"
        ledgers = {"on SQLite": f"sqlite:///{directory / 'relay.db'}", "on DynamoDB": table}
        for url in ledgers.values():
            asyncio.run(prepare(url, rounds))
        times: dict[str, list[float]] = {"a bare Starlette route": [], **{name: [] for name in ledgers}}
        for position in range(rounds):
            for name, found in times.items():
                handler = "receiver.aws_lambda.receive.handler" if name in ledgers else "bare_function.handler"
                environ = common | {"KLING_RELAY_LEDGER": ledgers.get(name, "")}
                found.append(asyncio.run(first_answer(handler, environ, directory, position)))
        bare = statistics.median(times["a bare Starlette route"])
        print(f"\n{'cold start on Lambda, to the first answer':<44}{'ms':>8}{'ratio':>8}")
        for name, found in times.items():
            median = statistics.median(found)
            label = f"the receiver {name}" if name in ledgers else name
            print(f"{label:<44}{median:>8.0f}{median / bare:>8.2f}")
        size = sum(file.stat().st_size for file in PACKAGE.rglob("*") if file.is_file())
        print(f"the package is {size / 1e6:.1f} MB unzipped")


async def prepare(url: str, count: int) -> None:
    """Create the tasks of the callbacks in a ledger."""
    ledger = open_ledger(url)
    await fill(ledger, "b", count)
    await ledger.close()
