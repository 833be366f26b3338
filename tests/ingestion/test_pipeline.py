"""The ingester as a process, between a venue and a real Kafka."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import pytest
from kafka import KafkaAdminClient
from websockets.asyncio.server import ServerConnection, serve

import services
from conf.settings import PROJECT, Settings
from ingestion.delivery import Delivery
from ingestion.feeds import VENUES
from ingestion.operation import fetch_status
from ingestion.publisher import publisher
from ingestion.spool import Spool
from ingestion.ticks import Reject
from services.control import states
from simulator.market import trades
from tests.ingestion import recorded
from tests.programs import RECORDINGS, ingestion, kafka_count, kafka_records, simulator, wait_until

Running = Callable[..., Settings]
ASSETS = ["bitcoin", "ethereum"]
CLIENTS = ["kafka-python", "confluent-kafka"]


@pytest.fixture
def own(running: Running) -> Settings:
    """Kafka answers; the topics are this test's own."""
    return with_own_topics(running("kafka"))


def with_own_topics(settings: Settings) -> Settings:
    name = uuid.uuid4().hex[:8]
    topics = {topic: f"{topic.partition('_')[0]}-{name}" for topic in ("ticks_topic", "rejects_topic", "gaps_topic")}
    return settings.model_copy(update=topics)


@contextmanager
def venue(frames: Sequence[str | bytes]) -> Iterator[str]:
    """A server that sends these frames, in order, once: after a connection is lost it goes on with the next frame."""
    ready = threading.Event()
    address: list[str] = []
    loop = asyncio.new_event_loop()
    over = asyncio.Event()
    left = iter(frames)

    async def handler(client: ServerConnection) -> None:
        for frame in left:
            await client.send(frame)
            if len(frame) > 1 << 20:
                break
        await client.wait_closed()

    async def run() -> None:
        async with serve(handler, "127.0.0.1", 0, ping_interval=None) as listening:
            address.append(f"ws://127.0.0.1:{listening.sockets[0].getsockname()[1]}/stream")
            ready.set()
            await over.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(run(),))
    thread.start()
    assert ready.wait(30)
    try:
        yield address[0]
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join()
        loop.close()


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def frame(trade_id: int, price: str = '"1.50"', symbol: str = "BTCUSDT") -> str:
    fields = f'"e":"trade","s":"{symbol}","t":{trade_id},"p":{price},"q":"2","T":1723161601437'
    return f'{{"stream":"btcusdt@trade","data":{{{fields}}}}}'


def ticks_by_symbol(settings: Settings) -> dict[str, list[dict[str, Any]]]:
    """The topic's messages by symbol, in Kafka's order; checks keys and partitions on the way."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    partitions: dict[str, set[int]] = defaultdict(set)
    for record in kafka_records(settings, settings.ticks_topic):
        message = json.loads(record.value)
        assert record.key.decode() == f"{message['source']}:{message['symbol']}"
        partitions[message["symbol"]].add(record.partition)
        found[message["symbol"]].append(message)
    assert all(len(numbers) == 1 for numbers in partitions.values())
    return found


def assert_numbered_without_holes(found: dict[str, list[dict[str, Any]]]) -> None:
    numbers = sorted(message["sequence"] for messages in found.values() for message in messages)
    assert numbers == list(range(1, len(numbers) + 1))
    assert len({message["producer"] for messages in found.values() for message in messages}) == 1


@pytest.mark.services
@pytest.mark.parametrize("client", CLIENTS)
def test_every_trade_of_a_venue_is_in_kafka_once_with_its_digits(own: Settings, tmp_path: Path, client: str) -> None:
    """Real recordings where they are at hand, else the simulator's own market."""
    own = own.model_copy(update={"kafka_client": client})
    files = [RECORDINGS / f"binance-{symbol}-20240809.gz" for symbol in ("btcusdt", "ethusdt")]
    if all(file.exists() for file in files):
        expected = [
            (trade.symbol, trade.trade_id, trade.price, trade.quantity)
            for file in files
            for trade in recorded.trades(file)
        ]
        arguments = ["--replay", *map(str, files)]
    else:
        symbols = {asset: VENUES["binance"].instruments[asset].symbol for asset in ASSETS}
        expected = [
            (symbols[trade.asset], trade.trade_id, trade.price, trade.quantity)
            for trade in islice(trades(ASSETS, 50.0, 1), 10_000)
        ]
        arguments = ["--assets", ",".join(ASSETS), "--trades", "10000"]
    with (
        simulator(tmp_path, *arguments, "--speed", "0") as (source, url),
        ingestion(tmp_path, own, url, "--assets", ",".join(ASSETS)) as program,
    ):
        assert source.process.wait(120) == 0
        wait_until(lambda: kafka_count(own, own.ticks_topic) >= len(expected), "all trades in Kafka")
        assert program.stop() == 0
        summary = program.line()
    assert (summary["received"], summary["published"], summary["rejected"]) == (len(expected), len(expected), 0)

    found = ticks_by_symbol(own)
    assert_numbered_without_holes(found)
    for symbol in {symbol for symbol, *_ in expected}:
        assert [(symbol, m["trade_id"], m["price_usd"], m["quantity"]) for m in found[symbol]] == [
            trade for trade in expected if trade[0] == symbol
        ]
    assert sum(map(len, found.values())) == len(expected)
    admin = KafkaAdminClient(bootstrap_servers=own.kafka_bootstrap_servers)
    topics = {topic["name"]: len(topic["partitions"]) for topic in admin.describe_topics([own.ticks_topic])}
    admin.close()
    assert topics == {own.ticks_topic: own.kafka_partitions}


