"""Green means ticks: a feed that says something and delivers nothing is neither healthy nor relied on."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from conf.settings import PROJECT, Settings
from ingestion.feeds import feed_of, make_feed
from ingestion.instruments import Instrument
from ingestion.liveness import LEAST_TICKS, Liveness
from ingestion.operation import ADDRESS_FILE
from ingestion.ticks import Control, Tick
from operation import addresses
from tests.programs import Program, ingestion, simulator, wait_until

ASSETS = ["bitcoin", "ethereum", "filecoin"]


@pytest.fixture
def nowhere(suite: Settings) -> Settings:
    """Kafka does not answer: everything stays in the spool."""
    return suite.model_copy(update={"kafka_bootstrap_servers": "127.0.0.1:1"})


def ask(folder: Path, path: str) -> tuple[int, dict[str, Any]]:
    """HTTP status and body of a running ingester; 0 before it is up."""
    address = addresses.read_address(folder / "spool" / ADDRESS_FILE)
    if address is None:
        return 0, {}
    code, content = addresses.ask(address.url + path, 60)
    return code, json.loads(content)


def ticks(folder: Path, feed: str) -> int:
    return int(ask(folder, "/status")[1].get("feeds", {}).get(feed, {}).get("ticks", 0))


def trouble(folder: Path) -> str:
    """What /healthz calls wrong, Kafka's absence aside."""
    _, body = ask(folder, "/healthz")
    return "; ".join(line for line in body.get("trouble", ()) if "Kafka" not in line)


@contextmanager
def of_venue(
    folder: Path, settings: Settings, venue: str, simulated: Sequence[str], *arguments: str
) -> Iterator[Program]:
    """An ingester of a simulated venue."""
    given = ("--venue", venue, "--assets", ",".join(ASSETS), *simulated)
    follows = ("--feed", venue, "--assets", ",".join(ASSETS), "--stop-seconds", "0")
    with simulator(folder, *given) as (_, url), ingestion(folder, settings, url, *follows, *arguments) as program:
        yield program


@pytest.mark.parametrize("venue", ["binance", "coinbase", "kraken"])
def test_a_delisted_asset_silences_no_other_and_is_named(nowhere: Settings, tmp_path: Path, venue: str) -> None:
    simulated = ("--rate", "100", "--delist", "filecoin")
    with of_venue(tmp_path, nowhere, venue, simulated, "--stale-seconds", "4"):
        wait_until(lambda: ticks(tmp_path, venue) > 100, "the others flow")
        wait_until(lambda: "FIL" in str(ask(tmp_path, "/healthz")[1].get("notes")), "/healthz names it")
        status = ask(tmp_path, "/status")[1]
        undelivered = status["feeds"][venue]["undelivered"]
        assert [symbol[:3] for symbol in undelivered] == ["FIL"]
        if venue != "binance":
            # Binance accepts any subscription.
            assert "the venue says" in next(iter(undelivered.values()))
        assert status["connections"] == 1
        assert not trouble(tmp_path)


def test_several_delisted_assets_of_one_request_are_found_one_after_the_other(
    nowhere: Settings, tmp_path: Path
) -> None:
    simulated = ("--rate", "50", "--delist", "filecoin,ethereum")
    with of_venue(tmp_path, nowhere, "coinbase", simulated):
        wait_until(lambda: ticks(tmp_path, "coinbase") > 50, "bitcoin flows")
        undelivered = ask(tmp_path, "/status")[1]["feeds"]["coinbase"]["undelivered"]
        assert sorted(undelivered) == ["ETH-USD", "FIL-USD"]


@pytest.mark.parametrize("venue", ["coinbase", "kraken"])
def test_heartbeats_without_a_subscription_are_not_health_and_the_next_feed_takes_over(
    nowhere: Settings, tmp_path: Path, venue: str
) -> None:
    """The venue refuses all that is wanted, and goes on with its heartbeats."""
    (tmp_path / "other").mkdir()
    simulated = ("--rate", "50", "--delist", ",".join(ASSETS))
    with simulator(tmp_path / "other", "--assets", ",".join(ASSETS)) as (_, other):
        fallback = ("--fallback-feeds", "binance", "--fallback-urls", f"binance={other}", "--stale-seconds", "4")
        with of_venue(tmp_path, nowhere, venue, simulated, *fallback):
            wait_until(lambda: ticks(tmp_path, "binance") > 20, "the fallback delivers")
            status = ask(tmp_path, "/status")[1]
            assert (status["takeovers"], status["feeds"][venue]["ticks"]) == (1, 0)
            assert set(status["feeds"][venue]["undelivered"]) == {
                symbol.replace("/", "-") if venue == "coinbase" else symbol
                for symbol in ("BTC/USD", "ETH/USD", "FIL/USD")
            }
            wait_until(lambda: not trouble(tmp_path), "the fallback delivers all of them: it is healthy")


