"""Deduplication: which ticks the lake has already, with a bounded state.

The state does not grow with the number of ticks:

- per instrument (source, symbol, trade_epoch): the intervals of trade ids seen. A repeat lies inside an interval; the
  holes between intervals are ticks that have not come yet.
- per producer: the intervals of sequences seen of ticks that have no trade id. They do not depend on partitions: with
  more partitions a repeat may come on another one than the tick did. At most SEQUENCE_RUNS intervals are kept, since
  sequences of ticks with a trade id leave holes. Below those (up to the producer's `floor`) the highest sequence per
  Kafka partition decides: Kafka keeps a producer's order within a partition, so a repeat is not above it.
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
from typing import Any, TypeVar

import polars as pl

from lake.contract import Pair
from lake.intervals import Instrument, Interval, add_interval, add_intervals, common, overlapping

INSTRUMENT = ("source", "symbol", "trade_epoch")
# More than an ingester has on its way to Kafka and may send again (setting max_in_flight).
SEQUENCE_RUNS = 25_000
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
    offset. sequences: the same of the sequences of a producer's ticks without a trade id.
    """

    runs: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=_RUNS))
    sequences: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=_SEQUENCES))


@dataclass(frozen=True)
class Repeats:
    """The repeats among some ticks. ids: INSTRUMENT, first, last. sequences: producer, sequence."""

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
    again = sequenced.filter(~pl.struct("producer", "sequence").is_first_distinct())
    if again.height:
        repeated.append(again["row"])
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
    sequenced = _sequenced(ticks).select("producer", partition, "sequence", "kafka_offset")
    return Numbers(
        _runs(numbered, INSTRUMENT, "trade_id").select(*_RUNS),
        _runs(sequenced, ("producer",), "sequence").select(*_SEQUENCES),
    )


def _runs(ticks: pl.DataFrame, key: Sequence[str], number: str) -> pl.DataFrame:
    """The runs of consecutive numbers with the same key and partition: key, partition, first, last, offsets."""
    ticks = ticks.sort(*key, number)
    begins = pl.any_horizontal(pl.col(name) != pl.col(name).shift(1) for name in (*key, "partition"))
    begins = begins | (pl.col(number) != pl.col(number).shift(1) + 1)
    runs = ticks.with_columns(run=begins.fill_null(True).cum_sum()).group_by("run", maintain_order=True)
    return runs.agg(
        *(pl.col(name).first() for name in (*key, "partition")),
        first=pl.col(number).first(),
        last=pl.col(number).last(),
        first_offset=pl.col("kafka_offset").min(),
        last_offset=pl.col("kafka_offset").max(),
    )


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
    again = _sequenced(ticks).join(repeats.sequences, on=["producer", "sequence"], how="semi")
    rows = pl.concat([among["row"], again["row"]])
    return ticks.filter(~pl.col("row").is_in(rows.implode())).drop("row")


@dataclass
class Delta:
    """What a micro-batch adds to the state.

    sequences: runs of a producer; None in commits of before such runs were kept. highest: the highest sequence per
    producer and partition. minutes: new and previous minute (None: none), in seconds since 1970.
    """

    runs: list[tuple[Instrument, Interval]] = field(default_factory=list)
    rejected: list[tuple[Instrument, Interval]] = field(default_factory=list)
    highest: list[tuple[tuple[str, int], int]] = field(default_factory=list)
    minutes: list[tuple[Pair, int, int | None]] = field(default_factory=list)
    sequences: list[tuple[str, Interval]] | None = field(default_factory=list)

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
            "sequences": [[*place, highest] for place, highest in self.highest],
            "minutes": [[*pair, newest, before] for pair, newest, before in self.minutes],
            "sequence_runs": None if self.sequences is None else [[producer, *run] for producer, run in self.sequences],
        }

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> Delta:
        runs = state.get("sequence_runs")
        return cls(
            [((source, symbol, epoch), (first, last)) for source, symbol, epoch, first, last in state["runs"]],
            [((source, symbol, epoch), (first, last)) for source, symbol, epoch, first, last in state["rejected"]],
            [((producer, partition), highest) for producer, partition, highest in state["sequences"]],
            [((source, asset), newest, before) for source, asset, newest, before in state["minutes"]],
            None if runs is None else [(producer, (first, last)) for producer, first, last in runs],
        )


