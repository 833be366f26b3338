"""Alerts as they happen: the same as gold's where ticks come in order, and out whatever is killed."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.structs import OffsetAndMetadata

from alerting.__main__ import Watch, alert_in, message
from conf.one_reader import STANDS_BY
from conf.settings import PROJECT, Settings, flag
from lake.contract import TickRules
from lake.gold.alerts import Alert
from lake.rules import AlertRule
from lake.silver.judge import Tick
from lake.times import to_time
from operation.addresses import Address, addresses, ask
from tests.micro_batches import market
from tests.operation.conventions import exposed, problems_of
from tests.oracle import Record, lake_of, tick_of
from tests.oracle import Tick as ExpectedTick
from tests.programs import Program, kafka_records, running_program, wait_until
from tests.ticks import CASES, INGESTED_AT, TICK, Case, compact

RULES = TickRules("rejects", "gaps", 5.0)
NOW = datetime(2026, 1, 1, tzinfo=UTC)


class Passed(Watch):
    """A watch that only notes the ticks that reach it."""

    def __init__(self) -> None:
        super().__init__(AlertRule())
        self.ticks: list[Tick] = []

    def add(self, tick: Tick) -> Alert | None:
        self.ticks.append(tick)
        return None


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_same_records_are_ticks_as_in_silver(case: Case) -> None:
    watch = Passed()
    alert_in(case.record(2), watch, RULES, INGESTED_AT)
    is_tick = case.topic == "ticks" and case.rule is None
    assert len(watch.ticks) == is_tick
    for tick in watch.ticks:
        expected = tick_of(case.record(2), timedelta(seconds=5))
        assert isinstance(expected, ExpectedTick)
        for name in ("source", "asset", "symbol", "event_id", "price_usd"):
            assert getattr(tick, name) == getattr(expected, name)
        assert to_time(tick.gold_time) == expected.gold_time


def test_two_currencies_of_a_venue_raise_no_alert() -> None:
    """As in gold, the venue's own quote counts."""
    usd = {**TICK, "source": "kraken", "symbol": "BTC/USD", "quote": "USD", "price_usd": "100"}
    other = {**usd, "symbol": "BTC/USDT", "quote": "USDT", "price_usd": "104", "event_time": "2024-08-09T00:00:03Z"}
    later = {**usd, "price_usd": "104", "event_time": "2024-08-09T00:00:04Z", "trade_id": 2}
    watch = Watch(AlertRule(), quotes=Settings().gold_quotes)
    records = [Record("ticks", 0, offset, None, compact(tick)) for offset, tick in enumerate([usd, other, later])]
    changed = [alert_in(record, watch, RULES, NOW) for record in records]
    assert [bool(alert) for alert in changed] == [False, False, True]


def test_an_id_beyond_64_bits_raises_no_alert() -> None:
    def records(trade_id: int) -> list[Record]:
        jump = {**TICK, "event_time": "2024-08-09T00:00:03Z", "price_usd": "70000", "trade_id": trade_id}
        return [Record("ticks", 0, offset, None, compact(tick)) for offset, tick in enumerate([TICK, jump])]

    for trade_id, alerts in ((2, 1), (2**63, 0)):
        watch = Watch(AlertRule())
        changed = [alert_in(record, watch, RULES, NOW) for record in records(trade_id)]
        assert len(list(filter(None, changed))) == alerts


def in_order() -> list[Record]:
    """The simulated market's ticks in each pair's tick order."""
    values = market(random.Random(8))
    ticks = [(tick_of(Record("ticks", 0, 0, None, value), timedelta(seconds=5)), value) for value in values]
    ticks.sort(key=lambda pair: (pair[0].gold_time, pair[0].trade_id or 0, pair[0].sequence or 0))
    return [Record("ticks", 0, number, None, value) for number, (_, value) in enumerate(ticks)]


def test_ticks_in_order_raise_golds_alerts() -> None:
    records = in_order()
    watch, newest = Watch(AlertRule()), dict[str, Alert]()
    for record in records:
        if changed := alert_in(record, watch, RULES, NOW):
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


def test_a_message_has_every_digit_of_a_price() -> None:
    alert = Alert(
        "id", "s", "a", "up", 1, Decimal("9999999999999999.999999999999"), 0, Decimal("100.500000000000"), 2.5
    )
    row = json.loads(message(alert, AlertRule(), NOW))
    assert (row["reference_price"], row["trigger_price"]) == ("9999999999999999.999999999999", "100.5")
    assert json.loads(message(replace(alert, trigger_price=Decimal(100)), AlertRule(), NOW))["trigger_price"] == "100"


@contextmanager
def alerting(settings: Settings, log: Path, ready: str = "watching topic") -> Iterator[Program]:
    names = ("kafka_bootstrap_servers", "ticks_topic", "alerts_topic", "kafka_partitions")
    given = [text for name in names[:3] for text in (flag(name), str(getattr(settings, name)))]
    given += ["--alerting-metrics-port", "0", "--state-dir", str(log.parent / "state")]
    with running_program("alerting", given, log) as program:
        wait_until(lambda: program.logged(ready), ready)
        yield program


