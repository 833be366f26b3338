"""The server: a venue's WebSocket in its dialect, and on the same port its REST."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Iterator
from http import HTTPStatus
from urllib.parse import parse_qs, urlsplit

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode
from websockets.http11 import Request, Response

from simulator.dialects import Answer, Dialect
from simulator.faults import CUTS, DEAD_SUBSCRIPTION, FRAGMENTS, FRAMES_BEFORE, SILENCE, fragments
from simulator.frames import Frame
from simulator.history import History

# Frames sent at a stretch before others get a turn.
STRETCH = 64
EVERYBODY = ""


class Venue:
    """Plays one source of frames to all who have subscribed.

    The market opens when the first client has subscribed, and goes on without clients. It waits for a client that reads
    slowly, where a real venue would cut it off: nothing is lost but by a closed connection.
    """

    def __init__(
        self,
        source: Callable[[int], Iterator[Frame]],
        speed: float,
        dialect: Dialect,
        history: History,
        faults: Collection[str] = (),
        cut_seconds: float | None = None,
    ) -> None:
        """`source` is given the milliseconds since 1970 at which the market opens. `speed` 0: as fast as is read.

        `faults` are those of connections, of simulator.faults. Every connection is cut without a word after
        `cut_seconds`.
        """
        self._cut_seconds = cut_seconds
        self.violations: Counter[str] = Counter()
        """How often each of the venue's rules was broken."""
        self._faults = faults
        self._heard: Counter[ServerConnection] = Counter()
        self._silent: list[ServerConnection] = []
        self._first: ServerConnection | None = None
        self._source = source
        self._speed = speed
        self._dialect = dialect
        self._history = history
        self._subscribers: defaultdict[str, set[ServerConnection]] = defaultdict(set)
        self._open = asyncio.Event()
        self._requests: deque[float] = deque()
        self.sent: Counter[str] = Counter()

    async def listen(self, port: int) -> Server:
        """Accept clients on loopback; port 0 takes a free one."""
        return await serve(
            self._client,
            "127.0.0.1",
            port,
            process_request=self._http,
            compression=None,
            # A client that is held up reads no ping; and at the end it may take its time to read what it was sent.
            ping_interval=None,
            close_timeout=None,
        )

    async def play(self) -> None:
        """Send the source to its end."""
        try:
            await self._play()
        finally:
            # They would never answer our goodbye.
            for client in self._silent:
                client.transport.abort()

    async def _play(self) -> None:
        await self._open.wait()
        loop = asyncio.get_running_loop()
        began = loop.time()
        for number, frame in enumerate(self._source(time.time_ns() // 1_000_000)):
            early = frame.at_ns / 1e9 / self._speed - (loop.time() - began) if self._speed else 0.0
            if early > 0.001 or number % STRETCH == 0:
                await asyncio.sleep(max(early, 0.0))
            for execution in frame.executions:
                self._history.add(execution.trade, execution.at_ms)
            if not frame.is_sent:
                continue
            for client in tuple(self._subscribers[frame.stream]):
                try:
                    await self._send(client, frame.text)
                except ConnectionClosed:
                    self._subscribers[frame.stream].discard(client)
            self.sent[frame.stream] += 1

    async def _send(self, client: ServerConnection, text: str) -> None:
        self._heard[client] += 1
        due = self._heard[client] == FRAMES_BEFORE
        if due and SILENCE in self._faults and len(self._heard) == 1:
            # Nothing more is said to this client, not even a pong: as if its packets went nowhere.
            client.transport.pause_reading()
            self._silent.append(client)
            for clients in self._subscribers.values():
                clients.discard(client)
        elif DEAD_SUBSCRIPTION in self._faults and client is self._first and self._heard[client] >= FRAMES_BEFORE:
            return
        elif due and CUTS in self._faults:
            client.transport.abort()
        else:
            await client.send(fragments(text) if FRAGMENTS in self._faults else text)

    async def _client(self, client: ServerConnection) -> None:
        self._first = self._first or client
        tasks = [asyncio.create_task(self._heartbeats(client)), asyncio.create_task(self._patience(client))]
        if self._cut_seconds is not None:
            tasks.append(asyncio.create_task(self._cut(client, self._cut_seconds)))
        said: deque[float] = deque()
        query = parse_qs(urlsplit(client.request.path if client.request else "").query)
        try:
            await self._do(client, self._dialect.hello(query))
            async for text in client:
                if self._says_too_much(said):
                    await client.close(CloseCode.POLICY_VIOLATION, "too many requests")
                    return
                await self._do(client, self._dialect.answer(text, self._streams(client)))
                if self._dialect.most_streams is not None and len(self._streams(client)) > self._dialect.most_streams:
                    self.violations["streams"] += 1
                    await client.close(CloseCode.POLICY_VIOLATION, "too many streams")
        except ConnectionClosed:
            pass
        finally:
            for task in tasks:
                task.cancel()
            for clients in self._subscribers.values():
                clients.discard(client)

    def _says_too_much(self, said: deque[float]) -> bool:
        if self._dialect.message_limit is None:
            return False
        most, seconds = self._dialect.message_limit
        said.append(time.monotonic())
        while said[0] <= said[-1] - seconds:
            said.popleft()
        if len(said) > most:
            self.violations["messages"] += 1
        return len(said) > most

    @staticmethod
    async def _cut(client: ServerConnection, seconds: float) -> None:
        await asyncio.sleep(seconds)
        client.transport.abort()

    async def _do(self, client: ServerConnection, answer: Answer) -> None:
        for stream in answer.unsubscribe:
            self._subscribers[stream].discard(client)
        for stream in answer.subscribe:
            self._subscribers[stream].add(client)
            self._subscribers[EVERYBODY].add(client)
        if answer.subscribe:
            self._open.set()
        for text in answer.texts:
            await client.send(text)

    def _streams(self, client: ServerConnection) -> set[str]:
        return {name for name, clients in self._subscribers.items() if client in clients and name != EVERYBODY}

    async def _heartbeats(self, client: ServerConnection) -> None:
        while self._dialect.heartbeat_seconds is not None:
            await asyncio.sleep(self._dialect.heartbeat_seconds)
            try:
                for text in self._dialect.heartbeats(self._streams(client)):
                    await client.send(text)
            except ConnectionClosed:
                return

    async def _patience(self, client: ServerConnection) -> None:
        if self._dialect.patience_seconds is not None:
            await asyncio.sleep(self._dialect.patience_seconds)
            if not self._streams(client):
                await client.close(reason="no subscription")

    def _http(self, client: ServerConnection, request: Request) -> Response | None:
        """Nothing for a WebSocket; the answer to any other request."""
        address = urlsplit(request.path)
        if "websocket" in request.headers.get("Upgrade", "").lower():
            if address.path == self._dialect.path:
                return None
            return client.respond(HTTPStatus.NOT_FOUND, f"connect to {self._dialect.path}\n")
        now = time.monotonic()
        most, seconds = self._dialect.rest_limit
        while self._requests and self._requests[0] <= now - seconds:
            self._requests.popleft()
        if len(self._requests) >= most:
            reply = self._dialect.too_many_requests()
        else:
            self._requests.append(now)
            reply = self._dialect.rest(address.path, parse_qs(address.query))
        response = client.respond(HTTPStatus(reply.status), json.dumps(reply.body))
        del response.headers["Content-Type"]
        response.headers["Content-Type"] = "application/json"
        for name, value in reply.headers.items():
            response.headers[name] = value
        return response
