"""Rebuild gold for a time range from silver, while the stream goes on.

    ./spark-submit.sh batch/recompute.py --from 2026-11-22T10:00:00Z --to 2026-11-22T12:00:00Z

In:  silver.ticks. Out: every gold table but gold.current_price, whole days of UTC at a time.

Gold is computed from silver as of the last micro-batch that all tables have. Files that the stream has written since
are left alone and told; run it again for those.

Exit codes: 0 all rebuilt, 1 some was left, 2 a wrong setting.
"""

from __future__ import annotations

import logging
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

from pyspark.sql import SparkSession

from conf.settings import USAGE_ERROR, arguments, from_command_line
from lake.metrics import GoldRules
from lake.recomputation import ALWAYS, DAY, Period, Row, Snapshot, by_span, gold_rows, period_of
from lake.rules import DECIDING, gold_rules
from lake.silver import Silver
from lake.summaries import to_time
from lake.tables import GOLD, GOLD_CURRENT_PRICE, SILVER_TICKS, Table


def recompute(snapshot: Snapshot, rules: GoldRules, day: Period) -> Iterator[tuple[Table, list[int]]]:
    """Rebuild each table's rows of a day; the spans of it that were left to the stream."""
    version = snapshot.versions[SILVER_TICKS.qualified_name]
    silver = Silver.of_lake(snapshot.spark, snapshot.root, rules, version)
    rows: dict[str, list[Row]] = defaultdict(list)
    for table, row in gold_rows(silver, rules, day, datetime.now(UTC)):
        rows[table.qualified_name].append(row)
    for table in GOLD:
        if table != GOLD_CURRENT_PRICE:
            spans = range(table.span(day.begin), table.span(day.end - 1) + 1)
            yield table, snapshot.rewrite(table, by_span(table, rows[table.qualified_name], spans))


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(
        __doc__,
        *("lake_root", *DECIDING),
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
            snapshot = Snapshot.newest(spark, settings.lake_root)
            for table, spans in recompute(snapshot, gold_rules(settings), Period(begin, begin + DAY)):
                told = f", {len(spans)} files left to the stream" if spans else ""
                print(f"{to_time(begin):%Y-%m-%d} {table.qualified_name}: rebuilt{told}", flush=True)
                left += len(spans)
    finally:
        spark.stop()
    return 1 if left else 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    sys.exit(main())