@pytest.mark.services
def test_bad_frames_are_counted_named_and_published_and_the_ticks_go_on(own: Settings, tmp_path: Path) -> None:
    """Promise 5."""
    bad: dict[str, str | bytes] = {
        "not JSON": "this is not JSON",
        "unknown stream 'btcusdt@nonsense'": '{"stream":"btcusdt@nonsense","data":{}}',
        "price p is missing": frame(2, "null"),
        "price p is '0'": frame(3, '"0"'),
        "price p is '-1'": frame(4, '"-1"'),
        "price p is 'NaN'": frame(5, '"NaN"'),
        "price p is '1000000000000000000000000000000'": frame(6, f'"1{"0" * 30}"'),
        "unknown symbol 'XYZUSDT'": frame(7, symbol="XYZUSDT"),
        "a frame larger than 1048576 bytes": "x" * (2 << 20),
        "not JSON: 'utf-8'": b"\xff\xfe\x00",
    }
    frames = [part for number, text in enumerate(bad.values()) for part in (frame(100 + number), text)]
    with venue([*frames, frame(999)]) as url, ingestion(tmp_path, own, url, "--assets", "bitcoin") as program:
        wait_until(lambda: kafka_count(own, own.ticks_topic) == len(bad) + 1, "the ticks between the bad frames")
        assert program.stop() == 0
        summary = program.line()
        assert program.logged("unknown stream 'btcusdt@nonsense'")
    assert summary["rejected"] == len(bad)
    assert summary["undelivered"] == 0
    assert summary["connections"] == 2
    assert [message["trade_id"] for message in ticks_by_symbol(own)["BTCUSDT"]] == [*range(100, 100 + len(bad)), 999]

    rejects = [json.loads(record.value) for record in kafka_records(own, own.rejects_topic)]
    assert len(rejects) == len(bad)
    for (reason, sent), reject in zip(bad.items(), rejects, strict=True):
        assert reject["source"] == "binance"
        assert reject["reason"].startswith(reason)
        if isinstance(sent, str) and len(sent) < 1000:
            assert reject["raw"] == sent
    assert rejects[3]["trade_id"] == 3


@pytest.mark.services
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_mid_flow_loses_nothing_that_was_received(
    own: Settings, tmp_path: Path, number: signal.Signals
) -> None:
    """Promise 1."""
    with (
        simulator(tmp_path, "--rate", "2000", "--seed", "5") as (source, url),
        ingestion(tmp_path, own, url) as program,
    ):
        wait_until(lambda: kafka_count(own, own.ticks_topic) > 2000, "some flow")
        assert program.stop(number) == 0
        summary = program.line()
        source.stop()
        sent = source.line()["sent"]
    found = ticks_by_symbol(own)
    assert_numbered_without_holes(found)
    assert summary["received"] == summary["published"] == sum(map(len, found.values()))
    assert summary["undelivered"] == 0
    for symbol, messages in found.items():
        ids = [message["trade_id"] for message in messages]
        assert ids == list(range(ids[0], ids[0] + len(ids)))
        assert len(ids) <= sent[f"{symbol.lower()}@trade"]


