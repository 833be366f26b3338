"""Deduplication: promise 1, silver has each tick once, whatever came again, in whatever order, part and micro-batch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lake.contract import Pair, TickRules
from lake.intervals import Interval, add_intervals
from lake.silver.deduplicate import Delta, Numbers, Seen, distinct, numbers, without
from lake.silver.read import read
from lake.silver.stage import columns
from tests.oracle import Record
from tests.ticks import TICK, arrow_records, compact

RULES = TickRules("rejects", "gaps", 5.0)
BTC = ("binance", "BTCUSDT", 0)


@dataclass(frozen=True)
class Delivery:
    """A Kafka record with a tick: told apart by its trade id, by its producer's sequence, or by its place."""

    partition: int
    offset: int
    trade_id: int | None = None
    symbol: str = "BTCUSDT"
    sequence: int | None = None
    producer: str = "p"

    @property
    def place(self) -> tuple[int, int]:
        return self.partition, self.offset

    @property
    def event_id(self) -> str:
        if self.trade_id is not None:
            return f"binance:{self.symbol}:0:{self.trade_id}"
        return f"ticks:{self.partition}:{self.offset}" if self.sequence is None else f"{self.producer}:{self.sequence}"


def ticks(deliveries: Sequence[Delivery]) -> pl.DataFrame:
    """As a task reads them."""
    records = [Record("ticks", d.partition, d.offset, None, compact({**TICK, **vars_of(d)})) for d in deliveries]
    return columns(read(arrow_records(records), RULES).ticks)


def vars_of(delivery: Delivery) -> dict[str, object]:
    names = ("trade_id", "symbol", "sequence", "producer")
    return {name: getattr(delivery, name) for name in names}


def kept(rows: pl.DataFrame) -> list[tuple[str, tuple[int, int]]]:
    """event_id and place of each tick."""
    return sorted((name, (p, o)) for name, p, o in rows.select("event_id", "kafka_partition", "kafka_offset").rows())


def ids(*trade_ids: int, partition: int = 0, first: int = 0) -> list[Delivery]:
    return [Delivery(partition, offset, trade_id) for offset, trade_id in enumerate(trade_ids, first)]


def sequences(*pairs: tuple[int, int], partition: int = 0, producer: str = "p") -> list[Delivery]:
    """offset, sequence"""
    return [Delivery(partition, offset, None, sequence=number, producer=producer) for offset, number in pairs]


def seen_after(seen: Seen, parts: Sequence[pl.DataFrame]) -> tuple[Seen, list[pl.DataFrame]]:
    """What the driver does with a micro-batch's parts: the state after it, and the new ticks."""
    repeats = seen.repeats([numbers(part) for part in parts])
    left = [without(part, repeats[n]) if n in repeats else part for n, part in enumerate(parts)]
    left = [part for part in left if part.height]
    return seen.after(seen.delta([numbers(part) for part in left], [], {})), left


# One task


def test_of_repeats_in_a_task_the_lowest_partition_and_offset_is_kept() -> None:
    deliveries = [*ids(5, 6, 5, 7, first=10), *ids(7, 8, partition=1), Delivery(0, 9, 6)]
    assert kept(distinct(ticks(deliveries))) == [
        ("binance:BTCUSDT:0:5", (0, 10)),
        ("binance:BTCUSDT:0:6", (0, 9)),
        ("binance:BTCUSDT:0:7", (0, 13)),
        ("binance:BTCUSDT:0:8", (1, 1)),
    ]


def test_a_sequence_that_came_before_is_a_repeat() -> None:
    """An ingester that starts again sends what its spool holds once more."""
    again = sequences((0, 1), (1, 2), (2, 1), (3, 2), (4, 3), (5, 3))
    other = sequences((6, 1), (7, 1), producer="q")
    elsewhere = sequences((0, 2), partition=1, producer="r")
    assert [place for _, place in kept(distinct(ticks([*again, *other, *elsewhere])))] == [
        *((0, 0), (0, 1), (0, 4)),
        (0, 6),
        (1, 0),
    ]


