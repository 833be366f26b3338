"""Rebuild gold for a time range from silver, while the stream goes on.

    ./spark-submit.sh batch/recompute.py --from 2026-11-22T10:00:00Z --to 2026-11-22T12:00:00Z

In:  silver.ticks. Out: every gold table but gold.current_price, whole days of UTC at a time.

Each table is computed from silver as of the micro-batch that the table has. Files that the stream has written in the
meantime are left alone and told; run it again for those.

Exit codes: 0 all rebuilt, 1 some was left, 2 a wrong setting.
"""

from __future__ import annotations

import logging
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime

from pyspark.sql import SparkSession

from conf.settings import USAGE_ERROR, Settings, arguments, from_command_line
from lake import writer
from lake.commits import TableLog
from lake.gold import Silver
from lake.recomputation import ALWAYS, DAY, Period, batch_of, gold_rows, period_of, table_span
from lake.rules import gold_rules
from lake.summaries import to_micros, to_time
from lake.tables import GOLD, GOLD_CURRENT_PRICE, SILVER_TICKS, Table

PATIENCE_SECONDS = 60.0


def silver_version(spark: SparkSession, root: str, batch: int) -> int:
    """The version of silver.ticks that has a micro-batch, for which it waits. Raises TimeoutError."""
    log = TableLog(spark, SILVER_TICKS.path(root))
    until = time.monotonic() + PATIENCE_SECONDS
    while True:
        if batch_of(log)[1] >= batch:
            return batch_of(log, batch)[0]
        if time.monotonic() > until:
            raise TimeoutError(
                f"gold has micro-batch {batch}, and silver has not: the stream died in the middle of it; start it again"
            )
        time.sleep(0.5)


def recompute(spark: SparkSession, settings: Settings, table: Table, day: Period) -> list[int]:
    """Rebuild a table's rows of a day; the spans that were left to the stream."""
    root, rules = settings.lake_root, gold_rules(settings)
    log = TableLog(spark, table.path(root))
    version, batch = batch_of(log)
    known = spark.read.format("delta").option("versionAsOf", version).load(table.path(root)).inputFiles()
    silver = Silver.of_lake(spark, root, rules, silver_version(spark, root, batch))
    length = 1 if table.file_span is None else table.file_span.total_seconds() * 1_000_000
    spans: dict[int, list[tuple[object, ...]]] = defaultdict(list)
    for span in range(int(day.begin // length), int(day.end // length)):
        spans[span] = []
    time_at = table.column_names.index(table.file_time)
    for made, row in gold_rows(silver, rules, day, datetime.now(UTC)):
        if made == table:
            at = row[time_at]
            assert isinstance(at, datetime)
            spans[table_span(table, to_micros(at))].append(row)
    return writer.rewrite(log, table, known, spans)


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(
        __doc__,
        *("lake_root", "future_tolerance_seconds", "gold_symbols", "volatility_seconds"),
        *("alert_threshold_pct", "alert_window_seconds", "alert_cooldown_seconds"),
    )
    parser.add_argument(
        "--from", dest="begin", type=datetime.fromisoformat, required=True, metavar="TIME", help="begin"
    )
    parser.add_argument("--to", dest="end", type=datetime.fromisoformat, required=True, metavar="TIME", help="end")
    settings, own = from_command_line(parser, argv)
    period = period_of(own.begin, own.end)
    if not ALWAYS.begin <= period.begin < period.end:
        print(f"{parser.prog}: --from is not before --to", file=sys.stderr)
        return USAGE_ERROR
    days = period.days()
    left = 0
    spark = SparkSession.builder.appName("tickhouse recompute").getOrCreate()
    try:
        for begin in range(days.begin, days.end, DAY):
            for table in GOLD:
                if table != GOLD_CURRENT_PRICE:
                    spans = recompute(spark, settings, table, Period(begin, begin + DAY))
                    told = f", {len(spans)} files left to the stream" if spans else ""
                    print(f"{to_time(begin):%Y-%m-%d} {table.qualified_name}: rebuilt{told}", flush=True)
                    left += len(spans)
    finally:
        spark.stop()
    return 1 if left else 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    sys.exit(main())
