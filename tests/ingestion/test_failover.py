"""While a source is silent or broken the next one speaks, and the first one again when it is healthy."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from http import HTTPStatus
from pathlib import Path

import pytest
from websockets.asyncio.server import Server, ServerConnection, broadcast, serve
from websockets.http11 import Request, Response

from ingestion.clock import Clock
from ingestion.connection import Connection
from ingestion.counts import Counts
from ingestion.errors import VenueRefused
from ingestion.failover import Failover
from ingestion.feeds import make_feed
from ingestion.gaps import GapTracker
from ingestion.intake import Intake, Topics
from ingestion.source import Source
from ingestion.spool import Spool

TRADE = '{{"stream":"btcusdt@trade","data":{{"e":"trade","s":"BTCUSDT","t":{},"p":"1.50","q":"2","T":1723161601437}}}}'


class Speaker:
    """A venue that sends a trade every 20 ms while it `speaks`."""

    def __init__(self, status: HTTPStatus | None = None) -> None:
        self.speaks = True
        self.last_spoke = 0.0
        self.status = status
        self.clients: set[ServerConnection] = set()
        self.server: Server | None = None

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        async with serve(self._client, "127.0.0.1", 0, process_request=self._answer, ping_interval=None) as self.server:
            speaking = asyncio.create_task(self._speak())
            yield f"ws://127.0.0.1:{self.server.sockets[0].getsockname()[1]}/stream"
            speaking.cancel()

    def _answer(self, client: ServerConnection, request: Request) -> Response | None:
        return None if self.status is None else client.respond(self.status, "no\n")

    async def _client(self, client: ServerConnection) -> None:
        self.clients.add(client)
        await client.wait_closed()
        self.clients.discard(client)

    async def _speak(self) -> None:
        for number in range(10**9):
            if self.speaks and self.clients:
                broadcast(self.clients, TRADE.format(number))
                self.last_spoke = asyncio.get_running_loop().time()
            await asyncio.sleep(0.02)


class Desk:
    """Two sources of the same asset."""

    def __init__(self, urls: list[str], folder: Path, *, healthy_seconds: float = 1.0, at_once: bool = False) -> None:
        self.spool = Spool(folder, 1.0, 1 << 30)
        topics = Topics("ticks", "rejects", "gaps")
        self.intakes = [
            Intake(make_feed("binance", ["bitcoin"], url), self.spool, Counts(), topics, GapTracker()) for url in urls
        ]
        self.failover = Failover(
            [Source(intake, lambda intake: Connection(intake, Clock(), 1 << 20)) for intake in self.intakes],
            failover_seconds=3.0,
            healthy_seconds=healthy_seconds,
            at_once=at_once,
        )
        self.running = asyncio.create_task(self.failover.run())

    def ticks(self, source: int) -> int:
        return self.intakes[source].counts.ticks

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not condition():
                if self.running.done():
                    self.running.result()
                await asyncio.sleep(0.01)

    async def stop(self) -> None:
        self.running.cancel()
        await self.failover.stop(10.0)
        self.spool.close()


def test_a_silent_source_is_replaced_within_5_seconds_and_taken_back(tmp_path: Path) -> None:
    first, second = Speaker(), Speaker()

    async def scenario() -> None:
        async with first.listening() as one, second.listening() as two:
            desk = Desk([one, two], tmp_path)
            await desk.until(lambda: desk.ticks(0) > 20)
            assert desk.ticks(1) == 0
            first.speaks = False
            await desk.until(lambda: desk.ticks(1) > 0)
            assert asyncio.get_running_loop().time() - first.last_spoke < 5.0
            first.speaks = True
            await desk.until(lambda: not second.clients)
            before = desk.ticks(0)
            await desk.until(lambda: desk.ticks(0) > before + 20)
            assert desk.failover.takeovers == 1
            await desk.stop()

    asyncio.run(scenario())


@pytest.mark.parametrize("status", [HTTPStatus.UNAVAILABLE_FOR_LEGAL_REASONS, HTTPStatus.UNAUTHORIZED])
def test_a_source_that_refuses_us_is_replaced_for_good(tmp_path: Path, status: HTTPStatus) -> None:
    first, second = Speaker(status), Speaker()

    async def scenario() -> None:
        async with first.listening() as one, second.listening() as two:
            desk = Desk([one, two], tmp_path)
            async with asyncio.timeout(5):
                await desk.until(lambda: desk.ticks(1) > 0)
            assert not desk.failover.sources[0].is_wanted
            await desk.stop()

    asyncio.run(scenario())


def test_it_ends_when_every_source_has_refused(tmp_path: Path) -> None:
    first, second = Speaker(HTTPStatus.UNAVAILABLE_FOR_LEGAL_REASONS), Speaker(HTTPStatus.UNAUTHORIZED)

    async def scenario() -> None:
        async with first.listening() as one, second.listening() as two:
            desk = Desk([one, two], tmp_path)
            with pytest.raises(VenueRefused, match="HTTP 401"):
                async with asyncio.timeout(5):
                    await desk.running
            await desk.stop()

    asyncio.run(scenario())


def test_all_at_once_if_wanted(tmp_path: Path) -> None:
    first, second = Speaker(), Speaker()

    async def scenario() -> None:
        async with first.listening() as one, second.listening() as two:
            desk = Desk([one, two], tmp_path, healthy_seconds=0.0, at_once=True)
            await desk.until(lambda: desk.ticks(0) > 100 and desk.ticks(1) > 100)
            assert first.clients
            assert second.clients
            await desk.stop()

    asyncio.run(scenario())
