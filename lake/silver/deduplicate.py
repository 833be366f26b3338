"""Deduplication: which ticks the lake has already, with a bounded state.

The state does not grow with the number of ticks:

- per instrument (source, symbol, trade_epoch): the intervals of trade ids seen. A repeat lies inside an interval; the
  holes between intervals are ticks that have not come yet.
- per producer and Kafka partition: the highest sequence seen of ticks that have no trade id. Kafka keeps a producer's
  order within a partition, so a repeat is not above it.
- per source and asset: the newest minute in gold; a tick of an earlier minute is late.

A task drops the repeats among its own records (`distinct`) and sends the driver runs of ids instead of ticks
(`Numbers`). The driver compares them with the state and with the other tasks' runs (`Seen.repeats`). Only files that
contain repeats are read again and rewritten without them (`without`). Among repeats the lowest offset wins.

The commit that appends a micro-batch's ticks to silver.ticks carries what they add to the state (`Delta`) in its
metadata, so the two cannot disagree. Snapshots of the whole state lie beside the log (lake.silver.state).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from lake.contract import Pair
from lake.intervals import Instrument, Interval, add_interval, add_intervals, common, overlapping

INSTRUMENT = ("source", "symbol", "trade_epoch")
_RUNS = {
    "source": pl.String,
    "symbol": pl.String,
    "trade_epoch": pl.Int64,
    "partition": pl.Int32,
    "first": pl.Int64,
    "last": pl.Int64,
    "first_offset": pl.Int64,
    "last_offset": pl.Int64,
}
_SEQUENCES = {
    "producer": pl.String,
    "partition": pl.Int32,
    "first": pl.Int64,
    "last": pl.Int64,
    "first_offset": pl.Int64,
    "last_offset": pl.Int64,
}


@dataclass(frozen=True)
class Numbers:
    """The numbers of some distinct ticks.

    runs: consecutive trade ids of an instrument in a Kafka partition, first to last, with their lowest and highest
    offset. sequences: the same of ticks without a trade id, one row per producer and Kafka partition.
    """

    runs: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=_RUNS))
    sequences: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=_SEQUENCES))


@dataclass(frozen=True)
class Repeats:
    """The repeats among some ticks.

    ids: INSTRUMENT, first, last. sequences: producer, partition, highest: all sequences up to it are repeats.
    """

    ids: pl.DataFrame
    sequences: pl.DataFrame


def distinct(ticks: pl.DataFrame) -> pl.DataFrame:
    """Drop repeated ticks (rows of silver.ticks); the one with the lowest Kafka partition and offset stays."""
    row = pl.int_range(pl.len()).alias("row")
    place = ("kafka_partition", "kafka_offset")
    numbered = ticks.select(row, *INSTRUMENT, "trade_id", *place).filter(pl.col("trade_id").is_not_null())
    key = [*INSTRUMENT, "trade_id"]
    repeated: list[pl.Series] = []
    if numbered.height and numbered.select(pl.struct(key).n_unique()).item() < numbered.height:
        firsts = numbered.sort(place).unique(key, keep="first", maintain_order=True)
        repeated.append(numbered.join(firsts, on="row", how="anti")["row"])
    sequenced = _sequenced(ticks.with_columns(row)).sort(place)
    highest = pl.col("sequence").cum_max().shift(1).over("producer", "kafka_partition")
    behind = sequenced.filter(pl.col("sequence") <= highest)
    if behind.height:
        repeated.append(behind["row"])
    return ticks.filter(~row.is_in(pl.concat(repeated).implode())) if repeated else ticks


def _sequenced(ticks: pl.DataFrame) -> pl.DataFrame:
    """The ticks identified by producer and sequence."""
    return ticks.filter(
        pl.col("trade_id").is_null() & pl.col("producer").is_not_null() & pl.col("sequence").is_not_null()
    )


def numbers(ticks: pl.DataFrame) -> Numbers:
    """The numbers of distinct ticks."""
    partition = pl.col("kafka_partition").alias("partition")
    numbered = ticks.filter(pl.col("trade_id").is_not_null()).select(*INSTRUMENT, partition, "trade_id", "kafka_offset")
    numbered = numbered.sort(*INSTRUMENT, "trade_id")
    begins = pl.any_horizontal(pl.col(name) != pl.col(name).shift(1) for name in (*INSTRUMENT, "partition"))
    begins = begins | (pl.col("trade_id") != pl.col("trade_id").shift(1) + 1)
    runs = numbered.with_columns(run=begins.fill_null(True).cum_sum()).group_by("run", maintain_order=True)
    whole_runs = runs.agg(
        *(pl.col(name).first() for name in (*INSTRUMENT, "partition")),
        first=pl.col("trade_id").first(),
        last=pl.col("trade_id").last(),
        first_offset=pl.col("kafka_offset").min(),
        last_offset=pl.col("kafka_offset").max(),
    )
    sequences = (
        _sequenced(ticks)
        .group_by("producer", partition)
        .agg(
            first=pl.col("sequence").min(),
            last=pl.col("sequence").max(),
            first_offset=pl.col("kafka_offset").min(),
            last_offset=pl.col("kafka_offset").max(),
        )
    )
    return Numbers(whole_runs.select(*_RUNS), sequences.select(*_SEQUENCES))


def without(ticks: pl.DataFrame, repeats: Repeats) -> pl.DataFrame:
    """Distinct ticks without the repeats."""
    ticks = ticks.with_row_index("row")
    ids = repeats.ids.sort("first").rename({"first": "trade_id"})
    among = (
        ticks.filter(pl.col("trade_id").is_not_null())
        .select("row", *INSTRUMENT, "trade_id")
        .sort("trade_id")
        .join_asof(ids, on="trade_id", by=[*INSTRUMENT], strategy="backward", check_sortedness=False)
        .filter(pl.col("trade_id") <= pl.col("last"))
    )
    behind = (
        _sequenced(ticks)
        .select("row", "producer", "sequence", pl.col("kafka_partition").alias("partition"))
        .join(repeats.sequences, on=["producer", "partition"])
        .filter(pl.col("sequence") <= pl.col("highest"))
    )
    rows = pl.concat([among["row"], behind["row"]])
    return ticks.filter(~pl.col("row").is_in(rows.implode())).drop("row")


@dataclass
class Delta:
    """What a micro-batch adds to the state. minutes: new and previous minute (None: none), in seconds since 1970."""

    runs: list[tuple[Instrument, Interval]] = field(default_factory=list)
    rejected: list[tuple[Instrument, Interval]] = field(default_factory=list)
    sequences: list[tuple[tuple[str, int], int]] = field(default_factory=list)
    minutes: list[tuple[Pair, int, int | None]] = field(default_factory=list)

    def minutes_before(self, minutes: Mapping[Pair, int]) -> dict[Pair, int]:
        """The newest minutes before the micro-batch, from those after it."""
        before = dict(minutes)
        for pair, _, minute in self.minutes:
            if minute is None:
                before.pop(pair, None)
            else:
                before[pair] = minute
        return before

    def to_json(self) -> dict[str, Any]:
        return {
            "runs": [[*instrument, *run] for instrument, run in self.runs],
            "rejected": [[*instrument, *run] for instrument, run in self.rejected],
            "sequences": [[*place, highest] for place, highest in self.sequences],
            "minutes": [[*pair, newest, before] for pair, newest, before in self.minutes],
        }

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> Delta:
        return cls(
            [((source, symbol, epoch), (first, last)) for source, symbol, epoch, first, last in state["runs"]],
            [((source, symbol, epoch), (first, last)) for source, symbol, epoch, first, last in state["rejected"]],
            [((producer, partition), highest) for producer, partition, highest in state["sequences"]],
            [((source, asset), newest, before) for source, asset, newest, before in state["minutes"]],
        )


@dataclass(frozen=True)
class Seen:
    """The state: trade id intervals, highest sequences, and newest minutes (seconds since 1970)."""

    instruments: Mapping[Instrument, tuple[Interval, ...]] = field(default_factory=dict)
    producers: Mapping[tuple[str, int], int] = field(default_factory=dict)
    minutes: Mapping[Pair, int] = field(default_factory=dict)
    # Trade ids of records in quarantine: they are not in silver, but they are not missing either.
    rejected: Mapping[Instrument, tuple[Interval, ...]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "instruments": [[*key, [list(interval) for interval in runs]] for key, runs in self.instruments.items()],
            "rejected": [[*key, [list(interval) for interval in runs]] for key, runs in self.rejected.items()],
            "producers": [[*key, highest] for key, highest in self.producers.items()],
            "minutes": [[*key, newest] for key, newest in self.minutes.items()],
        }

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> Seen:
        return cls(
            {(s, y, e): tuple((a, b) for a, b in runs) for s, y, e, runs in state["instruments"]},
            {(p, k): highest for p, k, highest in state["producers"]},
            {(s, a): newest for s, a, newest in state["minutes"]},
            {(s, y, e): tuple((a, b) for a, b in runs) for s, y, e, runs in state["rejected"]},
        )

    def after(self, delta: Delta) -> Seen:
        """The state after a micro-batch's delta; adding the delta again changes nothing."""
        producers, minutes = dict(self.producers), dict(self.minutes)
        for place, highest in delta.sequences:
            producers[place] = max(producers.get(place, highest), highest)
        for pair, newest, _ in delta.minutes:
            minutes[pair] = max(minutes.get(pair, newest), newest)
        return Seen(_with(self.instruments, delta.runs), producers, minutes, _with(self.rejected, delta.rejected))

    def delta(
        self, files: Iterable[Numbers], rejected: Iterable[tuple[str, str, int, int]], minutes: Mapping[Pair, int]
    ) -> Delta:
        """The delta of files of new ticks, of trade ids in quarantine, and of the pairs' newest minutes."""
        runs: list[tuple[Instrument, Interval]] = []
        sequences: dict[tuple[str, int], int] = {}
        for file in files:
            columns = ("source", "symbol", "trade_epoch", "first", "last")
            rows = file.runs.select(columns).rows()
            runs += [((source, symbol, epoch), (first, last)) for source, symbol, epoch, first, last in rows]
            for producer, partition, last in file.sequences.select("producer", "partition", "last").rows():
                sequences[producer, partition] = max(sequences.get((producer, partition), last), last)
        newer = [
            (pair, newest, self.minutes.get(pair))
            for pair, newest in minutes.items()
            if newest > self.minutes.get(pair, newest - 1)
        ]
        ids = [((source, symbol, epoch), (number, number)) for source, symbol, epoch, number in rejected]
        return Delta(runs, ids, list(sequences.items()), newer)

    def repeats(self, parts: Sequence[Numbers]) -> dict[int, Repeats]:
        """The repeats by number of the part; parts without repeats are absent.

        If two parts have the same tick, the one with the lower Kafka partition and offset keeps it. A part has a
        contiguous range of a Kafka partition, so of two parts' runs in one partition one lies wholly before the other.
        """
        ids: dict[int, list[tuple[str, str, int, int, int]]] = defaultdict(list)
        by_instrument: dict[Instrument, list[tuple[tuple[int, int], Interval, int]]] = defaultdict(list)
        columns = ("source", "symbol", "trade_epoch", "first", "last", "partition", "first_offset")
        for number, part in enumerate(parts):
            for source, symbol, epoch, first, last, partition, offset in part.runs.select(columns).rows():
                by_instrument[source, symbol, epoch].append(((partition, offset), (first, last), number))
        for instrument, runs in by_instrument.items():
            claimed = self.instruments.get(instrument, ())
            for _, run, number in sorted(runs) if len(runs) > 1 else runs:
                ids[number] += [(*instrument, *both) for both in common([run], overlapping(claimed, run))]
                if len(runs) > 1:
                    claimed = add_interval(claimed, run)
        sequences: dict[int, list[tuple[str, int, int]]] = defaultdict(list)
        by_place: dict[tuple[str, int], list[tuple[int, int, int, int]]] = defaultdict(list)
        fields = ("producer", "partition", "first_offset", "first", "last")
        for number, part in enumerate(parts):
            for producer, partition, offset, first, last in part.sequences.select(fields).rows():
                by_place[producer, partition].append((offset, first, last, number))
        for place, spans in by_place.items():
            highest = self.producers.get(place)
            for _, first, last, number in sorted(spans):
                if highest is not None and first <= highest:
                    sequences[number].append((*place, highest))
                highest = last if highest is None else max(highest, last)
        numbers = {number for number, runs in ids.items() if runs} | sequences.keys()
        id_columns = {name: _RUNS[name] for name in (*INSTRUMENT, "first", "last")}
        sequence_columns = {"producer": pl.String, "partition": pl.Int32, "highest": pl.Int64}
        return {
            number: Repeats(
                pl.DataFrame(ids[number], id_columns, orient="row"),
                pl.DataFrame(sequences[number], sequence_columns, orient="row"),
            )
            for number in numbers
        }


def _with(
    intervals: Mapping[Instrument, tuple[Interval, ...]], added: Iterable[tuple[Instrument, Interval]]
) -> dict[Instrument, tuple[Interval, ...]]:
    by_instrument: dict[Instrument, list[Interval]] = defaultdict(list)
    for instrument, run in added:
        by_instrument[instrument].append(run)
    after = dict(intervals)
    for instrument, runs in by_instrument.items():
        after[instrument] = add_intervals(after.get(instrument, ()), sorted(runs))
    return after
