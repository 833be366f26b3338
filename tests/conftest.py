"""What tests share: the settings of their own suite, and its services, started once and only if a test needs them."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

import services
from conf.settings import PROJECT, Settings, read_settings
from services.java import JARS, java_home

TEST_CONF = Path(__file__).parent / "test.toml"


@pytest.fixture(scope="session")
def suite() -> Settings:
    """The settings of the tests' own suite; starts nothing."""
    return read_settings(environment={}, file=TEST_CONF)


@pytest.fixture(scope="session")
def running(suite: Settings) -> Iterator[Callable[..., Settings]]:
    """`running("kafka", "hdfs")`: these services answer, empty at the start of the run. Returns the suite's settings.

    They are stopped at the end of the run; their logs stay in .tickhouse/test until the next one.
    """
    (PROJECT / ".tickhouse").mkdir(exist_ok=True)
    with (PROJECT / ".tickhouse" / "test.lock").open("w") as lock:
        # Two runs of the tests in one checkout take turns.
        fcntl.flock(lock, fcntl.LOCK_EX)
        services.down(suite)
        shutil.rmtree(suite.state_dir)

        def start(*names: str) -> Settings:
            services.up(suite, names)
            return suite

        try:
            yield start
        finally:
            services.down(suite)


@pytest.fixture(scope="session")
def spark() -> Iterator[SparkSession]:
    """A local session with the suite's own Spark settings and Delta; needs no service."""
    os.environ |= {
        "JAVA_HOME": str(java_home()),
        "SPARK_CONF_DIR": str(PROJECT / "conf"),
        "SPARK_LOCAL_IP": "127.0.0.1",
    }
    session = (
        SparkSession.builder.master("local[2]")
        .config("spark.jars", ",".join(str(jar) for jar in sorted((JARS / "spark").glob("*.jar"))))
        .config("spark.driver.host", "127.0.0.1")
        .config("spark.driver.bindAddress", "127.0.0.1")
        .config("spark.ui.enabled", "false")
        .getOrCreate()
    )
    yield session
    session.stop()
