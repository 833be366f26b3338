"""Mergeable summaries of a time window's ticks: one row per window, from which every gold price is derived.

A summary holds count, sum, M2 (the sum of squared differences from the mean), volume, notional, highest, lowest, and
the first and the last tick by `contract.TICK_ORDER`. Summaries of disjoint ticks merge into the summary of all of
them, in any order, so a late tick is no special case, and a longer window is a merge of shorter ones. Stream,
recomputation and proof share `of_ticks` and `merged`, and nothing else sums ticks.

Counts, sums and extremes are exact. M2 is a double, merged by the formula of Chan, Golub and LeVeque (1979), since a
sum of squares would lose eight digits at a price of 60,000.

A frame of summaries has key columns, chosen by its user, and `COLUMNS`. Times are Int64, in microseconds since
1970; orders are columns of their own (`open_time`, `open_trade_epoch`, ...), nulls first.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal

import polars as pl

from lake.times import BUCKET

PRICE = pl.Decimal(28, 12)
SUM = pl.Decimal(38, 12)
NOTIONAL = pl.Decimal(38, 18)
# The limit of DECIMAL(38,18). Int128, the type of the sums, holds 1.7 times as much.
_NOTIONAL_LIMIT = 10**38
_NOTIONAL_FITS = 1.6e38

Order = dict[str, pl.DataType]
TICK: Order = {
    "time": pl.Int64(),
    "trade_epoch": pl.Int64(),
    "trade_id": pl.Int64(),
    "producer": pl.String(),
    "sequence": pl.Int64(),
    "event_id": pl.String(),
}
NEWEST: Order = {
    "known_at": pl.Int64(),
    "event_time": pl.Int64(),
    "source": pl.String(),
    "trade_id": pl.Int64(),
    "producer": pl.String(),
    "sequence": pl.Int64(),
    "event_id": pl.String(),
}


def _end(prefix: str, order: Order) -> Order:
    return {f"{prefix}_{name}": kind for name, kind in order.items()}


OPEN, CLOSE = _end("open", TICK), _end("close", TICK)
NEW = _end("newest", NEWEST)
SUMS: Order = {
    "tick_count": pl.Int64(),
    "price_sum": SUM,
    "price_m2": pl.Float64(),
    "high": PRICE,
    "low": PRICE,
    "volume_sum": SUM,
    "notional": NOTIONAL,
}
COLUMNS: Order = {**SUMS, "open": PRICE, **OPEN, "close": PRICE, **CLOSE}
# Summaries of new ticks also have the newest tick over all venues (`contract.CURRENT_ORDER`), for gold.current_price.
NEWEST_COLUMNS: Order = {"newest": PRICE, "newest_time": pl.Int64(), **NEW}
PAIR = ("source", "asset")


def of_ticks(ticks: pl.DataFrame, *by: str) -> pl.DataFrame:
    """A summary of each five seconds of each instrument, with the newest tick.

    ticks: silver.ticks without is_late, with notional; times as Int64. Out: `by`, `start` (when the five seconds
    begin), COLUMNS, NEWEST_COLUMNS.
    """
    gold_time = pl.when("is_future").then("received_at").otherwise("event_time")
    ticks = ticks.with_columns(gold_time.alias("time"), known_at=pl.min_horizontal("event_time", "received_at"))
    singles = ticks.select(
        *by,
        (pl.col("time") // BUCKET * BUCKET).alias("start"),
        pl.lit(1, pl.Int64).alias("tick_count"),
        pl.col("price_usd").cast(SUM).alias("price_sum"),
        pl.lit(0.0).alias("price_m2"),
        *(pl.col("price_usd").alias(name) for name in ("high", "low", "open", "close", "newest")),
        pl.col("quantity").cast(SUM).alias("volume_sum"),
        "notional",
        *(pl.col(name).alias(f"{end}_{name}") for end in ("open", "close") for name in TICK),
        *(pl.col(name).alias(f"newest_{name}") for name in (*NEWEST, "time")),
    )
    return merged(singles, *by, "start")


def merged(parts: pl.DataFrame, *by: str) -> pl.DataFrame:
    """One summary of each key, of parts that share no tick.

    Out: `by`, COLUMNS, and NEWEST_COLUMNS if the parts have them. notional is null if no tick has a quantity, and
    if it is 10^20 or more; further parts keep it null.
    """
    ends = [("open", "open_time", OPEN, False), ("close", "close_time", CLOSE, True)]
    if newest := "newest" in parts.columns:
        ends.append(("newest", "newest_known_at", NEW, True))
    first_or_last = [
        (pl.col(time).max() if descending else pl.col(time).min()).alias(f"{name}_extreme")
        for name, time, _, descending in ends
    ]
    whole, parts = _sums(parts, by, first_or_last)
    for name, time, order, descending in ends:
        # Sort only the rows that may be first or last: few of a large frame.
        chosen = _first_by(parts.filter(pl.col(time) == pl.col(f"{name}_extreme")), list(order), descending=descending)
        extra = ["newest_time"] if name == "newest" else []
        whole = whole.join(chosen.select("group", name, *order, *extra), on="group")
    return whole.select(*by, *COLUMNS, *(NEWEST_COLUMNS if newest else ()))


def sums(parts: pl.DataFrame, *by: str) -> pl.DataFrame:
    """As `merged`, but only `by` and SUMS, without the first and the last tick."""
    return _sums(parts, by, [])[0].select(*by, *SUMS)


def _sums(parts: pl.DataFrame, by: Sequence[str], more: Sequence[pl.Expr]) -> tuple[pl.DataFrame, pl.DataFrame]:
    """(SUMS and `more` of each key, numbered as `group`; the parts with their group, its mean, and `more`)."""
    notional = pl.col("notional").to_physical()
    overflowed = pl.col("volume_sum").is_not_null() & pl.col("notional").is_null()
    fits = (notional.cast(pl.Float64).sum() < _NOTIONAL_FITS) & (notional.sum() < pl.lit(_NOTIONAL_LIMIT, pl.Int128))
    whole = parts.group_by(by).agg(
        pl.col("tick_count").sum(),
        pl.col("price_sum").to_physical().sum(),
        pl.col("high").max(),
        pl.col("low").min(),
        pl.when(pl.col("volume_sum").is_not_null().any()).then(pl.col("volume_sum").to_physical().sum()),
        pl.when(notional.is_not_null().any() & ~overflowed.any() & fits).then(notional.sum()),
        *more,
    )
    whole = whole.with_columns(
        decimal(pl.col("price_sum"), SUM), decimal(pl.col("volume_sum"), SUM), decimal(pl.col("notional"), NOTIONAL)
    ).with_row_index("group")
    numbered = whole.select(*by, "group", *(expression.meta.output_name() for expression in more), mean=_mean())
    parts = parts.join(numbered, on=by, nulls_equal=True)
    m2 = pl.col("price_m2") + pl.col("tick_count") * (_mean() - pl.col("mean")) ** 2
    return whole.join(parts.group_by("group").agg(price_m2=m2.sum()), on="group"), parts


def _first_by(rows: pl.DataFrame, order: Sequence[str], *, descending: bool) -> pl.DataFrame:
    """The first row of each group by an order, nulls first; with `descending` the last."""
    if rows["group"].n_unique() == rows.height:
        return rows
    in_order = rows.sort(order, descending=descending, nulls_last=descending)
    return in_order.unique("group", keep="first", maintain_order=True)


def _mean() -> pl.Expr:
    return pl.col("price_sum").cast(pl.Float64) / pl.col("tick_count")


def decimal(units: pl.Expr, kind: pl.Decimal) -> pl.Expr:
    """Int128 units of the last digit as a decimal; null if they do not fit."""
    unit = pl.lit(Decimal(1).scaleb(-kind.scale), pl.Decimal(38, kind.scale))
    return (units.cast(pl.Decimal(38, 0)) * unit).cast(kind, strict=False)


_TWO = pl.lit(2, pl.Int128)


def average() -> pl.Expr:
    """price_sum / tick_count, half up to 12 digits."""
    units, count = pl.col("price_sum").to_physical(), pl.col("tick_count").cast(pl.Int128)
    return decimal((_TWO * units + count) // (_TWO * count), PRICE)


def volume() -> pl.Expr:
    """volume_sum, or null if it does not fit DECIMAL(28,12)."""
    return pl.when(pl.col("volume_sum") < 10**16).then(pl.col("volume_sum")).cast(PRICE)


def vwap(rows: pl.DataFrame) -> pl.Series:
    """notional / volume_sum of each row, half up to 12 digits; null without volume, or if too large."""
    total, size = (pl.col(name).to_physical() for name in ("notional", "volume_sum"))
    # A quotient of units has 6 digits after the point; its remainder gives the other six.
    million = pl.lit(10**6, pl.Int128)
    rest = total % size
    units = total // size * million + (_TWO * rest * million + size) // (_TWO * size)
    in_range = (size > 0) & (size < pl.lit(8 * 10**31, pl.Int128)) & (total // size < pl.lit(10**22, pl.Int128))
    return rows.select(decimal(pl.when(in_range).then(units), PRICE).alias("vwap"))["vwap"]


def volatility_pct() -> pl.Expr:
    """100 * sqrt(M2 / (tick_count - 1)) / mean; null below two ticks."""
    variance = pl.max_horizontal(pl.col("price_m2"), 0.0) / (pl.col("tick_count") - 1)
    return pl.when(pl.col("tick_count") > 1).then(100 * variance.sqrt() / _mean())
