"""Alerts reach people: each once, while it is news, whatever fails on the way."""

from __future__ import annotations

import json
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from email.message import Message
from pathlib import Path
from uuid import uuid4

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.admin import NewTopic
from kafka.consumer.fetcher import ConsumerRecord
from kafka.structs import OffsetAndMetadata
from pydantic import SecretStr

import services
from conf.one_reader import STANDS_BY, OneReader
from conf.settings import PROJECT, Settings
from notifier.alerts import Alert, NotAnAlert
from notifier.channels import Email, NotNow, Refused, Webhook, channels
from notifier.delivery import Delivery
from notifier.sent_alerts import SentAlerts
from operation.addresses import addresses, ask
from tests.listening import beyond_loopback, listeners
from tests.notifier.receivers import Hook, Mailbox, serving
from tests.operation.conventions import exposed, problems_of
from tests.programs import Program, running_program, wait_until

CANARY = "canary-51c0ffee"


def row(name: str, *, age: float = 0, **others: object) -> bytes:
    """A row of gold.alerts as JSON."""
    opened_at = datetime.now(UTC) - timedelta(seconds=age)
    return json.dumps(
        {
            "alert_id": f"binance:bitcoin:up:binance:BTCUSDT:0:{name}",
            "source": "binance",
            "asset": "bitcoin",
            "direction": "up",
            "threshold_pct": 2.0,
            "window_seconds": 10,
            "opened_at": opened_at.isoformat(timespec="microseconds"),
            "reference_price": "60000.100000000000",
            "reference_time": (opened_at - timedelta(seconds=3)).isoformat(timespec="microseconds"),
            "trigger_price": "61500.000000000001",
            "peak_change_pct": 2.4998,
            "closed_at": None,
            **others,
        }
    ).encode()


