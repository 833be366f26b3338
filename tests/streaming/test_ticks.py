"""The streaming job's micro-batches, without Kafka: promises 1, 2 and 4 under a crash after any of their writes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta, tzinfo
from decimal import Decimal
from pathlib import Path
from typing import Any, Self

import polars as pl
import pytest

from lake.delta.frames import read_rows, span_of
from lake.delta.log import TableLog
from lake.delta.rewrite import rewrite
from lake.delta.writer import LakeWriter
from lake.silver.gaps import UNREPORTED
from lake.tables import (
    BRONZE_TICKS,
    GOLD_ALERTS,
    GOLD_CURRENT_PRICE,
    GOLD_PRICE_1M,
    GOLD_PRICE_5S,
    GOLD_ROLLING_PRICE,
    SILVER_GAPS,
    SILVER_QUARANTINE,
    SILVER_TICKS,
    TABLES,
    Table,
)
from streaming.checkpoint import CheckpointError
from tests.lakes import rows_of, wrong_gaps, wrong_rows
from tests.micro_batches import checkpoint_of, in_kafka, lake_in, market, opened, pieces, write, write_one
from tests.oracle import Record, lake_of
from tests.ticks import compact

TIME = datetime(2024, 8, 9, tzinfo=UTC)
IN_A_MICRO_BATCH = (
    *(BRONZE_TICKS, SILVER_TICKS, SILVER_QUARANTINE, SILVER_GAPS),
    *(GOLD_PRICE_5S, GOLD_PRICE_1M, GOLD_ROLLING_PRICE, GOLD_CURRENT_PRICE, GOLD_ALERTS),
)
"""The tables that a micro-batch writes; the longer windows come seconds later."""


REPORT = {
    "gap_id": "venue:BTCUSDT:0:2",
    "source": "venue",
    "symbol": "BTCUSDT",
    "trade_epoch": 0,
    "first_missing": 2,
    "last_missing": 60,
    "detected_at": TIME.isoformat(),
    "status": "unfillable",
    "reason": "the venue forgets",
}
"""Of the ingester."""


class Crash(Exception):
    """What a test lets happen in place of a write."""


class Crashes:
    """A driver that dies once it has written `only` these tables; None: it lives."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.only: list[Table] | None = None
        self.written: set[str] = set()
        for write_point in ("add", "replace"):
            monkeypatch.setattr(LakeWriter, write_point, self._crashing(getattr(LakeWriter, write_point)))

    def _crashing(self, real: Callable[..., object]) -> Callable[..., object]:
        def write(writer: LakeWriter, *arguments: Any, **options: Any) -> object:
            (table,) = (argument for argument in arguments if isinstance(argument, Table))
            if self.only is not None and table not in self.only:
                raise Crash(table.qualified_name)
            result = real(writer, *arguments, **options)
            self.written.add(table.qualified_name)
            return result

        return write


def message(chance: random.Random, number: int) -> bytes:
    """A tick of two instruments: some repeated, some out of order, one in ten no tick at all."""
    trade_id = max(1, number - chance.choice([0, 0, 0, 1, 5, 9]))
    at = TIME + timedelta(seconds=trade_id * 7)
    symbol = ("BTCUSDT", "ETHUSDT")[trade_id % 2]
    tick: dict[str, object] = {
        "timestamp": at.isoformat(timespec="microseconds"),
        "asset": symbol.lower(),
        "price_usd": f"{1000 + trade_id * trade_id % 97}.{trade_id % 10}",
        "source": "venue",
        "symbol": symbol,
        "event_time": (at - timedelta(seconds=trade_id % 3)).isoformat(timespec="microseconds"),
        "quantity": f"0.{trade_id}",
    }
    if trade_id % 3:
        tick |= {"trade_id": trade_id}
    else:
        tick |= {"producer": "p", "sequence": trade_id}
    return b"{" if number % 10 == 3 else json.dumps(tick, separators=(",", ":")).encode()