def test_ticks_without_any_number_are_told_apart_by_their_place() -> None:
    deliveries = [Delivery(partition, offset) for partition in (0, 1) for offset in (0, 1)]
    assert len(kept(distinct(ticks(deliveries)))) == 4
    nobody = [Delivery(0, offset, sequence=None) for offset in (5, 6)]
    assert Seen().repeats([numbers(ticks(nobody)), numbers(ticks(nobody))]) == {}


def test_a_task_tells_runs_of_ids_instead_of_ticks() -> None:
    """Whatever the order in which it has them; an instrument and a partition have runs of their own."""
    deliveries = [*ids(7, 5, 12, 6, 11), *ids(13, 14, partition=1), Delivery(0, 9, 8, symbol="ETHUSDT")]
    found = numbers(ticks([*deliveries, *sequences((20, 90), (21, 95), (22, 91))]))
    assert sorted(found.runs.select("symbol", "partition", "first", "last", "first_offset", "last_offset").rows()) == [
        ("BTCUSDT", 0, 5, 7, 0, 3),
        ("BTCUSDT", 0, 11, 12, 2, 4),
        ("BTCUSDT", 1, 13, 14, 0, 1),
        ("ETHUSDT", 0, 8, 8, 9, 9),
    ]
    assert found.sequences.rows() == [("p", 0, 90, 91, 20, 22), ("p", 0, 95, 95, 21, 21)]


def test_no_ticks_have_no_numbers() -> None:
    nothing = ticks([])
    assert distinct(nothing).is_empty()
    assert numbers(nothing).runs.is_empty()
    assert numbers(nothing).sequences.is_empty()
    assert Seen().repeats([numbers(nothing), Numbers()]) == {}


# All tasks


def test_new_ticks_are_told_from_repeats_and_from_holes() -> None:
    """Of all tasks together, and whatever the order in which a task has them."""
    seen = Seen({BTC: ((1, 4), (8, 9))}, {("p", 0): 70})

    def repeated(*parts: list[Delivery]) -> dict[int, list[str]]:
        """By the number of the part what is not new in it."""
        frames = [ticks(part) for part in parts]
        found = seen.repeats([numbers(frame) for frame in frames])
        names = {n: {name for name, _ in kept(frame)} for n, frame in enumerate(frames)}
        return {n: sorted(names[n] - {name for name, _ in kept(without(frames[n], found[n]))}) for n in found}

    def named(*trade_ids: int) -> list[str]:
        return [f"binance:BTCUSDT:0:{trade_id}" for trade_id in trade_ids]

    assert repeated(ids(7, 5), ids(12, 11, first=2)) == {}
    assert repeated(ids(7), ids(7, first=1)) == {1: named(7)}
    assert repeated(ids(7, first=1), ids(7)) == {0: named(7)}, "the lower offset wins"
    assert repeated(ids(7, partition=1), ids(7, first=9)) == {0: named(7)}, "the lower partition wins"
    assert repeated(ids(10, 9)) == {0: named(9)}
    assert repeated(ids(2, 3, 4, 5, 6, 7, 8, 9, 10)) == {0: sorted(named(2, 3, 4, 8, 9))}
    assert repeated([Delivery(0, 0, 2, symbol="ETHUSDT")]) == {}


def test_sequences_that_are_new_are_told_from_those_that_came_before() -> None:
    seen = Seen(sequences={"p": ((1, 70),)})

    def left(*parts: list[Delivery]) -> list[str]:
        return [name for part in seen_after(seen, [ticks(part) for part in parts])[1] for name, _ in kept(part)]

    assert left(sequences((5, 71), (8, 90)), sequences((9, 91))) == ["p:71", "p:90", "p:91"]
    assert left(sequences((5, 70))) == []
    assert left(sequences((5, 71)), sequences((6, 71), (7, 72))) == ["p:71", "p:72"]
    # Offsets decide, whichever task had them, and in whatever order their parts came.
    assert left(sequences((6, 71), (7, 72)), sequences((5, 71))) == ["p:72", "p:71"]
    assert left(sequences((5, 72)), sequences((6, 71))) == ["p:72", "p:71"], "out of order, but new"
    assert left(sequences((5, 71), partition=1), sequences((9, 71))) == ["p:71"], "once in all partitions"


