"""spark-submit.sh: the commands that it runs, word for word, and that what comes back is the job's."""

from __future__ import annotations

import getpass
import json
import os
import re
import subprocess
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import pytest

from conf.settings import PROJECT

Golden = Callable[[str, str], None]


def spark_submit(*words: str, folder: Path, **exported: str) -> subprocess.CompletedProcess[str]:
    """Run it from another folder, in an environment of its own."""
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "JAVA_HOME") if name in os.environ}
    command = [str(PROJECT / "spark-submit.sh"), *words]
    return subprocess.run(command, cwd=folder, env=environment | exported, capture_output=True, text=True, check=False)


def anywhere(command: str) -> str:
    """The command without what differs between machines, users and versions of packages."""
    command = re.sub(r"JAVA_HOME=\S+", "JAVA_HOME=JAVA", command.replace(str(PROJECT), "PROJECT"))
    command = re.sub(r"python3\.\d+", "python3.X", command.replace(f"/user/{getpass.getuser()}/", "/user/USER/"))
    command = re.sub(r"(packages-\w+-|tickhouse-jars/)[0-9a-f]{12}", r"\1HASH", command)
    return re.sub(r"(PROJECT/\.tickhouse/jars/spark/[\w.-]+\.jar,?)+", "EVERY-JAR", command)


@pytest.mark.parametrize(
    ("name", "words", "exported"),
    [
        ("local", ["streaming/ticks.py", "--once"], {}),
        (
            "local-options",
            [
                "--on",
                "local[2]",
                "--driver-memory=4g",
                "--conf",
                "spark.app.name=it's me",
                "batch/check_quality.py",
            ],
            {},
        ),
        ("yarn-client", ["--on", "yarn-client", "batch/check_quality.py", "--day", "2024-08-09"], {}),
        (
            "yarn-cluster",
            ["--on", "yarn-cluster", "--driver-memory", "1g", "streaming/ticks.py", "--conf", "SETTINGS", "--once"],
            {"TICKHOUSE_TICKS_TOPIC": "other", "TICKHOUSE_RECORDINGS": "here", "TICKHOUSE_CACHE": "here"},
        ),
        (
            "yarn-elsewhere",
            ["--on", "yarn-cluster", "streaming/ticks.py", "--lake-root", "hdfs://namenode.example:8020/lake"],
            {"HADOOP_CONF_DIR": "/etc/hadoop/conf", "PYSPARK_PYTHON": "/opt/python/bin/python3.11"},
        ),
        ("standalone", ["--on", "spark://127.0.0.1:7077", "streaming/ticks.py"], {}),
    ],
)
def test_commands_are_golden(
    name: str, words: list[str], exported: dict[str, str], golden: Golden, tmp_path: Path
) -> None:
    words = [str(PROJECT / "tests" / "test.toml") if word == "SETTINGS" else word for word in words]
    ran = spark_submit("--dry-run", *words, folder=tmp_path, **exported)
    assert (ran.returncode, ran.stderr) == (0, "")
    golden(f"{name}.txt", anywhere(ran.stdout))


def test_help_is_golden(golden: Golden, tmp_path: Path) -> None:
    ran = spark_submit("--help", folder=tmp_path)
    assert ran.returncode == 0
    golden("help.txt", ran.stdout)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "which job?"),
        (["--on"], "lacks its value"),
        (["--on", "mesos", "streaming/ticks.py"], "--on mesos: write local, yarn-client, yarn-cluster or spark://"),
        (["streaming/absent.py"], "there is no job"),
        (["--verbose", "ticks"], "ticks is not a JOB.py"),
        (["streaming/ticks.py", "--lake-root", "nonsense"], "--lake-root = 'nonsense'"),
        (["streaming/ticks.py", "--conf", "absent.toml"], "settings file absent.toml"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(words: list[str], said: str, tmp_path: Path) -> None:
    ran = spark_submit(*words, folder=tmp_path)
    assert ran.returncode == 2
    assert said in ran.stderr
    assert len(ran.stderr.splitlines()) == 1


JOB = """
import json, sys
from pyspark.sql import SparkSession
from conf.settings import arguments, from_command_line
from lake.tables import TABLES

settings, _ = from_command_line(arguments(None, "lake_root"))
spark = SparkSession.builder.getOrCreate()
table = settings.lake_root + "/table"
tiny = "cast(1 as decimal(28,12)) * cast('0.000000000001' as decimal(28,12))"
spark.sql(f"select {tiny} as tiny").write.format("delta").save(table)
print(json.dumps({
    "tiny": str(spark.read.format("delta").load(table).first()["tiny"]),
    "zone": spark.conf.get("spark.sql.session.timeZone"),
    "name": spark.conf.get("spark.app.name"),
}))
sys.exit(7)
"""


def test_a_job_has_our_code_delta_archived_classes_and_defaults_and_its_exit_code_comes_back(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(JOB)
    # -Xshare:on: Java ends at once where it cannot use the archive of classes.
    ran = spark_submit(
        *("--name", "given", "job.py", "--lake-root", f"file://{tmp_path}/lake"),
        folder=tmp_path,
        JDK_JAVA_OPTIONS="-Xshare:on",
    )
    assert ran.returncode == 7, ran.stderr
    told = json.loads(ran.stdout)
    assert (told["zone"], told["name"]) == ("UTC", "given")
    assert Decimal(told["tiny"]) == Decimal("0.000000000001")