def test_a_crash_after_any_write_loses_and_doubles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five micro-batches, of which each dies after some of the tables are written, and is replayed by a new driver."""
    chance = random.Random(5)
    records = [Record("ticks", 0, number, None, message(chance, number)) for number in range(100)]
    records[25] = Record("gaps", 0, 0, None, compact(REPORT))
    # At a place in its topic where the topic of the ticks has a tick of an earlier micro-batch.
    records[50] = Record("rejects", 0, 2, None, b'{"reason": "no price"}')
    records[45] = Record("gaps", 0, 1, None, b'{"gap_id": "none"}')
    settings = lake_in(tmp_path)
    crashes = Crashes(monkeypatch)
    survivors = [
        [SILVER_TICKS],
        [BRONZE_TICKS, GOLD_PRICE_5S, GOLD_PRICE_1M],
        [SILVER_TICKS, GOLD_CURRENT_PRICE],
        [GOLD_PRICE_5S],
        [SILVER_TICKS, GOLD_PRICE_5S],
    ]
    for batch, survives in enumerate(survivors):
        part = records[batch * 20 : batch * 20 + 20]
        crashes.only = survives
        crashes.written.clear()
        with pytest.raises(Crash):
            write_one(opened(settings), part, batch)
        assert crashes.written == {table.qualified_name for table in survives}
        crashes.only = None
        lakehouse = opened(settings)
        write_one(lakehouse, part, batch)
    write_one(lakehouse, part, batch)
    lakehouse.finish()

    expected = lake_of(records)
    assert len(expected.silver) < len(records) - len(expected.quarantine), "there were repeats"
    assert wrong_rows(settings.lake_root, expected) == {}
    assert wrong_gaps(settings.lake_root, expected) == []
    unfilled = [row for row in rows_of(settings.lake_root, SILVER_GAPS).values() if row["status"] != "filled"]
    reasons = {(row["symbol"], row["status"], row["reason"]) for row in unfilled}
    assert ("BTCUSDT", "unfillable", "the venue forgets") in reasons
    assert ("ETHUSDT", "open", UNREPORTED) in reasons


@pytest.mark.parametrize("seed", range(6))
def test_crashes_after_any_set_of_writes_lose_and_double_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """With repeats, odd records, bursts, silences, and late ticks; now and then a driver dies twice in a row."""
    chance = random.Random(seed)
    values: list[bytes | None] = list(market(chance))
    for at in chance.sample(range(len(values)), 30):
        values[at : at + 1] = [values[at], chance.choice([b"{", None, values[at], values[max(0, at - 9)]])]
    records = in_kafka(values)
    settings = lake_in(tmp_path)
    crashes = Crashes(monkeypatch)
    parts = pieces(records, chance, 10)
    for batch, part in enumerate(parts):
        tasks = chance.choice([1, 2, 3])
        survives: list[Table] = []
        for _ in range(chance.choice([0, 1, 1, 2])):
            survives += chance.sample(IN_A_MICRO_BATCH, chance.randrange(5))
            crashes.only = survives
            with pytest.raises(Crash):
                write_one(opened(settings), part, batch, tasks)
            crashes.only = None
        lakehouse = opened(settings)
        write_one(lakehouse, part, batch, tasks)
    lakehouse.finish()
    expected = lake_of(records)
    assert wrong_rows(settings.lake_root, expected) == {}
    assert wrong_gaps(settings.lake_root, expected) == []


def tick_at(second: float, number: int, price: str = "100") -> bytes:
    """A tick of one pair, so long after TIME."""
    at = (TIME + timedelta(seconds=second)).isoformat(timespec="microseconds")
    tick = {"timestamp": at, "asset": "x", "price_usd": price, "source": "a", "symbol": "X", "trade_id": number}
    return json.dumps(tick).encode()


@pytest.mark.parametrize(
    "survives", [[SILVER_TICKS], [GOLD_PRICE_5S], [SILVER_TICKS, GOLD_PRICE_5S]], ids=["silver", "gold", "both"]
)
def test_the_minute_before_a_silence_is_seen_after_a_crash_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, survives: list[Table]
) -> None:
    """Rolling prices look back on it from times that only the micro-batch of the crash brings."""
    first, second = in_kafka([tick_at(3, 1), tick_at(8, 2)]), in_kafka([tick_at(200, 3)], first=2)
    settings = lake_in(tmp_path)
    write(None, settings, [first])
    crashes = Crashes(monkeypatch)
    crashes.only = survives
    with pytest.raises(Crash):
        write_one(opened(settings), second, 1)
    crashes.only = None
    write(None, settings, [second], first=1)
    assert wrong_rows(settings.lake_root, lake_of([*first, *second])) == {}


@pytest.mark.parametrize("hours", [-3, 0, 3])
def test_a_report_that_tells_another_time_of_a_gap_replaces_its_row(tmp_path: Path, hours: int) -> None:
    """A hole is found by its ids, at the time of the micro-batch; the ingester's report of it says when it was."""
    settings = lake_in(tmp_path)
    ticks = in_kafka([tick_at(1, 1), tick_at(2, 5)])
    found_at = (datetime.now(UTC) + timedelta(hours=hours)).isoformat()
    report = {
        **REPORT,
        "source": "a",
        "symbol": "X",
        "status": "open",
        "first_missing": 2,
        "last_missing": 4,
        "detected_at": found_at,
    }
    write(None, settings, [ticks, in_kafka([compact(report)], "gaps")])
    [row] = rows_of(settings.lake_root, SILVER_GAPS).values()
    assert (row["first_missing"], row["last_missing"], row["reason"]) == (2, 4, REPORT["reason"])
    # And so after the next start.
    write(None, settings, [in_kafka([tick_at(1.5, 3)], first=2)], first=2)
    assert {(row["first_missing"], row["status"]) for row in rows_of(settings.lake_root, SILVER_GAPS).values()} == {
        *((2, "open"), (3, "filled"), (4, "open")),
    }