def test_a_repeat_on_another_partition_is_one() -> None:
    """After a topic has got more partitions, a spool that is sent again reaches others than the first time."""
    seen, left = seen_after(Seen(), [ticks(sequences((0, 1), (1, 3))), ticks(sequences((0, 2), (1, 5), partition=1))])
    assert sum(part.height for part in left) == 4
    again = [ticks(sequences((0, 3), (1, 4), (2, 5), partition=2)), ticks(sequences((2, 1), (3, 6), partition=1))]
    _, left = seen_after(seen, again)
    assert [row for part in left for row in kept(part)] == [("p:4", (2, 1)), ("p:6", (1, 3))]


def test_below_the_sequences_that_are_kept_a_partition_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ticks with a trade id leave a hole at each of their sequences; the state stays small."""
    monkeypatch.setattr("lake.silver.deduplicate.SEQUENCE_RUNS", 10)
    seen = Seen()
    for number in range(0, 100, 2):
        seen, left = seen_after(seen, [ticks(sequences((number, number), partition=number // 2 % 2))])
        assert len(left) == 1
    assert [len(runs) for runs in seen.sequences.values()] == [10]
    assert seen.floors == {"p": 78}
    assert seen_after(seen, [ticks(sequences((100, 4), (101, 98)))])[1] == []
    _, [late] = seen_after(seen, [ticks(sequences((5, 4), (6, 98), (7, 97), partition=2))])
    assert [name for name, _ in kept(late)] == ["p:4", "p:97"], "the new partition has not had 4"
    assert Seen.from_json(json.loads(json.dumps(seen.to_json()))) == seen


def test_a_state_of_before_sequences_were_kept_goes_on() -> None:
    """A snapshot and commits of an earlier version have the highest sequence per partition only."""
    old = {"instruments": [], "rejected": [], "minutes": [], "producers": [["p", 0, 70], ["p", 1, 60]]}
    delta = {"runs": [], "rejected": [], "minutes": [], "sequences": [["p", 1, 75], ["q", 0, 3]]}
    seen = Seen.from_json(old).after(Delta.from_json(delta))
    parts = [
        ticks([*sequences((9, 70), (10, 76)), *sequences((11, 3), (12, 4), producer="q")]),
        ticks(sequences((9, 75), (10, 76), (11, 77), partition=1)),
    ]
    after, left = seen_after(seen, parts)
    assert sorted(name for part in left for name, _ in kept(part)) == ["p:76", "p:77", "q:4"]
    assert seen_after(after, parts)[1] == []


# The state


def test_the_state_and_what_a_micro_batch_adds_survive_their_journey_through_json() -> None:
    seen = Seen(
        {BTC: ((1, 5), (9, 9)), ("kraken", "BTC/USD", 2): ((3, 4),)},
        {("p-1", 3): 77},
        {("binance", "bitcoin"): 1_723_161_600},
        {BTC: ((6, 6),)},
        {"p-1": ((70, 72), (77, 77))},
        {"p-1": 60},
    )
    assert Seen.from_json(json.loads(json.dumps(seen.to_json()))) == seen
    delta = Delta([(BTC, (7, 8))], [(BTC, (10, 10))], [(("p-1", 3), 78)], [(("binance", "bitcoin"), 60, None)])
    delta.sequences = [("p-1", (78, 80))]
    assert Delta.from_json(json.loads(json.dumps(delta.to_json()))) == delta


RUNS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 8)).map(lambda run: (run[0], run[0] + run[1])), max_size=9)


@given(st.lists(RUNS, max_size=5), RUNS)
def test_what_is_added_widens_what_was_seen_and_to_add_it_twice_changes_nothing(
    batches: list[list[Interval]], rejected: list[Interval]
) -> None:
    """A claim of the lake repeats the newest commit's metadata."""
    seen = Seen()
    for number, runs in enumerate(batches):
        minute: list[tuple[Pair, int, int | None]] = [(("s", "a"), 60 * (10 - number), None)]
        delta = Delta([(BTC, run) for run in runs], [(BTC, run) for run in rejected], [(("p", 1), 9 - number)], minute)
        delta.sequences = [("p", run) for run in runs]
        seen = seen.after(delta)
        assert seen.after(delta) == seen
    everything = [run for runs in batches for run in runs]
    assert seen.instruments.get(BTC, ()) == seen.sequences.get("p", ()) == add_intervals((), everything)
    if batches:
        assert seen.rejected.get(BTC, ()) == add_intervals((), rejected)
        assert (dict(seen.producers), dict(seen.minutes)) == ({("p", 1): 9}, {("s", "a"): 600})


