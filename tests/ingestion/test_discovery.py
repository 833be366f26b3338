"""Which instruments are followed: looked up over real HTTP at simulated venues, and changed on a live connection."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from websockets.asyncio.server import ServerConnection, serve
from websockets.http11 import Request, Response

from conf.settings import Settings, SettingsError
from ingestion.clock import Clock
from ingestion.connection import Connection
from ingestion.counts import Counts
from ingestion.discovery import Discovery, Refresh, _instruments_of
from ingestion.feeds import VENUES, feed_of
from ingestion.gaps import GapTracker
from ingestion.instruments import Instrument
from ingestion.intake import Intake, Topics
from ingestion.rest import RestBusy, RestRefused
from ingestion.source import Source
from ingestion.spool import Spool
from simulator.__main__ import DIALECTS
from simulator.dialects import Listing, Reply
from simulator.dialects.coincap import CoinCap
from simulator.market import trades
from simulator.venue import Venue

ASSETS = ["bitcoin", "ethereum", "solana", "dogecoin", "binance-coin"]


@asynccontextmanager
async def rest_of(name: str, assets: list[str]) -> AsyncIterator[tuple[str, Venue]]:
    """A simulated venue's REST address."""
    listing = Listing(name, assets)
    venue = Venue(lambda _: iter(()), 1.0, DIALECTS[name](listing), listing.history)
    async with await venue.listen(0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", venue


def symbols(instruments: list[Instrument]) -> list[tuple[str, str, str]]:
    return [(one.asset, one.symbol, one.quote) for one in instruments]


@pytest.mark.parametrize("name", ["binance", "coinbase", "kraken"])
def test_all_that_a_venue_trades_has_the_tables_names(name: str) -> None:
    async def scenario() -> None:
        async with rest_of(name, ASSETS) as (url, _):
            found = await Discovery(Settings(discover="all", rest_urls={name: url}), name).find()
        traded = VENUES[name].instruments
        assert found == [traded[asset] for asset in ASSETS if asset in traded]
        assert len(found) >= 4

    asyncio.run(scenario())


@pytest.mark.parametrize("name", ["binance", "coinbase", "kraken", "coincap"])
def test_the_top_are_those_of_coincap_that_the_venue_trades_largest_first(name: str) -> None:
    order = ["solana", "bitcoin", "binance-coin", "dogecoin", "ethereum"]

    async def scenario() -> None:
        async with rest_of("coincap", order) as (coincap, _), rest_of(name, ASSETS) as (url, _):
            settings = Settings(discover="top", top_assets=4, rest_urls={name: url, "coincap": coincap})
            found = await Discovery(settings, name).find()
        traded = VENUES[name].instruments
        assert found == [traded[asset] for asset in order[:4] if asset in traded]

    asyncio.run(scenario())


def test_named_assets_are_those_of_the_table_and_an_unknown_one_is_named() -> None:
    async def scenario() -> None:
        found = await Discovery(Settings(assets=["solana"]), "kraken").find()
        assert symbols(found) == [("solana", "SOL/USD", "USD")]
        with pytest.raises(SettingsError, match="kraken has no gold"):
            await Discovery(Settings(assets=["gold"]), "kraken").find()
        everything = await Discovery(Settings(discover="all"), "coincap").find()
        assert symbols(everything) == [("ALL", "ALL", "USD")]

    asyncio.run(scenario())


def test_a_name_beyond_the_table_is_coincaps_or_the_currency_and_never_another_assets() -> None:
    pairs = [
        ("BTC-USDT", "BTC", "USDT"),
        ("BTC-USD", "BTC", "USD"),
        ("PEPE-USD", "PEPE", "USD"),
        ("AAVE2-USD", "TEZOS", "USD"),
        ("WIF-USD", "WIF", "USD"),
        ("XYZ-USD", "XYZ", "USD"),
    ]
    names = {"WIF": "dogwifhat", "BTC": "other", "XYZ": "bitcoin"}
    assert symbols(_instruments_of(VENUES["coinbase"], pairs, names)) == [
        ("bitcoin", "BTC-USDT", "USDT"),
        ("bitcoin", "BTC-USD", "USD"),
        ("pepe", "PEPE-USD", "USD"),
        ("tezos-coinbase", "AAVE2-USD", "USD"),
        ("dogwifhat", "WIF-USD", "USD"),
        ("xyz", "XYZ-USD", "USD"),
    ]


def test_what_is_not_traded_now_and_what_is_quoted_otherwise_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def product(base: str, quote: str, **other: object) -> dict[str, object]:
        return {
            "id": f"{base}-{quote}", "base_currency": base, "quote_currency": quote, "status": "online",
            "trading_disabled": False, **other,
        }  # fmt: skip

    answer = [
        product("BTC", "USD"),
        product("BTC", "EUR"),
        product("ETH", "USDT"),
        product("SOL", "USD", status="delisted"),
        product("ADA", "USD", trading_disabled=True),
        product("b d", "USD"),
        {"id": 7},
        None,
    ]

    async def scenario() -> None:
        async with rest_of("coinbase", ASSETS) as (url, venue):
            monkeypatch.setattr(venue._dialect, "rest", lambda path, query: Reply(200, answer))
            found = await Discovery(Settings(discover="all", rest_urls={"coinbase": url}), "coinbase").find()
            assert symbols(found) == [("bitcoin", "BTC-USD", "USD"), ("ethereum", "ETH-USDT", "USDT")]
            monkeypatch.setattr(venue._dialect, "rest", lambda path, query: Reply(200, {"no": "list"}))
            with pytest.raises(RestBusy, match="no list of pairs"):
                await Discovery(Settings(discover="all", rest_urls={"coinbase": url}), "coinbase").find()

    asyncio.run(scenario())


def test_coincaps_key_travels_in_a_header_and_is_in_no_message(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        heard: list[str] = []

        async def no_websocket(client: ServerConnection) -> None:
            await client.close()

        def answer(client: ServerConnection, request: Request) -> Response:
            heard.append(request.headers.get("Authorization", ""))
            heard.append(request.path)
            return client.respond(HTTPStatus.UNAUTHORIZED, "no")

        async with serve(no_websocket, "127.0.0.1", 0, process_request=answer) as server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            settings = Settings(discover="top", rest_urls={"coincap": url}, coincap_api_key=SecretStr("canary"))
            with pytest.raises(RestRefused) as refused:
                await Discovery(settings, "coincap").find()
        assert heard == ["Bearer canary", "/v3/assets?limit=50"]
        assert "canary" not in str(refused.value)
        assert "canary" not in repr(settings)

    asyncio.run(scenario())


@pytest.mark.parametrize("name", ["binance", "coinbase", "kraken", "coincap"])
def test_assets_come_and_go_on_a_live_feed_without_a_gap_in_the_others(name: str, tmp_path: Path) -> None:
    """The list changes while trades flow: none of the asset that stays is missed, and no other connection is lost."""

    async def scenario() -> None:
        listing = Listing("coincap", ["bitcoin", "solana"])
        traded = Listing(name, ["bitcoin", "solana", "dogecoin"])
        dialect = DIALECTS[name](traded)
        venue = Venue(
            lambda opened_ms: dialect.frames(trades(traded.assets, 300.0, 4), opened_ms), 1.0, dialect, traded.history
        )
        coincap = Venue(lambda _: iter(()), 1.0, CoinCap(listing), listing.history)
        async with await venue.listen(0) as server, await coincap.listen(0) as list_server:
            port, list_port = (each.sockets[0].getsockname()[1] for each in (server, list_server))
            playing = asyncio.create_task(venue.play())
            urls = {name: f"http://127.0.0.1:{port}", "coincap": f"http://127.0.0.1:{list_port}"}
            discovery = Discovery(Settings(discover="top", rest_urls=urls), name)
            found = await discovery.find()
            feed = feed_of(name, found, f"ws://127.0.0.1:{port}{dialect.path}")
            spool = Spool(tmp_path / "spool", 10.0, 1 << 30)
            tracker = GapTracker()
            intake = Intake(feed, spool, Counts(), Topics("ticks", "rejects", "gaps"), tracker)
            source = Source(intake, lambda intake: Connection(intake, Clock(), 1 << 20))
            source.start()
            refresh = Refresh(discovery, source, tracker, 0.2)
            refresh.begin(found)
            tasks = [asyncio.create_task(part) for part in (spool.run(), refresh.run())]

            def ticks(asset: str) -> list[dict[str, Any]]:
                values = [json.loads(record.value) for record in spool.records(0) if record.topic == "ticks"]
                return [tick for tick in values if tick["asset"] == asset]

            async def until(condition: Callable[[], bool]) -> None:
                async with asyncio.timeout(60):
                    while True:
                        if condition():
                            return
                        assert source.look(60.0)
                        for task in tasks:
                            assert not task.done()
                        await asyncio.sleep(0.1)

            await until(lambda: bool(ticks("bitcoin") and ticks("solana")))
            assert not ticks("dogecoin")
            listing.assets[:] = ["bitcoin", "dogecoin"]
            await until(lambda: bool(ticks("dogecoin")))
            symbol = traded.symbols["solana"]
            assert refresh.instrument(symbol) is None
            # Longer than Kraken's snapshot of the latest trades reaches back.
            await asyncio.sleep(3.0)
            before = len(ticks("solana"))
            listing.assets[:] = ["bitcoin", "dogecoin", "solana"]
            await until(lambda: len(ticks("solana")) > before)
            await asyncio.sleep(1.5)
            assert tracker.changes(time.time_ns()) == []
            if name != "coincap":
                ids = sorted({tick["trade_id"] for tick in ticks("bitcoin")})
                assert ids == list(range(ids[0], ids[-1] + 1))
                assert intake.counts.connections == 1
                missing = sorted({tick["trade_id"] for tick in ticks("solana")})
                assert missing != list(range(missing[0], missing[-1] + 1)), "it was not left"
            source.stop()
            await source.ended()
            for task in (*tasks, playing):
                task.cancel()
            await asyncio.wait([*tasks, playing])
            spool.close()

    asyncio.run(scenario())
