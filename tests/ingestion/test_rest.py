"""A venue's REST: what an answer may cost, when to ask again, and what never goes through a proxy. Over real HTTP."""

from __future__ import annotations

import asyncio
import gzip
import json
import tracemalloc
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from conf.settings import Settings
from conf.text import LONGEST, brief, shown
from ingestion.discovery import Discovery
from ingestion.feeds import make_feed
from ingestion.feeds.kraken import _past_trades
from ingestion.fields import digits
from ingestion.proxies import is_here, proxy_of
from ingestion.rest import LARGEST_LIST, LARGEST_PAGE, Rest, RestBusy, RestRefused
from ingestion.ticks import Tick, is_price
from lake.contract import TickRules
from lake.silver import judge
from tests.ticks import INGESTED_AT, TICK, compact

RULES = TickRules("rejects", "gaps", 5.0)


@asynccontextmanager
async def http(answer: Callable[[str], tuple[int, dict[str, str], bytes]]) -> AsyncIterator[tuple[str, list[str]]]:
    """A server's address, and the request lines that it has had. Of a CONNECT it sees the target."""
    heard: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = (await reader.readline()).decode()
        while (await reader.readline()).strip():
            pass
        heard.append(line.strip())
        status, headers, body = answer(line.split()[1])
        head = [f"HTTP/1.1 {status} Some", *(f"{name}: {value}" for name, value in headers.items())]
        head += [f"Content-Length: {len(body)}", "Connection: close", "", ""]
        writer.write("\r\n".join(head).encode() + body)
        with suppress(ConnectionError):
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", heard


def ask(answer: tuple[int, dict[str, str], bytes], largest: int = LARGEST_PAGE) -> object:
    """What a GET makes of this answer."""

    async def scenario() -> object:
        async with http(lambda _: answer) as (url, _), Rest(url, 0.0, largest_answer=largest) as rest:
            return await rest.get("/list", {})

    return asyncio.run(scenario())


def bomb(size: int) -> bytes:
    """So many spaces in one JSON text, compressed a thousandfold."""
    squeeze = zlib.compressobj(9, wbits=31)
    return b"".join(squeeze.compress(b" " * (1 << 20)) for _ in range(size >> 20)) + squeeze.flush()


def test_a_compressed_answer_is_read_and_a_bomb_is_not_unpacked() -> None:
    assert ask((200, {"Content-Encoding": "gzip"}, gzip.compress(b'[{"a":1.50}]'))) == [{"a": "1.50"}]
    packed = bomb(600 << 20)
    assert len(packed) < 1 << 20
    tracemalloc.start()
    try:
        with pytest.raises(RestRefused, match=f"more than {LARGEST_LIST} bytes"):
            ask((200, {"Content-Encoding": "gzip"}, packed), LARGEST_LIST)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * LARGEST_LIST


