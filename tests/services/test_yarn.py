"""What jobs leave behind on HDFS when they are killed goes at the next start."""

from __future__ import annotations

import getpass
from collections.abc import Callable

import hdfs
import pytest

from conf.settings import Settings
from services.web import ask

pytestmark = pytest.mark.services


def test_up_removes_the_staging_folders_of_ended_jobs_only(running: Callable[..., Settings]) -> None:
    settings = running("hdfs", "yarn")
    web = f"http://127.0.0.1:{settings.resourcemanager_http_port}/ws/v1/cluster"
    start = ask(f"{web}/info")["clusterInfo"]["startedOn"]
    files = hdfs.InsecureClient(settings.webhdfs_url, user=getpass.getuser())
    staging = f"/user/{getpass.getuser()}/.sparkStaging"
    # Of an earlier start of YARN; of this one, and not known to have ended; of somebody else.
    kept = {f"application_{start}_0077", "not-of-spark"}
    for name in {"application_1700000000000_0001", *kept}:
        files.write(f"{staging}/{name}/code.zip", b"code", overwrite=True)
    running("hdfs", "yarn")
    assert set(files.list(staging)) == kept
