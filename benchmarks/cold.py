"""How long a query takes in a process that has read nothing yet: `python -m benchmarks.cold ROOT SQL [--times N]`

Queries by lake.reader. Prints one line of JSON: `seconds`, from opening the tables to the answer, of each time (the
first one is the cold one), and `rows`, the number of rows of the answer. Python's own start does not count.

Exit codes: 0 answered, 1 the lake lacks a table, or does not answer.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence

# Imported at a first query otherwise, and its import is Python's start.
import pyarrow.dataset  # noqa: F401

from conf.settings import PROJECT
from lake.reader import NoSuchTable, query

# A lake that nothing keeps up may be slow, but not for ever.
ANSWER_LIMIT = 120.0


class NoAnswer(RuntimeError):
    """A query failed, or took too long."""


def measured(root: str, sql: str, times: int = 1) -> list[float]:
    """The seconds that a query takes in a process of its own, the first time and again. Raises NoAnswer."""
    command = [sys.executable, "-m", "benchmarks.cold", root, sql, "--times", str(times)]
    try:
        ran = subprocess.run(
            command, cwd=PROJECT, capture_output=True, text=True, check=False, timeout=ANSWER_LIMIT * times
        )
    except subprocess.TimeoutExpired:
        raise NoAnswer(f"{sql}: no answer within {ANSWER_LIMIT * times:.0f} s") from None
    if ran.returncode:
        raise NoAnswer(f"{sql}: {ran.stderr.strip().splitlines()[-1] if ran.stderr.strip() else ran.returncode}")
    return [float(seconds) for seconds in json.loads(ran.stdout)["seconds"]]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cold", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", help="the lake's root")
    parser.add_argument("sql", help="a SELECT over the lake's tables")
    parser.add_argument("--times", type=int, default=1, metavar="N", help="ask so often (default: 1)")
    own = parser.parse_args(argv)
    seconds, rows = [], 0
    for _ in range(own.times):
        began = time.perf_counter()
        try:
            rows = query(own.root, own.sql).num_rows
        except (NoSuchTable, TimeoutError, OSError) as error:
            print(f"{parser.prog}: {error}", file=sys.stderr)
            return 1
        seconds.append(round(time.perf_counter() - began, 4))
    print(json.dumps({"seconds": seconds, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
