"""A web page that somebody opens on this machine reaches loopback: it must not change anything there."""

from __future__ import annotations

import getpass
from collections.abc import Callable

import pytest
import urllib3

from conf.settings import Settings
from lake.delta.files import WebHdfs

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