def test_heartbeats_alone_are_unhealthy(nowhere: Settings, tmp_path: Path) -> None:
    simulated = ("--rate", "50", "--delist", ",".join(ASSETS))
    with of_venue(tmp_path, nowhere, "kraken", simulated, "--stale-seconds", "3"):
        wait_until(lambda: "no feed has delivered a tick" in trouble(tmp_path), "it is unhealthy")
        assert ask(tmp_path, "/healthz")[0] == 503
        assert ask(tmp_path, "/status")[1]["feeds"]["kraken"]["quiet_seconds"] < 3


@pytest.mark.parametrize("venue", ["coinbase", "kraken", "binance"])
def test_a_subscription_that_dies_is_made_anew_and_nothing_is_missed_for_good(
    nowhere: Settings, tmp_path: Path, venue: str
) -> None:
    """Heartbeats go on; the connection is replaced, and the next one delivers."""
    simulated = ("--rate", "400", "--fault", "dead-subscription")
    with of_venue(tmp_path, nowhere, venue, simulated, "--stale-seconds", "3") as program:
        wait_until(lambda: program.logged("it brings no tick for"), "the connection is replaced")
        before = ticks(tmp_path, venue)
        wait_until(lambda: ticks(tmp_path, venue) > before + 1_000, "ticks flow again")
        wait_until(lambda: not trouble(tmp_path), "it is healthy again")
        assert ask(tmp_path, "/status")[1]["connections"] == 2


# A feed's answer to a refusal, on frames


def refusal(feed: Any, message: object) -> Control:
    (event,) = feed.receive(json.dumps(message).encode(), 10**18)
    assert isinstance(event, Control)
    return event


def coinbase_error(reason: str) -> dict[str, str]:
    return {"type": "error", "message": "Failed to subscribe", "reason": reason}


def products(texts: Sequence[str]) -> list[list[str]]:
    return [json.loads(text)["product_ids"] for text in texts]


def test_coinbase_only_the_request_of_the_refused_product_is_asked_again() -> None:
    feed = feed_of("coinbase", [Instrument(f"a{n}", f"A{n}-USD", "USD") for n in range(150)])
    assert [len(part) for part in products(feed.opening_frames())] == [100, 50]
    control = refusal(feed, coinbase_error("A120-USD is delisted"))
    assert control.symbol == "A120-USD"
    assert products(control.frames) == [[f"A{n}-USD" for n in range(100, 150) if n != 120]]
    assert list(feed.refused) == ["A120-USD"]
    # A new connection does not ask for it, and it is asked for again now and then, by itself.
    assert [len(part) for part in products(feed.opening_frames())] == [100, 49]
    assert products(feed.ask_refused()) == [["A120-USD"]]
    assert not feed.refused


def test_coinbase_an_error_without_a_product_is_narrowed_down() -> None:
    feed = make_feed("coinbase", ["bitcoin", "ethereum", "filecoin"])
    feed.opening_frames()
    assert products(refusal(feed, coinbase_error("some products are not available")).frames) == [
        ["BTC-USD"], ["ETH-USD"], ["FIL-USD"]
    ]  # fmt: skip
    # And not without end.
    assert refusal(feed, coinbase_error("some products are not available")).frames == ()


@pytest.mark.parametrize("reason", ["rate limit exceeded", "Too many requests", "Internal error", "temporarily down"])
def test_a_refusal_that_passes_is_no_refusal_of_an_instrument(reason: str) -> None:
    feed = make_feed("coinbase", ["bitcoin", "ethereum"])
    feed.opening_frames()
    control = refusal(feed, coinbase_error(reason))
    assert (products(control.frames), control.delay > 0) == ([["BTC-USD", "ETH-USD"]], True)
    assert not feed.refused
    for _ in range(10):
        control = refusal(feed, coinbase_error(reason))
    assert control.frames == ()


def test_binance_a_request_that_is_refused_as_a_whole_is_halved_until_one_is_left() -> None:
    feed = feed_of("binance", [Instrument(f"a{n}", f"A{n}USDT", "USDT") for n in range(164)])
    assert feed.url.count("@trade") == 100
    asked = [json.loads(text) for text in feed.opening_frames()]
    assert [len(request["params"]) for request in asked] == [64]
    refused = 0
    while asked:
        request = asked.pop()
        if "a150usdt@trade" in request["params"]:
            refused += 1
            error = {"error": {"code": 2, "msg": "Invalid request"}, "id": request["id"]}
            asked += [json.loads(text) for text in refusal(feed, error).frames]
    assert refused == 7
    assert list(feed.refused) == ["A150USDT"]


