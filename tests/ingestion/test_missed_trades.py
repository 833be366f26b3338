"""Promises 1 and 4 on a real Kafka: what a venue did not send is named on the topic gaps, and fetched from its REST."""

from __future__ import annotations

import json
import uuid
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conf.settings import Settings
from tests.programs import ingestion, kafka_count, kafka_records, simulator, wait_until

ASSETS = ("--assets", "bitcoin,ethereum")
SKIPPED, FORGOTTEN = 50, 7


@pytest.fixture
def own(running: Callable[..., Settings]) -> Settings:
    """Kafka answers; the topics are this test's own."""
    name = uuid.uuid4().hex[:8]
    topics = {f"{kind}_topic": f"{kind}-{name}" for kind in ("ticks", "rejects", "gaps")}
    return running("kafka").model_copy(update=topics)


def gaps(settings: Settings) -> list[dict[str, Any]]:
    """The rows of silver.gaps as the topic tells them: the last one of each gap."""
    rows = [json.loads(record.value) for record in kafka_records(settings, settings.gaps_topic)]
    return list({row["gap_id"]: row for row in rows}.values())


def missing(row: dict[str, Any]) -> set[tuple[str, int]]:
    return {(row["symbol"], number) for number in range(row["first_missing"], row["last_missing"] + 1)}


@pytest.mark.services
@pytest.mark.parametrize("venue", ["binance", "coinbase", "kraken"])
def test_missed_trades_are_named_and_filled_across_a_kill_too(own: Settings, tmp_path: Path, venue: str) -> None:
    """50 trades are not sent; 7 are unknown to the venue's history too; and meanwhile the ingester is killed."""
    holes = ("--skip", f"600:{SKIPPED}", "--forget", f"1000:{FORGOTTEN}")
    with simulator(tmp_path, "--venue", venue, *ASSETS, "--rate", "100", *holes) as (source, url):
        rest_url = "http://" + url.split("/")[2]
        arguments = ("--feed", venue, "--rest-urls", f"{venue}={rest_url}", "--gaps-topic", own.gaps_topic, *ASSETS)
        with ingestion(tmp_path, own, url, *arguments) as killed:
            wait_until(lambda: kafka_count(own, own.ticks_topic) > 300, "some flow")
            killed.process.kill()
            killed.process.wait()
        with ingestion(tmp_path, own, url, *arguments) as program:
            wait_until(lambda: kafka_count(own, own.ticks_topic) > 1_200, "the holes have gone by")

            def settled() -> bool:
                rows = gaps(own)
                lost = sum(len(missing(row)) for row in rows if row["status"] == "unfillable")
                return lost == FORGOTTEN and not [row for row in rows if row["status"] == "open"]

            wait_until(settled, "every gap is filled or given up")
            assert program.stop() == 0
        source.stop()
    received: dict[str, set[int]] = defaultdict(set)
    for record in kafka_records(own, own.ticks_topic):
        tick = json.loads(record.value)
        received[tick["symbol"]].add(tick["trade_id"])
    rows = gaps(own)
    unfillable = {one for row in rows if row["status"] == "unfillable" for one in missing(row)}
    filled = {one for row in rows if row["status"] == "filled" for one in missing(row)}
    every = {(symbol, number) for symbol, ids in received.items() for number in range(min(ids), max(ids) + 1)}
    assert every - unfillable == {(symbol, number) for symbol, ids in received.items() for number in ids}
    assert len(unfillable) == FORGOTTEN
    assert len(filled) >= SKIPPED
    assert {row["reason"] for row in rows if row["status"] == "unfillable"} == {"the venue's history does not have it"}
    assert {row["filled_by"] for row in rows if row["status"] == "filled"} <= {"backfill", "feed"}
    across = [row for row in rows if row["disconnected_at"] is not None]
    # Kraken's snapshot may bring what was missed meanwhile.
    assert across or venue == "kraken"
    assert "Traceback" not in program.log.read_text()


@pytest.mark.services
def test_a_venue_without_numbers_has_a_gap_from_the_last_price_to_the_next(own: Settings, tmp_path: Path) -> None:
    with simulator(tmp_path, "--venue", "coincap", *ASSETS, "--rate", "100") as (_, url):
        arguments = ("--feed", "coincap", "--gaps-topic", own.gaps_topic, *ASSETS)
        with ingestion(tmp_path, own, url, *arguments) as killed:
            wait_until(lambda: kafka_count(own, own.ticks_topic) > 20, "some flow")
            killed.process.kill()
            killed.process.wait()
        with ingestion(tmp_path, own, url, *arguments) as program:
            wait_until(lambda: [row["status"] for row in gaps(own)] == ["unfillable"] * 2, "each asset has its gap")
            assert program.stop() == 0
    received = [json.loads(record.value) for record in kafka_records(own, own.ticks_topic)]
    for row in gaps(own):
        assert (row["first_missing"], row["last_missing"]) == (None, None)
        times = sorted(tick["timestamp"] for tick in received if tick["symbol"] == row["symbol"])
        after = times.index(row["disconnected_at"]) + 1
        assert row["reason"] == f"the venue does not number its prices; the next one came at {times[after]}"
