"""`make torture MINUTES=30 SEED=1 PARTS="kills strangers"`: rounds of every part until the time is over."""

import argparse
import sys
import tempfile
import time
import traceback
from pathlib import Path

from submitter import log
from tests.torture import day, exploring, kills, network, overload, rotation, stores, strangers
from tests.torture.parts import Missing, Part, Round

PARTS: dict[str, Part] = {
    "kills": kills.run,
    "stores": stores.run,
    "day": day.run,
    "model": exploring.run,
    "strangers": strangers.run,
    "rotation": rotation.run,
    "overload": overload.run,
    "network": network.run,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="make torture", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"which of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--minutes", type=float, default=30, help="start no new round after this time")
    parser.add_argument("--seed", type=int, default=1, help="the seed of the first round; the next ones count on")
    parser.add_argument("--rounds", type=int, help="stop after this many rounds of each part")
    given = parser.parse_args()
    log.quiet()
    unknown = [name for name in given.parts if name not in PARTS]
    if unknown:
        parser.error(f"no such part: {', '.join(unknown)} (there are {', '.join(PARTS)})")
    totals: dict[str, Round] = {name: Round() for name in given.parts or PARTS}
    end_s = time.monotonic() + given.minutes * 60
    seed = given.seed
    while totals and time.monotonic() < end_s and (given.rounds is None or seed < given.seed + given.rounds):
        for name in [name for name in totals if time.monotonic() < end_s]:
            try:
                totals[name].add(run_round(name, seed))
            except Missing as reason:
                print(f"{name}: left out: {reason}", flush=True)
                del totals[name]
        seed += 1
    for name, total in totals.items():
        counts = ", ".join(f"{count:,} {what}" for what, count in total.counts.items())
        print(f"\n{name}: {counts}; findings: {len(total.findings) or 'none'}")
    return 1 if any(total.findings for total in totals.values()) else 0


def run_round(name: str, seed: int) -> Round:
    """Run one round; print its duration, and each finding with the command that repeats it."""
    begun_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        try:
            done = PARTS[name](seed, Path(folder))
        except Missing:
            raise
        except Exception:
            done = Round(findings=[traceback.format_exc()])
    done.counts |= {"rounds": 1, "seconds": round(time.monotonic() - begun_s)}
    print(f"{name}, seed {seed}: {dict(done.counts)}", flush=True)
    for finding in done.findings:
        print(f'FINDING: {finding}\n  repeat it: make torture PARTS="{name}" SEED={seed} ROUNDS=1', flush=True)
    return done


if __name__ == "__main__":
    sys.exit(main())
