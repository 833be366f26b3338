"""Frames of Kraken's WebSocket API v2, as documented, and of its v1, as recorded: odd input today."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence

import pytest

from ingestion.feeds import VENUES, feed_of, make_feed
from ingestion.instruments import Instrument
from ingestion.ticks import Control, Event, Ignored, Reject, Tick
from tests.programs import RECORDINGS

RECEIVED = 1_695_628_177_708_800_000
RECORDING = RECORDINGS / "kraken-v1-trades-20210417.gz"
MATIC = Instrument("polygon", "MATIC/USD", "USD")
# From the documentation of the channel.
SNAPSHOT = (
    '{"channel":"trade","type":"snapshot","data":[{"symbol":"MATIC/USD","side":"buy","price":0.5147,"qty":6423.46326,'
    '"ord_type":"limit","trade_id":4665846,"timestamp":"2023-09-25T07:48:36.925533Z"},{"symbol":"MATIC/USD",'
    '"side":"buy","price":0.5147,"qty":1136.19677815,"ord_type":"limit","trade_id":4665847,'
    '"timestamp":"2023-09-25T07:49:36.925603Z"}]}'
)
UPDATE = (
    '{"channel":"trade","type":"update","data":[{"symbol":"MATIC/USD","side":"sell","price":0.5117,"qty":40.0,'
    '"ord_type":"market","trade_id":4665906,"timestamp":"2023-09-25T07:49:37.708706Z"}]}'
)


def receive(text: str) -> Sequence[Event]:
    return feed_of("kraken", [MATIC]).receive(text.encode(), RECEIVED)


def tick(price: str, quantity: str, trade_id: int, event_ns: int) -> Tick:
    return Tick(RECEIVED, "polygon", price, "USD", "kraken", "MATIC/USD", event_ns, quantity, trade_id)


def test_snapshots_and_updates_are_ticks_with_the_digits_of_bare_numbers() -> None:
    assert receive(SNAPSHOT) == [
        tick("0.5147", "6423.46326", 4665846, 1_695_628_116_925_533_000),
        tick("0.5147", "1136.19677815", 4665847, 1_695_628_176_925_603_000),
    ]
    assert receive(UPDATE) == [tick("0.5117", "40.0", 4665906, 1_695_628_177_708_706_000)]


def test_a_number_with_an_exponent_is_written_out_exactly() -> None:
    assert receive(UPDATE.replace("0.5117", "1.392e-05").replace("40.0", "5E-8")) == [
        tick("0.00001392", "0.00000005", 4665906, 1_695_628_177_708_706_000)
    ]


@pytest.mark.parametrize(
    ("text", "event"),
    [
        ('{"channel":"heartbeat"}', Control("heartbeat")),
        (
            '{"channel":"status","type":"update","data":[{"api_version":"v2","connection_id":1,"system":"online",'
            '"version":"2.0.0"}]}',
            Ignored("status"),
        ),
        ('{"channel":"of next year"}', Ignored("another channel")),
        (
            '{"method":"subscribe","result":{"channel":"trade","snapshot":true,"symbol":"MATIC/USD"},"success":true,'
            '"time_in":"2023-09-25T09:21:10.428340Z","time_out":"2023-09-25T09:21:10.428375Z"}',
            Control("subscribed"),
        ),
        (
            '{"error":"Currency pair not supported XYZ/USD","method":"subscribe","success":false,"symbol":"XYZ/USD"}',
            Control("error", "'Currency pair not supported XYZ/USD'"),
        ),
    ],
)
def test_what_is_no_trade_is_told_apart(text: str, event: Event) -> None:
    assert receive(text) == [event]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("no json", "not JSON"),
        ("{}", "neither a channel's message nor a reply"),
        ('{"channel":"trade","type":"update","data":{}}', "the trade channel's data is {}"),
        ('{"channel":"trade","type":"update","data":[7]}', "a trade is 7"),
        (UPDATE.replace("MATIC", "XYZ"), "unknown symbol 'XYZ/USD'"),
        (UPDATE.replace("4665906", '"4665906"'), "trade id trade_id is '4665906'"),
        (UPDATE.replace("0.5117", "0.0"), "price price is '0.0'"),
        (UPDATE.replace("40.0", "null"), "quantity qty is missing"),
        (UPDATE.replace("2023-09-25T", "2023-09-25 "), "trade time timestamp is"),
    ],
)
def test_a_frame_that_is_no_tick_is_rejected_with_its_reason(text: str, reason: str) -> None:
    (event,) = receive(text)
    assert isinstance(event, Reject)
    assert reason in event.reason


def test_one_bad_trade_does_not_take_the_others_of_its_frame_along() -> None:
    first, second = receive(SNAPSHOT.replace("6423.46326", '"?"'))
    assert isinstance(first, Reject)
    assert first.trade_id == 4665846
    assert isinstance(second, Tick)


@pytest.mark.skipif(not RECORDING.exists(), reason="no recording")
def test_frames_of_the_old_protocol_are_rejected_and_raise_nothing() -> None:
    with gzip.open(RECORDING, "rt") as lines:
        texts = [line.strip().partition(": ")[2] for line in lines]
    events = [event for text in texts for event in receive(text)]
    assert len(events) == len(texts) == 49
    assert all(isinstance(event, Reject) for event in events)


def test_it_subscribes_to_trades_with_their_snapshot() -> None:
    feed = make_feed("kraken", ["bitcoin"])
    solana = VENUES["kraken"].instruments["solana"]
    assert feed.url == "wss://ws.kraken.com/v2"
    (opening,) = feed.opening_frames()
    assert json.loads(opening) == {
        "method": "subscribe",
        "params": {"channel": "trade", "symbol": ["BTC/USD"], "snapshot": True},
        "req_id": 1,
    }
    (added,) = feed.subscribe([solana]) or ()
    assert json.loads(added)["params"]["symbol"] == ["SOL/USD"]
    (left,) = feed.unsubscribe([solana]) or ()
    assert (json.loads(left)["method"], json.loads(left)["params"]["symbol"]) == ("unsubscribe", ["SOL/USD"])
    (opening,) = feed.opening_frames()
    assert json.loads(opening)["params"]["symbol"] == ["BTC/USD"]


def test_many_symbols_are_asked_for_in_parts() -> None:
    many = [Instrument(f"a{n}", f"A{n}-USD", "USD") for n in range(250)]
    requests = [json.loads(text) for text in feed_of("kraken", many).opening_frames()]
    assert [len(request["params"]["symbol"]) for request in requests] == [100, 100, 50]