class Topic:
    """A topic of its own, and the settings of a notifier that reads it."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.name = f"alerts-{uuid4().hex[:12]}"
        self.servers = settings.kafka_bootstrap_servers
        self.folder = folder
        self.folder.mkdir(exist_ok=True)

    def create(self) -> None:
        admin = KafkaAdminClient(bootstrap_servers=self.servers)
        admin.create_topics([NewTopic(self.name, 2, 1)])
        admin.close()

    def publish(self, *values: bytes | None) -> None:
        producer = KafkaProducer(bootstrap_servers=self.servers)
        for value in values:
            producer.send(self.name, value, key=b"binance:bitcoin")
        producer.flush()
        producer.close()

    def create_anew(self) -> None:
        admin = KafkaAdminClient(bootstrap_servers=self.servers)
        admin.delete_topics([self.name])
        wait_until(lambda: self.name not in admin.list_topics(), "the old topic is deleted")
        admin.close()
        self.create()

    def forget_offsets(self, channel: str, offset: int = 0, metadata: str = "") -> None:
        """As if what was told of had never been committed, or another offset had been."""
        consumer = KafkaConsumer(bootstrap_servers=self.servers, group_id=f"notifier-{channel}-{self.name}")
        places = [TopicPartition(self.name, number) for number in (0, 1)]
        consumer.assign(places)
        consumer.commit({place: OffsetAndMetadata(offset, metadata, -1) for place in places})
        consumer.close()

    def arguments(self, *others: str) -> tuple[str, ...]:
        own = ("--kafka-bootstrap-servers", self.servers, "--alerts-topic", self.name, "--notifier-metrics-port", "0")
        return (*own, "--state-dir", str(self.folder / "state"), *others)

    def publish_in_transaction(self, value: bytes) -> None:
        """As alerting does."""
        producer = KafkaProducer(bootstrap_servers=self.servers, transactional_id=self.name)
        producer.init_transactions()
        producer.begin_transaction()
        producer.send(self.name, value, key=b"binance:bitcoin")
        producer.commit_transaction()
        producer.close()

    def unread(self, channel: str) -> int:
        """By how many offsets the channel's group is behind the topic's ends."""
        consumer = KafkaConsumer(bootstrap_servers=self.servers, group_id=f"notifier-{channel}-{self.name}")
        ends = consumer.end_offsets([TopicPartition(self.name, number) for number in (0, 1)])
        behind = sum(end - (consumer.committed(place) or 0) for place, end in ends.items())
        consumer.close()
        return int(behind)

    def asked(self, page: str, state: str = "state") -> tuple[int, str]:
        """A page of the running notifier with this state folder: HTTP status and body."""
        [address] = addresses(self.folder / state)
        code, body = ask(address.url + page, 60)
        return code, body.decode()

    @contextmanager
    def notifier(self, *others: str, log: str = "notifier.log") -> Iterator[Program]:
        with running_program("notifier", self.arguments(*others), self.folder / log) as program:
            yield program


@pytest.fixture
def topic(running: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Topic:
    monkeypatch.delenv("TICKHOUSE_WEBHOOK_URL", raising=False)
    return Topic(running("kafka"), tmp_path)


def mail_flags(port: int) -> tuple[str, ...]:
    people = ("--smtp-from", "a@b.test", "--smtp-to", "c@d.test,e@f.test")
    return ("--smtp-host", "127.0.0.1", "--smtp-port", str(port), *people)


def hook_at(monkeypatch: pytest.MonkeyPatch, port: int, path: str = "/hook") -> None:
    monkeypatch.setenv("TICKHOUSE_WEBHOOK_URL", f"http://127.0.0.1:{port}{path}")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def text_of(mail: Message) -> str:
    payload = mail.get_payload(decode=True)
    assert isinstance(payload, bytes)
    return payload.decode()


# Through Kafka


@pytest.mark.services
def test_each_alert_is_told_of_once_by_all_ways_over_restarts(topic: Topic, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not again when it is corrected or closed; not when it is stale; and what is no alert stops nothing."""
    hook, mailbox = Hook(), Mailbox(rude=True)
    hook_at(monkeypatch, hook.port)
    first, second, third = row("1"), row("2"), row("3")
    with serving(hook), serving(mailbox):
        with topic.notifier(*mail_flags(mailbox.port)) as program:
            wait_until(lambda: program.logged("telling of"), "it starts before there is a topic")
            topic.create()
            topic.publish(first, row("1", peak_change_pct=3.5), b"{", None, b"[]", b"\xff", row("0", age=400))
            topic.publish(row("5", peak_change_pct=10**400), row("6", asset="a\r\nforged"), b"\r\n\x1b[2Jforged")
            topic.publish(row("1", closed_at=datetime.now(UTC).isoformat()), row("4", opened_at="soon"), first, second)
            wait_until(lambda: len(hook.bodies) >= 2 and len(mailbox.mails) >= 2, "both are told of by both ways")
            assert not beyond_loopback(listeners([psutil.Process(program.process.pid)]))
            outcome = 'tickhouse_notifier_alerts_total{channel="webhook",outcome="%s"}'
            wait_until(lambda: exposed(topic.asked("/metrics")[1])[outcome % "sent"] == 2, "it counts them")
            assert exposed(topic.asked("/metrics")[1])[outcome % "skipped"] == 8
            assert program.stop() == 0
            assert program.log.read_text().count("webhook: skipped") == 8
            log = program.log.read_bytes()
            assert b"\\x1b[2Jforged" in log
            assert not [mark for mark in (b"\r", b"\x1b", b"\nforged") if mark in log]
        topic.forget_offsets("webhook")
        with topic.notifier(*mail_flags(mailbox.port)) as program:
            topic.publish(third)
            wait_until(lambda: len(hook.bodies) >= 3 and len(mailbox.mails) >= 3, "and the next one after a restart")
            assert program.stop() == 0
    assert hook.bodies == [first, second, third], "as they came, to the byte"
    assert set(hook.asked) == {"/hook"}
    assert [mail["Subject"] for mail in mailbox.mails] == 3 * ["bitcoin up 2.50 % at binance"]
    assert [first.decode() in text_of(mail) for mail in mailbox.mails] == [True, False, False]
    assert mailbox.recipients[:2] == ["TO:<c@d.test>", "TO:<e@f.test>"]
    assert len({mail["Message-ID"] for mail in mailbox.mails}) == 3


