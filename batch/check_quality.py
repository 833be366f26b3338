"""Check a day of silver.ticks and gold.price_1m with Great Expectations.

In: the rows of silver.ticks whose event_date, and of gold.price_1m whose window_date, is --date.
Out: one row of quality.results per expectation, and the same on standard output.
Exit code: 0 when every expectation of severity error holds, else 1. A day without rows fails.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from datetime import UTC, date, datetime

import great_expectations as gx
import great_expectations.expectations.core as gxe
from great_expectations.core import ExpectationValidationResult
from great_expectations.data_context.types.base import ProgressBarsConfig
from great_expectations.expectations.expectation import Expectation
from great_expectations.expectations.metadata_types import FailureSeverity
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from batch import results
from batch.opening import files_of_lake
from conf.settings import arguments, from_command_line
from lake.delta.files import Files
from lake.tables import GOLD_PRICE_1M, SILVER_TICKS, Table

SEVERITIES = {FailureSeverity.CRITICAL: "error", FailureSeverity.WARNING: "warning"}


@dataclass(frozen=True)
class Verdict:
    """A row of quality.results."""

    run_id: str
    checked_at: datetime
    table_name: str
    slice: str
    suite: str
    expectation: str
    column_name: str
    severity: str
    success: bool
    observed: str | None
    unexpected_count: int | None


def not_null(table: Table) -> list[Expectation]:
    return [gxe.ExpectColumnValuesToNotBeNull(column=column.name) for column in table.columns if not column.nullable]


def no_row_where(name: str, condition: str) -> Expectation:
    return gxe.UnexpectedRowsExpectation(
        unexpected_rows_query=f"SELECT * FROM {{batch}} WHERE {condition}", meta={"name": name}
    )


def at_most(lower: str, higher: str) -> Expectation:
    return gxe.ExpectColumnPairValuesAToBeGreaterThanB(column_A=higher, column_B=lower, or_equal=True)


@dataclass(frozen=True)
class Suite:
    """The expectations of a table's rows of one day; `day`: the column with a row's day."""

    table: Table
    day: str
    expectations: list[Expectation]


SILVER_SUITE = Suite(
    SILVER_TICKS,
    day="event_date",
    expectations=[
        gxe.ExpectTableRowCountToBeBetween(min_value=1),
        *not_null(SILVER_TICKS),
        gxe.ExpectColumnValuesToBeUnique(column="event_id"),
        gxe.ExpectColumnValuesToBeBetween(column="price_usd", min_value=0, strict_min=True),
        gxe.ExpectColumnValuesToBeBetween(column="quantity", min_value=0),
        no_row_where("event_date is the date of event_time", "event_date <> to_date(event_time)"),
        # A venue's clock that runs ahead deserves a warning, but is no error.
        gxe.ExpectColumnValuesToBeInSet(
            column="is_future", value_set=[False], mostly=0.99, severity=FailureSeverity.WARNING
        ),
    ],
)
GOLD_SUITE = Suite(
    GOLD_PRICE_1M,
    day="window_date",
    expectations=[
        gxe.ExpectTableRowCountToBeBetween(min_value=1),
        *not_null(GOLD_PRICE_1M),
        gxe.ExpectCompoundColumnsToBeUnique(column_list=list(GOLD_PRICE_1M.key)),
        gxe.ExpectColumnValuesToBeBetween(column="low", min_value=0, strict_min=True),
        *(at_most("low", price) for price in ("open", "close", "average")),
        *(at_most(price, "high") for price in ("open", "close", "average")),
        gxe.ExpectColumnValuesToBeBetween(column="tick_count", min_value=1),
        gxe.ExpectColumnValuesToBeBetween(column="volatility_pct", min_value=0),
        no_row_where("the window is one minute", "window_end - window_start <> INTERVAL 1 MINUTE"),
        no_row_where("the window starts with a minute", "window_start <> date_trunc('minute', window_start)"),
        no_row_where("window_date is the date of window_start", "window_date <> to_date(window_start)"),
    ],
)


def verdicts(rows: DataFrame, suite: Suite, day: date, checked_at: datetime) -> list[Verdict]:
    """The verdict of each of the suite's expectations on these rows."""
    table = suite.table
    context = gx.get_context(mode="ephemeral")
    context.enable_analytics(False)
    context.variables.progress_bars = ProgressBarsConfig(globally=False, metric_calculations=False)
    asset = context.data_sources.add_spark(table.database).add_dataframe_asset(table.name)
    batch = asset.add_batch_definition_whole_dataframe(str(day)).get_batch({"dataframe": rows})
    expected = gx.ExpectationSuite(table.qualified_name, expectations=suite.expectations)
    results = batch.validate(expected, result_format="SUMMARY").results
    return [_verdict(result, suite, day, checked_at) for result in results]


