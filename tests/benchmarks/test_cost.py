"""What a command costs includes what outlives it, as Spark's JVM outlives the Python that started it."""

from __future__ import annotations

import json
import subprocess
import sys

from conf.settings import PROJECT

ORPHAN = "import sys, time; sum(range(5_000_000)); sys.stderr.write(str(time.process_time()))"


def test_the_time_of_a_process_whose_parent_has_ended_counts() -> None:
    command = ["bash", "-c", f"('{sys.executable}' -c '{ORPHAN}' &); exit 3"]
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.cost", *command], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    told = json.loads(ran.stdout)
    assert told["exit_code"] == 3
    assert told["cpu_seconds"] >= round(float(ran.stderr), 2) > 0