@pytest.mark.services
def test_a_webhook_that_is_down_gets_its_alerts_when_it_is_back(topic: Topic, monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds up no mail meanwhile."""
    port = free_port()
    hook_at(monkeypatch, port)
    mailbox = Mailbox()
    topic.create()
    topic.publish(row("1"), row("2"))
    flags = (*mail_flags(mailbox.port), "--stream-stale-seconds", "3")
    with serving(mailbox), topic.notifier(*flags) as program:
        wait_until(lambda: len(mailbox.mails) == 2, "mail goes out")
        wait_until(lambda: program.logged("webhook: ConnectError; again in"), "the webhook is asked again")
        wait_until(lambda: topic.asked("/healthz")[0] == 503, "waiting alerts make it unhealthy")
        health = topic.asked("/healthz")[1]
        assert "webhook: 2 of the 2 records to go" in health
        assert "last error: ConnectError" in health
        assert "email" not in health
        waiting = json.loads(topic.asked("/status")[1])["channels"]
        assert (waiting["webhook"]["sent"], waiting["webhook"]["waiting"], waiting["email"]["sent"]) == (0, 2, 2)
        assert waiting["webhook"]["waiting_seconds"] > 0
        hook = Hook(port, answers=(503, 429, 204))
        hook.headers = {"Retry-After": "1"}
        with serving(hook):
            wait_until(lambda: len(hook.bodies) == 2, "the webhook has both")
            wait_until(lambda: topic.asked("/healthz")[0] == 200, "it is healthy again")
            page = topic.asked("/metrics")[1]
            figures = exposed(page)
            assert problems_of(page) == []
            assert figures['tickhouse_notifier_alerts_total{channel="webhook",outcome="sent"}'] == 2
            assert figures['tickhouse_notifier_alerts_total{channel="email",outcome="sent"}'] == 2
            assert figures['tickhouse_notifier_failed_attempts_total{channel="webhook"}'] >= 3
            assert figures['tickhouse_notifier_failed_attempts_total{channel="email"}'] == 0
            assert figures['tickhouse_notifier_waiting_seconds{channel="webhook"}'] == 0
            assert program.stop() == 0
        assert len(mailbox.mails) == 2
        assert program.logged("HTTP 503; again in")


@pytest.mark.services
def test_what_could_not_be_told_before_a_stop_is_told_after_it(topic: Topic, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    hook_at(monkeypatch, port)
    topic.create()
    topic.publish(row("1"))
    with topic.notifier() as program:
        wait_until(lambda: program.logged("again in"), "it is tried")
        assert program.stop() == 0
    hook = Hook(port)
    with serving(hook), topic.notifier() as program:
        wait_until(lambda: len(hook.bodies) == 1, "it is told of")
        assert program.stop() == 0


@pytest.mark.services
def test_what_is_no_news_any_more_or_refused_is_given_up(topic: Topic, monkeypatch: pytest.MonkeyPatch) -> None:
    """And holds up nothing; a time far ahead does not make it news for ever."""
    hook = Hook(answers=(400, *(503 for _ in range(100))))
    hook_at(monkeypatch, hook.port)
    topic.create()
    refused, ahead, told = row("1"), row("2", age=-86_400), row("3", age=-3_600)
    with serving(hook), topic.notifier("--alert-stale-seconds", "3") as program:
        topic.publish(refused, ahead)
        wait_until(lambda: program.logged("gave up"), "one is given up")
        hook.answers.clear()
        topic.publish(refused, told)
        wait_until(lambda: len(hook.bodies) == 1, "the next one is told of")
        assert program.stop() == 0
    assert hook.bodies == [told]
    assert program.logged("webhook: refused binance:bitcoin:up:binance:BTCUSDT:0:1: HTTP 400")


@pytest.mark.services
def test_after_a_kill_only_what_was_in_hand_is_repeated(topic: Topic, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while the webhook has the third of five and has not answered."""
    hook = Hook()
    hook_at(monkeypatch, hook.port)
    topic.create()
    alerts = [row(str(number)) for number in range(5)]
    hook.silent_from = 3
    with serving(hook):
        with topic.notifier() as program:
            topic.publish(*alerts)
            wait_until(lambda: len(hook.bodies) == 3, "the third is on its way")
            program.stop(signal.SIGKILL)
        hook.silent_from = None
        hook.answer.set()
        with topic.notifier() as program:
            wait_until(lambda: len(hook.bodies) == 6, "the others are told of")
            assert program.stop() == 0
    assert hook.bodies == [*alerts[:3], *alerts[2:]]


@pytest.mark.services
def test_a_second_notifier_stands_by_and_takes_over(topic: Topic, monkeypatch: pytest.MonkeyPatch) -> None:
    """On another machine: it has another state folder."""
    hook = Hook()
    hook_at(monkeypatch, hook.port)
    topic.create()
    says_so = f"webhook: {STANDS_BY}"
    with serving(hook), topic.notifier() as first:
        topic.publish(row("1"))
        wait_until(lambda: len(hook.bodies) == 1, "the first sends")
        assert json.loads(topic.asked("/healthz")[1])["notes"] == []
        elsewhere = ("--state-dir", str(topic.folder / "elsewhere"))
        with topic.notifier(*elsewhere, log="second.log") as second:
            wait_until(lambda: second.logged("stands by"), "the second stands by")
            wait_until(lambda: says_so in topic.asked("/healthz", "elsewhere")[1], "it says so")
            assert topic.asked("/healthz", "elsewhere") == (200, json.dumps({"trouble": [], "notes": [says_so]}))
            page = topic.asked("/metrics", "elsewhere")[1]
            assert problems_of(page) == []
            assert exposed(page)['tickhouse_notifier_stands_by{channel="webhook"}'] == 1
            topic.publish(row("2"), row("3"))
            wait_until(lambda: len(hook.bodies) == 3, "the first sends on")
            first.stop(signal.SIGKILL)
            topic.publish(row("4"))
            wait_until(lambda: len(hook.bodies) == 4, "the second takes over")
            assert (
                exposed(topic.asked("/metrics", "elsewhere")[1])['tickhouse_notifier_stands_by{channel="webhook"}'] == 0
            )
            assert second.stop() == 0
            assert not second.logged("0:3")
    assert [json.loads(body)["alert_id"][-1] for body in hook.bodies] == ["1", "2", "3", "4"]


@pytest.mark.services
def test_nothing_waits_behind_the_end_of_a_transaction(topic: Topic, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kafka gives it an offset, and no reader a record: what is behind by it would be unhealthy for ever."""
    hook = Hook()
    hook_at(monkeypatch, hook.port)
    topic.create()
    with serving(hook), topic.notifier() as program:
        topic.publish_in_transaction(row("1"))
        wait_until(lambda: len(hook.bodies) == 1, "it is sent")
        wait_until(lambda: topic.unread("webhook") == 0, "the group has read all that there is")
        assert program.stop() == 0


@pytest.mark.services
def test_a_topic_made_anew_is_named_and_read_from_its_begin(topic: Topic, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it runs, and while it does not, although the new topic has as many records."""
    hook = Hook()
    hook_at(monkeypatch, hook.port)
    topic.create()
    with serving(hook):
        with topic.notifier() as program:
            topic.publish(row("1"), row("2"))
            wait_until(lambda: len(hook.bodies) == 2, "they are sent")
            topic.create_anew()
            topic.publish(row("3"), row("1", age=400))
            wait_until(lambda: len(hook.bodies) == 3, "the new topic's alert is sent")
            assert program.stop() == 0
        topic.create_anew()
        topic.publish(row("4"), row("3"), row("5"), row("6"))
        # Kafka forgets a deleted topic's offsets; a copy of the cluster that is put back does not.
        topic.forget_offsets("webhook", 2, "an older topic's id")
        with topic.notifier() as program:
            wait_until(lambda: len(hook.bodies) == 6, "so are those")
            assert program.logged("the topic was made anew")
            assert program.stop() == 0
    assert [json.loads(body)["alert_id"][-1] for body in hook.bodies] == list("123456")


@pytest.mark.services
def test_offsets_beyond_what_kafka_has_are_named(topic: Topic, monkeypatch: pytest.MonkeyPatch) -> None:
    hook = Hook()
    hook_at(monkeypatch, hook.port)
    topic.create()
    topic.publish(row("1"))
    topic.forget_offsets("webhook", 1_000)
    with serving(hook), topic.notifier() as program:
        wait_until(lambda: len(hook.bodies) == 1, "it is sent")
        assert program.logged("records are deleted, or a disk was lost")
        assert program.stop() == 0


@pytest.mark.services
def test_kafka_may_be_away(topic: Topic, suite: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on when Kafka is back, and stops when asked to whether it is or not."""
    hook = Hook()
    hook_at(monkeypatch, hook.port)
    topic.create()
    with serving(hook), topic.notifier() as program:
        topic.publish(row("1"))
        wait_until(lambda: len(hook.bodies) == 1, "all is well")
        try:
            services.down(suite, ["kafka"])
            services.up(suite, ["kafka"])
            topic.publish(row("2"))
            wait_until(lambda: len(hook.bodies) == 2, "it is back")
            services.down(suite, ["kafka"])
            assert program.stop() == 0
        finally:
            services.up(suite, ["kafka"])


@pytest.mark.services
def test_secrets_are_told_to_nobody(topic: Topic, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by log, `ps` or the file of ids, whether the webhook is refused, away or answers."""
    hook = Hook(answers=(403, 500))
    hook_at(monkeypatch, hook.port, f"/{CANARY}?token={CANARY}")
    monkeypatch.setenv("TICKHOUSE_SMTP_PASSWORD", CANARY)
    flags = (*mail_flags(free_port()), "--smtp-user", "me", "--smtp-tls", "starttls", "--log-format", "json")
    topic.create()
    told: list[str] = []
    with serving(hook), topic.notifier(*flags) as program:
        topic.publish(row("1"), row("2"))
        wait_until(lambda: len(hook.bodies) == 1 and program.logged("email: ConnectionRefusedError"), "some go wrong")
        told += [topic.asked(page)[1] for page in ("/metrics", "/healthz", "/status")]
        told += psutil.Process(program.process.pid).cmdline()
        assert program.stop() == 0
    told += [file.read_text() for file in (topic.folder / "state").rglob("*.ids")]
    told.append(program.log.read_text())
    assert hook.asked[0] == f"/{CANARY}?token={CANARY}"
    assert "HTTP 403" in told[-1]
    assert not [text for text in told if CANARY in text]


# Settings


def started(folder: Path, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "notifier", "--state-dir", str(folder), "--kafka-bootstrap-servers", "127.0.0.1:1"]
    command += ["--notifier-metrics-port", "0"]
    prefixed = {f"TICKHOUSE_{name.upper()}": value for name, value in environment.items()}
    return subprocess.run(
        [*command, *flags], cwd=PROJECT, capture_output=True, text=True, timeout=60, env={"PATH": "", **prefixed}
    )


def test_without_anybody_to_tell_it_says_what_to_set(tmp_path: Path) -> None:
    ended = started(tmp_path)
    assert ended.returncode == 2
    assert "TICKHOUSE_WEBHOOK_URL" in ended.stderr
    assert "smtp_host" in ended.stderr


def mail_login(user: str, password: str) -> dict[str, str]:
    people = {"smtp_host": "h", "smtp_from": "a@b.test", "smtp_to": "a@b.test", "smtp_tls": "tls"}
    return {**people, "smtp_user": user, "smtp_password": password}


@pytest.mark.parametrize(
    ("said", "settings"),
    [
        ("TICKHOUSE_WEBHOOK_URL: Value error, not an address", {"webhook_url": f"ftp://{CANARY}"}),
        ("TICKHOUSE_WEBHOOK_URL: Value error, its port", {"webhook_url": f"http://h:99999/{CANARY}"}),
        ("smtp_to", {"smtp_host": "h", "smtp_from": "a@b.test"}),
        ("TICKHOUSE_SMTP_FROM", {"smtp_host": "h", "smtp_from": "a\nBcc: x@b.test", "smtp_to": "a@b.test"}),
        ("smtp_user and", {"smtp_host": "h", "smtp_from": "a@b.test", "smtp_to": "a@b.test", "smtp_password": CANARY}),
        (
            "smtp_tls: smtp_password is not sent in the clear",
            {
                "smtp_host": "h",
                "smtp_from": "a@b.test",
                "smtp_to": "a@b.test",
                "smtp_user": "u",
                "smtp_password": CANARY,
            },
        ),
        ("smtp_password: SMTP takes printable ASCII", mail_login("u", f"{CANARY}é")),
        ("smtp_password: SMTP takes printable ASCII", mail_login("u", f"{CANARY}\n")),
        ("smtp_password: SMTP takes printable ASCII", mail_login("u", "")),
        ("smtp_user: SMTP takes printable ASCII", mail_login(f"{CANARY}é", "p")),
        ("smtp_host: a..b is not the name of a host", {**mail_login("u", CANARY), "smtp_host": "a..b"}),
        ("webhook_url: it is not a valid URL", {"webhook_url": f"http://h/{CANARY}\x7f"}),
        ("webhook_url: it is not a valid URL", {"webhook_url": f"http://{'a' * 64}.b..c/{CANARY}"}),
    ],
)
def test_a_wrong_setting_is_named_and_its_secret_is_not(tmp_path: Path, said: str, settings: dict[str, str]) -> None:
    ended = started(tmp_path, **settings)
    assert ended.returncode == 2
    assert said in ended.stderr
    assert CANARY not in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_two_notifiers_do_not_share_what_they_remember(tmp_path: Path) -> None:
    kafka = ("--kafka-bootstrap-servers", "127.0.0.1:1")
    flags = ("--state-dir", str(tmp_path), *kafka, *mail_flags(1), "--notifier-metrics-port", "0")
    with running_program("notifier", flags, tmp_path / "log") as program:
        wait_until(lambda: program.logged("telling of") and program.logged("Kafka"), "it waits for Kafka")
        second = started(tmp_path, *mail_flags(1))
        assert second.returncode == 4
        assert "another notifier" in second.stderr
        assert program.stop() == 0


def test_secrets_do_not_show_in_settings() -> None:
    settings = Settings(webhook_url=SecretStr(f"http://h/{CANARY}"), smtp_password=SecretStr(CANARY))
    assert CANARY not in repr(settings) + str(settings.model_dump(mode="json"))
    assert [channel.name for channel in channels(settings)] == ["webhook"]


# The parts


@pytest.mark.parametrize(
    "change",
    [
        {"alert_id": None},
        {"alert_id": ""},
        {"alert_id": 7},
        {"asset": "a\r\nBcc: x@y.test"},
        {"source": "\ud800"},
        {"opened_at": "2024-08-09T10:00:00"},
        {"opened_at": "0001-01-01T00:00:00+23:00"},
        {"opened_at": 1723197600},
        {"peak_change_pct": "2"},
        {"peak_change_pct": True},
        {"peak_change_pct": float("nan")},
        {"reference_price": 5.5},
        pytest.param({"peak_change_pct": 10**400}, id="ten to the 400"),
        {"peak_change_pct": float("-inf")},
        {"peak_change_pct": 1e32},
        {"peak_change_pct": None},
        {"peak_change_pct": [2.5]},
        {"threshold_pct": float("inf")},
        pytest.param({"asset": "a" * 513}, id="long"),
        pytest.param({"more": "a" * 20_000}, id="large"),
        {"asset": "a\x1b[2J"},
        {"asset": "a\u202e"},
        {"direction": {}},
        {"opened_at": "+10000-01-01T00:00:00Z"},
    ],
)
def test_a_record_that_is_no_alert_is_known_as_such(change: dict[str, object]) -> None:
    with pytest.raises(NotAnAlert):
        Alert.read(json.dumps({**json.loads(row("1")), **change}).encode())


@pytest.mark.parametrize("name", sorted(json.loads(row("1")).keys() - {"threshold_pct", "window_seconds", "closed_at"}))
def test_a_record_without_a_field_that_a_message_needs_is_no_alert(name: str) -> None:
    fields = json.loads(row("1"))
    del fields[name]
    if name == "reference_time":
        Alert.read(json.dumps(fields).encode())
        return
    with pytest.raises(NotAnAlert, match=name):
        Alert.read(json.dumps(fields).encode())


@pytest.mark.parametrize(
    "value", [b"[" * 500_000, b"[" * 10_000, b'{"a":' * 400, b"1e999", b"9" * 5_000, b"\x00", None]
)
def test_bytes_that_are_no_alert_raise_nothing_else(value: bytes | None) -> None:
    with pytest.raises(NotAnAlert):
        Alert.read(value)


@given(
    st.binary()
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda values: (
            st.lists(values) | st.dictionaries(st.sampled_from(sorted(json.loads(row("1")))) | st.text(), values)
        ),
    ).map(lambda value: json.dumps(value).encode())
)
def test_whatever_a_record_holds_it_is_an_alert_or_not(value: bytes) -> None:
    with suppress(NotAnAlert):
        assert len(Alert.read(value).alert_id) <= 512


def test_foreign_text_in_other_fields_goes_out_escaped_and_cut() -> None:
    fields = {**json.loads(row("1")), "comment": "a\r\n\x1b[2J\u202e" + "x" * 600, "list": [{"a\nb": "c\nd"}]}
    alert = Alert.read(json.dumps(fields, ensure_ascii=False).encode())
    sent = json.loads(alert.json)
    assert sent["comment"].startswith("a\\r\\n\\x1b[2J\\u202exxx")
    assert len(sent["comment"]) == 512
    assert sent["list"] == [{"a\\nb": "c\\nd"}]
    assert {name: sent[name] for name in json.loads(row("1"))} == {name: fields[name] for name in json.loads(row("1"))}


class Broken:
    """A channel with an error of its own in it, for the first `times` attempts."""

    name = "broken"

    def __init__(self, times: int) -> None:
        self.times = times
        self.attempts = 0

    def send(self, alert: Alert) -> None:
        self.attempts += 1
        if self.attempts <= self.times:
            raise KeyError(CANARY)

    def close(self) -> None:
        """Nothing to close."""


@pytest.mark.parametrize(("times", "attempts", "skipped"), [(2, 3, 0), (100, 3, 1)])
def test_an_unforeseen_error_is_tried_again_and_then_passed_over(
    times: int,
    attempts: int,
    skipped: int,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("notifier.delivery._backoff", lambda state: 0.01)
    channel = Broken(times)
    delivery = Delivery(Settings(), channel, SentAlerts(tmp_path / "ids"), threading.Event())
    record = ConsumerRecord("alerts", 0, 0, 7, 0, 0, None, row("1"), [], None, 0, 0, 0)
    assert delivery.handle(record)
    assert (channel.attempts, delivery.figures.skipped) == (attempts, skipped)
    assert delivery.figures.sent == 1 - skipped
    assert "internal error KeyError at" in caplog.text
    assert CANARY not in caplog.text


class Stumbling(Delivery):
    """Its first reading of Kafka ends with an error that nobody foresaw."""

    readings = 0

    def _follow(self, reader: OneReader) -> None:
        self.readings += 1
        if self.readings == 1:
            raise KeyError(CANARY)
        self._stop.set()


@pytest.mark.services
def test_an_unforeseen_error_outside_of_sending_is_no_end(
    topic: Topic, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("notifier.delivery.SAY_AGAIN_SECONDS", 0.0)
    settings = Settings(kafka_bootstrap_servers=topic.servers, alerts_topic=topic.name)
    topic.create()
    delivery = Stumbling(settings, Broken(0), SentAlerts(topic.folder / "ids"), threading.Event())
    delivery.run()
    assert delivery.readings == 2
    assert "internal error KeyError at" in caplog.text
    assert CANARY not in caplog.text


def test_ids_are_remembered_by_the_newest_and_a_torn_line_spoils_no_other(tmp_path: Path) -> None:
    file = tmp_path / "ids"
    sent_alerts = SentAlerts(file, most=3)
    for name in ("a", "b\n", "ü", "d"):
        sent_alerts.add(name)
    with file.open("a") as torn:
        torn.write('\n"tor')
    sent_alerts.add("e")
    again = SentAlerts(file, most=3)
    assert [name in again for name in ("a", "b\n", "ü", "d", "e", "tor")] == [False, False, True, True, True, False]
    for number in range(100):
        again.add(str(number))
        assert len(file.read_text().splitlines()) <= 7
    assert "99" in SentAlerts(file, most=3)


def test_a_webhook_that_says_nothing_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("notifier.channels.TIMEOUT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        webhook = Webhook(f"http://127.0.0.1:{silent.getsockname()[1]}/{CANARY}")
        with pytest.raises(NotNow, match="ReadTimeout") as error:
            webhook.send(Alert.read(row("1")))
        assert CANARY not in str(error.value)
        webhook.close()


def mail_settings(port: int, **others: object) -> Settings:
    mail = {"smtp_host": "127.0.0.1", "smtp_port": port, "smtp_from": "a@b.test", "smtp_to": ["c@d.test"]}
    return Settings.model_validate({**mail, **others})


@pytest.mark.parametrize(("answer", "error"), [(451, NotNow), (550, Refused)])
def test_a_mail_server_s_no_is_for_now_or_for_good(answer: int, error: type[Exception]) -> None:
    mailbox = Mailbox()
    mailbox.answers = [answer]
    with serving(mailbox):
        email = Email(mail_settings(mailbox.port))
        with pytest.raises(error, match=str(answer)) as told:
            email.send(Alert.read(row("1")))
        assert "not you" not in str(told.value), "what it wrote may hold anything"
        email.send(Alert.read(row("1")))
    assert len(mailbox.mails) == 1


def test_a_password_goes_to_a_server_that_proves_who_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=mailbox -addext subjectAltName=IP:127.0.0.1"
    subprocess.run([*command.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    mailbox = Mailbox(context)
    with serving(mailbox):
        email = Email(mail_settings(mailbox.port, smtp_tls="starttls", smtp_user="me", smtp_password=CANARY))
        with pytest.raises(NotNow, match="SSLCertVerificationError"):
            email.send(Alert.read(row("1")))
        assert not mailbox.logins
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        email.send(Alert.read(row("1")))
    assert mailbox.logins == [f"\0me\0{CANARY}"]
    assert len(mailbox.mails) == 1


def test_starttls_is_not_left_out_where_a_server_has_none() -> None:
    mailbox = Mailbox()
    with serving(mailbox), pytest.raises(Refused, match="NotSupported"):
        Email(mail_settings(mailbox.port, smtp_tls="starttls")).send(Alert.read(row("1")))
    assert not mailbox.mails
