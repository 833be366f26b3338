"""Frames of Binance become ticks with the venue's own digits, and what is no trade is named."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from ingestion.feeds import VENUES, feed_of, make_feed
from ingestion.instruments import Instrument
from ingestion.ticks import Control, Event, Ignored, Reject, Tick
from tests.ingestion import recorded
from tests.programs import RECORDINGS

RECEIVED = 1_723_161_600_164_378_285
TRADE = {
    "e": "trade", "E": 1723161601438, "s": "BTCUSDT", "t": 3735693016,
    "p": "61685.99000000", "q": "0.00017000", "T": 1723161601437, "m": True, "M": True,
}  # fmt: skip


def receive(frame: bytes | str) -> Sequence[Event]:
    feed = make_feed("binance", ["bitcoin", "ethereum"])
    return feed.receive(frame.encode() if isinstance(frame, str) else frame, RECEIVED)


def frame(stream: object = "btcusdt@trade", **fields: object) -> str:
    """A real frame with some fields changed; None takes a field out."""
    changed = {name: value for name, value in {**TRADE, **fields}.items() if value is not None}
    return json.dumps({"stream": stream, "data": changed}, separators=(",", ":"))


@pytest.mark.parametrize(
    ("file", "asset", "symbol", "count", "first", "last"),
    [
        ("binance-btcusdt-20240809.gz", "bitcoin", "BTCUSDT", 10_147, 3735693016, 3735703162),
        ("binance-ethusdt-20240809.gz", "ethereum", "ETHUSDT", 8_409, 1520545031, 1520553439),
    ],
)
def test_every_trade_of_a_real_recording_is_a_tick_with_its_exact_digits(
    file: str, asset: str, symbol: str, count: int, first: int, last: int
) -> None:
    if not (RECORDINGS / file).exists():
        pytest.skip(f"no recording {file}; the simulator's frames are tested in test_pipeline")
    feed = make_feed("binance", [asset])
    ticks: list[Event] = []
    others: list[Event] = []
    for received_ns, raw in recorded.frames(RECORDINGS / file):
        for event in feed.receive(raw, received_ns):
            (ticks if isinstance(event, Tick) else others).append(event)

    expected = [
        Tick(
            received_ns=trade.received_ns,
            asset=asset,
            price_usd=trade.price,
            quote="USDT",
            source="binance",
            symbol=symbol,
            event_ns=trade.made_at_ms * 10**6,
            quantity=trade.quantity,
            trade_id=trade.trade_id,
        )
        for trade in recorded.trades(RECORDINGS / file)
    ]
    assert ticks == expected
    assert len(ticks) == count
    assert [tick.trade_id for tick in ticks if isinstance(tick, Tick)] == list(range(first, last + 1))
    assert {event.kind for event in others if isinstance(event, Ignored)} == {"bookTicker", "depth@100ms"}
    assert not [event for event in others if isinstance(event, Reject)]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("not json at all", "not JSON"),
        ("", "not JSON"),
        (b'{"stream":"btcusdt@trade\xff"}', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"stream":"btcusdt@trade","data":{"p":NaN}}', "not JSON"),
        ("[1,2]", "not a JSON object"),
        ("17", "not a JSON object"),
        ("{}", "neither a stream with data nor a reply"),
        ('{"stream":"btcusdt@trade"}', "neither a stream with data nor a reply"),
        ('{"stream":"btcusdt@trade","data":[]}', "neither a stream with data nor a reply"),
        (frame(stream="btcusdt@nonsense"), "unknown stream 'btcusdt@nonsense'"),
        (frame(stream="xyzusdt@trade"), "unknown stream 'xyzusdt@trade'"),
        (frame(stream="dogeusdt@trade"), "unknown stream 'dogeusdt@trade'"),
        (frame(s="XYZUSDT"), "unknown symbol 'XYZUSDT'"),
        (frame(s=None), "unknown symbol missing"),
        (frame(e="aggTrade"), "event 'aggTrade' on a trade stream"),
        (frame(t=None), "trade id t is missing"),
        (frame(t="3735693016"), "trade id t is '3735693016'"),
        (frame(t=1.5), "trade id t is '1.5'"),
        (frame(t=True), "trade id t is True"),
        (frame(t=-1), "trade id t is -1"),
        (frame(t=2**63), "trade id t is 9223372036854775808"),
        (frame(p=None), "price p is missing"),
        (frame(p="0"), "price p is '0'"),
        (frame(p="0.00000000"), "price p is '0.00000000'"),
        (frame(p=0), "price p is '0'"),
        (frame(p="-1"), "price p is '-1'"),
        (frame(p="NaN"), "price p is 'NaN'"),
        (frame(p="Infinity"), "price p is 'Infinity'"),
        (frame(p="1" + "0" * 30), "price p is '1000000000000000000000000000000'"),
        (frame(p=10**30), "price p is '1000000000000000000000000000000'"),
        (frame(p=1e30), "price p is '1000000000000000000000000000000'"),
        (frame(p="1e17"), "price p is '100000000000000000'"),
        (frame(p="1.0000000000001"), "price p is '1.0000000000001'"),
        (frame(p="\u0661\u0662"), "price p is '\u0661\u0662'"),
        (frame(p='1","x":"'), "price p is"),
        (frame(p=[1]), "price p is [1]"),
        (frame(q="-0.5"), "quantity q is '-0.5'"),
        (frame(q=None), "quantity q is missing"),
        (frame(T=None), "trade time T is missing"),
        (frame(T="1723161601437"), "trade time T is '1723161601437'"),
        (frame(T=10**14 - 1), "trade time T is 99999999999999"),
        (frame(T=0), "trade time T is 0"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_frame_that_is_no_tick_is_rejected_with_its_reason(bad: str | bytes, reason: str) -> None:
    (event,) = receive(bad)
    assert isinstance(event, Reject)
    assert reason in event.reason
    assert event.raw == (bad.encode() if isinstance(bad, str) else bad)
    assert "\n" not in event.reason
    assert len(event.reason) < 300


def test_a_rejected_trade_keeps_its_number_so_that_it_is_not_taken_for_missing() -> None:
    (event,) = receive(frame(p="0"))
    assert isinstance(event, Reject)
    assert (event.symbol, event.trade_id) == ("BTCUSDT", 3735693016)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ('{"stream":"btcusdt@bookTicker","data":{"u":1,"s":"BTCUSDT"}}', "bookTicker"),
        ('{"stream":"ethusdt@depth@100ms","data":{"e":"depthUpdate"}}', "depth@100ms"),
        ('{"stream":"solusdt@kline_1m","data":{"e":"kline"}}', "kline_1m"),
        ('{"stream":"btcusdt@aggTrade","data":{"e":"aggTrade"}}', "aggTrade"),
    ],
)
def test_what_carries_no_trade_is_counted_and_not_rejected(text: str, kind: str) -> None:
    assert receive(text) == [Ignored(kind)]


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ('"61685.99000000"', "61685.99000000"),
        ('"0.000000000001"', "0.000000000001"),
        ('"9999999999999999.999999999999"', "9999999999999999.999999999999"),
        ("61685.99000000", "61685.99000000"),
        ("0.1000000000000", "0.1"),
        ('"1.5E-7"', "0.00000015"),
        ('"1e3"', "1000"),
        ('"+00000000000000000061685.9900000000000"', "61685.99"),
        ('"1e17"', None),
        ('"1e-13"', None),
        ("1.5e-7", "0.00000015"),
        ("1e3", "1000"),
        ("61685", "61685"),
        ("1234567890.123456789012", "1234567890.123456789012"),
    ],
)
def test_digits_are_kept_as_sent_even_of_a_bare_number(sent: str, kept: str | None) -> None:
    (event,) = receive(frame().replace('"61685.99000000"', sent))
    assert (event.price_usd if isinstance(event, Tick) else None) == kept


def test_the_address_names_the_streams() -> None:
    assert make_feed("binance", ["bitcoin", "ethereum", "bitcoin"]).url == (
        "wss://data-stream.binance.vision/stream?streams=btcusdt@trade/ethusdt@trade"
    )
    feed = make_feed("binance", ["dogecoin"], "ws://127.0.0.1:9000/stream")
    assert feed.url == "ws://127.0.0.1:9000/stream?streams=dogeusdt@trade"


@pytest.mark.parametrize(
    ("text", "control"),
    [
        ('{"result":null,"id":1}', Control("subscribed")),
        (
            '{"error":{"code":2,"msg":"Invalid request"},"id":1}',
            Control("error", "{'code': 2, 'msg': 'Invalid request'}"),
        ),
        ('{"e":"serverShutdown","E":1770123456789}', Control("reconnect", "the server is about to shut down")),
    ],
)
def test_what_the_venue_says_of_the_conversation_is_told(text: str, control: Control) -> None:
    assert receive(text) == [control]


def test_instruments_come_and_go_on_one_connection_and_a_later_one_knows() -> None:
    traded = VENUES["binance"].instruments
    feed = make_feed("binance", ["bitcoin", "ethereum"])
    assert feed.opening_frames() == []
    assert feed.subscribe([traded["solana"]]) == ['{"method":"SUBSCRIBE","params":["solusdt@trade"],"id":1}']
    assert feed.unsubscribe([traded["bitcoin"]]) == ['{"method":"UNSUBSCRIBE","params":["btcusdt@trade"],"id":2}']
    assert feed.url.endswith("?streams=ethusdt@trade/solusdt@trade")
    # A trade that was under way when its stream was left is a trade.
    (event,) = feed.receive(frame().encode(), RECEIVED)
    assert isinstance(event, Tick)


def test_more_streams_than_an_address_holds_are_subscribed_to() -> None:
    many = [Instrument(f"a{n}", f"A{n}USDT", "USDT") for n in range(250)]
    feed = feed_of("binance", many)
    assert feed.url.count("@trade") == 100
    requests = [json.loads(text) for text in feed.opening_frames()]
    assert [len(request["params"]) for request in requests] == [100, 50]
    assert len({request["id"] for request in requests}) == 2