@pytest.mark.parametrize(
    ("answer", "error", "match"),
    [
        ((200, {"Content-Encoding": "gzip, gzip"}, gzip.compress(gzip.compress(b"[]"))), RestRefused, "encoded as"),
        ((200, {"Content-Encoding": "br"}, b"[]"), RestRefused, "encoded as br"),
        ((200, {"Content-Encoding": "gzip"}, b"not gzip"), RestBusy, "not gzip"),
        ((200, {"Content-Encoding": "gzip"}, gzip.compress(b"[1,2,3]" * 99)[:-9]), RestBusy, "cut off"),
        ((200, {}, b" " * (LARGEST_PAGE + 1)), RestRefused, f"more than {LARGEST_PAGE} bytes"),
        (
            (200, {"Content-Encoding": "gzip"}, gzip.compress(b"[" + b"0," * (4 << 20) + b"0]")),
            RestRefused,
            "more than",
        ),
        ((200, {}, b"<html>"), RestBusy, "not JSON"),
        ((200, {}, b"[" * 100_000), RestBusy, "not JSON"),
        ((403, {}, b""), RestBusy, "HTTP 403"),
        ((408, {}, b""), RestBusy, "HTTP 408"),
        ((500, {}, b""), RestBusy, "HTTP 500"),
        ((401, {}, b""), RestRefused, "HTTP 401"),
        ((451, {}, b""), RestRefused, "HTTP 451"),
        ((302, {"Location": "http://127.0.0.1:1/"}, b""), RestRefused, "HTTP 302"),
    ],
    ids=[
        *("two encodings", "unknown encoding", "not gzip", "gzip cut off", "large", "large when unpacked", "html"),
        *("deep", "403", "408", "500", "401", "451", "302"),
    ],
)
def test_an_answer_that_cannot_be_used_is_busy_or_refused(
    answer: tuple[int, dict[str, str], bytes], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        ask(answer)


def test_a_ban_of_days_is_waited_out_by_everybody() -> None:
    with pytest.raises(RestBusy) as busy:
        ask((418, {"Retry-After": "259200"}, b""))
    assert busy.value.wait == 259_200


def test_a_list_that_is_closed_for_legal_reasons_is_had_from_the_market_data_address() -> None:
    """Binance's HTTP 451: the same list is at another address of the venue, without a key."""
    pair = {"symbol": "BTCUSDT", "baseAsset": "BTC", "quoteAsset": "USDT", "status": "TRADING"}

    async def scenario() -> None:
        listed = json.dumps({"symbols": [pair]}).encode()
        async with http(lambda _: (451, {}, b"{}")) as (closed, asked), http(lambda _: (200, {}, listed)) as (other, _):
            urls = {"rest_urls": {"binance": closed}, "market_data_urls": {"binance": other}}
            found = await Discovery(Settings.model_validate({"discover": "all", **urls}), "binance").find()
            assert [one.symbol for one in found] == ["BTCUSDT"]
            assert len(asked) == 1
            async with Rest(closed, 0.0, market_data_url=other) as rest:
                for _ in range(3):
                    await rest.get("/api/v3/historicalTrades", {})
            # The first address is not asked again.
            assert len(asked) == 2
            closed_too = {"rest_urls": {"binance": closed}, "market_data_urls": {"binance": closed}}
            with pytest.raises(RestRefused, match="HTTP 451"):
                await Discovery(Settings.model_validate({"discover": "all", **closed_too}), "binance").find()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        ("EGeneral:Temporary lockout", True),
        ("EGeneral:Internal error", True),
        ("EGeneral:Too many requests", True),
        ("EService:Unavailable", True),
        ("EService:Market in cancel_only mode", True),
        ("EAPI:Rate limit exceeded", True),
        ("EOf next year:Whatever", True),
        ("EQuery:Unknown asset pair", False),
        ("EGeneral:Invalid arguments", False),
    ],
)
def test_krakens_errors_are_passing_unless_the_question_is_wrong(error: str, passes: bool) -> None:
    with pytest.raises(RestBusy if passes else RestRefused, match=error):
        _past_trades({"error": [error], "result": {}})


def test_krakens_warning_is_no_error_and_its_words_forge_no_log_line() -> None:
    assert _past_trades({"error": ["WGeneral:Deprecated"], "result": {"last": "1", "XXBTZUSD": []}}) == ([], 1)
    with pytest.raises(RestBusy) as busy:
        _past_trades({"error": ["EService:\r\n2026 ERROR forged \x1b[2J" + "x" * 9_999]})
    assert str(busy.value).isprintable()
    assert len(str(busy.value)) < 2 * LONGEST


# Proxies


@pytest.mark.parametrize(
    ("url", "here"),
    [
        ("ws://127.0.0.1:9001/stream", True),
        ("http://localhost:9001", True),
        ("http://LOCALHOST.:9001", True),
        ("http://venue.localhost/", True),
        ("http://127.8.9.1/", True),
        ("ws://[::1]:9001/", True),
        ("ws://[::ffff:127.0.0.1]:9001/", True),
        ("http://user:password@127.0.0.1/", True),
        ("http://0.0.0.0:1/", True),
        ("wss://data-stream.binance.vision/stream", False),
        ("http://127.0.0.1.example.org/", False),
        ("http://localhost.example.org/", False),
        ("http://10.0.0.1/", False),
    ],
)
def test_only_what_is_elsewhere_goes_through_the_proxy(url: str, here: bool) -> None:
    assert is_here(url) == here
    assert proxy_of(url, SecretStr("http://proxy:3128")) == (None if here else "http://proxy:3128")
    assert proxy_of(url, None) is None


