"""Frames of Coinbase Exchange: real ones of a recording, and those of its documentation."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter

import pytest

from ingestion.feeds import VENUES, feed_of, make_feed
from ingestion.instruments import Instrument
from ingestion.ticks import Control, Event, Ignored, Reject, Tick
from tests.programs import RECORDINGS

RECEIVED = 1_618_677_817_061_845_000
RECORDING = RECORDINGS / "coinbase-20210417.gz"
# From the documentation of the channels.
MATCH = {
    "type": "match", "trade_id": 10, "sequence": 50, "maker_order_id": "ac928c66-ca53-498f-9c13-a110027a60e8",
    "taker_order_id": "132fb6ae-456b-4654-b4e0-d681ac05cea1", "time": "2014-11-07T08:19:27.028459Z",
    "product_id": "BTC-USD", "size": "5.23512", "price": "400.23", "side": "sell",
}  # fmt: skip
HEARTBEAT = {
    "type": "heartbeat", "sequence": 90, "last_trade_id": 20, "product_id": "BTC-USD",
    "time": "2014-11-07T08:19:28.464459Z",
}  # fmt: skip
TICKER = {
    "type": "ticker", "sequence": 37475248783, "product_id": "ETH-USD", "price": "1285.22", "open_24h": "1310.79",
    "volume_24h": "245532.79269678", "side": "buy", "time": "2022-10-19T23:28:22.061769Z", "trade_id": 370843401,
    "last_size": "11.4396987",
}  # fmt: skip
SUBSCRIPTIONS = {"type": "subscriptions", "channels": [{"name": "matches", "product_ids": ["BTC-USD"]}]}
ERROR = {"type": "error", "message": "Failed to subscribe", "reason": "XYZ-USD is not a valid product"}
_REAL = re.compile(
    r'(\S+): \{"type":"(?:last_)?match","trade_id":(\d+),.*"size":"([^"]+)","price":"([^"]+)",'
    r'"product_id":"([^"]+)","sequence":\d+,"time":"[^"]+?(\d\d\.\d{6})Z"\}'
)


def receive(message: object) -> Event:
    text = message if isinstance(message, str) else json.dumps(message)
    (event,) = make_feed("coinbase", ["bitcoin", "ethereum"]).receive(text.encode(), RECEIVED)
    return event


@pytest.mark.skipif(not RECORDING.exists(), reason="no recording; the simulator's frames are tested in tests/simulator")
def test_every_match_of_a_real_recording_is_a_tick_with_its_exact_digits() -> None:
    with gzip.open(RECORDING, "rt") as lines:
        frames = [line.strip().partition(": ") for line in lines]
    products = sorted({match[5] for frame in frames if (match := _REAL.match(": ".join(frame[::2])))})
    assert len(products) == 10
    feed = feed_of("coinbase", [Instrument(product.lower(), product, product[-3:]) for product in products])
    events = [event for _, _, text in frames for event in feed.receive(text.encode(), RECEIVED)]
    ticks = [event for event in events if isinstance(event, Tick)]
    expected = [match.groups()[1:] for frame in frames if (match := _REAL.match(": ".join(frame[::2])))]
    assert len(ticks) == 97 + 10
    assert [
        (str(tick.trade_id), tick.quantity, tick.price_usd, tick.symbol, f"{(tick.event_ns or 0) / 1e9 % 60:09.6f}")
        for tick in ticks
    ] == expected
    controls = Counter(event.kind for event in events if isinstance(event, Control))
    # The 107 tickers tell the latest trade's id.
    assert controls["heartbeat"] == 107
    assert not [event for event in events if isinstance(event, Reject)]


def test_a_documented_match_is_a_tick() -> None:
    assert receive(MATCH) == Tick(
        received_ns=RECEIVED,
        asset="bitcoin",
        price_usd="400.23",
        quote="USD",
        source="coinbase",
        symbol="BTC-USD",
        event_ns=1_415_348_367_028_459_000,
        quantity="5.23512",
        trade_id=10,
    )


@pytest.mark.parametrize(
    ("message", "event"),
    [
        (HEARTBEAT, Control("heartbeat", symbol="BTC-USD", last_trade_id=20)),
        (HEARTBEAT | {"last_trade_id": 0}, Control("heartbeat", symbol="BTC-USD")),
        (TICKER, Control("heartbeat", symbol="ETH-USD", last_trade_id=370843401)),
        (SUBSCRIPTIONS, Control("subscribed")),
        (ERROR, Control("error", "'Failed to subscribe': 'XYZ-USD is not a valid product'")),
        ({"type": "l2update", "product_id": "BTC-USD"}, Ignored("l2update")),
        ({"type": "something_of_next_year"}, Ignored("another type")),
    ],
)
def test_what_is_no_match_is_told_apart(message: object, event: Event) -> None:
    assert receive(message) == event


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("no json", "not JSON"),
        ("[]", "not a JSON object"),
        ({"no": "type"}, "type is missing"),
        (MATCH | {"product_id": "XYZ-USD"}, "unknown product 'XYZ-USD'"),
        (MATCH | {"product_id": ["BTC-USD"]}, "unknown product ['BTC-USD']"),
        (MATCH | {"trade_id": "10"}, "trade id trade_id is '10'"),
        (MATCH | {"price": "0.00"}, "price price is '0.00'"),
        (MATCH | {"size": "-1"}, "quantity size is '-1'"),
        (MATCH | {"time": "2014-11-07 08:19:27"}, "trade time time is '2014-11-07 08:19:27'"),
        (MATCH | {"time": "2014-02-30T08:19:27Z"}, "trade time time is"),
    ],
)
def test_a_frame_that_is_no_tick_is_rejected_with_its_reason(message: object, reason: str) -> None:
    event = receive(message)
    assert isinstance(event, Reject)
    assert reason in event.reason


def test_it_subscribes_to_matches_tickers_and_heartbeats_of_each_product() -> None:
    feed = make_feed("coinbase", ["bitcoin"])
    solana = VENUES["coinbase"].instruments["solana"]
    channels = '"channels":["matches","ticker","heartbeat"]'
    assert feed.url == "wss://ws-feed.exchange.coinbase.com"
    assert feed.opening_frames() == [f'{{"type":"subscribe","product_ids":["BTC-USD"],{channels}}}']
    assert feed.subscribe([solana]) == [f'{{"type":"subscribe","product_ids":["SOL-USD"],{channels}}}']
    assert feed.opening_frames() == [f'{{"type":"subscribe","product_ids":["BTC-USD","SOL-USD"],{channels}}}']
    assert feed.unsubscribe([solana]) == [f'{{"type":"unsubscribe","product_ids":["SOL-USD"],{channels}}}']
    assert feed.opening_frames() == [f'{{"type":"subscribe","product_ids":["BTC-USD"],{channels}}}']


def test_many_symbols_are_asked_for_in_parts() -> None:
    many = [Instrument(f"a{n}", f"A{n}-USD", "USD") for n in range(250)]
    requests = [json.loads(text) for text in feed_of("coinbase", many).opening_frames()]
    assert [len(request["product_ids"]) for request in requests] == [100, 100, 50]