@pytest.mark.services
@pytest.mark.parametrize("client", CLIENTS)
def test_a_killed_kafka_delays_ticks_and_neither_loses_nor_repeats_one(
    own: Settings, tmp_path: Path, client: str
) -> None:
    """More come than Kafka's client may hold: the spool takes them, and reading goes on."""
    own = own.model_copy(update={"kafka_client": client})
    total = 20_000
    arguments = ("--rate", "2000", "--trades", str(total), "--assets", "bitcoin,ethereum")
    with (
        simulator(tmp_path, *arguments) as (source, url),
        ingestion(tmp_path, own, url, "--assets", "bitcoin,ethereum", "--max-in-flight", "500") as program,
    ):
        wait_until(lambda: kafka_count(own, own.ticks_topic) > 1000, "some flow")
        (broker,) = states(own, ["kafka"])
        assert broker.pid is not None
        os.kill(broker.pid, signal.SIGKILL)
        wait_until(lambda: not listens(own.kafka_port), "the broker is gone")
        wait_until(lambda: program.logged("what comes stays in the spool"), "the log says that nothing flows to Kafka")
        services.up(own, ["kafka"])
        assert source.process.wait(120) == 0
        wait_until(lambda: kafka_count(own, own.ticks_topic) >= total, "all trades in Kafka")
        assert program.stop() == 0
        summary = program.line()
        assert program.logged("Kafka acknowledges again")
    assert (summary["received"], summary["published"], summary["connections"]) == (total, total, 1)
    found = ticks_by_symbol(own)
    assert_numbered_without_holes(found)
    for messages in found.values():
        ids = [message["trade_id"] for message in messages]
        assert ids == list(range(ids[0], ids[0] + len(ids)))


@pytest.mark.services
@pytest.mark.parametrize("client", CLIENTS)
def test_a_broker_that_says_nothing_costs_no_processor_time(own: Settings, tmp_path: Path, client: str) -> None:
    """As one that hangs: its port takes connections. What comes meanwhile has the processor for itself."""
    own = own.model_copy(update={"kafka_client": client})
    with (
        simulator(tmp_path, "--rate", "200", "--assets", "bitcoin") as (_, url),
        ingestion(tmp_path, own, url, "--assets", "bitcoin", "--stop-seconds", "0") as program,
    ):
        wait_until(lambda: kafka_count(own, own.ticks_topic) > 200, "some flow")
        (broker,) = states(own, ["kafka"])
        assert broker.pid is not None
        os.kill(broker.pid, signal.SIGKILL)
        try:
            wait_until(lambda: not listens(own.kafka_port), "the broker is gone")
            with socket.create_server(("127.0.0.1", own.kafka_port)) as mute:
                mute.accept()
                process = psutil.Process(program.process.pid)
                before = process.cpu_times()
                time.sleep(5)
                after = process.cpu_times()
        finally:
            services.up(own, ["kafka"])
        assert program.stop() == 0
    assert after.user + after.system - before.user - before.system < 1.5


def published(folder: Path) -> int:
    """How much the ingester with its spool in this folder has sent."""
    return int((fetch_status(folder / "spool") or {"published": 0})["published"])


@pytest.mark.services
def test_what_kafka_does_not_take_is_sent_by_the_next_start(own: Settings, tmp_path: Path) -> None:
    """Promise 1, with a stop after stop_seconds and one at once by a second signal."""
    (tmp_path / "patient").mkdir()
    held = ("--assets", "bitcoin", "--max-in-flight", "200", "--stop-seconds")
    with (
        simulator(tmp_path, "--rate", "500", "--assets", "bitcoin") as (_, url),
        ingestion(tmp_path, own, url, *held, "1") as program,
        ingestion(tmp_path / "patient", own, url, *held, "3600") as patient,
    ):
        for folder in (tmp_path, tmp_path / "patient"):
            wait_until(lambda: published(folder) > 200, "each has some flow to Kafka")  # noqa: B023
        (broker,) = states(own, ["kafka"])
        assert broker.pid is not None
        os.kill(broker.pid, signal.SIGKILL)
        try:
            wait_until(lambda: not listens(own.kafka_port), "the broker is gone")
            wait_until(lambda: program.logged("what comes stays in the spool"), "no message goes to Kafka")
            wait_until(lambda: patient.logged("what comes stays in the spool"), "no message goes to Kafka")
            assert program.stop() == 0
            summary = program.line()
            assert program.logged(f"{summary['undelivered']} messages remain in the spool")
            patient.process.send_signal(signal.SIGTERM)
            wait_until(lambda: patient.logged("a second signal stops at once"), "the first signal is answered")
            assert patient.stop() == 130
        finally:
            services.up(own, ["kafka"])
        assert summary["undelivered"] == summary["received"] - summary["published"] >= 200
        assert "Traceback" not in program.log.read_text()

    for folder in (tmp_path, tmp_path / "patient"):
        with ingestion(folder, own, "ws://127.0.0.1:1/stream", "--assets", "bitcoin") as again:
            wait_until(lambda: again.logged("messages of an earlier run are still to be sent"), "the spool is found")
            wait_until(lambda: again.logged("ws://127.0.0.1:1/stream"), "it is up")
            assert again.stop() == 0
            assert again.line()["undelivered"] == 0
    numbers: defaultdict[str, set[int]] = defaultdict(set)
    for message in ticks_by_symbol(own)["BTCUSDT"]:
        numbers[message["producer"]].add(message["sequence"])
    assert len(numbers) == 2
    assert all(found == set(range(1, len(found) + 1)) for found in numbers.values())
    assert summary["received"] in map(len, numbers.values())