@dataclass(frozen=True)
class Seen:
    """The state: intervals of trade ids and sequences, and newest minutes (seconds since 1970)."""

    instruments: Mapping[Instrument, tuple[Interval, ...]] = field(default_factory=dict)
    # The highest sequence per producer and partition.
    producers: Mapping[tuple[str, int], int] = field(default_factory=dict)
    minutes: Mapping[Pair, int] = field(default_factory=dict)
    # Trade ids of records in quarantine: they are not in silver, but they are not missing either.
    rejected: Mapping[Instrument, tuple[Interval, ...]] = field(default_factory=dict)
    # Per producer: the sequences seen above its floor, and the floor.
    sequences: Mapping[str, tuple[Interval, ...]] = field(default_factory=dict)
    floors: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "instruments": [[*key, [list(interval) for interval in runs]] for key, runs in self.instruments.items()],
            "rejected": [[*key, [list(interval) for interval in runs]] for key, runs in self.rejected.items()],
            "producers": [[*key, highest] for key, highest in self.producers.items()],
            "minutes": [[*key, newest] for key, newest in self.minutes.items()],
            "sequences": [[producer, [list(run) for run in runs]] for producer, runs in self.sequences.items()],
            "floors": dict(self.floors),
        }

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> Seen:
        producers = {(p, k): highest for p, k, highest in state["producers"]}
        return cls(
            {(s, y, e): tuple((a, b) for a, b in runs) for s, y, e, runs in state["instruments"]},
            producers,
            {(s, a): newest for s, a, newest in state["minutes"]},
            {(s, y, e): tuple((a, b) for a, b in runs) for s, y, e, runs in state["rejected"]},
            {producer: tuple((a, b) for a, b in runs) for producer, runs in state.get("sequences", ())},
            # A state of before sequences were kept: what it knows counts as below the floors.
            dict(state["floors"]) if "floors" in state else _floors({}, producers.items()),
        )

    def after(self, delta: Delta) -> Seen:
        """The state after a micro-batch's delta; adding the delta again changes nothing."""
        producers, minutes = dict(self.producers), dict(self.minutes)
        for place, highest in delta.highest:
            producers[place] = max(producers.get(place, highest), highest)
        for pair, newest, _ in delta.minutes:
            minutes[pair] = max(minutes.get(pair, newest), newest)
        floors = dict(self.floors) if delta.sequences is not None else _floors(self.floors, delta.highest)
        above = [
            (producer, (max(first, floors.get(producer, first - 1) + 1), last))
            for producer, (first, last) in delta.sequences or ()
            if last > floors.get(producer, last - 1)
        ]
        sequences = _with(self.sequences, above)
        for producer in {producer for producer, _ in above}:
            surplus = len(sequences[producer]) - SEQUENCE_RUNS
            if surplus > 0:
                floors[producer] = sequences[producer][surplus - 1][1]
                sequences[producer] = sequences[producer][surplus:]
        instruments, rejected = _with(self.instruments, delta.runs), _with(self.rejected, delta.rejected)
        return Seen(instruments, producers, minutes, rejected, sequences, floors)

    def delta(
        self, files: Iterable[Numbers], rejected: Iterable[tuple[str, str, int, int]], minutes: Mapping[Pair, int]
    ) -> Delta:
        """The delta of files of new ticks, of trade ids in quarantine, and of the pairs' newest minutes."""
        files = list(files)
        runs: list[tuple[Instrument, Interval]] = []
        for file in files:
            columns = ("source", "symbol", "trade_epoch", "first", "last")
            rows = file.runs.select(columns).rows()
            runs += [((source, symbol, epoch), (first, last)) for source, symbol, epoch, first, last in rows]
        sequences = pl.concat([Numbers().sequences, *(file.sequences for file in files)])
        highest = sequences.group_by("producer", "partition").agg(pl.col("last").max()).sort("producer", "partition")
        newer = [
            (pair, newest, self.minutes.get(pair))
            for pair, newest in minutes.items()
            if newest > self.minutes.get(pair, newest - 1)
        ]
        ids = [((source, symbol, epoch), (number, number)) for source, symbol, epoch, number in rejected]
        return Delta(
            *(runs, ids, [((producer, partition), last) for producer, partition, last in highest.rows()], newer),
            [(producer, (first, last)) for producer, first, last in _joined(sequences).rows()],
        )

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
        sequences = self._repeated_sequences(parts)
        numbers = {number for number, runs in ids.items() if runs} | sequences.keys()
        id_columns = {name: _RUNS[name] for name in (*INSTRUMENT, "first", "last")}
        none = pl.DataFrame(schema={"producer": pl.String, "sequence": pl.Int64})
        return {
            number: Repeats(pl.DataFrame(ids[number], id_columns, orient="row"), sequences.get(number, none))
            for number in numbers
        }

    def _repeated_sequences(self, parts: Sequence[Numbers]) -> dict[int, pl.DataFrame]:
        """producer and sequence of the repeats, by number of the part."""
        of_parts = [part.sequences.with_columns(part=pl.lit(n, pl.Int64)) for n, part in enumerate(parts)]
        runs = pl.concat(part for part in of_parts if part.height) if any(map(len, of_parts)) else None
        if runs is None:
            return {}
        ticks = runs.with_columns(sequence=pl.int_ranges("first", pl.col("last") + 1)).explode("sequence")
        # Of the ticks of one sequence the one with the lowest partition and offset is no repeat.
        ticks = ticks.sort("producer", "sequence", "partition", "first_offset")
        ends = runs.group_by("producer").agg(pl.col("first").min(), pl.col("last").max())
        seen = pl.DataFrame(
            [
                (producer, *run)
                for producer, first, last in ends.rows()
                for run in overlapping(self.sequences.get(producer, ()), (first, last))
            ],
            {"producer": pl.String, "sequence": pl.Int64, "until": pl.Int64},
            orient="row",
        ).sort("sequence")
        ticks = ticks.sort("sequence", maintain_order=True)
        ticks = ticks.join_asof(seen, on="sequence", by="producer", check_sortedness=False)
        floors = pl.DataFrame(list(self.floors.items()), {"producer": pl.String, "floor": pl.Int64}, orient="row")
        highest = pl.DataFrame(
            [(*place, number) for place, number in self.producers.items()],
            {"producer": pl.String, "partition": pl.Int32, "highest": pl.Int64},
            orient="row",
        )
        ticks = ticks.join(floors, on="producer", how="left", maintain_order="left")
        ticks = ticks.join(highest, on=["producer", "partition"], how="left", maintain_order="left")
        sequence = pl.col("sequence")
        is_repeat = (
            ~pl.struct("producer", "sequence").is_first_distinct()
            | (sequence <= pl.col("until")).fill_null(False)
            | ((sequence <= pl.col("floor")) & (sequence <= pl.col("highest"))).fill_null(False)
        )
        repeats = ticks.filter(is_repeat).select("part", "producer", "sequence")
        return {int(n): rows.drop("part") for (n,), rows in repeats.partition_by("part", as_dict=True).items()}


