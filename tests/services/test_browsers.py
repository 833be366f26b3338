"""A web page that somebody opens on this machine reaches loopback: it must not change anything there."""

from __future__ import annotations

import getpass
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import urllib3

from conf.settings import PROJECT, Settings
from lake.delta.files import WebHdfs
from services.java import java_home, spark_class_path

pytestmark = pytest.mark.services

Running = Callable[..., Settings]
# What a browser sends by itself when the script of a page calls fetch() or submits a form.
BROWSER = {
    "User-Agent": "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0",
    "Origin": "https://example.org",
    "Content-Type": "text/plain",
}

REFUSED = "Missing Required Header for CSRF Vulnerability Protection"


def browse(method: str, url: str, body: str | None = None) -> urllib3.BaseHTTPResponse:
    return urllib3.request(method, url, headers=BROWSER, body=body, retries=False, redirect=False)


def test_a_page_changes_no_file_on_hdfs_and_our_client_does(running: Running) -> None:
    settings = running("hdfs")
    files = WebHdfs(settings.webhdfs_url, getpass.getuser())
    url = f"{settings.lake_root}/kept"
    files.write(url, b"content")
    name_node = f"{settings.webhdfs_url}/webhdfs/v1{url.removeprefix(f'hdfs://127.0.0.1:{settings.namenode_port}')}"
    user = f"user.name={getpass.getuser()}"
    for method, operation in [
        ("POST", "TRUNCATE&newlength=0"),
        ("POST", "APPEND"),
        ("PUT", "CREATE&overwrite=true"),
        ("PUT", "RENAME&destination=/gone"),
        ("DELETE", "DELETE&recursive=true"),
    ]:
        answer = browse(method, f"{name_node}?op={operation}&{user}", "" if method != "DELETE" else None)
        assert answer.status == 400, operation
        assert answer.reason == REFUSED, operation
    assert files.read(url) == b"content"
    files.write(url, b"new content")
    assert files.rename(url, f"{url}-2")
    assert files.read(f"{url}-2") == b"new content"
    files.delete(f"{url}-2")
    assert not files.exists(f"{url}-2")


def test_a_page_writes_nothing_through_the_datanode(running: Running) -> None:
    settings = running("hdfs")
    address = f"http://127.0.0.1:{settings.datanode_http_port}/webhdfs/v1/forged"
    query = (
        f"op=CREATE&user.name={getpass.getuser()}&namenoderpcaddress=127.0.0.1:{settings.namenode_port}&overwrite=true"
    )
    url = f"{address}?{query}&createflag=&createparent=true"
    answer = browse("PUT", url, "forged")
    assert (answer.status, answer.reason) == (400, REFUSED)
    # The same request of a program is carried out.
    assert urllib3.request("PUT", url, body=b"a program's", retries=False).status == 201
    files = WebHdfs(settings.webhdfs_url, getpass.getuser())
    assert files.read(f"hdfs://127.0.0.1:{settings.namenode_port}/forged") == b"a program's"


def test_a_page_starts_no_application_on_yarn(running: Running) -> None:
    settings = running("yarn")
    web = f"http://127.0.0.1:{settings.resourcemanager_http_port}/ws/v1/cluster/apps/new-application"
    answer = browse("POST", web, "")
    assert answer.status == 400
    assert answer.reason == REFUSED
    # Without the filter, and so for whoever is no browser, it is a request that YARN answers.
    assert urllib3.request("POST", web, retries=False).status == 200


JOB_WITH_A_PAGE = """
import os, sys, threading, time, urllib.request
from pathlib import Path
from pyspark.sql import SparkSession

posted = sys.argv[1]

def wait(number):
    while not os.path.exists(posted):
        time.sleep(0.1)
    return number

spark = SparkSession.builder.master("local[1]").config("spark.ui.port", "0").getOrCreate()
context = spark.sparkContext
rows = []
job = threading.Thread(target=lambda: rows.extend(context.parallelize([1, 2], 1).map(wait).collect()))
job.start()
while not (context.statusTracker().getActiveJobsIds() and context.statusTracker().getActiveStageIds()):
    time.sleep(0.1)
for path in ("jobs/job/kill/?id=0", "stages/stage/kill/?id=0"):
    request = urllib.request.Request(f"{context.uiWebUrl}/{path}", b"", {"User-Agent": "Mozilla/5.0 (X11)"})
    urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60)
# The page ends a job by and by: here it would be ended before this one is over.
time.sleep(2)
Path(posted).touch()
job.join()
print(rows)
spark.stop()
"""


def test_a_page_ends_no_spark_job(tmp_path: Path) -> None:
    environment = os.environ | {
        "JAVA_HOME": str(java_home()),
        "SPARK_CONF_DIR": str(PROJECT / "conf"),
        "SPARK_LOCAL_IP": "127.0.0.1",
        "PYSPARK_PYTHON": sys.executable,
        "PYSPARK_SUBMIT_ARGS": f"--driver-class-path {spark_class_path()} pyspark-shell",
    }
    command = [sys.executable, "-c", JOB_WITH_A_PAGE, str(tmp_path / "posted")]
    job = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert job.stdout.strip() == "[1, 2]", job.stderr[-3000:]
