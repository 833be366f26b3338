"""Frames of CoinCap: recorded ones, and odd ones."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from conf.settings import SettingsError
from ingestion.counts import Counts
from ingestion.feeds import make_feed
from ingestion.gaps import GapTracker
from ingestion.instruments import Instrument
from ingestion.intake import Intake, Topics
from ingestion.spool import Spool
from ingestion.ticks import Control, Event, Ignored, Reject, Tick
from tests.programs import RECORDINGS

RECEIVED = 1_670_000_000_000_000_000
RECORDING = RECORDINGS / "coincap-prices.jsonl"


def receive(text: str, assets: Sequence[str] = ("bitcoin", "ethereum")) -> Sequence[Event]:
    return make_feed("coincap", assets).receive(text.encode(), RECEIVED)


def price(asset: str, digits: str) -> Tick:
    return Tick(RECEIVED, asset, digits, "USD", "coincap", asset)


@pytest.mark.skipif(not RECORDING.exists(), reason="no recording; documented frames are tested below")
def test_every_price_of_a_real_recording_is_a_tick_with_its_exact_digits() -> None:
    lines = RECORDING.read_text().splitlines()
    events = [event for line in lines for event in receive(line, ["ALL"])]
    pairs = [pair.split('":"') for line in lines for pair in line.strip('{}"').split('","')]
    assert events == [price(asset, digits) for asset, digits in pairs]
    assert len(events) == 25
    named = [event for line in lines for event in receive(line, ["bitcoin", "1inch"])]
    assert [event for event in named if isinstance(event, Tick)] == [
        tick for tick in events if isinstance(tick, Tick) and tick.asset in ("bitcoin", "1inch")
    ]
    assert {event.kind for event in named if isinstance(event, Ignored)} == {"an asset not asked for"}


def test_a_documented_frame_is_a_tick_for_each_price() -> None:
    assert receive('{"bitcoin":"6929.8217756835","ethereum":"404.98"}') == [
        price("bitcoin", "6929.8217756835"),
        price("ethereum", "404.98"),
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"bitcoin":"0"}', "price of bitcoin is '0'"),
        ('{"bitcoin":"-1"}', "price of bitcoin is '-1'"),
        ('{"bitcoin":null}', "price of bitcoin is missing"),
        ('{"bitcoin":{"usd":"1"}}', "price of bitcoin is {'usd': '1'}"),
        ('{"bitcoin":"6929.8217756835584756"}', "price of bitcoin is '6929.8217756835584756'"),
    ],
)
def test_a_frame_that_is_no_tick_is_rejected_with_its_reason(text: str, reason: str) -> None:
    (event,) = receive(text)
    assert isinstance(event, Reject)
    assert reason in event.reason


def test_one_bad_price_does_not_take_the_others_of_its_frame_along() -> None:
    bad, good = receive('{"bitcoin":"?","ethereum":"1.5"}')
    assert isinstance(bad, Reject)
    assert good == price("ethereum", "1.5")


def test_with_all_assets_a_name_that_is_none_is_rejected() -> None:
    (event,) = receive('{"bit coin\\"":"1.5"}', ["ALL"])
    assert isinstance(event, Reject)


def test_a_refusal_is_told_and_is_no_bad_frame() -> None:
    assert receive("Unauthorized: Invalid API key") == [Control("refused", "CoinCap does not accept the key")]


def test_the_address_holds_the_assets_and_the_key() -> None:
    feed = make_feed("coincap", ["bitcoin", "ethereum"], api_key="a key&")
    assert feed.url == "wss://wss.coincap.io/prices?assets=bitcoin,ethereum&apiKey=a%20key%26"
    assert make_feed("coincap", ["ALL"], api_key="k").url == "wss://wss.coincap.io/prices?assets=ALL&apiKey=k"
    seed = make_feed("coincap", ["bitcoin"], "wss://ws.coincap.io/prices")
    assert seed.url == "wss://ws.coincap.io/prices?assets=bitcoin"
    # Another choice of assets takes another connection.
    assert seed.subscribe([Instrument("1inch", "1inch", "USD")]) is None
    assert seed.unsubscribe([Instrument("bitcoin", "bitcoin", "USD")]) is None
    assert seed.url == "wss://ws.coincap.io/prices?assets=1inch"
    with pytest.raises(SettingsError, match="ALL stands alone"):
        make_feed("coincap", ["ALL", "bitcoin"])


@pytest.mark.parametrize(
    ("taken", "came", "new"),
    [
        # The list as it was when the new connection came up, and what has changed since.
        ("4 5", "5 6 7", "6 7"),
        ("4 5 6 7", "5 6 7", ""),
        ("4 5 6", "5 6 7", "7"),
        # Prices that come back.
        ("4 5", "5 6 5 7", "6 5 7"),
        ("4 5 6 5", "5 6 5 7", "7"),
        ("5 5 5", "5 5 6", "6"),
        # Nothing in common, and nothing taken yet.
        ("4 5", "8 9", "8 9"),
        ("", "5 6", "5 6"),
    ],
)
def test_what_two_connections_both_tell_counts_once(taken: str, came: str, new: str, tmp_path: Path) -> None:
    async def scenario() -> list[str]:
        spool = Spool(tmp_path, 0.0, 1 << 30)
        intake = Intake(
            make_feed("coincap", ["bitcoin"]), spool, Counts(), Topics("ticks", "rejects", "gaps"), GapTracker()
        )
        for number in taken.split():
            await intake.frame(b'{"bitcoin":"%b"}' % number.encode(), RECEIVED)
        await intake.overlapping([(b'{"bitcoin":"%b"}' % number.encode(), RECEIVED) for number in came.split()])
        spool.stop()
        await spool.run()
        prices = [json.loads(record.value)["price_usd"] for record in spool.records(0)]
        spool.close()
        return prices

    assert asyncio.run(scenario()) == [*taken.split(), *new.split()]
