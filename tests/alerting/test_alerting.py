"""Alerts as they happen: the same as gold's where ticks come in order, and out whatever is killed."""

from __future__ import annotations

import json
import random
import signal
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaAdminClient, KafkaProducer

from alerting.__main__ import Watch
from alerting.ticks import NotATick, read
from conf.settings import Settings, flag
from lake.alerts import Alert, Rule
from lake.summaries import to_time
from tests.micro_batches import market
from tests.oracle import NotATick as NotATickEither
from tests.oracle import Record, lake_of, tick_of
from tests.programs import Program, kafka_records, running_program, wait_until

TICK = {
    "timestamp": "2024-08-09T00:00:00.000001Z",
    "asset": "bitcoin",
    "price_usd": "61685.99",
    "source": "binance",
    "symbol": "BTCUSDT",
    "event_time": "2024-08-09T00:00:00.5Z",
    "quantity": "0.1",
    "trade_id": 7,
    "sequence": 3,
    "producer": "p",
}
VALUES: dict[str, list[object]] = {
    "price_usd": [
        *("0", "-1", "1e-30", "1e-3", "1e16", "nan", "", 5, 5.25, True, None, [], "0.0000000000001", "0.0000000000010"),
        "9999999999999999.999999999999",
    ],
    "quantity": [None, "0", "-0", "-1", 0.5, "1e17", "x", "9999999999999999"],
    "timestamp": ["2024-08-09 00:00:00Z", "2024-13-09T00:00:00Z", 1.5, None, "2024-08-09T00:00:00"],
    "event_time": [None, "2024-08-09T01:00:00+01:00", "2024-08-09T00:10:00Z", "later", 7],
    "asset": ["", "a b", "x" * 65, None],
    "source": [None, ""],
    "symbol": [None],
    "producer": [None, ""],
    "quote": [None, 1],
    "trade_id": [None, "7", 2.0],
    "sequence": [None],
    "trade_epoch": [2],
    "more": [{"a": []}],
}
ODD: list[dict[str, object]] = [{name: value} for name, values in VALUES.items() for value in values]
ODD += [{"trade_id": None, "sequence": None}]


@pytest.mark.parametrize("change", [{}, *ODD], ids=str)
def test_the_same_records_are_ticks_as_in_silver(change: dict[str, object]) -> None:
    value = json.dumps({**TICK, **change}).encode()
    try:
        expected = tick_of(Record("ticks", 1, 2, None, value), timedelta(seconds=5))
    except NotATickEither:
        with pytest.raises(NotATick):
            read(value, "ticks:1:2", 5)
        return
    told = read(value, "ticks:1:2", 5)
    assert (*told.pair, told.symbol) == (expected.source, expected.asset, expected.symbol)
    assert told.tick.event_id == expected.event_id
    assert (to_time(told.tick.time), told.tick.price) == (expected.gold_time, expected.price_usd)


@pytest.mark.parametrize("value", [None, b"", b"[]", b"{", b'"x"', b"\xff", b"1"])
def test_what_is_no_json_object_is_no_tick(value: bytes | None) -> None:
    with pytest.raises(NotATick):
        read(value, "ticks:0:0", 5)


def in_order() -> list[Record]:
    """The simulated market's ticks in each pair's tick order."""
    values = market(random.Random(8))
    ticks = [(tick_of(Record("ticks", 0, 0, None, value), timedelta(seconds=5)), value) for value in values]
    ticks.sort(key=lambda pair: (pair[0].gold_time, pair[0].trade_id or 0, pair[0].sequence or 0))
    return [Record("ticks", 0, number, None, value) for number, (_, value) in enumerate(ticks)]


def test_ticks_in_order_raise_golds_alerts() -> None:
    records = in_order()
    watch, newest = Watch(Rule()), dict[str, Alert]()
    for record in records:
        if changed := watch.add(read(record.value, f"ticks:0:{record.offset}", 5)):
            newest[changed.alert_id] = changed
    expected = {alert.alert_id: alert for alert in lake_of(records).alerts.values()}
    assert len(expected) > 3
    assert newest.keys() == expected.keys()
    for alert_id, alert in expected.items():
        want, have = asdict(alert), asdict(newest[alert_id])
        for name in ("direction", "reference_price", "trigger_price"):
            assert have[name] == want[name]
        assert to_time(have["opened_at"]) == want["opened_at"]
        if want["closed_at"] is not None:
            assert to_time(have["closed_at"]) == want["closed_at"]
            assert have["peak_change_pct"] == want["peak_change_pct"]
    assert watch.late == 0


@contextmanager
def alerting(settings: Settings, log: Path) -> Iterator[Program]:
    names = ("kafka_bootstrap_servers", "ticks_topic", "alerts_topic", "kafka_partitions")
    given = [text for name in names[:3] for text in (flag(name), str(getattr(settings, name)))]
    with running_program("alerting", given, log) as program:
        wait_until(lambda: program.logged("watching topic"), "it watches")
        yield program


@pytest.mark.services
def test_an_alert_is_out_whatever_is_killed(running: Callable[..., Settings], tmp_path: Path) -> None:
    """Jumps before the first start, while it runs, and while it is dead after kill -9."""
    name = uuid.uuid4().hex[:8]
    settings = running("kafka").model_copy(update={"ticks_topic": f"ticks-{name}", "alerts_topic": f"alerts-{name}"})
    admin = KafkaAdminClient(bootstrap_servers=settings.kafka_bootstrap_servers)
    admin.create_topics({settings.ticks_topic: {"num_partitions": 2, "replication_factor": 1}}, wait_for_metadata=True)
    admin.close()
    producer = KafkaProducer(bootstrap_servers=settings.kafka_bootstrap_servers, acks="all")
    sent = 0

    def jump(asset: str) -> None:
        nonlocal sent
        for price in ("100", "103"):
            sent += 1
            now = datetime.now(UTC).isoformat(timespec="microseconds")
            tick = {"timestamp": now, "asset": asset, "price_usd": price, "source": "venue", "trade_id": sent}
            producer.send(settings.ticks_topic, json.dumps(tick).encode(), key=f"venue:{asset}".encode()).get(30)

    def alerted() -> dict[str, dict[str, Any]]:
        records = kafka_records(settings, settings.alerts_topic)
        return {json.loads(record.value)["asset"]: json.loads(record.value) for record in records}

    jump("early")
    with alerting(settings, tmp_path / "first.log") as program:
        jump("bitcoin")
        line = program.line()
        wait_until(lambda: "bitcoin" in alerted(), "the alert is out")
        assert alerted()["bitcoin"] == line
        program.stop(signal.SIGKILL)
    jump("ethereum")
    with alerting(settings, tmp_path / "second.log") as program:
        wait_until(lambda: "ethereum" in alerted(), "the alert of the time when it was dead is out")
        assert program.stop() == 0
    found = alerted()["ethereum"]
    assert (found["direction"], found["trigger_price"], found["closed_at"]) == ("up", "103", None)
    assert Decimal(found["reference_price"]) == 100
    assert found["peak_change_pct"] == 3.0
    assert "early" not in alerted(), "what was before the first start wakes nobody"
    producer.close()