def page_of(address: Address) -> str:
    """/metrics"""
    return ask(f"{address.url}/metrics", 60)[1].decode()


def standby(settings: Settings, log: Path) -> AbstractContextManager[Program]:
    return alerting(settings, log, "stands by")


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

    began = time.time() - 1
    jump("early")
    with alerting(settings, tmp_path / "first.log") as program:
        jump("bitcoin")
        line = program.line()
        wait_until(lambda: "bitcoin" in alerted(), "the alert is out")
        assert alerted()["bitcoin"] == line
        [address] = addresses(tmp_path / "state")

        def lags() -> dict[str, float]:
            figures = exposed(page_of(address)).items()
            return {name: value for name, value in figures if name.startswith("tickhouse_kafka_lag_records{")}

        by_partition = [
            f'tickhouse_kafka_lag_records{{partition="{number}",reader="alerting",topic="{settings.ticks_topic}"}}'
            for number in (0, 1)
        ]
        wait_until(lambda: lags() == dict.fromkeys(by_partition, 0), "it has read all")
        figures = exposed(page_of(address))
        assert problems_of(page_of(address)) == []
        assert figures['tickhouse_alerting_alerts_total{change="opened"}'] == 1
        assert figures['tickhouse_alerting_alerts_total{change="closed"}'] == 0
        # Those from before the start too, to find open episodes.
        assert figures["tickhouse_alerting_records_total"] == 4
        assert figures["tickhouse_alerting_send_errors_total"] == 0
        assert began < figures["tickhouse_alerting_last_record_timestamp_seconds"] <= time.time()
        assert ask(f"{address.url}/healthz", 60)[0] == 200
        program.stop(signal.SIGKILL)
    [left] = addresses(tmp_path / "state")
    assert not left.is_alive
    jump("ethereum")
    with alerting(settings, tmp_path / "second.log") as program:
        wait_until(lambda: "ethereum" in alerted(), "the alert of the time when it was dead is out")
        [address] = addresses(tmp_path / "state")
        assert address.is_alive, "the file of the killed one is gone"
        assert program.stop() == 0
    found = alerted()["ethereum"]
    assert (found["direction"], found["trigger_price"], found["closed_at"]) == ("up", "103", None)
    assert Decimal(found["reference_price"]) == 100
    assert found["peak_change_pct"] == 3.0
    assert "early" not in alerted(), "what was before the first start wakes nobody"
    producer.close()


@pytest.mark.services
def test_a_second_process_stands_by_is_healthy_and_says_so(running: Callable[..., Settings], tmp_path: Path) -> None:
    """Until the first ends. Then it watches."""
    settings = Ticks(running("kafka")).settings
    with alerting(settings, tmp_path / "first.log") as first, standby(settings, tmp_path / "second.log") as second:
        by_pid = {address.pid: address for address in addresses(tmp_path / "state")}
        reading, waiting = by_pid[first.process.pid], by_pid[second.process.pid]

        def health(address: Address) -> tuple[int, dict[str, Any]]:
            code, content = ask(f"{address.url}/healthz", 60)
            return code, json.loads(content)

        wait_until(lambda: health(waiting)[1]["notes"] != [], "it says so")
        assert health(waiting) == (200, {"trouble": [], "notes": [STANDS_BY]})
        assert health(reading) == (200, {"trouble": [], "notes": []})
        assert problems_of(page_of(waiting)) == []
        standing_by = [exposed(page_of(each))["tickhouse_alerting_stands_by"] for each in (reading, waiting)]
        assert standing_by == [0, 1]
        assert first.stop() == 0
        wait_until(lambda: second.logged("watching topic"), "it takes over")
        assert health(waiting) == (200, {"trouble": [], "notes": []})
        assert second.stop() == 0


