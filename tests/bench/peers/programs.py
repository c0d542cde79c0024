"""How each peer is run: its processes, its Redis (`appendfsync always`), and the request line that it expects."""

import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import msgspec

from tests.bench import servers
from tests.bench.end_to_end import Case, serving_case
from tests.bench.processes import listening_process
from tests.conformance.brokers import free_port

ROOT = Path(__file__).parents[3]
INSTALLED = ROOT / ".venv/peers"
PYTHON = str(INSTALLED / "bin/python")
NODE_PROGRAM = str(Path(__file__).with_name("fastify_bullmq.cjs"))
CONCURRENCY = 50
"""Posts to the hook at once, of each peer."""
HOOKSPOOL_CONNECTIONS = 16
"""hookspool's intake serves one connection in each of its 16 threads, and lets only 5 more wait."""


class Running(msgspec.Struct, frozen=True):
    """A receiver's port, and the ids of all processes whose CPU time counts."""

    port: int
    pids: list[int]


Start = Callable[[Path, int, int], AbstractContextManager[Running]]
"""Runs a program, given a folder for its data, the port of the hook's server, and the number of tasks to come."""


class Program(msgspec.Struct, frozen=True):
    """What is measured. Peers take all callbacks at one path; `path` is None for kling-relay's signed paths.

    `connections` is the number of callbacks at once.
    """

    name: str
    start: Start
    path: str | None = "/hooks/kling"
    connections: int = 64


@contextmanager
def _worker(command: list[str], log: Path, settings: Mapping[str, str]) -> Iterator[int]:
    """Run a process that listens nowhere, while the block runs; yield its id."""
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | settings)
        try:
            yield process.pid
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def kling_relay(concurrency: int | None) -> Start:
    """Return how `kling-relay serve` is run on SQLite, with this `concurrency` of its hook (None: the default)."""

    @contextmanager
    def start(directory: Path, hook_port: int, tasks: int) -> Iterator[Running]:
        ledger = directory / "relay.db"
        servers.fill(ledger, "b", tasks)
        case = Case(concurrency=concurrency)
        with serving_case(case, directory, hook_port, f"sqlite:///{ledger}") as (port, process):
            yield Running(port, [process.pid])

    return start


def on_redis(program: str, *arguments: str) -> Start:
    """Return how a peer on Redis is run: `program ... receive PORT` and `program ... work`, and a Redis server."""

    @contextmanager
    def start(directory: Path, hook_port: int, tasks: int) -> Iterator[Running]:
        redis_port, port = free_port(), free_port()
        redis = ["--bind", "127.0.0.1", "--port", str(redis_port), "--dir", str(directory), "--save", ""]
        redis += ["--appendonly", "yes", "--appendfsync", "always"]
        settings = _settings(hook_port) | {
            "REDIS_URL": f"redis://127.0.0.1:{redis_port}/0",
            "HOOK_URL": f"http://127.0.0.1:{hook_port}/hook/0",
            "CONCURRENCY": str(CONCURRENCY),
        }
        receive = [*arguments, "receive", str(port)]
        with ExitStack() as stack:
            enter = stack.enter_context
            store = enter(listening_process(redis, redis_port, directory / "redis.log", python="redis-server"))
            log = directory / "receive.log"
            receiver = enter(listening_process(receive, port, log, python=program, settings=settings))
            worker = enter(_worker([program, *arguments, "work"], directory / "work.log", settings))
            yield Running(port, [store.pid, receiver.pid, worker])

    return start


@contextmanager
def hookspool(directory: Path, hook_port: int, tasks: int) -> Iterator[Running]:
    """Run hookspool's intake and dispatcher, on its SQLite spool."""
    port, program = free_port(), str(INSTALLED / "bin/hookspool")
    secret = '{ env = "HOOK_SECRET" }'
    (directory / "config.toml").write_text(
        f'intake = {{ listen = "127.0.0.1:{port}" }}\n'
        f"dispatch = {{ parallel = {CONCURRENCY} }}\n"
        f"alerts = {{ dry = true }}\n"
        f'[sources.kling]\nmodule = "tests.bench.peers.hookspool_source"\naction = "hook"\n'
        f"secrets = {{ secret = {secret} }}\n"
        f'[destinations.hook]\ntype = "http"\nurl = "http://127.0.0.1:{hook_port}/hook/0"\nallow_insecure = true\n'
        f"secret = {secret}\nunwrap = true\nmax_inflight = {CONCURRENCY}\n"
    )
    settings = _settings(hook_port) | {"HOOKSPOOL_HOME": str(directory)}
    subprocess.run([program, "migrate"], env=os.environ | settings, check=True, stdout=subprocess.DEVNULL)
    log = directory / "intake.log"
    with (
        listening_process(["intake"], port, log, python=program, settings=settings) as intake,
        _worker([program, "dispatch"], directory / "dispatch.log", settings) as dispatcher,
    ):
        yield Running(port, [intake.pid, dispatcher])


def _settings(hook_port: int) -> dict[str, str]:
    return {
        "HOOK_SECRET": f"whsec_{servers.WEBHOOK}",
        "PYTHONPATH": str(ROOT),
        "NODE_PATH": str(INSTALLED / "node_modules"),
    }


PROGRAMS = {
    "kling-relay": Program("kling-relay, concurrency default (10)", kling_relay(None), path=None),
    "kling-relay-50": Program("kling-relay, concurrency 50", kling_relay(CONCURRENCY), path=None),
    "arq": Program("FastAPI + arq, Redis", on_redis(PYTHON, "-m", "tests.bench.peers.fastapi_arq")),
    "bullmq": Program("fastify + BullMQ, Redis", on_redis("node", NODE_PROGRAM)),
    "hookrelay": Program("hookrelay on FastAPI, Redis", on_redis(PYTHON, "-m", "tests.bench.peers.hookrelay_fastapi")),
    "hookspool": Program("hookspool, SQLite", hookspool, connections=HOOKSPOOL_CONNECTIONS),
}
