"""The part `model`: a state machine explores every engine beside a model, and every short sequence of observations."""

import contextlib
import io
import os
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import hypothesis
from hypothesis.stateful import run_state_machine_as_test

from submitter.ledger.dynamodb import deliveries as dynamodb_deliveries
from tests.conformance.aws_stand_ins import AWS, MINISTACK, run_ministack
from tests.torture.engines import DynamoStore, PostgresStore, SqliteStore, Store, has_postgres
from tests.torture.machine import LedgerMachine
from tests.torture.parts import Round
from tests.torture.sequences import explore, explore_orders

GENERATE = (hypothesis.Phase.generate,)
PHASES = (*GENERATE, hypothesis.Phase.shrink)
"""Shrinking takes up to five minutes, where a step takes milliseconds: only findings on SQLite are shrunk."""


def run(seed: int, folder: Path) -> Round:
    """Explore with `seed` what is on this machine: SQLite always, PostgreSQL, DynamoDB's stand-in."""
    done = Round()
    done.add(short_sequences())
    done.add(explore_store("SQLite", lambda: SqliteStore(folder), seed, examples=150, steps=40))
    if has_postgres():
        done.add(explore_store("PostgreSQL", PostgresStore, seed, examples=40, steps=40, phases=GENERATE))
    if MINISTACK.exists():
        with dynamodb(folder):
            done.add(explore_store("DynamoDB", DynamoStore, seed, examples=10, steps=25, phases=GENERATE))
    return done


def short_sequences(length: int = 4) -> Round:
    """Every sequence of up to `length` observations, and every order of `length` reports."""
    explored, ordered = explore(length), explore_orders(length)
    counts = Counter({"transitions": explored.transitions + ordered.transitions})
    return Round(counts, [f"the state machine: {finding}" for finding in explored.findings + ordered.findings])


def explore_store(
    engine: str,
    new_store: Callable[[], Store],
    seed: int,
    *,
    examples: int,
    steps: int,
    phases: Sequence[hypothesis.Phase] = PHASES,
) -> Round:
    """Run the state machine with `seed`; a failure is a finding, with its shortest known sequence of steps."""
    counts: Counter[str] = Counter()
    machine = type(f"{engine}Machine", (LedgerMachine,), {"new_store": staticmethod(new_store), "counts": counts})
    settings = hypothesis.settings(
        database=None,
        derandomize=False,
        max_examples=examples,
        stateful_step_count=steps,
        phases=phases,
        deadline=None,
        print_blob=False,
        report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    printed, findings = io.StringIO(), []
    try:
        with contextlib.redirect_stdout(printed):
            run_state_machine_as_test(hypothesis.seed(seed)(machine), settings=settings)
    except Exception as error:
        lines = "\n".join([*traceback.format_exception_only(error), printed.getvalue()]).splitlines()
        shown = [line for line in lines if line and "everything_is_as_the_model_says" not in line]
        findings.append("\n".join([engine, *shown]))
    return Round(Counter({f"{what} on {engine}": count for what, count in counts.items()}), findings)


@contextmanager
def dynamodb(folder: Path) -> Iterator[None]:
    """Run the stand-in for DynamoDB. A worker sees at once that another one disabled a hook, as the model does."""
    with (
        run_ministack(folder) as url,
        patch.dict(os.environ, AWS | {"AWS_ENDPOINT_URL": url}),
        patch.object(dynamodb_deliveries, "HOOKS_MAX_AGE_S", 0.0),
    ):
        yield