def test_minutes_are_told_with_what_was_newest_before() -> None:
    """A driver after a crash takes back those of a micro-batch that gold lacks."""
    seen = Seen(minutes={("s", "a"): 120, ("s", "b"): 120})
    delta = seen.delta([], [], {("s", "a"): 180, ("s", "b"): 60, ("s", "c"): 60})
    assert sorted(delta.minutes) == [(("s", "a"), 180, 120), (("s", "c"), 60, None)]
    assert seen.after(delta).minutes == {("s", "a"): 180, ("s", "b"): 120, ("s", "c"): 60}


# All of it, against a set


@st.composite
def histories(draw: st.DrawFn) -> list[list[list[Delivery]]]:
    """Micro-batches of parts of ticks. A part has a contiguous range of each partition that it has any of."""
    next_offset = {0: 0, 1: 0, 2: 0}
    next_sequence = {"p": 1, "q": 1}
    micro_batches = []
    for _ in range(draw(st.integers(1, 4))):
        parts: list[list[Delivery]] = []
        for partition in draw(st.lists(st.sampled_from([0, 0, 1, 2]), max_size=5)):
            part = []
            for _ in range(draw(st.integers(0, 8))):
                offset = next_offset[partition]
                next_offset[partition] += draw(st.sampled_from([1, 1, 1, 3]))
                kind = draw(st.sampled_from(["id", "id", "id", "sequence", "sequence", "none"]))
                if kind == "id":
                    symbol = draw(st.sampled_from(["BTCUSDT", "ETHUSDT"]))
                    part.append(Delivery(partition, offset, draw(st.integers(0, 12)), symbol))
                elif kind == "sequence":
                    # Repeats and late ones come on any partition.
                    producer = draw(st.sampled_from(["p", "q"]))
                    back = draw(st.sampled_from([0, 0, 1, 3]))
                    number = max(1, next_sequence[producer] - back)
                    next_sequence[producer] = max(next_sequence[producer], number + draw(st.sampled_from([1, 1, 4])))
                    part.append(Delivery(partition, offset, None, sequence=number, producer=producer))
                else:
                    part.append(Delivery(partition, offset))
            parts.append(part)
        # A small micro-batch is one task, which has all partitions; and tasks end in any order.
        if draw(st.booleans()):
            parts = [[delivery for part in parts for delivery in part]]
        micro_batches.append(draw(st.permutations(parts)))
    return micro_batches


@settings(max_examples=150, deadline=None)
@given(histories())
def test_each_tick_is_kept_once_at_its_lowest_place_in_its_first_micro_batch(
    history: list[list[list[Delivery]]],
) -> None:
    seen, found = Seen(), []
    wanted: dict[str, tuple[int, int]] = {}
    for parts in history:
        seen, left = seen_after(seen, [distinct(ticks(part)) for part in parts if part])
        found += [row for part in left for row in kept(part)]
        for delivery in sorted((d for part in parts for d in part), key=lambda delivery: delivery.place):
            wanted.setdefault(delivery.event_id, delivery.place)
        assert sorted(found) == sorted(wanted.items())


@pytest.mark.parametrize("as_read_back", [False, True])
def test_ids_of_all_parts_are_the_state_whether_new_or_read_back(as_read_back: bool) -> None:
    """A driver after a crash reads what silver has got, and tells the same numbers."""
    parts = [ids(5, 6, 9), ids(7, 8, partition=1)]
    frames = [ticks(part) for part in parts]
    if as_read_back:
        frames = [pl.concat(frames)]
    seen = Seen().after(Seen().delta([numbers(frame) for frame in frames], [(*BTC, 3)], {}))
    assert seen.instruments == {BTC: ((5, 9),)}
    assert seen.rejected == {BTC: ((3, 3),)}
