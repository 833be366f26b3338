"""The streaming job's micro-batches, without Kafka: promises 1 and 2 under a crash after any of their writes."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pyspark.sql import SparkSession

from conf.settings import Settings
from lake.gaps import UNREPORTED
from lake.tables import (
    BRONZE_TICKS,
    GOLD,
    GOLD_CURRENT_PRICE,
    GOLD_PRICE_1M,
    SILVER_GAPS,
    SILVER_QUARANTINE,
    SILVER_TICKS,
    TABLES,
    Table,
)
from lake.writer import LakeWriter
from streaming.lakehouse import CheckpointError, resume
from tests.lakes import rows_of
from tests.micro_batches import checkpoint_of, frame
from tests.oracle import Record, Row, differences, lake_of, missing_ids

TIME = datetime(2024, 8, 9, tzinfo=UTC)
COMPARED = (BRONZE_TICKS, SILVER_TICKS, SILVER_QUARANTINE, *GOLD)


class Crash(Exception):
    """What a test lets happen in place of a write."""


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


def test_a_crash_after_any_write_loses_and_doubles_nothing(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four micro-batches, of which each dies after one of the tables is written, and is replayed by a new driver."""
    chance = random.Random(5)
    records = [Record("ticks", 0, number, None, message(chance, number)) for number in range(80)]
    report = {
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
    records[25] = Record("gaps", 0, 0, None, json.dumps(report).encode())
    # At a place in its topic where the topic of the ticks has a tick of an earlier micro-batch.
    records[50] = Record("rejects", 0, 2, None, b'{"reason": "no price"}')
    records[45] = Record("gaps", 0, 1, None, b'{"gap_id": "none"}')
    root = f"file:{tmp_path / 'lake'}"
    settings = Settings(lake_root=root, checkpoint=f"file:{tmp_path / 'checkpoint'}")
    checkpoint_of(tmp_path / "checkpoint", "q")
    spark.sparkContext.setLocalProperty("sql.streaming.queryId", "q")

    written: set[str] = set()
    only: list[Table] = []

    def crashing(real: Callable[..., object]) -> Callable[..., object]:
        def write(writer: LakeWriter, *arguments: Any, **options: Any) -> object:
            (table,) = (argument for argument in arguments if isinstance(argument, Table))
            if only and table not in only:
                raise Crash(table.qualified_name)
            result = real(writer, *arguments, **options)
            written.add(table.qualified_name)
            return result

        return write

    monkeypatch.setattr(LakeWriter, "append", crashing(LakeWriter.append))
    monkeypatch.setattr(LakeWriter, "add", crashing(LakeWriter.add))
    monkeypatch.setattr(LakeWriter, "replace", crashing(LakeWriter.replace))

    survivors = [[SILVER_TICKS], [BRONZE_TICKS, GOLD_PRICE_1M], [SILVER_TICKS, GOLD_CURRENT_PRICE], [GOLD_PRICE_1M]]
    for batch, survives in enumerate(survivors):
        part = frame(spark, records[batch * 20 : batch * 20 + 20])
        only[:] = survives
        written.clear()
        with pytest.raises(Crash):
            resume(spark, settings).write_batch(part, batch)
        assert written == {table.qualified_name for table in survives}
        only.clear()
        lakehouse = resume(spark, settings)
        lakehouse.write_batch(part, batch)
    lakehouse.write_batch(part, batch)
    lakehouse.finish()

    expected = lake_of(records)
    assert len(expected.silver) < len(records) - len(expected.quarantine), "there were repeats"
    tables: list[Mapping[Hashable, Row]] = [
        *(expected.bronze, expected.silver, expected.quarantine),
        *(expected.price_1m, expected.price_5m, expected.price_1h, expected.price_1d),
        *(expected.rolling_price, expected.current_price, expected.alerts),
    ]
    for table, rows in zip(COMPARED, tables, strict=True):
        assert differences(rows, rows_of(root, table)) == [], table.qualified_name
    named: dict[tuple[str, str, int], list[int]] = defaultdict(list)
    reasons = set()
    for row in rows_of(root, SILVER_GAPS).values():
        gap = SimpleNamespace(**row)
        if gap.status != "filled":
            named[gap.source, gap.symbol, gap.trade_epoch] += range(gap.first_missing, gap.last_missing + 1)
            reasons.add((gap.symbol, gap.status, gap.reason))
    assert {key: sorted(ids) for key, ids in named.items()} == {
        key: sorted(ids) for key, ids in missing_ids(expected).items()
    }
    assert ("BTCUSDT", "unfillable", "the venue forgets") in reasons
    assert ("ETHUSDT", "open", UNREPORTED) in reasons


def test_the_tables_of_another_checkpoint_are_refused(spark: SparkSession, tmp_path: Path) -> None:
    """A new checkpoint would begin at Kafka's first record and write everything again."""
    settings = Settings(lake_root=f"file:{tmp_path / 'lake'}", checkpoint=f"file:{tmp_path / 'checkpoint'}")
    checkpoint_of(tmp_path / "checkpoint", "q")
    spark.sparkContext.setLocalProperty("sql.streaming.queryId", "q")
    resume(spark, settings).write_batch(frame(spark, [Record("ticks", 0, 0, None, b"no tick")]), 0)
    assert resume(spark, settings).writer.batch(BRONZE_TICKS) == 0
    for name, query in (("checkpoint", "another"), ("absent", None)):
        if query:
            checkpoint_of(tmp_path / name, query)
        with pytest.raises(CheckpointError, match="another checkpoint"):
            resume(spark, settings.model_copy(update={"checkpoint": f"file:{tmp_path / name}"}))
    assert [table.qualified_name for table in TABLES if rows_of(settings.lake_root, table)] == [
        "bronze.ticks",
        "silver.quarantine",
    ]
