"""Whatever a venue sends, a feed raises nothing, and what it says of it is fit for a log and for Kafka."""

from __future__ import annotations

import json
import random

import pytest

from ingestion.feeds import VENUES, make_feed
from ingestion.gaps import GapTracker
from ingestion.ticks import Control, Reject, Tick, is_price, is_quantity

TRADES = {
    "binance": [
        '{"stream":"btcusdt@trade","data":{"e":"trade","E":1,"s":"BTCUSDT","t":7,"p":"1.50","q":"2","T":1723161601437}}',
        '{"error":{"code":2,"msg":"Invalid request"},"id":1}',
        '{"result":null,"id":1}',
        '{"e":"serverShutdown","E":1770123456789}',
        '{"stream":"btcusdt@depth@100ms","data":{}}',
    ],
    "coinbase": [
        '{"type":"match","trade_id":10,"sequence":50,"time":"2014-11-07T08:19:27.028459Z","product_id":"BTC-USD",'
        '"size":"5.23512","price":"400.23","side":"sell"}',
        '{"type":"ticker","product_id":"BTC-USD","price":"400.23","time":"2014-11-07T08:19:27.028459Z","trade_id":11}',
        '{"type":"heartbeat","sequence":90,"last_trade_id":20,"product_id":"BTC-USD"}',
        '{"type":"subscriptions","channels":[{"name":"matches","product_ids":["BTC-USD"]}]}',
        '{"type":"error","message":"Failed to subscribe","reason":"BTC-USD is delisted"}',
    ],
    "kraken": [
        '{"channel":"trade","type":"update","data":[{"symbol":"BTC/USD","side":"sell","price":0.5117,"qty":40.0,'
        '"ord_type":"market","trade_id":4665906,"timestamp":"2023-09-25T07:49:37.708706Z"}]}',
        '{"channel":"heartbeat"}',
        '{"error":"Currency pair not supported","method":"subscribe","success":false,"symbol":"BTC/USD","req_id":1}',
        '{"method":"subscribe","result":{"channel":"trade","symbol":"BTC/USD"},"success":true}',
    ],
    "coincap": ['{"bitcoin":"16538.73","ethereum":"1234.94"}', '{"error":"no"}', "Unauthorized"],
}
VALUES = [
    *("null", "true", "[]", "{}", '""', "0", "-1", "1e999", "1E-400", "9" * 400, "-" * 9, '"\\ud800"', "1.5"),
    *('"\\u0000\\u001b[2J"', '"' + "9" * 5000 + '"', "[" * 2_000, '{"a":' * 500, '"NaN"', "NaN", '"0x1"', '"\u0661"'),
    "18446744073709551616",
]


def mutated(frame: str, chance: random.Random) -> bytes:
    """The frame with a value or some bytes replaced, left out, repeated or cut."""
    if chance.random() < 0.5:
        try:
            keys = json.dumps(json.loads(frame)).split('"')[1::2]
        except ValueError:
            keys = ["x"]
        key = chance.choice(keys)
        at = frame.find(f'"{key}":')
        if at >= 0:
            start = at + len(key) + 3
            end = min((place for mark in ",}]" if (place := frame.find(mark, start)) >= 0), default=len(frame))
            return (frame[:start] + chance.choice(VALUES) + frame[end:]).encode("utf-8", "surrogatepass")
    data = bytearray(frame.encode())
    for _ in range(chance.randrange(1, 8)):
        at = chance.randrange(len(data) + 1)
        kind = chance.randrange(4)
        if kind == 0:
            data[at : at + 1] = bytes([chance.randrange(256)])
        elif kind == 1:
            del data[at : at + chance.randrange(1, 9)]
        elif kind == 2:
            data[at:at] = data[max(0, at - 9) : at]
        else:
            del data[at:]
    return bytes(data)


@pytest.mark.parametrize("name", VENUES)
def test_ten_thousand_mutated_frames_raise_nothing(name: str) -> None:
    chance = random.Random(16)
    feed, tracker = make_feed(name, ["bitcoin", "ethereum"]), GapTracker()
    kinds = set()
    for number in range(10_000):
        if number % 100 == 0:
            feed.opening_frames()
        for event in feed.receive(mutated(chance.choice(TRADES[name]), chance), 10**18):
            kinds.add(type(event).__name__)
            if isinstance(event, Tick):
                assert is_price(event.price_usd)
                assert event.quantity is None or is_quantity(event.quantity)
                json.loads(tracker.observe(event).to_json("p", number))
            elif isinstance(event, Reject):
                assert event.reason.isprintable()
                assert len(event.reason) < 400
                tracker.observe_reject(event)
                json.loads(event.to_json())
            elif isinstance(event, Control):
                assert event.text.isprintable()
                assert len(event.text) < 400
                assert all(json.loads(text) for text in event.frames)
                if event.symbol is not None and event.last_trade_id is not None:
                    tracker.mentioned(name, event.symbol, event.last_trade_id, 10**18)
    tracker.changes(2 * 10**18)
    assert {"Tick", "Reject"} <= kinds
