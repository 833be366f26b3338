"""Prices by time window as mergeable summaries: what the stream folds into gold, and what a batch recomputes.

A summary of some ticks of a window holds count, sum, M2, volume, notional, highest, lowest, and the first and the last
by tick order. Two summaries of disjoint ticks merge into the summary of both, in any order, so a late tick is no
special case. Counts, sums and extremes are exact; M2 (the sum of squared differences from the mean) is a double, merged
by Chan, Golub and LeVeque's formula (1979), since a sum of squares would lose eight digits at a price of 60,000.
"""

from __future__ import annotations

from datetime import datetime

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from lake.tables import CURRENT_ORDER, GOLD_CURRENT_PRICE, GOLD_PRICE_1M, PRICE, TICK_ORDER
from lake.ticks import gold_time, notional

SUMMARY = (
    *("tick_count", "price_sum", "price_m2", "high", "low", "open", "open_order", "close", "close_order"),
    *("volume", "notional", "first_event_time", "last_event_time"),
)


def summaries(ticks: DataFrame, **window: Column) -> DataFrame:
    """A summary row per window; `window` names the columns that say which one, `ticks` are rows of silver.ticks."""
    within = ("trade_epoch", "trade_id", "producer", "sequence", "event_id")
    order = F.struct(gold_time().alias("gold_time"), *within).cast(TICK_ORDER)
    price = F.col("price_usd")
    return (
        ticks.select(
            *(column.alias(name) for name, column in window.items()),
            price,
            "quantity",
            notional(price, F.col("quantity")).alias("tick_notional"),
            order.alias("tick_order"),
        )
        .groupBy(*window)
        .agg(
            F.count("*").alias("tick_count"),
            F.sum("price_usd").cast("DECIMAL(38,12)").alias("price_sum"),
            (F.var_pop(price.cast("double")) * F.count("*")).alias("price_m2"),
            F.max("price_usd").alias("high"),
            F.min("price_usd").alias("low"),
            F.min_by("price_usd", "tick_order").alias("open"),
            F.min("tick_order").alias("open_order"),
            F.max_by("price_usd", "tick_order").alias("close"),
            F.max("tick_order").alias("close_order"),
            F.try_sum("quantity").try_cast(PRICE).alias("volume"),
            F.try_sum("tick_notional").alias("notional"),
        )
        .withColumn("first_event_time", F.col("open_order.gold_time"))
        .withColumn("last_event_time", F.col("close_order.gold_time"))
    )


def merged(left: Column, right: Column) -> Column:
    """The SUMMARY struct of the ticks of two SUMMARY structs."""

    def sum_of(name: str, type_name: str) -> Column:
        a, b = left[name], right[name]
        return F.coalesce(F.try_add(a, b), F.when(b.isNull(), a), F.when(a.isNull(), b)).try_cast(type_name)

    def by_order(name: str, order: str, first: bool) -> Column:
        a, b = left[order], right[order]
        return F.when(a <= b if first else a >= b, left[name]).otherwise(right[name])

    a_count, b_count = left["tick_count"], right["tick_count"]
    a_sum, b_sum = left["price_sum"], right["price_sum"]
    count = a_count + b_count
    distance = b_sum.cast("double") / b_count - a_sum.cast("double") / a_count
    columns = {
        "tick_count": count,
        "price_sum": (a_sum + b_sum).cast("DECIMAL(38,12)"),
        "price_m2": left["price_m2"] + right["price_m2"] + distance * distance * a_count * b_count / count,
        "high": F.greatest(left["high"], right["high"]),
        "low": F.least(left["low"], right["low"]),
        "open": by_order("open", "open_order", first=True),
        "open_order": by_order("open_order", "open_order", first=True),
        "close": by_order("close", "close_order", first=False),
        "close_order": by_order("close_order", "close_order", first=False),
        "volume": sum_of("volume", PRICE),
        "notional": sum_of("notional", "DECIMAL(38,18)"),
        "first_event_time": F.least(left["first_event_time"], right["first_event_time"]),
        "last_event_time": F.greatest(left["last_event_time"], right["last_event_time"]),
    }
    return F.struct(*(columns[name].alias(name) for name in SUMMARY))


