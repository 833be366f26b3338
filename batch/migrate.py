"""Upgrade a lake of an earlier version of the suite to this version, in place.

    ./spark-submit.sh batch/migrate.py              # show the steps
    ./spark-submit.sh batch/migrate.py --execute

In:  all tables. Out: tables and columns that the lake lacks, their properties, and gold.price_5s from silver.ticks.

This adds columns and rewrites no row. If the rules of a tick have changed since (lake.contract), it judges every record
of bronze again. If silver or quarantine would differ by the current rules, the lake needs
`./spark-submit.sh streaming/ticks.py --rebuild` afterwards; until then the streaming job refuses it and says so. The
streaming job must not run meanwhile. An interrupted run can be repeated.

Exit codes: 0 the lake is of this version, or would be, 1 it needs a --rebuild after --execute, 2 a wrong setting, or
there is no such lake, 4 the streaming job is running.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import reduce
from operator import or_

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from batch.comparable import Comparable
from batch.prove import judged, silver_checks
from conf.settings import USAGE_ERROR, Settings, arguments, from_command_line
from lake.delta.files import Files, UnknownStore, files_of
from lake.delta.lease import LakeInUse, Lease
from lake.delta.log import TableLog
from lake.delta.version import version_of
from lake.delta.writer import create_table, table_properties
from lake.gold.recompute import Snapshot, fill_price_5s
from lake.rules import DECIDING, PROPERTY, GoldRules, deciding, gold_rules, tick_rules
from lake.tables import BRONZE_TICKS, GOLD_PRICE_5S, SILVER_TICKS, TABLES, VERSION, Column, Table

logger = logging.getLogger("batch.migrate")

IN_USE = 4


@dataclass(frozen=True)
class Step:
    """What a table lacks: all of it, or columns and properties."""

    table: Table
    absent: bool
    columns: tuple[Column, ...]
    properties: dict[str, str]

    def __str__(self) -> str:
        name = self.table.qualified_name
        if self.absent:
            return f"{name}: create it"
        columns = [f"add column {column.name} {column.type}" for column in self.columns]
        return f"{name}: {', '.join([*columns, *(f'set {key}' for key in self.properties)])}"


def steps(files: Files, settings: Settings) -> Iterator[Step]:
    """The steps, table by table. silver.ticks comes last: its version marks the lake as upgraded."""
    for table in sorted(TABLES, key=lambda table: table == SILVER_TICKS):
        log = TableLog(files, table.path(settings.lake_root))
        if log.newest() < 0:
            yield Step(table, True, table.columns, {})
            continue
        state = log.state()
        columns = tuple(
            column for column in table.columns if f'"name":"{column.name}"' not in _compact(state.schema_string)
        )
        properties_now = table_properties(table)
        if table == SILVER_TICKS:
            properties_now[PROPERTY] = deciding(settings)
        properties = {key: value for key, value in properties_now.items() if state.configuration.get(key) != value}
        if columns or properties:
            yield Step(table, False, columns, properties)


def _compact(json: str) -> str:
    return json.replace(" ", "")


def needs_rebuild(spark: SparkSession, files: Files, settings: Settings) -> bool:
    """Whether silver or quarantine would differ by the current rules; prints the differences."""
    snapshot = Snapshot.newest(spark, settings.lake_root, files)
    checked = judged(snapshot.read(BRONZE_TICKS), tick_rules(settings)).persist()
    valid, comparable = checked.where(F.col("event_id").isNotNull()), Comparable.of(snapshot)
    broken = [
        check for check in silver_checks(snapshot, checked, valid, comparable, settings.ticks_topic) if check.wrong
    ]
    checked.unpersist()
    for check in broken:
        print(check, flush=True)
    return bool(broken) or mixes_quotes(snapshot.read(SILVER_TICKS), gold_rules(settings))


def mixes_quotes(ticks: DataFrame, rules: GoldRules) -> bool:
    """Whether gold has ticks of a quote that no longer feeds it; earlier versions let every quote feed it."""
    own = [(F.col("source") == source) & (F.col("quote") != quote) for source, quote in rules.quotes.items()]
    pair = F.concat_ws(":", "source", "asset")
    others = ticks.where(reduce(or_, own, F.lit(False)) & ~pair.isin(list(rules.symbols)))
    is_mixed = not others.isEmpty()
    if is_mixed:
        print("gold has ticks of quotes that no longer feed it (setting gold_quotes)", flush=True)
    return is_mixed


def take(spark: SparkSession, files: Files, settings: Settings, step: Step) -> None:
    """Carry out a step."""
    root, table = settings.lake_root, step.table
    if step.absent:
        create_table(files, table, root)
        return
    name = f"delta.`{table.path(root)}`"
    if step.columns:
        columns = ", ".join(f"{c.name} {c.type} COMMENT '{_quoted(c.comment)}'" for c in step.columns)
        spark.sql(f"ALTER TABLE {name} ADD COLUMNS ({columns})")
    if step.properties:
        properties = ", ".join(f"'{key}' = '{_quoted(value)}'" for key, value in step.properties.items())
        spark.sql(f"ALTER TABLE {name} SET TBLPROPERTIES ({properties})")


def _quoted(value: str) -> str:
    return value.replace("\\", "\\\\").replace("'", "\\'")


def fill(spark: SparkSession, files: Files, settings: Settings) -> None:
    """Make gold.price_5s from silver.ticks, as of silver's micro-batch."""
    root = settings.lake_root
    for day, rows in fill_price_5s(spark, root, files, gold_rules(settings), datetime.now(UTC)):
        print(f"gold.price_5s of {day}: {rows} rows", flush=True)
    last_batch = _last_batch(TableLog(files, SILVER_TICKS.path(root)))
    if last_batch:
        log = TableLog(files, GOLD_PRICE_5S.path(root))
        if not log.put(log.newest() + 1, last_batch):
            raise RuntimeError("gold.price_5s was written by somebody else meanwhile: run this again")


