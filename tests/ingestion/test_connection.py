"""The shell around a feed, against real WebSocket servers in this process."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import ssl
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from http import HTTPStatus
from pathlib import Path

import pytest
from pydantic import SecretStr
from websockets.asyncio.server import ServerConnection, broadcast, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

import ingestion.connection
from ingestion.clock import Clock
from ingestion.connection import Connection
from ingestion.counts import Counts
from ingestion.errors import FORBIDDEN_TRIES, LONGEST_DELAY, VenueRefused
from ingestion.feeds import make_feed
from ingestion.feeds.binance import Binance
from ingestion.gaps import GapTracker
from ingestion.intake import Intake, Topics
from ingestion.proxies import proxy_of
from ingestion.spool import Spool

TOPICS = Topics("ticks", "rejects", "gaps")
Handler = Callable[[ServerConnection], Awaitable[None]]
TRADE = '{{"stream":"btcusdt@trade","data":{{"e":"trade","s":"BTCUSDT","t":{},"p":"1.50","q":"2","T":1723161601437}}}}'


class Desk:
    """A connection to one server, and what came of it in a spool."""

    def __init__(
        self,
        url: str,
        folder: Path,
        *,
        max_frame_bytes: int = 1 << 20,
        max_spool_bytes: int = 1 << 30,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.spool = Spool(folder / "spool", 1.0, max_spool_bytes)
        self.counts = Counts()
        self.intake = Intake(make_feed("binance", ["bitcoin"], url), self.spool, self.counts, TOPICS, GapTracker())
        self.connection = Connection(self.intake, Clock(), max_frame_bytes, sleep=sleep)
        self.writing = asyncio.create_task(self.spool.run())
        self.task = asyncio.create_task(self.connection.run())

    def taken(self, topic: str) -> list[bytes]:
        """What is durable."""
        return [record.value for record in self.spool.records(0) if record.topic == topic]

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not condition():
                if self.task.done():
                    self.task.result()
                await asyncio.sleep(0.01)

    async def stop(self) -> None:
        self.connection.stop()
        async with asyncio.timeout(60):
            await self.task
            self.spool.stop()
            await self.writing


@asynccontextmanager
async def server(handler: Handler, status: HTTPStatus | None = None) -> AsyncIterator[str]:
    def answer(client: ServerConnection, request: Request) -> Response | None:
        return None if status is None else client.respond(status, "no\n")

    async with serve(handler, "127.0.0.1", 0, process_request=answer, ping_interval=None) as listening:
        yield f"ws://127.0.0.1:{listening.sockets[0].getsockname()[1]}/stream"


def test_frames_become_numbered_messages_and_bad_ones_stop_nothing(tmp_path: Path) -> None:
    async def handler(client: ServerConnection) -> None:
        for text in (TRADE.format(1), "not json", TRADE.format(2), '{"stream":"a@b","data":{}}', TRADE.format(3)):
            await client.send(text)
        await client.send(b"\x00\xff")
        await client.wait_closed()

    async def scenario() -> None:
        async with server(handler) as url:
            desk = Desk(url, tmp_path)
            await desk.until(lambda: desk.counts.frames == 6)
            await desk.stop()
        ticks = desk.taken("ticks")
        assert [b'"sequence":%d}' % number in tick for number, tick in enumerate(ticks, 1)] == [True] * 3
        assert len(desk.taken("rejects")) == desk.counts.rejected == 3
        assert desk.counts.connections == 1

    asyncio.run(scenario())


def test_an_oversized_frame_is_counted_named_and_the_connection_made_anew(tmp_path: Path) -> None:
    first = True

    async def handler(client: ServerConnection) -> None:
        nonlocal first
        await client.send(TRADE.format(1 if first else 2))
        if first:
            first = False
            await client.send("x" * 5000)
        await client.wait_closed()

    async def scenario() -> None:
        async with server(handler) as url:
            desk = Desk(url, tmp_path, max_frame_bytes=4096)
            await desk.until(lambda: desk.counts.ticks == 2)
            await desk.stop()
        (reject,) = desk.taken("rejects")
        assert b"a frame larger than 4096 bytes" in reject
        assert desk.counts.connections == 2

    asyncio.run(scenario())


def test_a_venue_that_accepts_and_closes_is_not_asked_more_than_once_a_second(tmp_path: Path) -> None:
    times: list[float] = []

    async def handler(client: ServerConnection) -> None:
        times.append(asyncio.get_running_loop().time())

    async def scenario() -> None:
        async with server(handler) as url:
            desk = Desk(url, tmp_path)
            await desk.until(lambda: len(times) == 3)
            await desk.stop()

    asyncio.run(scenario())
    assert all(later - earlier > 0.9 for earlier, later in itertools.pairwise(times))


@pytest.mark.parametrize("status", [HTTPStatus.UNAUTHORIZED, HTTPStatus.UNAVAILABLE_FOR_LEGAL_REASONS])
def test_a_refusal_ends_the_connection_within_seconds(status: HTTPStatus, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with server(lambda client: client.wait_closed(), status) as url:
            desk = Desk(url + "?apiKey=canary", tmp_path)
            with pytest.raises(VenueRefused, match=f"HTTP {status.value}") as refused:
                async with asyncio.timeout(5):
                    await desk.task
            assert "canary" not in str(refused.value)

    asyncio.run(scenario())


def test_a_bad_certificate_ends_the_connection_within_seconds(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "1"),
            *("-keyout", key, "-out", certificate),
        ],
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    async def scenario() -> None:
        async with serve(lambda client: client.wait_closed(), "127.0.0.1", 0, ssl=context) as listening:
            desk = Desk(f"wss://localhost:{listening.sockets[0].getsockname()[1]}/stream", tmp_path)
            with pytest.raises(VenueRefused, match="certificate"):
                async with asyncio.timeout(5):
                    await desk.task

    asyncio.run(scenario())


def test_stopping_keeps_every_frame_that_the_venue_sent_before_it_heard_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise 1: nothing received is lost."""
    monkeypatch.setattr(ingestion.connection, "GOODBYE_SECONDS", 60.0)
    sent = 0

    async def handler(client: ServerConnection) -> None:
        nonlocal sent
        try:
            while True:
                await client.send(TRADE.format(sent))
                sent += 1
        except ConnectionClosed:
            pass

    async def scenario() -> None:
        async with server(handler) as url:
            desk = Desk(url, tmp_path)
            await desk.until(lambda: desk.counts.ticks > 500)
            await desk.stop()
        numbers = [int(value.split(b'"trade_id":')[1].split(b",")[0]) for value in desk.taken("ticks")]
        assert numbers == list(range(len(numbers)))
        assert len(numbers) == sent

    asyncio.run(scenario())


