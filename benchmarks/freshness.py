"""How long a tick takes from its frame to gold: `python -m benchmarks.freshness [--lake-root ROOT] [--batches 100]`

Reads what the lake says of itself while or after the streaming job runs: each tick's received_at in silver.ticks, and
when its micro-batch was committed to gold.price_1m. Prints one line of JSON: p50 and p99 of that time in seconds, the
time between micro-batches in seconds (median, and that of the first and of the last hundred), and ticks per second,
over the last micro-batches.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from io import BytesIO
from itertools import pairwise
from statistics import median, quantiles
from typing import Any
from urllib.parse import urlsplit

import hdfs
import pyarrow.parquet as pq

from conf.settings import arguments, from_command_line
from lake.tables import GOLD_PRICE_1M, SILVER_TICKS


def commits(files: hdfs.Client, folder: str, newest: int) -> Iterator[tuple[int, float, list[str]]]:
    """(micro-batch, seconds since 1970 of its commit, data files that it added) of a table's newest commits."""
    names = sorted(name for name in files.list(f"{folder}/_delta_log") if name.endswith(".json"))
    for name in names[-newest:]:
        with files.read(f"{folder}/_delta_log/{name}", encoding="utf-8") as text:
            actions: list[dict[str, Any]] = [json.loads(line) for line in text.read().splitlines()]
        info = next(action["commitInfo"] for action in actions if "commitInfo" in action)
        metadata = json.loads(info.get("userMetadata", "{}"))
        added = [f"{folder}/{action['add']['path']}" for action in actions if "add" in action]
        # A writer that claims the lake carries on what was kept with the last micro-batch, and adds nothing.
        if "batch" in metadata and added:
            yield metadata["batch"], info["timestamp"] / 1000, added


def received(files: hdfs.Client, path: str) -> list[float]:
    """received_at of the ticks in a data file, in seconds since 1970."""
    with files.read(path) as content:
        times = pq.read_table(BytesIO(content.read()), columns=["received_at"])["received_at"].to_pylist()
    return [(time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp() for time in times]


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, "lake_root", "webhdfs_url")
    parser.add_argument("--batches", type=int, default=100, help="how many of the last micro-batches (default: 100)")
    settings, own = from_command_line(parser, argv)
    files = hdfs.InsecureClient(settings.webhdfs_url)
    root = urlsplit(settings.lake_root).path
    in_gold = {batch: at for batch, at, _ in commits(files, GOLD_PRICE_1M.path(root), own.batches)}
    waits: list[float] = []
    for batch, _, paths in commits(files, SILVER_TICKS.path(root), own.batches):
        if batch in in_gold:
            waits += [in_gold[batch] - at for path in paths for at in received(files, path)]
    times = sorted(in_gold.values())
    between = [after - before for before, after in pairwise(times)]
    percentiles = quantiles(waits, n=100)
    print(
        json.dumps(
            {
                "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
                "micro_batches": len(in_gold),
                "ticks": len(waits),
                "ticks_per_second": round(len(waits) / (times[-1] - times[0])),
                "between_micro_batches": round(median(between), 2),
                "between_first_100": round(median(between[:100]), 3),
                "between_last_100": round(median(between[-100:]), 3),
                "frame_to_gold_p50": round(percentiles[49], 2),
                "frame_to_gold_p99": round(percentiles[98], 2),
            }
        )
    )


if __name__ == "__main__":
    main()