def test_the_environments_proxies_are_not_asked_and_the_setting_is(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with http(lambda _: (200, {}, b"[]")) as (url, direct), http(lambda _: (502, {}, b"")) as (proxy, asked):
            for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"):
                monkeypatch.setenv(name, proxy)
            monkeypatch.delenv("no_proxy", raising=False)
            async with Rest(url, 0.0) as rest:
                assert await rest.get("/list", {}) == []
            assert (len(direct), asked) == (1, [])
            venue = "https://venue.invalid"
            async with Rest(venue, 0.0, proxy=proxy_of(venue, SecretStr(proxy))) as rest:
                with pytest.raises(RestBusy):
                    await rest.get("/list", {})
            assert asked == ["CONNECT venue.invalid:443 HTTP/1.1"]

    asyncio.run(scenario())


# Foreign text, and numbers


@given(st.text())
def test_escaped_text_is_short_and_prints_on_one_line(text: str) -> None:
    line = shown(text)
    assert line.isprintable()
    assert len(line) <= 10 * LONGEST + 3
    if text.isprintable() and len(text) <= LONGEST:
        assert line == text
    assert brief(text).isprintable()


@given(st.from_regex(r"\+?0{0,40}[0-9]{0,18}(\.[0-9]{0,14}0{0,90})?([eE][+-]?[0-9]{1,3})?", fullmatch=True))
def test_a_feed_takes_the_numbers_that_the_lake_takes_with_the_same_value(text: str) -> None:
    kept = digits(text)
    (ours,) = judge_price(kept) if is_price(kept) else (None,)
    (theirs,) = judge_price(text)
    assert ours == theirs


def judge_price(text: object) -> tuple[object]:
    """The price that the lake reads in a tick, or None if it is not one."""
    value = compact({**TICK, "price_usd": text, "quantity": None})
    verdict = judge.judge(value, "ticks", 0, 0, INGESTED_AT, RULES)
    return (verdict.price_usd if isinstance(verdict, judge.Tick) else None,)


def test_a_binance_time_in_microseconds_is_that_time() -> None:
    feed = make_feed("binance", ["bitcoin"], "ws://127.0.0.1:1/stream?timeUnit=MICROSECOND")
    assert feed.url == "ws://127.0.0.1:1/stream?timeUnit=MICROSECOND&streams=btcusdt@trade"
    for made_at, event_ns in (
        (1_723_161_601_437, 1_723_161_601_437_000_000),
        (1_723_161_601_437_123, 1_723_161_601_437_123_000),
    ):
        trade = {"e": "trade", "s": "BTCUSDT", "t": 1, "p": "1.50", "q": "2", "T": made_at}
        (tick,) = feed.receive(json.dumps({"stream": "btcusdt@trade", "data": trade}).encode(), 10**18)
        assert isinstance(tick, Tick)
        assert tick.event_ns == event_ns


def test_instruments_whose_names_are_no_names_are_named_once_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    pairs = [("BTCUSDT", "BTC"), ("\u5e01\u5b89\u4eba\u751fUSDT", "\u5e01\u5b89\u4eba\u751f"), ("A\nBUSDT", "A\nB")]
    rows = [{"symbol": s, "baseAsset": b, "quoteAsset": "USDT", "status": "TRADING"} for s, b in pairs]

    async def scenario() -> None:
        async with http(lambda _: (200, {}, json.dumps({"symbols": rows}).encode())) as (url, _):
            discovery = Discovery(Settings(discover="all", rest_urls={"binance": url}), "binance")
            for _ in range(2):
                assert [one.symbol for one in await discovery.find()] == ["BTCUSDT"]
            assert len(discovery.left_out) == 2

    asyncio.run(scenario())
    (message,) = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert "\u5e01\u5b89\u4eba\u751fUSDT" in message
    assert message.isprintable()