def _verdict(result: ExpectationValidationResult, suite: Suite, day: date, checked_at: datetime) -> Verdict:
    config, details = result.expectation_config, result.result
    assert config is not None  # as every result of a validation has
    columns = config.kwargs.get("column_list") or [
        config.kwargs[name] for name in ("column", "column_A", "column_B") if name in config.kwargs
    ]
    # An expectation on rows has our own name, and its observed value is the number of rows that break it.
    name = (config.meta or {}).get("name")
    error = result.exception_info.get("exception_message")
    observed = error or details.get("observed_value") or details.get("partial_unexpected_list")
    return Verdict(
        run_id=f"{suite.table.qualified_name}@{checked_at.isoformat()}",
        checked_at=checked_at,
        table_name=suite.table.qualified_name,
        slice=f"{suite.day} = {day}",
        suite=suite.table.qualified_name,
        expectation=name or config.type,
        column_name=",".join(columns),
        severity=SEVERITIES[config.severity],
        success=bool(result.success),
        observed=str(observed) if observed else None,
        unexpected_count=details.get("observed_value") if name else details.get("unexpected_count"),
    )


def line(verdict: Verdict) -> str:
    """A verdict as a line of text."""
    mark = "ok" if verdict.success else verdict.severity.upper()
    rows = f" {verdict.unexpected_count} rows" if verdict.unexpected_count else ""
    seen = f": {verdict.observed}" if verdict.observed and not verdict.success else ""
    return f"{mark:8}{verdict.table_name:16}{verdict.expectation} {verdict.column_name}{rows}{seen}"


def check(spark: SparkSession, files: Files, root: str, day: date, checked_at: datetime) -> list[Verdict]:
    """Check the day in each table, and append the verdicts to quality.results."""
    day_verdicts: list[Verdict] = []
    for suite in (SILVER_SUITE, GOLD_SUITE):
        rows = spark.read.format("delta").load(suite.table.path(root)).where(F.col(suite.day) == day)
        day_verdicts += verdicts(rows, suite, day, checked_at)
    results.append(spark, files, root, [astuple(verdict) for verdict in day_verdicts])
    return day_verdicts


def arg_parser() -> argparse.ArgumentParser:
    parser = arguments(__doc__, "lake_root", "webhdfs_url")
    parser.add_argument(
        "--date", type=date.fromisoformat, required=True, metavar="YYYY-MM-DD", help="the day to check, in UTC"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = arg_parser()
    settings, options = from_command_line(parser, argv)
    files = files_of_lake(parser, settings)
    spark = SparkSession.builder.appName("tickhouse check_quality").getOrCreate()
    try:
        day_verdicts = check(spark, files, settings.lake_root, options.date, datetime.now(UTC))
    finally:
        spark.stop()
    print("\n".join(line(verdict) for verdict in day_verdicts))
    failed = [verdict for verdict in day_verdicts if not verdict.success and verdict.severity == "error"]
    print(f"{len(day_verdicts)} expectations of {options.date}, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    sys.exit(main())