def test_stopping_ends_an_attempt_to_connect_and_a_wait_for_the_next(tmp_path: Path) -> None:
    async def scenario() -> None:
        desk = Desk("ws://127.0.0.1:1/stream", tmp_path / "one")
        await asyncio.sleep(0)
        await desk.stop()
        desk = Desk("ws://127.0.0.1:1/stream", tmp_path / "other")
        await asyncio.sleep(0.3)
        await desk.stop()

    asyncio.run(scenario())


def test_a_full_spool_holds_the_venue_back_and_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory stays bounded: what is not read stays with the venue. Being held up is not taken for silence."""
    monkeypatch.setattr(Binance, "silence_seconds", 0.3)
    monkeypatch.setattr(ingestion.connection, "PONG_SECONDS", 1.0)
    sent = 0
    total = 60_000

    async def handler(client: ServerConnection) -> None:
        nonlocal sent
        for sent in range(1, total + 1):
            await client.send(TRADE.format(sent) + " " * 400)
        await client.wait_closed()

    async def scenario() -> None:
        async with server(handler) as url:
            desk = Desk(url, tmp_path, max_spool_bytes=1 << 20)
            held, before = 0, -1
            while sent != before or sent == 0:
                before = sent
                await asyncio.sleep(1.0)
                held = sent
            assert held < total
            assert desk.spool.size < 2 << 20
            numbers: list[int] = []
            while len(numbers) < total:
                read = desk.spool.read()
                numbers.extend(int(record.value.split(b'"trade_id":')[1].split(b",")[0]) for record in read)
                desk.spool.forget(len(numbers))
                await asyncio.sleep(0)
            await desk.stop()
        assert desk.counts.connections == 1
        assert numbers == list(range(1, total + 1))

    asyncio.run(scenario())


@pytest.mark.parametrize("why", ["lifetime", "asked", "mute"])
def test_a_connection_that_will_not_last_is_replaced_before_it_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    """Promise 4: Binance cuts a connection after a day, and says so before a restart; nothing is missed by that."""
    if why == "lifetime":
        monkeypatch.setattr(Binance, "connection_lifetime_seconds", 1.0)
    if why == "mute":
        monkeypatch.setattr(Binance, "silence_seconds", 0.1)
    clients: set[ServerConnection] = set()
    most = count = 0

    async def handler(client: ServerConnection) -> None:
        nonlocal most, count
        count += 1
        clients.add(client)
        most = max(most, len(clients))
        await client.send(TRADE.format(0))
        if why == "asked" and count == 1:
            await client.send('{"e":"serverShutdown","E":1770123456789}')
        await client.wait_closed()
        clients.discard(client)

    async def market() -> None:
        for number in range(1, 10_000):
            broadcast(clients, TRADE.format(number))
            await asyncio.sleep(0.005)

    async def scenario() -> None:
        async with server(handler) as url:
            selling = asyncio.create_task(asyncio.sleep(0) if why == "mute" else market())
            desk = Desk(url, tmp_path)
            await desk.until(lambda: desk.counts.connections >= 2 and len(clients) == 1)
            before = desk.counts.frames
            await desk.until(lambda: why == "mute" or desk.counts.frames > before + 50)
            await desk.stop()
            selling.cancel()
        numbers = {int(value.split(b'"trade_id":')[1].split(b",")[0]) for value in desk.taken("ticks")}
        # 0 is each connection's greeting.
        market_made = sorted(numbers - {0})
        assert why == "mute" or market_made == list(range(market_made[0], market_made[-1] + 1))

    asyncio.run(scenario())
    assert most == 2


def test_a_thousand_accepts_and_closes_are_a_second_apart_at_least(tmp_path: Path) -> None:
    """The time between them is asked for, not waited for."""
    asked: list[float] = []
    accepted = 0

    async def handler(client: ServerConnection) -> None:
        nonlocal accepted
        accepted += 1

    async def sleep(seconds: float) -> None:
        asked.append(seconds)

    async def scenario() -> None:
        async with server(handler) as url:
            desk = Desk(url, tmp_path, sleep=sleep)
            await desk.until(lambda: accepted >= 1_000)
            await desk.stop()

    asyncio.run(scenario())
    assert len(asked) >= 999
    assert min(asked) > 0.9
    assert max(asked) <= LONGEST_DELAY * 1.5


def test_a_venue_gone_without_a_word_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Binance, "silence_seconds", 0.2)
    monkeypatch.setattr(ingestion.connection, "PONG_SECONDS", 0.2)
    clients = 0
    over = asyncio.Event()

    async def handler(client: ServerConnection) -> None:
        nonlocal clients
        clients += 1
        # No pong comes from a side that does not read.
        client.transport.pause_reading()
        await over.wait()

    async def scenario() -> None:
        async with serve(handler, "127.0.0.1", 0, ping_interval=None, close_timeout=0.1) as listening:
            desk = Desk(f"ws://127.0.0.1:{listening.sockets[0].getsockname()[1]}/stream", tmp_path)
            await desk.until(lambda: clients == 2)
            over.set()
            desk.task.cancel()
            await asyncio.wait([desk.task])

    asyncio.run(scenario())


@asynccontextmanager
async def moody_server(
    handler: Handler, answer: Callable[[int], tuple[HTTPStatus, dict[str, str]] | None]
) -> AsyncIterator[tuple[str, list[float]]]:
    """A server whose nth handshake is answered by an HTTP status and headers, or taken; with the times of them."""
    times: list[float] = []

    def process(client: ServerConnection, request: Request) -> Response | None:
        times.append(asyncio.get_running_loop().time())
        refusal = answer(len(times))
        if refusal is None:
            return None
        response = client.respond(refusal[0], "no\n")
        for name, value in refusal[1].items():
            response.headers[name] = value
        return response

    async with serve(handler, "127.0.0.1", 0, process_request=process, ping_interval=None) as listening:
        yield f"ws://127.0.0.1:{listening.sockets[0].getsockname()[1]}/stream", times


def test_a_passing_403_does_not_end_the_connection(tmp_path: Path) -> None:
    async def handler(client: ServerConnection) -> None:
        await client.send(TRADE.format(1))
        await client.wait_closed()

    async def scenario() -> None:
        async def no_wait(seconds: float) -> None:
            await asyncio.sleep(0)

        last = FORBIDDEN_TRIES - 1
        async with moody_server(handler, lambda n: (HTTPStatus.FORBIDDEN, {}) if n <= last else None) as (url, times):
            desk = Desk(url, tmp_path / "passing", sleep=no_wait)
            await desk.until(lambda: desk.counts.ticks == 1)
            await desk.stop()
            assert len(times) == FORBIDDEN_TRIES
        async with moody_server(handler, lambda n: (HTTPStatus.FORBIDDEN, {})) as (url, times):
            desk = Desk(url, tmp_path / "final", sleep=no_wait)
            with pytest.raises(VenueRefused, match=f"HTTP 403 Forbidden, {FORBIDDEN_TRIES} times in a row"):
                async with asyncio.timeout(60):
                    await desk.task
            assert len(times) == FORBIDDEN_TRIES

    asyncio.run(scenario())


@pytest.mark.parametrize("old", ["stays", "is cut"])
def test_a_venue_that_asks_to_wait_is_left_alone_while_a_connection_is_replaced(tmp_path: Path, old: str) -> None:
    """Also when the old connection ends meanwhile: the time that the venue named holds for every further attempt."""
    wait = 6.0

    async def handler(client: ServerConnection) -> None:
        await client.send(TRADE.format(1))
        await client.send('{"e":"serverShutdown","E":1770123456789}')
        if old == "is cut":
            await asyncio.sleep(2.0)
            await client.close()
        await client.wait_closed()

    def answer(number: int) -> tuple[HTTPStatus, dict[str, str]] | None:
        return (HTTPStatus.TOO_MANY_REQUESTS, {"Retry-After": str(int(wait))}) if number == 2 else None

    async def scenario() -> list[float]:
        async with moody_server(handler, answer) as (url, times):
            desk = Desk(url, tmp_path)
            await desk.until(lambda: len(times) >= 3)
            await desk.stop()
        return times

    times = asyncio.run(scenario())
    assert times[2] - times[1] >= wait


def test_stopping_does_not_wait_for_a_ban_to_end(tmp_path: Path) -> None:
    def banned(_: int) -> tuple[HTTPStatus, dict[str, str]]:
        return HTTPStatus.IM_A_TEAPOT, {"Retry-After": "259200"}

    async def scenario() -> None:
        async with moody_server(lambda client: client.wait_closed(), banned) as (url, times):
            desk = Desk(url, tmp_path)
            await desk.until(lambda: len(times) == 1)
            await asyncio.sleep(1.5)
            assert len(times) == 1
            await desk.stop()

    asyncio.run(scenario())


def test_a_proxy_of_the_environment_is_not_asked_for_what_is_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "ws_proxy", "wss_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")

    async def handler(client: ServerConnection) -> None:
        await client.send(TRADE.format(1))
        await client.wait_closed()

    async def scenario() -> None:
        async with server(handler) as url:
            desk = Desk(url, tmp_path)
            await desk.until(lambda: desk.counts.ticks == 1)
            await desk.stop()

    asyncio.run(scenario())


def test_a_price_without_an_id_counts_once_however_the_connection_is_replaced(tmp_path: Path) -> None:
    """CoinCap numbers nothing: what the old and the new connection both tell is one price."""
    clients: list[ServerConnection] = []
    price = 0

    async def handler(client: ServerConnection) -> None:
        # The list as it is, as CoinCap begins.
        await client.send(f'{{"bitcoin":"{1000 + price}"}}')
        clients.append(client)
        await client.wait_closed()
        clients.remove(client)

    async def market() -> None:
        nonlocal price
        while True:
            price += 1
            broadcast(set(clients), f'{{"bitcoin":"{1000 + price}"}}')
            await asyncio.sleep(0.01)

    async def scenario() -> list[int]:
        async with server(handler) as url:
            spool = Spool(tmp_path / "spool", 1.0, 1 << 30)
            intake = Intake(make_feed("coincap", ["bitcoin"], url), spool, Counts(), TOPICS, GapTracker())
            connection = Connection(intake, Clock(), 1 << 20)
            tasks = [asyncio.create_task(part) for part in (spool.run(), connection.run(), market())]

            async def until_alone(connections: int) -> None:
                async with asyncio.timeout(60):
                    while True:
                        if intake.counts.connections == connections and len(clients) == 1:
                            return
                        await asyncio.sleep(0.01)

            for number in range(1, 6):
                await until_alone(number)
                await asyncio.sleep(0.3)
                connection.renew("a test")
            await until_alone(6)
            await asyncio.sleep(0.3)
            connection.stop()
            await tasks[1]
            tasks[2].cancel()
            spool.stop()
            await tasks[0]
            return [int(record.value.split(b'"price_usd":"')[1].split(b'"')[0]) for record in spool.records(0)]

    prices = asyncio.run(scenario())
    assert prices == list(range(prices[0], prices[-1] + 1))
    assert len(prices) > 50


def test_what_a_venue_says_forges_no_log_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A close reason, an error and a broken frame with line breaks and a terminal's commands in them."""
    caplog.set_level(logging.INFO)
    forged = "\r\n2026-01-01 00:00:00 ERROR forged \x1b[2J\u202e"

    async def handler(client: ServerConnection) -> None:
        await client.send(json.dumps({"error": {"code": 2, "msg": forged * 99}, "id": 1}))
        await client.send(json.dumps({"stream": f"x@{forged}", "data": {}}))
        await client.send(forged)
        await client.send(TRADE.format(1).replace("1.50", json.dumps(forged)[1:-1]))
        await client.close(1011, forged)

    async def scenario() -> None:
        async with server(handler) as url:
            desk = Desk(url, tmp_path)
            await desk.until(lambda: desk.counts.connections == 2)
            await desk.stop()

    asyncio.run(scenario())
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("ingestion")]
    assert len([message for message in messages if "forged" in message]) >= 5
    assert all(message.isprintable() and len(message) < 1_000 for message in messages)


