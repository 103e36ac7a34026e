"""Many seeds of the model-based test, and of its variant with threads: make chaos.

    python -m tests.chaos --seconds 300 --seed 1

Ends at the first violation, with its seed: --seed and --count 1 repeat it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import psycopg

from tests.chaos_threads import Chaos
from tests.conftest import BACKENDS
from tests.helpers import Connection
from tests.model import Violation
from tests.model_steps import Seed
from tests.servers import Servers

THREADED = 6  # every so many seeds one with threads
THREADED_SECONDS = 5


def run_seed(dsn: str, seed: int, steps: int) -> None:
    def connect() -> Connection:
        return psycopg.connect(dsn, autocommit=True)

    if seed % THREADED == THREADED - 1:
        Chaos(connect, seed).run(THREADED_SECONDS)
    else:
        Seed(connect, seed).run(steps)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--count", type=int, default=100_000, help="of seeds, at most")
    parser.add_argument("--seed", type=int, help="the first one; any without")
    parser.add_argument("--steps", type=int, default=300, help="in each seed")
    options = parser.parse_args()
    first = time.time_ns() % 1_000_000 if options.seed is None else options.seed
    end = time.monotonic() + options.seconds
    with tempfile.TemporaryDirectory() as folder:
        servers = Servers(Path(folder))
        try:
            with servers.database(BACKENDS[0]) as database:
                for seed in range(first, first + options.count):
                    if time.monotonic() > end:
                        break
                    print(f"seed {seed}", flush=True)
                    try:
                        run_seed(database.dsn, seed, options.steps)
                    except (Violation, psycopg.Error) as error:
                        print(f"{error}\nviolation with --seed {seed} --count 1", flush=True)
                        return 1
        finally:
            servers.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
