"""Derive gold's rows from summaries: pure functions of frames, shared by stream, recomputation and proof.

A price row has two forms: *stored*, with the columns of lake.tables, and *summaries* (lake.gold.summary) with source,
asset and `start`, the window's first instant as Int64. Times in the second form are microseconds since 1970.
"""

from __future__ import annotations

from datetime import datetime

import polars as pl

from lake.gold.summary import (
    CLOSE,
    COLUMNS,
    NEW,
    OPEN,
    PAIR,
    SUM,
    average,
    merged,
    sums,
    volatility_pct,
    volume,
    vwap,
)
from lake.rules import GoldRules
from lake.tables import GOLD_CURRENT_PRICE, GOLD_ROLLING_PRICE, Table
from lake.times import BUCKET, MINUTE

TIME = pl.Datetime("us", "UTC")
# The oldest price that gold.current_price compares with.
OLDEST_COMPARED = 2 * MINUTE
# The number of buckets in gold.rolling_price's minute.
ROLLED = MINUTE // BUCKET


def _time(name: str) -> pl.Expr:
    return pl.col(name).cast(TIME)


def _micros(name: str) -> pl.Expr:
    return pl.col(name).cast(pl.Int64)


def _stored_order(prefix: str, first: str, order: dict[str, pl.DataType]) -> pl.Expr:
    """The columns PREFIX_... as a struct of lake.tables, with times as TIMESTAMP."""
    fields = [
        (_time(name) if name.endswith(("_time", "_at")) else pl.col(name)).alias(
            first if name == f"{prefix}_time" else name.removeprefix(f"{prefix}_")
        )
        for name in order
    ]
    return pl.struct(fields).alias(f"{prefix}_order")


def price_rows(table: Table, summaries: pl.DataFrame, at: datetime) -> pl.DataFrame:
    """Stored rows of a price table (gold.price_5s, ...), from summaries of its windows."""
    rows = summaries.with_columns(vwap(summaries)).with_columns(
        window_start=_time("start"),
        window_end=(pl.col("start") + table.window_micros).cast(TIME),
        average=average(),
        volatility_pct=volatility_pct(),
        volume=volume(),
        first_event_time=_time("open_time"),
        last_event_time=_time("close_time"),
        updated_at=pl.lit(at, TIME),
        window_date=_time("start").cast(pl.Date),
        open_order=_stored_order("open", "gold_time", OPEN),
        close_order=_stored_order("close", "gold_time", CLOSE),
    )
    return rows.select(table.column_names)


def summaries_of(prices: pl.DataFrame) -> pl.DataFrame:
    """The summaries behind stored price rows: source, asset, start, COLUMNS."""
    order_fields = [
        (_field(end, "gold_time" if name == f"{end}_time" else name.removeprefix(f"{end}_"))).alias(name)
        for end, order in (("open", OPEN), ("close", CLOSE))
        for name in order
    ]
    return prices.select(
        *PAIR,
        _micros("window_start").alias("start"),
        volume_sum(),
        *(name for name in COLUMNS if name not in (*OPEN, *CLOSE, "volume_sum")),
        *order_fields,
    )


def volume_sum() -> pl.Expr:
    """volume_sum of stored price rows. Rows of a version 1 lake have it in `volume`."""
    return pl.coalesce("volume_sum", pl.col("volume").cast(SUM)).alias("volume_sum")


def _field(end: str, name: str) -> pl.Expr:
    field = pl.col(f"{end}_order").struct.field(name)
    return field.cast(pl.Int64) if name == "gold_time" else field