class Ticks:
    """A topic of ticks and one of their alerts."""

    def __init__(self, suite: Settings, partitions: int = 2) -> None:
        name = uuid.uuid4().hex[:8]
        self.settings = suite.model_copy(update={"ticks_topic": f"ticks-{name}", "alerts_topic": f"alerts-{name}"})
        self.servers, self.partitions = suite.kafka_bootstrap_servers, partitions
        self.sent = 0
        self.create()

    def create(self) -> None:
        admin = KafkaAdminClient(bootstrap_servers=self.servers)
        topic = {self.settings.ticks_topic: {"num_partitions": self.partitions, "replication_factor": 1}}
        admin.create_topics(topic, wait_for_metadata=True)
        admin.close()

    def create_anew(self) -> None:
        admin = KafkaAdminClient(bootstrap_servers=self.servers)
        admin.delete_topics([self.settings.ticks_topic])
        wait_until(lambda: self.settings.ticks_topic not in admin.list_topics(), "the old topic is deleted")
        admin.close()
        self.create()

    def jump(self, asset: str, age: float = 0) -> None:
        """Two ticks that make an alert, put into Kafka `age` seconds ago."""
        producer = KafkaProducer(bootstrap_servers=self.servers, acks="all")
        for price in ("100", "103"):
            self.sent += 1
            at = datetime.now(UTC) - timedelta(seconds=age)
            tick = {
                "timestamp": at.isoformat(timespec="microseconds"),
                "asset": asset,
                "price_usd": price,
                "source": "venue",
                "trade_id": self.sent,
            }
            key, milliseconds = f"venue:{asset}".encode(), int(at.timestamp() * 1_000)
            producer.send(self.settings.ticks_topic, compact(tick), key=key, timestamp_ms=milliseconds).get(30)
        producer.close()

    def group(self) -> KafkaConsumer:
        group = f"{self.settings.alerts_topic}-of-{self.settings.ticks_topic}"
        return KafkaConsumer(bootstrap_servers=self.servers, group_id=group)

    def places(self) -> list[TopicPartition]:
        return [TopicPartition(self.settings.ticks_topic, number) for number in range(self.partitions)]

    def stored(self) -> int:
        """The sum of the group's offsets."""
        group = self.group()
        offset = sum(group.committed(place) or 0 for place in self.places())
        group.close()
        return offset

    def store(self, offset: int, metadata: str = "") -> None:
        group = self.group()
        group.assign(self.places())
        group.commit({place: OffsetAndMetadata(offset, metadata, -1) for place in self.places()})
        group.close()

    def alerted(self) -> list[str]:
        """The assets of all alerts, repeated if the alert is."""
        return [
            json.loads(record.value)["asset"] for record in kafka_records(self.settings, self.settings.alerts_topic)
        ]

    def has(self, *assets: str) -> None:
        wait_until(lambda: set(assets) <= set(self.alerted()), f"alerts of {assets}")


@pytest.mark.services
def test_two_processes_raise_each_alert_once_and_the_second_takes_over(
    running: Callable[..., Settings], tmp_path: Path
) -> None:
    """After the first was killed, and after it was stopped for so long that the other took over."""
    ticks = Ticks(running("kafka"))
    with (
        alerting(ticks.settings, tmp_path / "first.log") as first,
        standby(ticks.settings, tmp_path / "second.log") as second,
    ):
        ticks.jump("a")
        ticks.has("a")
        first.process.send_signal(signal.SIGSTOP)
        ticks.jump("b")
        wait_until(lambda: second.logged("watching topic"), "the second takes over")
        ticks.has("b")
        first.process.send_signal(signal.SIGCONT)
        wait_until(lambda: first.logged("stands by"), "the first stands by")
        ticks.jump("c")
        ticks.has("c")
        second.stop(signal.SIGKILL)
        ticks.jump("d")
        ticks.has("d")
        assert first.stop() == 0
    assert sorted(ticks.alerted()) == ["a", "b", "c", "d"]


@pytest.mark.services
def test_a_topic_made_anew_while_it_is_watched_is_read_from_its_fresh_ticks(
    running: Callable[..., Settings], tmp_path: Path
) -> None:
    ticks = Ticks(running("kafka"))
    with alerting(ticks.settings, tmp_path / "log") as program:
        ticks.jump("before")
        ticks.has("before")
        ticks.create_anew()
        ticks.jump("stale", age=3_600)
        ticks.jump("fresh")
        ticks.has("fresh")
        ticks.jump("next")
        ticks.has("next")
        assert program.stop() == 0
        assert program.logged("again"), "it says so"
    assert "stale" not in ticks.alerted()


@pytest.mark.services
@pytest.mark.parametrize(
    ("offset", "metadata", "cause"), [(1_000, "", "a disk was lost"), (2, "an older topic's id", "was made anew")]
)
def test_offsets_that_kafka_does_not_have_are_named_and_no_fresh_alert_is_missed(
    offset: int, metadata: str, cause: str, running: Callable[..., Settings], tmp_path: Path
) -> None:
    ticks = Ticks(running("kafka"), partitions=1)
    ticks.jump("stale", age=3_600)
    ticks.jump("fresh")
    ticks.store(offset, metadata)
    with alerting(ticks.settings, tmp_path / "log") as program:
        ticks.has("fresh")
        assert program.logged(cause)
        ticks.jump("next")
        ticks.has("next")
        wait_until(lambda: ticks.stored() == ticks.sent, "it stores where it is")
        assert program.stop() == 0
    assert sorted(ticks.alerted()) == ["fresh", "next"]


def test_alerting_starts_without_spark() -> None:
    """It is up in a moment, on a machine that has none."""
    program = "import sys, alerting.__main__; sys.exit('pyspark' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=PROJECT, check=False).returncode == 0