def test_the_tables_of_another_checkpoint_are_refused(tmp_path: Path) -> None:
    """A new checkpoint would begin at Kafka's first record and write everything again."""
    settings = lake_in(tmp_path)
    write_one(opened(settings), in_kafka([b"no tick"]), 0)
    assert opened(settings).writer.batch(BRONZE_TICKS) == 0
    for name, query in (("checkpoint", "another"), ("absent", None)):
        if query:
            checkpoint_of(tmp_path / name, query)
        with pytest.raises(CheckpointError, match="another checkpoint"):
            opened(settings.model_copy(update={"checkpoint": f"file:{tmp_path / name}"}))
    assert [table.qualified_name for table in TABLES if rows_of(settings.lake_root, table)] == [
        "bronze.ticks",
        "silver.quarantine",
    ]


def test_of_two_first_starts_that_meet_one_writes_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both find an empty lake. The one that claims it later sees what the other has written until then."""
    settings = lake_in(tmp_path)
    records = in_kafka([tick_at(second, second) for second in range(6)])
    checkpoint_of(tmp_path / "other", "another")
    one, claim = opened(settings), LakeWriter.claim

    def write_and_claim(writer: LakeWriter) -> None:
        monkeypatch.undo()
        write_one(one, records[:3], 0)
        claim(writer)

    monkeypatch.setattr(LakeWriter, "claim", write_and_claim)
    with pytest.raises(CheckpointError, match="another checkpoint"):
        opened(settings.model_copy(update={"checkpoint": f"file:{tmp_path / 'other'}"}))
    write(None, settings, [records[3:]], first=1)
    assert wrong_rows(settings.lake_root, lake_of(records)) == {}


def test_a_micro_batch_of_another_query_is_no_replay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have other records under the same number."""
    settings = lake_in(tmp_path)
    first, other = in_kafka([tick_at(1, 1)]), in_kafka([tick_at(2, 2)], first=1)
    lakehouse = opened(settings)
    write_one(lakehouse, first, 0)
    lakehouse.finish()
    monkeypatch.setattr("tests.micro_batches.QUERY", "another")
    with pytest.raises(CheckpointError, match="query q wrote micro-batch 0"):
        write_one(lakehouse, other, 0)
    assert wrong_rows(settings.lake_root, lake_of(first)) == {}


@pytest.mark.parametrize(
    ("batch", "records", "message"),
    [
        (1, slice(1, 4), "has the records .* the checkpoint was changed"),
        (0, slice(0, 1), "is 0, and the newest of .* is 1"),
        (3, slice(3, 4), "is 3, and the newest of .* is 1"),
    ],
    ids=["with other records", "before the newest", "after one that is missing"],
)
def test_a_checkpoint_that_was_brought_back_from_a_copy_is_refused(
    tmp_path: Path, batch: int, records: slice, message: str
) -> None:
    """Its micro-batches have numbers that the lake knows, and other records: to skip them would lose those."""
    settings = lake_in(tmp_path)
    everything = in_kafka([tick_at(second, second) for second in range(4)])
    write(None, settings, [everything[:1], everything[1:3]])
    with pytest.raises(CheckpointError, match=message):
        write_one(opened(settings), everything[records], batch)
    assert wrong_rows(settings.lake_root, lake_of(everything[:3])) == {}


