"""The simulator as a process, met by a plain WebSocket client."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosedOK, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from conf.settings import PROJECT
from simulator.market import trades
from tests.programs import simulator


@contextmanager
def client(url: str) -> Iterator[ClientConnection]:
    with connect(url, compression=None, ping_interval=None, proxy=None, max_queue=None) as socket:
        yield socket


def until_the_end(socket: ClientConnection) -> list[Any]:
    """Every frame until the venue says goodbye."""
    frames = []
    try:
        while True:
            frames.append(json.loads(socket.recv(timeout=60)))
    except ConnectionClosedOK:
        return frames


def test_a_client_gets_the_seeds_trades_in_binances_format(tmp_path: Path) -> None:
    arguments = ("--assets", "bitcoin,cardano", "--seed", "9", "--trades", "500", "--speed", "0")
    with simulator(tmp_path, *arguments) as (program, url):
        with client(f"{url}?streams=btcusdt@trade/adausdt@trade") as socket:
            frames = until_the_end(socket)
        assert sum(program.line()["sent"].values()) == 500
        assert program.process.wait(60) == 0
    symbols = {"bitcoin": "BTCUSDT", "cardano": "ADAUSDT"}
    expected = [trade for trade, _ in zip(trades(["bitcoin", "cardano"], 50.0, 9), range(500), strict=False)]
    opened = frames[0]["data"]["T"] - expected[0].at_ms
    assert frames == [
        {
            "stream": f"{symbols[trade.asset].lower()}@trade",
            "data": {
                "e": "trade",
                "E": opened + trade.at_ms,
                "s": symbols[trade.asset],
                "t": trade.trade_id,
                "p": trade.price,
                "q": trade.quantity,
                "T": opened + trade.at_ms,
                "m": trade.buyer_is_maker,
                "M": True,
            },
        }
        for trade in expected
    ]


def test_streams_are_subscribed_and_left_by_frames_and_ids_are_shared(tmp_path: Path) -> None:
    with (
        simulator(tmp_path, "--assets", "bitcoin", "--rate", "200") as (_, url),
        client(url) as one,
        client(url) as other,
    ):
        for number, socket in enumerate((one, other)):
            socket.send(json.dumps({"method": "SUBSCRIBE", "params": ["btcusdt@trade"], "id": number}))
        first = [json.loads(one.recv(timeout=60)) for _ in range(200)]
        second = [json.loads(other.recv(timeout=60)) for _ in range(50)]
        assert first[0] == {"result": None, "id": 0}
        shared = {frame["data"]["t"]: frame for frame in first[1:]}
        assert {"result": None, "id": 1} in second
        seen = [frame for frame in second if "data" in frame and frame["data"]["t"] in shared]
        assert seen == [shared[frame["data"]["t"]] for frame in seen]
        assert len(seen) > 10

        one.send(json.dumps({"method": "UNSUBSCRIBE", "params": ["btcusdt@trade"], "id": 7}))
        one.send(json.dumps({"method": "LIST_SUBSCRIPTIONS", "id": 8}))
        one.send("not json")
        answers: list[Any] = []
        while len(answers) < 3:
            frame = json.loads(one.recv(timeout=60))
            if "stream" not in frame:
                answers.append(frame)
        assert answers[:2] == [{"result": None, "id": 7}, {"result": [], "id": 8}]
        assert "error" in answers[2]


def test_recordings_are_merged_by_time_and_filtered_by_subscription(tmp_path: Path) -> None:
    def line(at: int, stream: str) -> str:
        return f'{at} {{"stream":"{stream}","data":{{"at":{at}}}}}\n'

    plain, packed = tmp_path / "a.jsonl", tmp_path / "b.gz"
    plain.write_text(line(1_000, "a@trade") + line(3_000, "a@trade") + line(4_000, "a@depth"))
    with gzip.open(packed, "wt") as file:
        file.write(line(2_000, "b@trade") + line(5_000, "b@trade"))
    with simulator(tmp_path, "--replay", str(plain), str(packed), "--speed", "0") as (program, url):
        with client(f"{url}?streams=a@trade/b@trade") as socket:
            frames = until_the_end(socket)
        assert program.process.wait(60) == 0
    assert [frame["data"]["at"] for frame in frames] == [1_000, 2_000, 3_000, 5_000]


def test_speed_is_a_multiple_of_the_recordings_own(tmp_path: Path) -> None:
    recording = tmp_path / "a.jsonl"
    recording.write_text("".join(f'{n * 10**9} {{"stream":"a@trade","data":{{}}}}\n' for n in range(5)))
    with (
        simulator(tmp_path, "--replay", str(recording), "--speed", "4") as (_, url),
        client(f"{url}?streams=a@trade") as socket,
    ):
        socket.recv(timeout=60)
        began = time.monotonic()
        assert len(until_the_end(socket)) == 4
        # Four seconds of recording in one.
        assert 0.9 < time.monotonic() - began < 3.5


def test_another_path_is_not_found(tmp_path: Path) -> None:
    with simulator(tmp_path) as (program, url):
        with pytest.raises(InvalidStatus, match="404"), client(url.replace("/stream", "/ws")):
            pass
        assert program.stop() == 0
        assert program.line() == {"sent": {}}


@pytest.mark.parametrize(
    "arguments", [["--port", "70000"], ["--assets", "gold"], ["--rate", "0"], ["--speed", "-1"], ["--replay", "absent"]]
)
def test_a_wrong_argument_is_named(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "simulator", *arguments], cwd=PROJECT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert arguments[0] in done.stderr.splitlines()[-1]
