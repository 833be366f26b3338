"""scripts/demo from nothing to prices in SQL, and back to nothing."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import services
from conf.settings import PROJECT, read_settings
from lake.tables import TABLES

pytestmark = pytest.mark.services

# A suite of its own, so that what the demo starts and stops is all that there is.
SUITE = """
state_dir = "{folder}/state"
kafka_bootstrap_servers = "127.0.0.1:25092"
kafka_port = 25092
kafka_controller_port = 25093
lake_root = "hdfs://127.0.0.1:25020/tickhouse"
webhdfs_url = "http://127.0.0.1:25870"
namenode_port = 25020
namenode_http_port = 25870
secondarynamenode_http_port = 25868
datanode_port = 25866
datanode_http_port = 25864
datanode_ipc_port = 25867
sql_port = 25000
metrics_port = 25100
stream_metrics_port = 0
"""
PATIENCE = 600.0


def test_the_demo_shows_prices_answers_sql_and_leaves_nothing_running(tmp_path: Path) -> None:
    conf, out = tmp_path / "suite.toml", tmp_path / "out"
    conf.write_text(SUITE.format(folder=tmp_path))
    with out.open("w") as output:
        demo = subprocess.Popen(
            [sys.executable, "-m", "demo", "--conf", str(conf)], cwd=PROJECT, stdout=output, stderr=output
        )
        try:
            deadline = time.monotonic() + PATIENCE
            while demo.poll() is None and f"SQL: {len(TABLES)} tables" not in out.read_text():
                assert time.monotonic() < deadline, out.read_text()[-5000:]
                time.sleep(0.5)
            programs = psutil.Process(demo.pid).children(recursive=True)
            demo.send_signal(signal.SIGINT)
            exit_code = demo.wait(120)
        finally:
            demo.terminate()
    shown = out.read_text()
    assert exit_code == 0, shown[-5000:]
    for title in ("gold.current_price", "gold.price_1m", "bitcoin", "lag ", "beeline"):
        assert title in shown
    assert [program for program in programs if program.is_running() and program.status() != psutil.STATUS_ZOMBIE] == []
    settings = read_settings(environment={}, file=conf)
    assert {state.pid for state in services.states(settings)} == {None}