@pytest.mark.services
@pytest.mark.parametrize("client", CLIENTS)
def test_what_was_taken_under_another_topic_still_goes_there(own: Settings, client: str, tmp_path: Path) -> None:
    """The settings name other topics than when the last run filled its spool."""
    earlier = with_own_topics(own).ticks_topic

    async def run() -> int:
        spool = Spool(tmp_path, 0.0, 1 << 30)
        delivery = Delivery(spool, lambda: publisher(own.model_copy(update={"kafka_client": client})))
        writing, sending = asyncio.create_task(spool.run()), asyncio.create_task(delivery.run())
        for topic in (earlier, own.ticks_topic):
            spool.append(topic, b"binance:BTCUSDT", b"a tick")
        while delivery.published < 2 and not sending.done():
            await asyncio.wait([sending], timeout=0.05)
        spool.stop()
        await writing
        sending.cancel()
        await asyncio.wait([sending])
        spool.close()
        return delivery.published

    assert asyncio.run(run()) == 2
    assert [kafka_count(own, topic) for topic in (earlier, own.ticks_topic)] == [1, 1]


def test_without_kafka_it_says_so_waits_and_stops_when_told(suite: Settings, tmp_path: Path) -> None:
    nowhere = suite.model_copy(update={"kafka_bootstrap_servers": "127.0.0.1:1"})
    with ingestion(tmp_path, nowhere, "ws://127.0.0.1:1/stream") as program:
        wait_until(lambda: program.logged("Kafka at 127.0.0.1:1 does not answer"), "the log says what is missing")
        assert program.stop() == 0
        assert program.line()["received"] == 0
    assert "Traceback" not in program.log.read_text()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--feed", "nowhere"], "feed = 'nowhere'"),
        (["--assets", "bitcoin,gold"], "binance has no gold"),
        (["--assets", ""], "--assets"),
        (["--url", "http://127.0.0.1/"], "--url"),
        (["--url", "ws://127.0.0.1:70000/stream"], "its port is not between 1 and 65535"),
        (["--kafka-bootstrap-servers", "127.0.0.1:0"], "its port is not between 1 and 65535"),
        (["--kafka-bootstrap-servers", "127.0.0.1"], "--kafka-bootstrap-servers"),
        (["--ticks-topic", "a b"], "--ticks-topic"),
        (["--max-in-flight", "0"], "--max-in-flight"),
        (["--spool-max-bytes", "1"], "--spool-max-bytes"),
        (["--spool-dir", "/dev/null/spool"], "spool_dir"),
    ],
)
def test_a_wrong_setting_is_one_line_and_exit_code_2(arguments: list[str], named: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ingestion", *arguments], cwd=PROJECT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert named in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not done.stdout


@pytest.mark.services
@pytest.mark.parametrize("client", CLIENTS)
def test_a_reject_that_is_too_large_for_the_broker_is_shortened_and_blocks_nothing(
    own: Settings, client: str, tmp_path: Path
) -> None:
    """The topics take less than is usual: less than a frame, and less than a batch of ticks."""
    settings = own.model_copy(update={"kafka_client": client})
    admin = KafkaAdminClient(bootstrap_servers=own.kafka_bootstrap_servers)
    for topic in (own.ticks_topic, own.rejects_topic):
        admin.create_topics({topic: {"num_partitions": own.kafka_partitions, "configs": {"max.message.bytes": "6000"}}})
    admin.close()
    rejects = [Reject(0, "binance", f"why {number}", b"\x00\xff\xe2\x82\xac" * 20_000) for number in range(3)]

    async def run() -> None:
        spool = Spool(tmp_path, 0.0, 1 << 30)
        delivery = Delivery(spool, lambda: publisher(settings))
        writing, sending = asyncio.create_task(spool.run()), asyncio.create_task(delivery.run())
        for reject in rejects:
            spool.append(own.rejects_topic, reject.key, reject.to_json())
            for number in range(100):
                spool.append(own.ticks_topic, b"binance:BTCUSDT", b"a tick of some bytes %03d" % number)
        async with asyncio.timeout(120):
            while spool.delivered < spool.end and not sending.done():
                await asyncio.wait([sending], timeout=0.05)
        spool.stop()
        await writing
        sending.cancel()
        await asyncio.wait([sending])
        spool.close()

    asyncio.run(run())
    assert kafka_count(own, own.ticks_topic) >= 300
    taken = {
        json.loads(record.value)["reason"]: json.loads(record.value) for record in kafka_records(own, own.rejects_topic)
    }
    assert set(taken) == {"why 0", "why 1", "why 2"}
    assert all(message["raw"].startswith("\x00\\xff\u20ac") for message in taken.values())
