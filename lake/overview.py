"""What some ticks add to the lake, as a few rows: by Arrow, wherever the ticks are.

An executor sends the driver this instead of the ticks: a summary a venue, symbol, asset and five seconds, for gold;
and the trade ids and sequences as runs, by which the driver sees whether it has any of the ticks already (lake.seen).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from lake.canonical import notional
from lake.intervals import Instrument, Interval
from lake.metrics import Bucket, Newest
from lake.summaries import BUCKET_SECONDS, Pair, Summary, rank

_BUCKET_MICROS = BUCKET_SECONDS * 1_000_000
# Makes a bucket's number positive, since Arrow's division rounds towards zero.
_SHIFT = 1_000_000_000
# What a DECIMAL(38,18) holds: as Spark's try_sum, which is null beyond.
_NOTIONAL_LIMIT = 10**20


class Sequences(NamedTuple):
    """The ticks without a trade id of a producer in a Kafka partition; both numbers ascend together."""

    producer: str
    partition: int
    first_offset: int
    last_offset: int
    first: int
    last: int


@dataclass
class Overview:
    """buckets: each with its symbol. runs: of consecutive trade ids. repeated: a tick is there twice, or a sequence
    does not ascend."""

    buckets: list[tuple[str, Bucket]] = field(default_factory=list)
    runs: list[tuple[Instrument, Interval]] = field(default_factory=list)
    sequences: list[Sequences] = field(default_factory=list)
    repeated: bool = False

    def add(self, other: Overview) -> None:
        """Have what another one has too, of other ticks."""
        self.buckets += other.buckets
        self.runs += other.runs
        self.sequences += other.sequences
        self.repeated |= other.repeated


def overview(ticks: pa.Table, newest_minutes: Mapping[Pair, int]) -> tuple[Overview, pa.Array]:
    """(what ticks as of lake.canonical add, is_late of each).

    newest_minutes: of a source and asset the newest minute that gold has, in seconds since 1970.
    """
    if not ticks.num_rows:
        return Overview(), pa.array([], pa.bool_())
    ticks = ticks.combine_chunks()
    instrument = _instrument(ticks)
    by_bucket, is_late = _buckets(ticks, instrument, newest_minutes)
    runs, repeated = _runs(ticks, instrument)
    sequences, disordered = _sequences(ticks)
    return Overview(by_bucket, runs, sequences, repeated or disordered), is_late


def buckets(ticks: pa.Table) -> list[tuple[str, Bucket]]:
    """The buckets of ticks as of silver.ticks, each with its symbol."""
    if not ticks.num_rows:
        return []
    ticks = ticks.append_column("notional", notional(ticks["price_usd"], ticks["quantity"])).combine_chunks()
    return _buckets(ticks, _instrument(ticks), {})[0]


def _instrument(ticks: pa.Table) -> pa.Array:
    """A number for each source, symbol, asset and trade_epoch."""
    names = pc.binary_join_element_wise(
        *(ticks[name] for name in ("source", "symbol", "asset")), ticks["trade_epoch"].cast(pa.string()), ":"
    )
    return names.combine_chunks().dictionary_encode().indices


def _buckets(
    ticks: pa.Table, instrument: pa.Array, newest_minutes: Mapping[Pair, int]
) -> tuple[list[tuple[str, Bucket]], pa.Array]:
    event_time, received_at = (ticks[name].cast(pa.int64()) for name in ("event_time", "received_at"))
    gold_time = pc.if_else(ticks["is_future"], received_at, event_time)
    known_at = pc.min_element_wise(event_time, received_at)
    shifted = pc.divide(pc.add(gold_time, _SHIFT * _BUCKET_MICROS), _BUCKET_MICROS)
    lowest, highest = pc.min_max(shifted).values()
    span = pa.scalar(highest.as_py() - lowest.as_py() + 1, pa.int64())
    code = pc.add(pc.multiply(instrument.cast(pa.int64()), span), pc.subtract(shifted, lowest))
    # A group's number is that of its first tick among the groups.
    group = code.combine_chunks().dictionary_encode().indices
    price = ticks["price_usd"]
    rows = pa.table(
        {
            "group": group,
            "gold_time": gold_time,
            "known_at": known_at,
            "price": price,
            "as_double": price.cast(pa.float64()),
            "quantity": ticks["quantity"],
            "notional": ticks["notional"],
        }
    )
    # NULL where there is none, and not 0.
    some = pc.ScalarAggregateOptions(min_count=1)
    sums = rows.group_by("group", use_threads=False).aggregate(
        [
            ("price", "count"),
            ("price", "sum"),
            ("price", "min"),
            ("price", "max"),
            ("as_double", "variance", pc.VarianceOptions(ddof=0)),
            ("quantity", "sum", some),
            ("notional", "sum", some),
            ("gold_time", "min"),
            ("gold_time", "max"),
            ("known_at", "max"),
        ]
    )
    sums = sums.sort_by("group")
    ends = pc.or_(
        pc.or_(
            pc.equal(gold_time, sums["gold_time_min"].take(group)),
            pc.equal(gold_time, sums["gold_time_max"].take(group)),
        ),
        pc.equal(known_at, sums["known_at_max"].take(group)),
    )
    outer = _outer(
        ticks.append_column("group", group)
        .append_column("gold_time", gold_time)
        .append_column("known_at", known_at)
        .set_column(ticks.column_names.index("event_time"), "event_time", event_time)
        .select(["group", "gold_time", "known_at", "event_time", *_NAMES])
        .filter(ends)
        .to_pylist()
    )
    found, late = [], []
    for row in sums.to_pylist():
        first, last, newest = outer[row["group"]]
        bucket = _bucket(row, first, last, newest)
        late.append(bucket.minute < newest_minutes.get(bucket.pair, bucket.minute))
        found.append((first["symbol"], bucket))
    return found, pa.array(late, pa.bool_()).take(group)


_NAMES = ("source", "symbol", "asset", "price_usd", "trade_epoch", "trade_id", "producer", "sequence", "event_id")


def _order(tick: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(tick[name] for name in ("gold_time", "trade_epoch", "trade_id", "producer", "sequence", "event_id"))


def _newness(tick: Mapping[str, Any]) -> tuple[Any, ...]:
    names = ("known_at", "event_time", "source", "trade_id", "producer", "sequence", "event_id")
    return tuple(tick[name] for name in names)


def _outer(ticks: Iterable[dict[str, Any]]) -> dict[int, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]:
    """Of each group its first and last tick by order, and its newest one."""
    groups: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for tick in ticks:
        groups[tick["group"]].append(tick)
    return {
        group: (
            min(members, key=lambda tick: rank(_order(tick))),
            max(members, key=lambda tick: rank(_order(tick))),
            max(members, key=lambda tick: rank(_newness(tick))),
        )
        for group, members in groups.items()
    }


def _bucket(row: Mapping[str, Any], first: dict[str, Any], last: dict[str, Any], newest: dict[str, Any]) -> Bucket:
    whole: Decimal | None = row["notional_sum"]
    summary = Summary(
        tick_count=row["price_count"],
        price_sum=row["price_sum"],
        price_m2=row["as_double_variance"] * row["price_count"],
        high=row["price_max"],
        low=row["price_min"],
        open=first["price_usd"],
        open_order=_order(first),
        close=last["price_usd"],
        close_order=_order(last),
        volume=row["quantity_sum"],
        notional=None if whole is None or whole >= _NOTIONAL_LIMIT else whole,
    )
    pair = (first["source"], first["asset"])
    told = Newest(_newness(newest), newest["price_usd"], newest["gold_time"])
    return Bucket(pair, first["gold_time"] // _BUCKET_MICROS, summary, told)


def _runs(ticks: pa.Table, instrument: pa.Array) -> tuple[list[tuple[Instrument, Interval]], bool]:
    """(the runs of consecutive trade ids, whether one is there twice)"""
    numbered = pa.table({"instrument": instrument, "trade_id": ticks["trade_id"], "row": _numbers(ticks)})
    numbered = numbered.filter(pc.is_valid(numbered["trade_id"]))
    if not numbered.num_rows:
        return [], False
    numbered = numbered.sort_by([("instrument", "ascending"), ("trade_id", "ascending")])
    same = pc.equal(_steps(numbered["instrument"]), 0)
    steps = _steps(numbered["trade_id"])
    repeated = pc.any(pc.and_(same, pc.equal(steps, 0))).as_py()
    begins = pc.fill_null(pc.invert(pc.and_(same, pc.less_equal(steps, 1))), True)
    firsts, lasts = _pieces(begins)
    names = ticks.select(["source", "symbol", "trade_epoch"]).take(numbered["row"].take(firsts)).to_pylist()
    ids = (numbered["trade_id"].take(ends).to_pylist() for ends in (firsts, lasts))
    return list(zip((tuple(name.values()) for name in names), zip(*ids, strict=True), strict=True)), bool(repeated)


def _sequences(ticks: pa.Table) -> tuple[list[Sequences], bool]:
    """(of ticks without a trade id, what each producer sent in a partition; whether one does not ascend)"""
    names = ["producer", "kafka_partition", "kafka_offset", "sequence"]
    without = pc.and_(pc.is_null(ticks["trade_id"]), pc.is_valid(ticks["producer"]))
    rows = ticks.select(names).filter(pc.and_(without, pc.is_valid(ticks["sequence"])))
    if not rows.num_rows:
        return [], False
    producer = rows["producer"].combine_chunks().dictionary_encode().indices.cast(pa.int64())
    place = pc.add(pc.multiply(producer, pa.scalar(2**31, pa.int64())), rows["kafka_partition"].cast(pa.int64()))
    rows = rows.append_column("place", place).sort_by([("place", "ascending"), ("kafka_offset", "ascending")])
    same = pc.equal(_steps(rows["place"]), 0)
    disordered = pc.any(pc.and_(same, pc.less_equal(_steps(rows["sequence"]), 0))).as_py()
    ends = (rows.take(ends).to_pylist() for ends in _pieces(pc.fill_null(pc.invert(same), True)))
    found = [
        Sequences(
            *(first["producer"], first["kafka_partition"]),
            *(tick[name] for name in ("kafka_offset", "sequence") for tick in (first, last)),
        )
        for first, last in zip(*ends, strict=True)
    ]
    return found, bool(disordered)


def _numbers(ticks: pa.Table) -> pa.Array:
    return pa.array(range(ticks.num_rows), pa.int64())


def _steps(values: pa.ChunkedArray) -> pa.Array:
    """How much more each value is than the one before; null for the first."""
    return pc.pairwise_diff(values.combine_chunks().cast(pa.int64()))


def _pieces(begins: pa.Array) -> tuple[pa.Array, pa.Array]:
    """The first and the last row of each piece, of whether a piece begins at a row."""
    firsts = pc.indices_nonzero(begins).cast(pa.int64())
    return firsts, pa.concat_arrays([pc.subtract(firsts.slice(1), 1), pa.array([len(begins) - 1], pa.int64())])
