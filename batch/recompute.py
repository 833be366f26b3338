"""Rebuild gold for a time range from silver, while the stream goes on.

    ./spark-submit.sh batch/recompute.py --from 2026-11-22T10:00:00Z --to 2026-11-22T12:00:00Z

In:  silver.ticks. Out: every gold table but gold.current_price, whole days of UTC at a time.

Gold is computed from silver as of the last micro-batch that all tables have. Rows whose files the stream has
written since are not rebuilt, but counted; run this again for those. A day of which silver.ticks has dropped rows
(keep_days, scripts/drop-older-than) is left as it is.

Exit codes: 0 all rebuilt, 1 some rows were not rebuilt, 2 a wrong setting, 5 the tables' history passed meanwhile.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

from pyspark.sql import SparkSession

from batch.opening import OVERTAKEN, files_of_lake
from conf.settings import USAGE_ERROR, arguments, from_command_line
from lake.delta.overtaken import Overtaken
from lake.gold.recompute import ALWAYS, LOOKS_BACK, Period, Snapshot, expected, period_of
from lake.rules import DECIDING, GoldRules, gold_rules
from lake.tables import GOLD, GOLD_ALERTS, GOLD_CURRENT_PRICE, SILVER_TICKS, Table
from lake.times import DAY, to_micros, to_time

REBUILT = tuple(table for table in GOLD if table != GOLD_CURRENT_PRICE)


def recompute(snapshot: Snapshot, rules: GoldRules, day: Period) -> Iterator[tuple[Table, list[int]]]:
    """Rebuild each table's rows of a day. Yields each table and the spans that were left to the stream."""
    gold = expected(snapshot.read(SILVER_TICKS), rules, day, datetime.now(UTC), REBUILT)
    try:
        for table in REBUILT:
            rows = gold.rows(table) if table == GOLD_ALERTS else gold.rows(table, day.begin)
            spans = range(table.span(day.begin), table.span(day.end - 1) + 1)
            yield table, snapshot.rewrite(table, spans, rows)
    finally:
        gold.forget()


def is_whole(snapshot: Snapshot, day: Period) -> bool:
    """Whether silver.ticks has all ticks that make the day's rows: none of them was dropped."""
    dropped = snapshot.dropped_before(SILVER_TICKS)
    return dropped is None or to_micros(dropped) + LOOKS_BACK <= day.begin


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__, "lake_root", "webhdfs_url", *DECIDING)
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
    files = files_of_lake(parser, settings)
    left = 0
    spark = SparkSession.builder.appName("tickhouse recompute").getOrCreate()
    try:
        for begin in range(days.begin, days.end, DAY):
            snapshot, day = Snapshot.newest(spark, settings.lake_root, files), Period(begin, begin + DAY)
            if not is_whole(snapshot, day):
                print(f"{to_time(begin):%Y-%m-%d}: left as it is, since old rows of silver.ticks were dropped")
                left += 1
                continue
            with snapshot.reading():
                for table, spans in recompute(snapshot, gold_rules(settings), day):
                    rest = f", {len(spans)} spans of rows left to the stream" if spans else ""
                    print(f"{to_time(begin):%Y-%m-%d} {table.qualified_name}: rebuilt{rest}", flush=True)
                    left += len(spans)
    except Overtaken as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return OVERTAKEN
    finally:
        spark.stop()
    return 1 if left else 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    sys.exit(main())
