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
from services.java import SHARED_CLASSES, java_home, spark_class_path

GOLDEN_OPTION = "--update-golden"
TEST_CONF = Path(__file__).parent / "test.toml"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        GOLDEN_OPTION, action="store_true", help="write what users see to the golden files; then read the diff"
    )


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """`golden(name, text)`: the text is that of the file golden/NAME beside the test. An absent file fails."""
    folder = request.path.parent / "golden"

    def check(name: str, text: str) -> None:
        path = folder / name
        if request.config.getoption(GOLDEN_OPTION):
            path.write_text(text, encoding="utf-8")
        assert path.exists(), f"there is no {path}: `scripts/test {GOLDEN_OPTION}` writes it"
        assert text == path.read_text(encoding="utf-8"), f"if this is meant: scripts/test {GOLDEN_OPTION}"

    return check


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
        .config("spark.driver.extraClassPath", spark_class_path())
        .config("spark.driver.extraJavaOptions", SHARED_CLASSES)
        .config("spark.driver.host", "127.0.0.1")
        .config("spark.driver.bindAddress", "127.0.0.1")
        .config("spark.ui.enabled", "false")
        .getOrCreate()
    )
    yield session
    session.stop()
