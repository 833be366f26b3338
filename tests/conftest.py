"""What tests share: the settings of their own suite, and its services, started once and only if a test needs them.

Where files of tests run side by side (pytest-xdist), each of its workers has a suite of its own.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

import services
from conf.settings import PROJECT, Settings, read_settings
from services.java import SHARED_CLASSES, java_home, spark_class_path

GOLDEN_OPTION = "--update-golden"
WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
# The longest files: begun first, they are not what is waited for in the end.
LONGEST = [PROJECT / "tests" / "test_end_to_end.py", PROJECT / "tests" / "faults" / "test_faults.py"]

# Python workers of Spark take a main module without a file, as an xdist worker's is, for a doctest, and end.
sys.modules["__main__"].__dict__.setdefault("__file__", __file__)


def settings_file(worker: int) -> Path:
    """test.toml for the first worker; for another one a copy with ports and a state folder of its own."""
    first = Path(__file__).parent / "test.toml"
    if worker == 0:
        return first
    text = re.sub(r"\b2\d{4}\b", lambda port: str(int(port[0]) + 100 * worker), first.read_text(encoding="utf-8"))
    made = PROJECT / ".tickhouse" / f"test-{worker}.toml"
    made.parent.mkdir(exist_ok=True)
    made.write_text(text.replace(".tickhouse/test", f".tickhouse/test-{worker}"), encoding="utf-8")
    return made


TEST_CONF = settings_file(WORKER)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        GOLDEN_OPTION, action="store_true", help="write what users see to the golden files; then read the diff"
    )
    parser.addoption("--fuzz", type=int, default=2_000, help="how many odd records tests/fuzz makes")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path) if item.path in LONGEST else len(LONGEST))


@pytest.fixture
def fuzz(request: pytest.FixtureRequest) -> int:
    """How many odd records a test makes."""
    return int(request.config.getoption("--fuzz"))


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

    They are stopped at the end of the run; their logs stay in the suite's state folder until the next one.
    """
    suite.state_dir.parent.mkdir(exist_ok=True)
    with Path(f"{suite.state_dir}.lock").open("w") as lock:
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
        "PYSPARK_PYTHON": sys.executable,
    }
    session = (
        SparkSession.builder.master("local[2]")
        .config("spark.driver.extraClassPath", spark_class_path())
        .config("spark.driver.extraJavaOptions", SHARED_CLASSES)
        .config("spark.driver.host", "127.0.0.1")
        .config("spark.driver.bindAddress", "127.0.0.1")
        .config("spark.ui.enabled", "false")
        # Where its Python workers find the code, from wherever the tests are run.
        .config("spark.executorEnv.PYTHONPATH", str(PROJECT))
        .getOrCreate()
    )
    yield session
    session.stop()
