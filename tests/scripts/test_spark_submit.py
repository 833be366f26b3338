"""spark-submit.sh: the commands that it runs, word for word, and that what comes back is the job's."""

from __future__ import annotations

import getpass
import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import pytest

from conf.settings import PROJECT, Settings, is_secret, read_settings
from lake.rules import DECIDING
from submit.settings import JOB_SETTINGS
from tests.conftest import TEST_CONF

CANARY = "canary-51c0ffee"
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
    command = re.sub(r"(packages-\w+-|tickhouse-jars/|settings-)[0-9a-f]{12}", r"\1HASH", command)
    command = re.sub(r"tmp/job-\d+", "tmp/job-NUMBER", command)
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
            {
                "TICKHOUSE_TICKS_TOPIC": "other",
                "TICKHOUSE_RECORDINGS": "here",
                "TICKHOUSE_WEBHOOK_URL": "https://h/KEY",
            },
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


def test_only_settings_of_jobs_leave_this_machine(tmp_path: Path) -> None:
    """Whatever the settings file and the environment hold, and as the driver on YARN will read it."""
    conf = tmp_path / "all.toml"
    conf.write_text(
        f"""
lake_root = "hdfs://namenode.example:8020/lake"
alert_threshold_pct = 1.5
gold_symbols = {{ "binance:bitcoin" = "BTCUSDT" }}
smtp_password = "{CANARY}"
coincap_api_key = "{CANARY}"
webhook_url = "https://h/{CANARY}"
rest_urls = {{ coinbase = "https://user:{CANARY}@h/" }}
"""
    )
    conf.chmod(0o600)
    secret = {"TICKHOUSE_WEBHOOK_URL": f"https://h/{CANARY}", "TICKHOUSE_REST_URLS": f"kraken=https://u:{CANARY}@h/"}
    job = ("streaming/ticks.py", "--conf", str(conf))
    ran = spark_submit(
        "--dry-run", "--on", "yarn-cluster", *job, folder=tmp_path, **secret, TICKHOUSE_TICKS_TOPIC="other"
    )
    assert ran.returncode == 0, ran.stderr
    assert CANARY not in ran.stdout + ran.stderr

    command = [sys.executable, "-m", "submit.settings", *job]
    environment = {**secret, "TICKHOUSE_TICKS_TOPIC": "other"}
    made = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, check=True)
    shipped = Path(made.stdout.strip())
    assert f"spark.yarn.dist.files={shipped}#settings.toml" in ran.stdout
    assert CANARY not in shipped.read_text()
    assert stat.S_IMODE(shipped.stat().st_mode) == 0o600
    settings = read_settings(environment={}, file=shipped)
    whole = read_settings(environment=environment, file=conf)
    assert settings.model_dump(include=set(JOB_SETTINGS)) == whole.model_dump(include=set(JOB_SETTINGS))
    assert (settings.ticks_topic, settings.gold_symbols) == ("other", {"binance:bitcoin": "BTCUSDT"})
    assert settings.model_dump(exclude=set(JOB_SETTINGS)) == Settings().model_dump(exclude=set(JOB_SETTINGS))


ON_YARN = """
import json, os, sys
from conf.settings import read_settings
from pyspark.sql import SparkSession

SparkSession.builder.getOrCreate().stop()
settings = read_settings()
shipped = open("settings.toml").read()
print("told", json.dumps([settings.ticks_topic, str(settings.webhook_url), dict(os.environ), shipped]))
"""


@pytest.mark.services
def test_a_driver_on_yarn_has_the_settings_of_jobs_and_no_secret(
    running: Callable[..., Settings], tmp_path: Path
) -> None:
    suite = running("hdfs", "yarn")
    (tmp_path / "job.py").write_text(ON_YARN)
    conf = tmp_path / "settings.toml"
    conf.write_text(TEST_CONF.read_text() + f'\nsmtp_password = "{CANARY}"\n')
    conf.chmod(0o600)
    secret = {"TICKHOUSE_WEBHOOK_URL": f"https://h/{CANARY}", "TICKHOUSE_TICKS_TOPIC": "other"}
    ran = spark_submit("--on", "yarn-cluster", "job.py", "--conf", str(conf), folder=tmp_path, **secret)
    assert ran.returncode == 0, ran.stderr[-5_000:]
    logs = [log.read_text() for log in (suite.state_dir / "services" / "yarn" / "log" / "containers").rglob("stdout")]
    [told] = [json.loads(line[5:]) for log in logs for line in log.splitlines() if line.startswith("told ")]
    assert told[:2] == ["other", "None"]
    assert CANARY not in json.dumps(told)


def test_the_settings_that_jobs_read_are_shipped() -> None:
    files = [file for folder in ("lake", "streaming", "batch") for file in (PROJECT / folder).rglob("*.py")]
    read = {name for file in files for name in re.findall(r"\bsettings\.([a-z_]+)", file.read_text())}
    # A folder of this machine: a driver elsewhere has none, and scripts/status asks it at its port.
    read.discard("state_dir")
    assert "lake_root" in read
    assert (read & Settings.model_fields.keys()) | set(DECIDING) <= set(JOB_SETTINGS)
    assert not [name for name in JOB_SETTINGS if is_secret(Settings.model_fields[name].annotation)]


def test_a_job_s_environment_has_no_settings_of_other_programs(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text("import json, os; print(json.dumps(sorted(os.environ)))")
    exported = {"TICKHOUSE_WEBHOOK_URL": f"https://h/{CANARY}", "TICKHOUSE_TICKS_TOPIC": "other", "FEED": "kept"}
    ran = spark_submit("job.py", folder=tmp_path, **exported)
    names = json.loads(ran.stdout)
    assert "TICKHOUSE_WEBHOOK_URL" not in names
    assert {"TICKHOUSE_TICKS_TOPIC", "FEED"} <= set(names)


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


TEMPORARY = """
import json, tempfile
from pyspark.sql import SparkSession

spark = SparkSession.builder.getOrCreate()
java = spark._jvm.java
made = java.io.File.createTempFile("made", "by-java")
manager = spark._jvm.org.apache.spark.SparkEnv.get().blockManager().diskBlockManager()
print(json.dumps({
    "python": tempfile.gettempdir(),
    "java": made.getParent(),
    "spark": [folder.getPath() for folder in manager.localDirs()],
    "hadoop": spark._jsc.hadoopConfiguration().get("hadoop.tmp.dir"),
}))
"""


def test_temporary_files_are_below_the_state_folder_and_those_of_a_dead_job_are_removed(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(TEMPORARY)
    left, other = tmp_path / "state" / "tmp" / "job-999999999", tmp_path / "state" / "tmp" / f"job-{os.getpid()}"
    for folder in (left, other):
        folder.mkdir(parents=True)
    ran = spark_submit("job.py", folder=tmp_path, TICKHOUSE_STATE_DIR=str(tmp_path / "state"))
    assert ran.returncode == 0, ran.stderr
    places = json.loads(ran.stdout)
    [own] = [folder for folder in other.parent.iterdir() if folder != other]
    assert stat.S_IMODE(own.stat().st_mode) == 0o700
    for place in (places["python"], places["java"], *places["spark"], places["hadoop"]):
        assert Path(place).is_relative_to(own), places
    assert (left.exists(), other.exists()) == (False, True)


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