# Clocks


def test_a_driver_whose_clock_is_a_day_ahead_once_holds_no_window_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The longer windows follow by a clock that nobody sets; also after a restart."""

    class Ahead(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Self:
            return super().now(tz) + timedelta(days=1)

    settings = lake_in(tmp_path)
    records = in_kafka([tick_at(60 * number, number) for number in range(12)])
    lakehouse = opened(settings)
    with monkeypatch.context() as wrong:
        wrong.setattr("streaming.lakehouse.datetime", Ahead)
        write_one(lakehouse, records[:4], 0)
    write_one(lakehouse, records[4:8], 1)
    lakehouse.roll_up()
    assert wrong_rows(settings.lake_root, lake_of(records[:8])) == {}
    write(None, settings, [records[8:]], first=2)
    assert wrong_rows(settings.lake_root, lake_of(records)) == {}


def test_a_receipt_in_2099_is_not_believed(tmp_path: Path) -> None:
    """It would be the newest price for decades, and each later tick would be late."""
    far = json.loads(tick_at(3, 2, "9999"))
    far |= {"timestamp": "2099-01-01T00:00:00Z", "event_time": "2099-01-01T00:00:00Z"}
    values = [tick_at(1, 1), json.dumps(far).encode(), tick_at(5, 3), tick_at(65, 4)]
    records = [replace(record, ingested_at=datetime.now(UTC)) for record in in_kafka(values)]
    settings = lake_in(tmp_path)
    write(None, settings, [records[:2], records[2:3], records[3:]])
    assert wrong_rows(settings.lake_root, lake_of(records)) == {}
    assert {row["rule"] for row in rows_of(settings.lake_root, SILVER_QUARANTINE).values()} == {"timestamp"}
    assert {row["is_late"] for row in rows_of(settings.lake_root, SILVER_TICKS).values()} == {False}
    assert [row["price_usd"] for row in rows_of(settings.lake_root, GOLD_CURRENT_PRICE).values()] == [100]


# Outsiders


@pytest.mark.parametrize("also_another_span", [False, True])
def test_rows_cached_before_an_outsider_s_commit_are_not_written_back(tmp_path: Path, also_another_span: bool) -> None:
    """A repair of one row of a file, beside the running stream, which then changes another row of that file."""

    def tick_of_asset(asset: str, second: float, number: int) -> bytes:
        return tick_at(second, number).replace(b'"x"', f'"{asset}"'.encode()).replace(b'"X"', f'"{asset}"'.encode())

    settings = lake_in(tmp_path)
    lakehouse = opened(settings)
    values = [tick_of_asset(asset, second, number) for number, second in enumerate([1, 31]) for asset in "xyz"]
    write_one(lakehouse, in_kafka(values), 0)
    files = lakehouse.writer.files
    for table in (GOLD_PRICE_5S, GOLD_PRICE_1M):
        base = TableLog(files, table.path(settings.lake_root)).files()
        rows = pl.concat([read_rows(files, table, file) for file in base])
        repaired = rows.with_columns(
            volume=pl.when(pl.col("asset") == "y")
            .then(pl.lit(Decimal(77)))
            .otherwise("volume")
            .cast(rows["volume"].dtype)
        )
        spans = repaired.select(span_of(table).unique()).to_series().to_list()
        assert rewrite(files, table, settings.lake_root, base, spans, repaired) == []
    more = [tick_of_asset("x", 2, 7), *([tick_of_asset("z", 32, 8)] if also_another_span else [])]
    write_one(lakehouse, in_kafka(more, first=len(values)), 1)
    lakehouse.finish()
    for table in (GOLD_PRICE_5S, GOLD_PRICE_1M):
        rows_after = rows_of(settings.lake_root, table).values()
        volumes = {(str(row["asset"]), row["volume"]) for row in rows_after}
        assert volumes == {("x", None), ("y", Decimal(77)), ("z", None)}, table.qualified_name
