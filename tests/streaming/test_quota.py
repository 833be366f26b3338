"""A used-up quota of HDFS: the job ends at once and names it, wherever it meets it."""

from __future__ import annotations

import getpass
import subprocess
import uuid
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

import hdfs
import pytest
import urllib3
from kafka import KafkaAdminClient, KafkaProducer

from conf.settings import PROJECT, Settings
from lake.tables import BRONZE_TICKS
from tests.conftest import TEST_CONF


@pytest.mark.services
def test_the_job_ends_at_once_and_names_a_used_up_quota(running: Callable[..., Settings], tmp_path: Path) -> None:
    """Of the folder that executors write into, and of Spark's own checkpoint."""
    suite, name = running("kafka", "hdfs"), uuid.uuid4().hex[:8]
    root = f"{suite.lake_root}-quota-{name}"
    topics = {f"--{kind}-topic": f"{kind}-{name}" for kind in ("ticks", "rejects", "gaps")}
    options = [text for option in topics.items() for text in option]
    command = ["./spark-submit.sh", "streaming/ticks.py", "--conf", str(TEST_CONF), "--lake-root", root, "--once"]
    files = hdfs.InsecureClient(suite.webhdfs_url, user=getpass.getuser())
    with closing(KafkaAdminClient(bootstrap_servers=suite.kafka_bootstrap_servers)) as admin:
        options_of_topic = {"num_partitions": 1, "replication_factor": 1}
        admin.create_topics({topics["--ticks-topic"]: options_of_topic}, wait_for_metadata=True)
    producer = KafkaProducer(bootstrap_servers=suite.kafka_bootstrap_servers, acks="all")

    def run() -> tuple[int, str]:
        producer.send(topics["--ticks-topic"], b"no tick").get(timeout=60)
        done = subprocess.run(
            [*command, *options], cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        return done.returncode, done.stdout

    def set_quota(folder: str, names: int) -> None:
        query = f"op=SETQUOTA&namespacequota={names}&user.name={getpass.getuser()}"
        answer = urllib3.request("PUT", f"{suite.webhdfs_url}/webhdfs/v1{folder}?{query}")
        assert answer.status == 200, answer.data

    code, output = run()
    assert code == 0, output
    bronze = BRONZE_TICKS.path(urlsplit(root).path)
    [date] = [part for part in files.list(bronze) if part.startswith("ingest_date")]
    for folder in (f"{bronze}/{date}", f"{urlsplit(root).path}/_checkpoints/ticks/offsets"):
        set_quota(folder, files.content(folder)["directoryCount"] + files.content(folder)["fileCount"])
        code, output = run()
        assert code == 1, output
        assert "the quota is used up" in output
        set_quota(folder, 2**40)
    code, output = run()
    assert code == 0, output
    producer.close()