def merged_by(rows: DataFrame, *key: str) -> DataFrame:
    """One summary a key, of summaries whose ticks are disjoint. In and out: key, SUMMARY, updated_at (the latest)."""
    parts = F.collect_list(F.struct(*SUMMARY))
    return (
        rows.groupBy(*key)
        .agg(parts.alias("parts"), F.max("updated_at").alias("updated_at"))
        .withColumn("whole", F.aggregate(F.slice("parts", 2, F.size("parts")), F.element_at("parts", 1), merged))
        .select(*key, "whole.*", "updated_at")
    )


def derived(summary: dict[str, Column]) -> dict[str, Column]:
    """average, volatility_pct and vwap of a summary, given its columns.

    volatility_pct is 100 * sqrt(M2 / (n - 1)) / mean, null below two ticks.
    """
    count, price_sum = summary["tick_count"], summary["price_sum"]
    mean = price_sum.cast("double") / count
    return {
        "average": (price_sum / count).cast(PRICE),
        "volatility_pct": F.when(count > 1, 100 * F.sqrt(summary["price_m2"] / (count - 1)) / mean),
        "vwap": F.try_divide(summary["notional"], summary["volume"]).try_cast(PRICE),
    }


def minute_summaries(ticks: DataFrame, at: datetime) -> DataFrame:
    """source, asset, window_start, SUMMARY, updated_at of these ticks' minutes."""
    start = F.date_trunc("minute", gold_time())
    rows = summaries(ticks, source=F.col("source"), asset=F.col("asset"), window_start=start)
    return rows.withColumn("updated_at", F.lit(at))


def price_1m(rows: DataFrame) -> DataFrame:
    """gold.price_1m of the minutes' summaries, of which several may be of the same minute."""
    whole = merged_by(rows, *GOLD_PRICE_1M.key)
    return (
        whole.withColumns(derived({name: F.col(name) for name in SUMMARY}))
        .withColumns(
            {
                "window_end": F.col("window_start") + F.expr("INTERVAL 1 MINUTE"),
                "window_date": F.to_date("window_start"),
            }
        )
        .select(*GOLD_PRICE_1M.column_names)
    )


def newest_ticks(ticks: DataFrame, at: datetime) -> DataFrame:
    """gold.current_price of these ticks alone: each asset's newest by CURRENT_ORDER."""
    order = F.struct(
        F.least("event_time", "received_at").alias("known_at"),
        *("event_time", "source", "trade_id", "producer", "sequence", "event_id"),
    ).cast(CURRENT_ORDER)
    newest = ticks.groupBy("asset").agg(
        F.max(order).alias("current_order"), F.max_by("price_usd", order).alias("price_usd")
    )
    return newest.select(
        *("asset", "price_usd", "current_order", "current_order.source", "current_order.event_time"),
        "current_order.event_id",
        F.lit(None).cast("double").alias("change_pct_1m"),
        F.lit(at).alias("updated_at"),
    ).select(*GOLD_CURRENT_PRICE.column_names)


def current_price(rows: DataFrame) -> DataFrame:
    """gold.current_price of rows of that table, of which several may be of the same asset: the newest one."""
    row = F.struct(*GOLD_CURRENT_PRICE.column_names)
    return rows.groupBy("asset").agg(F.max_by(row, "current_order").alias("row")).select("row.*")


def feeding_gold(ticks: DataFrame, gold_symbols: dict[str, str]) -> DataFrame:
    """The ticks of the symbols that feed gold: for a source and asset that `gold_symbols` names, only that symbol's."""
    for pair, symbol in gold_symbols.items():
        source, _, asset = pair.partition(":")
        ticks = ticks.where(~((F.col("source") == source) & (F.col("asset") == asset) & (F.col("symbol") != symbol)))
    return ticks
