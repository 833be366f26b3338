"""Kafka: one process, broker and controller (KRaft)."""

from __future__ import annotations

import base64
import re
import subprocess
import time
import uuid
from collections import defaultdict
from pathlib import Path

from kafka import KafkaAdminClient
from kafka.admin import ConfigResource, ConfigResourceType
from kafka.errors import KafkaError

from conf.settings import Settings
from services.daemon import LOOPBACK, Daemon, accepts, daemon_environment
from services.errors import DaemonDied
from services.java import LOGGING_TO_STDOUT, jars, java_command, java_home
from services.service import Report, Service, as_properties, in_units, write_if_changed, write_logging_and_hosts


def service(settings: Settings) -> Service:
    folder = settings.state_dir / "services" / "kafka"
    properties = folder / "conf" / "server.properties"
    broker = Daemon(
        name="broker",
        folder=folder,
        command=java_command(
            folder,
            "broker",
            jars_of="kafka",
            heap="512m",
            carries_data=True,
            main="kafka.Kafka",
            arguments=[str(properties)],
        ),
        ports={"kafka_port": settings.kafka_port, "kafka_controller_port": settings.kafka_controller_port},
        environment=daemon_environment(java_home()),
    )
    address = f"{LOOPBACK}:{settings.kafka_port}"
    return Service(
        name="kafka",
        address=address,
        daemons=(broker,),
        prepare=lambda: _prepare(settings, folder, properties),
        waits_for=lambda: _waits_for(settings.kafka_port),
        report=lambda report: _report(settings, folder / "data", report),
    )


def _server_properties(settings: Settings, folder: Path) -> dict[str, str]:
    broker = f"PLAINTEXT://{LOOPBACK}:{settings.kafka_port}"
    controller = f"CONTROLLER://{LOOPBACK}:{settings.kafka_controller_port}"
    return {
        "process.roles": "broker,controller",
        "node.id": "1",
        "controller.quorum.bootstrap.servers": f"{LOOPBACK}:{settings.kafka_controller_port}",
        "listeners": f"{broker},{controller}",
        "advertised.listeners": f"{broker},{controller}",
        "controller.listener.names": "CONTROLLER",
        "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT",
        "log.dirs": str(folder / "data"),
        # Of a topic that says nothing else, such as one that a person made, Kafka keeps as much as of ours. Its default
        # is no limit in bytes.
        "log.retention.hours": str(settings.kafka_retention_hours),
        "log.retention.bytes": str(settings.kafka_retention_bytes),
        # Only whole closed segments are deleted: the default of 1 GiB keeps up to that much more of each partition, and
        # that of a week twice the hours of a quiet one.
        "log.segment.bytes": str(256 << 20),
        "log.roll.hours": "24",
        # Internal topics are compacted, not deleted, and likewise only closed segments are; the default is 100 MiB.
        "offsets.topic.segment.bytes": str(16 << 20),
        "transaction.state.log.segment.bytes": str(16 << 20),
        "share.coordinator.state.topic.segment.bytes": str(16 << 20),
        # Compaction's table of keys is always in memory: the default of 128 MiB takes a quarter of the heap. This one
        # holds 600,000 keys; ours are one a consumer group and partition.
        "log.cleaner.dedupe.buffer.size": str(16 << 20),
        # The controller writes two records a second, 14 MB a day, also while nothing happens; it deletes only closed
        # segments, by default after a week or 1 GiB.
        "metadata.log.segment.bytes": str(16 << 20),
        "metadata.max.retention.bytes": str(32 << 20),
        # Topics are made with the partitions and retention that the settings say, never by a slip of the pen.
        "auto.create.topics.enable": "false",
        # One broker can hold one replica of the internal topics; their defaults would wait for three brokers for ever.
        "offsets.topic.replication.factor": "1",
        "transaction.state.log.replication.factor": "1",
        "transaction.state.log.min.isr": "1",
        "share.coordinator.state.topic.replication.factor": "1",
        "share.coordinator.state.topic.min.isr": "1",
        # 50 partitions each, the default, serve many brokers; here they only cost files and time to start.
        "offsets.topic.num.partitions": "1",
        "transaction.state.log.num.partitions": "1",
        "share.coordinator.state.topic.num.partitions": "1",
        # Nobody else will join a group that starts on one machine: the first consumer gets its partitions at once.
        "group.initial.rebalance.delay.ms": "0",
    }