def windows(parts: pl.DataFrame, length: int) -> pl.DataFrame:
    """Merge summaries of short windows into windows of `length` microseconds."""
    return merged(parts.with_columns(pl.col("start") // length * length), *PAIR, "start")


def looks(changed: pl.DataFrame, newest: pl.DataFrame, reach: int) -> pl.DataFrame:
    """The rows of gold.rolling_price that changed buckets may alter: source, asset, as_of.

    changed: source, asset, start. newest: source, asset, newest (the start of the bucket of the pair's newest tick; no
    row is later). reach: how many buckets a row looks back on.
    """
    return (
        changed.join(pl.DataFrame({"step": range(1, reach + 1)}), how="cross")
        .select(*PAIR, as_of=pl.col("start") + pl.col("step") * BUCKET)
        .unique()
        .join(newest, on=PAIR)
        .filter(pl.col("as_of") <= pl.col("newest"))
        .select(*PAIR, "as_of")
    )


def rolling_rows(keys: pl.DataFrame, buckets: pl.DataFrame, rules: GoldRules, at: datetime) -> pl.DataFrame:
    """Stored rows of gold.rolling_price for these keys (source, asset, as_of); none if the minute has no tick.

    buckets: the summaries (SUMS suffice) of all buckets that the rows look back on.
    """
    reach = max(ROLLED, rules.volatility_buckets)
    parts = (
        keys.join(pl.DataFrame({"step": range(1, reach + 1)}), how="cross")
        .with_columns(start=pl.col("as_of") - pl.col("step") * BUCKET)
        .join(buckets, on=[*PAIR, "start"])
    )
    key = (*PAIR, "as_of")
    minute = sums(parts.filter(pl.col("step") <= ROLLED), *key)
    volatile = sums(parts.filter(pl.col("step") <= rules.volatility_buckets), *key)
    volatility = volatile.select(*key, volatility_pct=volatility_pct())
    rows = minute.join(volatility, on=key, how="left").with_columns(
        average_1m=average(), as_of=_time("as_of"), updated_at=pl.lit(at, TIME)
    )
    return rows.select(GOLD_ROLLING_PRICE.column_names)


def newest_ticks(summaries: pl.DataFrame) -> pl.DataFrame:
    """Each asset's newest tick over all venues: asset, newest, newest_time, NEW."""
    return (
        summaries.select("asset", "newest", "newest_time", *NEW)
        .sort(*NEW, descending=True, nulls_last=True)
        .unique("asset", keep="first", maintain_order=True)
    )


def newest_of(current: pl.DataFrame, future_tolerance_seconds: float) -> pl.DataFrame:
    """The newest ticks behind stored rows of gold.current_price, in the form of `newest_ticks`."""
    order = [pl.col("current_order").struct.field(name.removeprefix("newest_")).alias(name) for name in NEW]
    rows = current.select("asset", pl.col("price_usd").alias("newest"), *order).with_columns(
        _micros("newest_known_at"), _micros("newest_event_time")
    )
    # As for is_future: a venue's time too far ahead of the receipt is replaced by the receipt.
    ahead = pl.col("newest_event_time") - pl.col("newest_known_at")
    believed = pl.when(ahead > round(future_tolerance_seconds * 1_000_000))
    time = believed.then("newest_known_at").otherwise("newest_event_time")
    return rows.select("asset", "newest", time.alias("newest_time"), *NEW)


def current_rows(newest: pl.DataFrame, before: pl.DataFrame, at: datetime) -> pl.DataFrame:
    """Stored rows of gold.current_price. before: asset, price: its venue's last price a minute earlier, if any."""
    # 100 * (price / before - 1), as a quotient of whole units: rounded only once.
    units = (pl.col(name).to_physical() for name in ("newest", "price"))
    price, earlier = units
    change = 100 * ((price - earlier).cast(pl.Float64) / earlier.cast(pl.Float64))
    rows = newest.join(before, on="asset", how="left").with_columns(
        change_pct_1m=change,
        price_usd=pl.col("newest"),
        source=pl.col("newest_source"),
        event_time=_time("newest_event_time"),
        event_id=pl.col("newest_event_id"),
        updated_at=pl.lit(at, TIME),
        current_order=_stored_order("newest", "time", NEW),
    )
    return rows.select(GOLD_CURRENT_PRICE.column_names)


def prices_before(times: pl.DataFrame, buckets: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The last price at or before a time, where the buckets suffice to find it.

    times: source, asset, time. buckets: summaries of the two minutes up to it. Out: (source, asset, price) of pairs
    whose last bucket ends with a tick at or before the time; (source, asset, time, start) of pairs whose bucket has
    ticks on both sides of it, so that only its ticks have the price.
    """
    near = (
        times.join(buckets.select(*PAIR, "start", "open_time", "close_time", "close"), on=PAIR)
        .filter((pl.col("open_time") <= pl.col("time")) & (pl.col("close_time") >= pl.col("time") - MINUTE))
        .sort("start", descending=True)
        .unique(PAIR, keep="first", maintain_order=True)
    )
    whole = near.filter(pl.col("close_time") <= pl.col("time"))
    split = near.filter(pl.col("close_time") > pl.col("time"))
    return whole.select(*PAIR, pl.col("close").alias("price")), split.select(*PAIR, "time", "start")