def _last_batch(log: TableLog) -> dict[str, object]:
    """The query and batch of the newest commit of a micro-batch."""
    for number in range(log.newest(), -1, -1):
        metadata = log.metadata(number)
        if "batch" in metadata and "query" in metadata:
            return {"query": metadata["query"], "batch": metadata["batch"]}
    return {}


def migrate(spark: SparkSession, files: Files, settings: Settings, *, execute: bool) -> bool:
    """Upgrade the lake, or print the steps. Returns whether it then needs a --rebuild."""
    root = settings.lake_root
    version = version_of(files, root, SILVER_TICKS)
    todo = list(steps(files, settings))
    if not todo:
        print(f"{root} is of version {VERSION}: there is nothing to do")
        return False
    print(f"{root} is of version {version}, and this suite's is {VERSION}")
    for step in todo:
        print(f"    {step}")
    rebuild = version is not None and version < VERSION and needs_rebuild(spark, files, settings)
    if rebuild:
        print("silver or gold would differ by today's rules: then run ./spark-submit.sh streaming/ticks.py --rebuild")
    else:
        print(f"    {GOLD_PRICE_5S.qualified_name}: fill it from silver.ticks")
    if not execute:
        print("nothing was changed: --execute does it")
        return rebuild
    for step in todo:
        if step.table != SILVER_TICKS:
            take(spark, files, settings, step)
    if rebuild:
        return True
    fill(spark, files, settings)
    for step in todo:
        if step.table == SILVER_TICKS:
            take(spark, files, settings, step)
    print(f"{root} is of version {VERSION} now")
    return False


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__, "lake_root", "webhdfs_url", "ticks_topic", "rejects_topic", "gaps_topic", *DECIDING)
    parser.add_argument("--execute", action="store_true", help="do it, instead of saying what would be done")
    settings, own = from_command_line(parser, argv)
    try:
        files = files_of(settings.lake_root, str(settings.webhdfs_url))
    except UnknownStore as error:
        parser.error(str(error))
    if version_of(files, settings.lake_root, SILVER_TICKS) is None:
        print(f"{parser.prog}: there is no lake at {settings.lake_root}", file=sys.stderr)
        return USAGE_ERROR
    spark = SparkSession.builder.appName("tickhouse migrate").getOrCreate()
    lease = Lease(files, settings.lake_root)
    try:
        lease.acquire()
        return 1 if migrate(spark, files, settings, execute=own.execute) else 0
    except LakeInUse as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return IN_USE
    finally:
        lease.release()
        spark.stop()


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    sys.exit(main())
