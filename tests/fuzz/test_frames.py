"""Whatever a venue sends, a feed makes ticks, controls or rejects of it; and what it calls a tick is one
for the lake, or in quarantine by the lake's narrower limits.

`--fuzz 1000000` gives each feed a hundredth of so many frames.
"""

from __future__ import annotations

import random
from datetime import UTC, datetime

import pytest

from ingestion.feeds import VENUES
from ingestion.ticks import Control, Ignored, Reject, Tick
from lake.contract import TickRules
from lake.silver import judge
from tests.fuzz.mutations import mutated

RULES = TickRules("rejects", "gaps", 5.0)
NOW = datetime(2024, 8, 9, tzinfo=UTC)
FRAMES = {
    "binance": [
        b'{"stream":"btcusdt@trade","data":{"e":"trade","E":1723161600000,"s":"BTCUSDT","t":7,"p":"61685.99000000",'
        b'"q":"0.00017000","T":1723161600164,"m":true}}',
        b'{"result":null,"id":1}',
        b'{"error":{"code":2,"msg":"Invalid request"},"id":1}',
    ],
    "coinbase": [
        b'{"type":"match","trade_id":10,"sequence":50,"time":"2024-08-09T00:00:00.028459Z","product_id":"BTC-USD",'
        b'"size":"5.23512","price":"400.23","side":"sell"}',
        b'{"type":"heartbeat","sequence":90,"last_trade_id":20,"product_id":"BTC-USD","time":"2024-08-09T00:00:00.0Z"}',
        b'{"type":"error","message":"Failed to subscribe","reason":"BTC-XYZ is not a valid product"}',
    ],
    "kraken": [
        b'{"channel":"trade","type":"update","data":[{"symbol":"BTC/USD","side":"sell","price":0.5117,"qty":40.0,'
        b'"ord_type":"market","trade_id":4665906,"timestamp":"2024-08-09T00:00:00.708706Z"}]}',
        b'{"channel":"heartbeat"}',
        b'{"error":"Currency pair not supported XYZ/USD","method":"subscribe","success":false,"symbol":"XYZ/USD"}',
    ],
    "coincap": [b'{"bitcoin":"16538.73","ethereum":"1234.94"}', b"Unauthorized"],
}


@pytest.mark.parametrize("name", FRAMES)
def test_any_frame_is_told(name: str, fuzz: int) -> None:
    chance, received_ns = random.Random(fuzz), int(NOW.timestamp() * 10**9)
    venue = VENUES[name]
    feed = venue.feed([venue.instruments["bitcoin"]], None, None)
    ticks = 0
    for number in range(max(300, fuzz // 100)):
        for event in feed.receive(mutated(FRAMES[name], chance), received_ns):
            assert isinstance(event, Tick | Reject | Ignored | Control)
            if isinstance(event, Reject):
                event.to_json()
            if isinstance(event, Tick):
                ticks += 1
                value = event.to_json("producer", number)
                verdict = judge.judge(value, "ticks", 0, number, NOW, RULES)
                if isinstance(verdict, judge.Rejection):
                    # The lake's limits are narrower: a time in the year 7443, a product beyond 10^20.
                    assert verdict.rule in ("event_time", "range"), (value, verdict)
                    assert verdict.instrument_ids or event.trade_id is None, "a rejected trade is not missing"
                else:
                    assert isinstance(verdict, judge.Tick), (value, verdict)
    assert ticks > 0


def test_there_are_frames_of_each_venue() -> None:
    assert FRAMES.keys() == VENUES.keys()