def _joined(runs: pl.DataFrame) -> pl.DataFrame:
    """The runs of sequences of each producer, adjacent ones joined: producer, first, last. Runs do not overlap."""
    runs = runs.sort("producer", "first")
    begins = (pl.col("producer") != pl.col("producer").shift(1)) | (pl.col("first") > pl.col("last").shift(1) + 1)
    joined = runs.with_columns(run=begins.fill_null(True).cum_sum()).group_by("run", maintain_order=True)
    return joined.agg(pl.col("producer").first(), pl.col("first").min(), pl.col("last").max()).drop("run")


def _floors(floors: Mapping[str, int], highest: Iterable[tuple[tuple[str, int], int]]) -> dict[str, int]:
    """The floors, raised to the highest sequence of each producer."""
    after = dict(floors)
    for (producer, _), sequence in highest:
        after[producer] = max(after.get(producer, sequence), sequence)
    return after


_Key = TypeVar("_Key", Instrument, str)


def _with(
    intervals: Mapping[_Key, tuple[Interval, ...]], added: Iterable[tuple[_Key, Interval]]
) -> dict[_Key, tuple[Interval, ...]]:
    by_key: dict[_Key, list[Interval]] = defaultdict(list)
    for key, run in added:
        by_key[key].append(run)
    after = dict(intervals)
    for key, runs in by_key.items():
        after[key] = add_intervals(after.get(key, ()), sorted(runs))
    return after
