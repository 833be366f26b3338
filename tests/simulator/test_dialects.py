"""Each simulated venue as a process, met by that venue's own feed, and by plain HTTP."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.exceptions import ConnectionClosedOK
from websockets.sync.client import ClientConnection, connect

from ingestion.feeds import VENUES, Feed, make_feed
from ingestion.ticks import Control, Event, Reject, Tick
from simulator.market import Trade, trades
from tests.programs import Program, running_program

ASSETS = ["bitcoin", "cardano"]


@contextmanager
def venue(folder: Path, name: str, *arguments: str) -> Iterator[tuple[Program, str, str]]:
    """A simulated venue, its WebSocket's and its REST's address."""
    given = ["--port", "0", "--venue", name, "--assets", ",".join(ASSETS), "--seed", "9", *arguments]
    with running_program("simulator", given, folder / f"{name}.log") as program:
        addresses = program.line()
        yield program, addresses["url"], addresses["rest_url"]


@contextmanager
def client(feed: Feed) -> Iterator[ClientConnection]:
    with connect(feed.url, compression=None, ping_interval=None, proxy=None, max_queue=None) as socket:
        for text in feed.opening_frames():
            socket.send(text)
        yield socket


def events_until_the_end(feed: Feed, socket: ClientConnection) -> list[Event]:
    events: list[Event] = []
    try:
        while True:
            events += feed.receive(socket.recv(timeout=60, decode=False), 1)
    except ConnectionClosedOK:
        return events


def made(count: int) -> list[Trade]:
    return list(islice(trades(ASSETS, 50.0, 9), count))


@pytest.mark.parametrize("name", ["binance", "coinbase", "kraken"])
def test_a_venues_own_feed_understands_every_trade(tmp_path: Path, name: str) -> None:
    with venue(tmp_path, name, "--trades", "500", "--speed", "0") as (program, url, _):
        feed = make_feed(name, ASSETS, url)
        with client(feed) as socket:
            events = events_until_the_end(feed, socket)
        assert program.process.wait(60) == 0
    ticks = [event for event in events if isinstance(event, Tick)]
    opened_ms = (ticks[0].event_ns or 0) // 10**6 - made(1)[0].at_ms
    assert [
        (tick.asset, tick.trade_id, tick.price_usd, tick.quantity, tick.event_ns, tick.symbol) for tick in ticks
    ] == [
        (
            trade.asset,
            trade.trade_id,
            trade.price,
            trade.quantity,
            (opened_ms + trade.at_ms) * 10**6,
            VENUES[name].instruments[trade.asset].symbol,
        )
        for trade in made(500)
    ]
    assert not [event for event in events if isinstance(event, Reject)]
    assert not [event for event in events if isinstance(event, Control) and event.kind == "error"]


def test_coincaps_prices_are_parts_of_a_list_for_all_or_for_some(tmp_path: Path) -> None:
    with venue(tmp_path, "coincap", "--trades", "500", "--speed", "0") as (program, url, _):
        feed = make_feed("coincap", ["ALL"], url)
        with client(feed) as socket:
            frames: list[Any] = []
            try:
                while True:
                    frames.append(json.loads(socket.recv(timeout=60)))
            except ConnectionClosedOK:
                pass
        assert program.process.wait(60) == 0
    assert {len(frame) for frame in frames} == {1, 2}
    last = {trade.asset: trade.price for trade in made(500)}
    assert {asset: price for frame in frames for asset, price in frame.items()} == last


def test_coinbase_tells_the_latest_trade_before_and_between(tmp_path: Path) -> None:
    with venue(tmp_path, "coinbase", "--rate", "20") as (_, url, _):
        feed = make_feed("coinbase", ASSETS, url)
        with client(feed) as first:
            while json.loads(first.recv(timeout=60))["type"] != "heartbeat":
                pass
        with client(feed) as second:
            kinds: Counter[str] = Counter()
            until = time.monotonic() + 60
            while not {"last_match", "match", "ticker", "heartbeat"} <= set(kinds):
                assert time.monotonic() < until
                kinds[json.loads(second.recv(timeout=60))["type"]] += 1
            assert next(iter(kinds)) == "subscriptions"
            second.send('{"type":"subscribe","product_ids":["XYZ-USD"],"channels":["matches"]}')
            while (frame := json.loads(second.recv(timeout=60)))["type"] != "error":
                pass
            assert frame["reason"] == "XYZ-USD is not a valid product"


def test_coinbase_cuts_off_who_does_not_subscribe(tmp_path: Path) -> None:
    with venue(tmp_path, "coinbase") as (_, url, _), connect(url, proxy=None) as socket:
        began = time.monotonic()
        with pytest.raises(ConnectionClosedOK):
            socket.recv(timeout=60)
        assert 4.5 < time.monotonic() - began < 30


def test_kraken_sends_a_snapshot_of_what_was(tmp_path: Path) -> None:
    with venue(tmp_path, "kraken", "--rate", "100") as (_, url, _):
        feed = make_feed("kraken", ASSETS, url)
        with client(feed) as first:
            seen: list[int] = []
            while len(seen) < 20:
                seen += [
                    event.trade_id or 0
                    for event in feed.receive(first.recv(timeout=60, decode=False), 1)
                    if isinstance(event, Tick) and event.asset == "bitcoin"
                ]
        with client(feed) as second:
            while '"snapshot"' not in (text := second.recv(timeout=60, decode=True)):
                pass
        again = [event.trade_id for event in feed.receive(str(text).encode(), 1) if isinstance(event, Tick)]
        assert len(again) <= 50
        assert set(again) & set(seen) or min(id for id in again if id) > max(seen)


def test_trades_that_are_not_sent_are_in_the_rest_unless_forgotten(tmp_path: Path) -> None:
    arguments = ("--trades", "400", "--speed", "20", "--skip", "100:5", "--forget", "200:5", "--skip", "399:1")
    expected = [(VENUES["binance"].instruments[trade.asset].symbol, trade.trade_id) for trade in made(400)]
    with venue(tmp_path, "binance", *arguments) as (program, url, rest_url):
        feed = make_feed("binance", ASSETS, url)
        with client(feed) as socket, httpx.Client(base_url=rest_url, trust_env=False) as http:
            got: set[tuple[str, int | None]] = set()

            def read(count: int) -> None:
                while len(got) < count:
                    for event in feed.receive(socket.recv(timeout=60, decode=False), 1):
                        assert isinstance(event, Tick)
                        got.add((event.symbol, event.trade_id))

            read(250)
            first = next(trade_id for symbol, trade_id in expected if symbol == "BTCUSDT")
            answer = http.get(f"/api/v3/historicalTrades?symbol=BTCUSDT&limit=1000&fromId={first}").json()
            read(389)
        assert [one for one in expected if one not in got] == expected[100:105] + expected[200:205] + expected[399:]
        remembered = expected[:200] + expected[205:250]
        ids = [trade_id for symbol, trade_id in remembered if symbol == "BTCUSDT"]
        assert [one["id"] for one in answer][: len(ids)] == ids
        assert program.process.wait(60) == 0


def test_a_limit_of_requests_is_answered_as_the_venue_does(tmp_path: Path) -> None:
    with venue(tmp_path, "kraken") as (_, _, rest_url), httpx.Client(base_url=rest_url, trust_env=False) as http:
        answers = [http.get("/0/public/AssetPairs").json() for _ in range(4)]
    assert answers[0]["result"]["XXBTZUSD"]["wsname"] == "XBT/USD"
    assert answers[-1]["error"] == ["EGeneral:Too many requests"]
