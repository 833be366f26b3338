"""The WebSocket server: Binance's combined streams at /stream, by address or by SUBSCRIBE."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from http import HTTPStatus
from urllib.parse import parse_qs, urlsplit

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from simulator.frames import Frame

# Frames sent at a stretch before others get a turn.
STRETCH = 64


class Venue:
    """Plays one source of frames to all who have subscribed.

    The market opens when the first client has subscribed, and goes on without clients. It waits for a client that reads
    slowly, where a real venue would cut it off: nothing is lost but by a closed connection.
    """

    def __init__(self, source: Callable[[int], Iterator[Frame]], speed: float) -> None:
        """`source` is given the milliseconds since 1970 at which the market opens. `speed` 0: as fast as is read."""
        self._source = source
        self._speed = speed
        self._subscribers: defaultdict[str, set[ServerConnection]] = defaultdict(set)
        self._open = asyncio.Event()
        self.sent: Counter[str] = Counter()

    async def listen(self, port: int) -> Server:
        """Accept clients on loopback; port 0 takes a free one."""
        return await serve(
            self._client,
            "127.0.0.1",
            port,
            process_request=_only_streams,
            compression=None,
            # A client that is held up reads no ping; and at the end it may take its time to read what it was sent.
            ping_interval=None,
            close_timeout=None,
        )

    async def play(self) -> None:
        """Send the source to its end."""
        await self._open.wait()
        loop = asyncio.get_running_loop()
        began = loop.time()
        for number, frame in enumerate(self._source(time.time_ns() // 1_000_000)):
            early = frame.at_ns / 1e9 / self._speed - (loop.time() - began) if self._speed else 0.0
            if early > 0.001 or number % STRETCH == 0:
                await asyncio.sleep(max(early, 0.0))
            for client in tuple(self._subscribers[frame.stream]):
                try:
                    await client.send(frame.text)
                except ConnectionClosed:
                    self._subscribers[frame.stream].discard(client)
            self.sent[frame.stream] += 1

    async def _client(self, client: ServerConnection) -> None:
        query = parse_qs(urlsplit(client.request.path if client.request else "").query)
        try:
            self._subscribe(client, [name for names in query.get("streams", []) for name in names.split("/")])
            async for text in client:
                await client.send(json.dumps(self._answer(client, text)))
        except ConnectionClosed:
            pass
        finally:
            for clients in self._subscribers.values():
                clients.discard(client)

    def _subscribe(self, client: ServerConnection, streams: list[str]) -> None:
        for stream in streams:
            self._subscribers[stream].add(client)
        if streams:
            self._open.set()

    def _answer(self, client: ServerConnection, text: str | bytes) -> object:
        """Binance's reply to a request."""
        try:
            request = json.loads(text)
            method, number = request["method"], request.get("id")
            streams = [str(stream) for stream in request.get("params", [])]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return {"error": {"code": 3, "msg": f"Invalid JSON: {error}"}}
        if method == "SUBSCRIBE":
            self._subscribe(client, streams)
        elif method == "UNSUBSCRIBE":
            for stream in streams:
                self._subscribers[stream].discard(client)
        elif method == "LIST_SUBSCRIPTIONS":
            return {"result": [name for name, clients in self._subscribers.items() if client in clients], "id": number}
        else:
            return {"error": {"code": 2, "msg": f"Invalid request: unknown method {method}"}, "id": number}
        return {"result": None, "id": number}


def _only_streams(client: ServerConnection, request: Request) -> Response | None:
    if urlsplit(request.path).path == "/stream":
        return None
    return client.respond(HTTPStatus.NOT_FOUND, "connect to /stream?streams=btcusdt@trade/ethusdt@trade\n")