def test_a_venue_elsewhere_is_reached_through_the_proxy_of_the_setting(tmp_path: Path) -> None:
    """The proxy alone knows where the venue is, and is told no more than its name."""
    asked: list[str] = []

    async def handler(client: ServerConnection) -> None:
        await client.send(TRADE.format(1))
        await client.wait_closed()

    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
        writer.close()

    async def scenario() -> None:
        async with server(handler) as url:
            port = int(url.split(":")[2].split("/")[0])

            async def proxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                asked.append((await reader.readuntil(b"\r\n\r\n")).decode().splitlines()[0])
                there_reader, there_writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
                await asyncio.gather(pipe(reader, there_writer), pipe(there_reader, writer))

            async with await asyncio.start_server(proxy, "127.0.0.1", 0) as listening:
                address = SecretStr(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}")
                spool = Spool(tmp_path, 1.0, 1 << 30)
                venue = "ws://venue.invalid:8080/stream"
                intake = Intake(make_feed("binance", ["bitcoin"], venue), spool, Counts(), TOPICS, GapTracker())
                connection = Connection(intake, Clock(), 1 << 20, proxy=proxy_of(venue, address))
                running = asyncio.create_task(connection.run())
                async with asyncio.timeout(60):
                    while not intake.counts.ticks:
                        assert not running.done()
                        await asyncio.sleep(0.01)
                connection.stop()
                await running
                spool.close()

    asyncio.run(scenario())
    assert asked == ["CONNECT venue.invalid:8080 HTTP/1.1"]
