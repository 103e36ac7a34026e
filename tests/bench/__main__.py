"""`python -m tests.bench`: measure, print, and write the results down."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from pgqueue_sql.private_server import find_installations

from . import (
    backlog,
    batch,
    consume,
    held_snapshot,
    idle_cost,
    latency,
    ordered,
    plans,
    plots,
    publish,
    receive,
    rules,
)
from .report import Report, save, summary
from .scale import FULL, QUICK, Scale
from .servers import REPOSITORY, Lab, lab

GROUPS: dict[str, Callable[[Lab, Report, Scale], None]] = {
    "publish": publish.run,
    "batch": batch.run,
    "receive": receive.run,
    "consume": consume.run,
    "latency": latency.run,
    "ordered": ordered.run,
    "idle": idle_cost.run,
    "rules": rules.run,
    "backlog": backlog.run,
    "held": held_snapshot.run,
    "plans": plans.run,
}
# In seconds they would show nothing but noise.
TOO_SMALL_WHEN_QUICK = ("idle", "rules")
SERVERS = (15, 18)
RESULTS = REPOSITORY / "build" / "bench"


def main() -> None:
    arguments = _arguments()
    scale = QUICK if arguments.quick else FULL
    overrides = {
        "rounds": arguments.rounds,
        "turn_seconds": arguments.seconds,
        "held_seconds": arguments.held_seconds,
    }
    scale = replace(scale, **{name: value for name, value in overrides.items() if value})
    found = {installation.major: installation for installation in find_installations()}
    if missing := set(arguments.server) - set(found):
        sys.exit(f"no PostgreSQL {missing.pop()} was found, only {', '.join(map(str, found))}")
    command = f"python -m tests.bench {shlex.join(sys.argv[1:])}"
    started = time.monotonic()
    print(command)
    print(f"{os.cpu_count()} cores; {', '.join(arguments.only)}; {scale}")
    if not arguments.quick:
        print("All groups take about an hour a server, and 8 times as long as a snapshot is held.")
    reports = []
    for major in arguments.server:
        with lab(found[major], arguments.sql) as here:
            report = Report(here.version, scale)
            reports.append(report)
            for group in arguments.only:
                print(f"\n== {group}, PostgreSQL {here.version}", flush=True)
                GROUPS[group](here, report, scale)
                file = save(arguments.output, command, reports)
    summary(reports)
    pictures = plots.draw(reports, arguments.output)
    written = ", ".join(str(each) for each in (file, *pictures))
    print(f"\n{time.monotonic() - started:.0f} s; written: {written}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small numbers, to see that it works")
    parser.add_argument("--only", type=_groups, help=", ".join(GROUPS))
    parser.add_argument("--server", type=_majors, help="major versions: 15,18; --quick: 18")
    parser.add_argument("--rounds", type=int, help="turns of each contestant")
    parser.add_argument("--seconds", type=float, help="length of a turn, where it is timed")
    parser.add_argument("--held-seconds", type=int, help="how long a snapshot is held each time")
    parser.add_argument(
        "--sql", type=Path, default=REPOSITORY / "sql", help="measure the SQL in another folder"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of JSON and plots")
    arguments = parser.parse_args()
    arguments.only = arguments.only or [
        group for group in GROUPS if not (arguments.quick and group in TOO_SMALL_WHEN_QUICK)
    ]
    arguments.server = arguments.server or SERVERS[-1 if arguments.quick else 0 :]
    return arguments


def _groups(text: str) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - set(GROUPS):
        raise argparse.ArgumentTypeError(f"no group {', '.join(unknown)}")
    return names


def _majors(text: str) -> list[int]:
    return [int(major) for major in text.split(",")]


if __name__ == "__main__":
    main()