def test_kraken_a_reply_is_about_its_symbol() -> None:
    feed = make_feed("kraken", ["bitcoin", "ethereum"])
    (opening,) = feed.opening_frames()
    reply = {"error": "Currency pair not supported BTC/USD", "method": "subscribe", "success": False}
    control = refusal(feed, reply | {"symbol": "BTC/USD", "req_id": json.loads(opening)["req_id"]})
    assert (control.symbol, control.frames) == ("BTC/USD", ())
    assert list(feed.refused) == ["BTC/USD"]
    control = refusal(feed, reply | {"symbol": "ETH/USD", "error": "Exceeded msg rate"})
    assert json.loads(control.frames[0])["params"]["symbol"] == ["ETH/USD"]
    assert control.delay > 0
    again = {"error": "Already subscribed to one or more channels", "method": "subscribe", "symbol": "ETH/USD"}
    assert refusal(feed, again | {"success": False}).kind == "subscribed"
    assert list(feed.refused) == ["BTC/USD"]


# What silence is, by the clock


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def followed(clock: Clock) -> Liveness:
    liveness = Liveness(30.0, clock)
    liveness.begin()
    liveness.follow([Instrument("bitcoin", "BTC", "USD"), Instrument("rare", "RARE", "USD")])
    return liveness


def tick(symbol: str, trade_id: int) -> Tick:
    return Tick(10**18, symbol, "1", "USD", "venue", symbol, 10**18, "1", trade_id)


def test_an_instrument_that_rarely_trades_is_not_silent_and_one_that_always_trades_is() -> None:
    clock = Clock()
    liveness = followed(clock)
    for second in range(6_000):
        clock.now += 1
        liveness.tick(tick("BTC", second))
        if second % 300 == 0:
            liveness.tick(tick("RARE", second))
        assert not liveness.silent(clock.now)
    clock.now += 31
    assert list(liveness.silent(clock.now)) == ["BTC"]
    assert liveness.is_dead(clock.now)
    clock.now += 20 * 300
    assert sorted(liveness.silent(clock.now)) == ["BTC", "RARE"]


@pytest.mark.parametrize("mean", [0.5, 5.0, 60.0])
def test_trades_that_come_in_bursts_and_lulls_are_no_silence(mean: float) -> None:
    """Orders by chance, at a pace that changes by a factor of thirty every few minutes; each with several fills."""
    chance, clock = random.Random(5), Clock()
    liveness = followed(clock)
    pace, silences, number = 1.0, 0, 0
    for _ in range(20_000):
        if chance.random() < 0.02:
            pace = chance.choice([0.1, 1.0, 3.0])
        clock.now += chance.expovariate(1 / (mean * pace))
        silences += bool(liveness.silent(clock.now))
        for _ in range(chance.randrange(1, 5)):
            number += 1
            liveness.tick(tick("BTC", number))
    # A lull of a thirtieth of the pace that begins at once may look like a silence: less than once in 2,000 orders.
    assert silences < 10


def test_a_venue_that_repeats_its_last_trade_delivers_nothing() -> None:
    clock = Clock()
    liveness = followed(clock)
    liveness.tick(tick("BTC", 7))
    for _ in range(10):
        clock.now += 10
        liveness.tick(tick("BTC", 7))
    assert liveness.is_dead(clock.now)


def test_one_silent_instrument_is_seen_unless_another_feed_has_its_asset() -> None:
    clock = Clock()
    liveness = followed(clock)
    for second in range(LEAST_TICKS + 50):
        clock.now += 1
        liveness.tick(tick("BTC", second))
        liveness.tick(tick("RARE", second))
    for second in range(100, 140):
        clock.now += 1
        liveness.tick(tick("RARE", second))
    assert list(liveness.silent(clock.now)) == ["BTC"]
    assert liveness.is_dead(clock.now)
    assert not liveness.is_dead(clock.now, elsewhere={"bitcoin"})
    assert not liveness.is_dead(clock.now, refused={"BTC"})
    assert liveness.is_dead(clock.now, refused={"BTC", "RARE"})


def test_what_is_not_read_is_not_silent() -> None:
    clock = Clock()
    liveness = followed(clock)
    for second in range(50):
        clock.now += 1
        liveness.tick(tick("BTC", second))
    clock.now += 3_600
    liveness.hold()
    assert not liveness.is_dead(clock.now)
    clock.now += 31
    assert liveness.is_dead(clock.now)


def test_neither_the_feed_nor_status_goes_through_the_environments_proxy(
    nowhere: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "ws_proxy", "socks_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    with simulator(tmp_path, "--rate", "100") as (_, url), ingestion(tmp_path, nowhere, url) as program:
        wait_until(lambda: ticks(tmp_path, "binance") > 10, "ticks flow")
        command = [sys.executable, "-m", "ingestion", "status", "--spool-dir", str(tmp_path / "spool")]
        told = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=120)
        assert "binance" in told.stdout
        program.process.kill()