def _prepare(settings: Settings, folder: Path, properties: Path) -> None:
    write_if_changed(properties, as_properties(_server_properties(settings, folder)))
    write_logging_and_hosts(folder)
    if (folder / "data" / "meta.properties").exists():
        return
    # As Kafka's own random-uuid, which would take a Java start of its own; it must not begin with a dash.
    cluster = "T" + base64.urlsafe_b64encode(uuid.uuid4().bytes).decode()[1:22]
    format_storage = [
        f"{java_home()}/bin/java", "-Xmx256m", LOGGING_TO_STDOUT, "-cp", f"{folder}/conf:{jars('kafka')}",
        "kafka.tools.StorageTool", "format", "-t", cluster, "-c", str(properties), "--standalone", "--ignore-formatted",
    ]  # fmt: skip
    formatted = subprocess.run(format_storage, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if formatted.returncode != 0:
        raise DaemonDied(f"kafka: its storage in {folder}/data could not be formatted:\n{formatted.stdout.strip()}")


def _waits_for(port: int) -> str | None:
    if not accepts(port):
        return f"port {port}"
    address = f"{LOOPBACK}:{port}"
    try:
        admin = KafkaAdminClient(bootstrap_servers=address, request_timeout_ms=5000, bootstrap_timeout_ms=1000)
    except (KafkaError, OSError) as error:
        return f"metadata from {address} ({type(error).__name__})"
    try:
        return None if admin.describe_cluster()["brokers"] else f"a broker at {address}"
    except KafkaError as error:
        return f"metadata from {address} ({type(error).__name__})"
    finally:
        admin.close()


def _report(settings: Settings, data: Path, report: Report) -> None:
    """Each topic's size against what retention lets it have, and whether the disk has room for that."""
    partitions: dict[str, list[Path]] = defaultdict(list)
    for folder in data.iterdir():
        # Others are being deleted.
        if partition := re.fullmatch(r"(.+)-\d+", folder.name):
            partitions[partition[1]].append(folder)
    try:
        limits = _retention(settings, [topic for topic in partitions if not topic.startswith("__")])
    except (KafkaError, OSError) as error:
        report.unknown.append(f"how long it keeps the records of a topic ({type(error).__name__})")
        limits = {}
    topics: dict[str, dict[str, float | None]] = {}
    growth = 0
    for topic, folders in sorted(partitions.items()):
        size = sum(file.stat().st_size for folder in folders for file in folder.glob("*.log"))
        topics[topic] = {"bytes": size, "partitions": len(folders)}
        text = f"topic {topic}: {in_units(size)} in {len(folders)} partitions"
        if topic in limits:
            hours, each = limits[topic]
            limit = None if each is None else each * len(folders)
            topics[topic] |= {"retention_hours": hours, "retention_bytes": limit}
            growth += _growth(folders, size, hours, limit)
            kept = "for ever" if hours is None else f"for {hours:,.0f} h"
            text += f"; kept {kept}" + ("" if limit is None else f", at most {in_units(limit)}")
            if hours is None and limit is None:
                report.warnings.append(
                    f"topic {topic} keeps all records for ever: set its retention.ms or retention.bytes"
                )
        report.lines.append(text)
    report.figures |= {"topics": topics, "expected_growth_bytes": growth}
    if growth > report.figures["disk_free_bytes"]:
        report.warnings.append(
            f"at the rate so far, records take {in_units(growth)} more before the first are deleted, and the disk has "
            f"{in_units(report.figures['disk_free_bytes'])} free: lower the topics' retention.bytes or retention.ms "
            "(kafka_retention_bytes and kafka_retention_hours are for new topics)"
        )


def _growth(folders: list[Path], size: int, hours: float | None, limit: int | None) -> int:
    """Bytes that a topic will have more by the time that its first records are deleted. 0: it is too young to tell."""
    age = (time.time() - min(folder.joinpath("partition.metadata").stat().st_mtime for folder in folders)) / 3600
    if age < 1 or (hours is not None and age > hours):
        return 0
    by_time = None if hours is None else int(size / age * hours)
    return max(0, min((most for most in (by_time, limit) if most is not None), default=size) - size)


def _retention(settings: Settings, topics: list[str]) -> dict[str, tuple[float | None, int | None]]:
    """Topic -> hours, and bytes of a partition; None: for ever, any number. Raises KafkaError or OSError."""
    admin = KafkaAdminClient(
        bootstrap_servers=f"{LOOPBACK}:{settings.kafka_port}", request_timeout_ms=5000, bootstrap_timeout_ms=1000
    )
    try:
        resources = [ConfigResource(ConfigResourceType.TOPIC, topic) for topic in topics]
        configs = admin.describe_configs(resources, config_filter="all").get("topic", {}) if resources else {}
    finally:
        admin.close()
    limits = {}
    for topic, config in configs.items():
        milliseconds, size = int(config["retention.ms"]["value"]), int(config["retention.bytes"]["value"])
        limits[topic] = (None if milliseconds < 0 else milliseconds / 3_600_000, None if size < 0 else size)
    return limits
