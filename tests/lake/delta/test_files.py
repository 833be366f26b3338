"""Files by Python alone: the same on HDFS and on the local disk; a file is created once, and whole."""

from __future__ import annotations

import io
import itertools
import json
import pickle
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

from conf.settings import Settings
from lake.delta import files as module
from lake.delta.files import (
    Files,
    LocalDisk,
    QuotaExceeded,
    StoreError,
    StoreUnavailable,
    UnknownStore,
    WebHdfs,
    files_of,
)

Place = tuple[Files, str]


@pytest.fixture(params=["disk", pytest.param("hdfs", marks=pytest.mark.services)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Files, and a folder of their own."""
    if request.param == "disk":
        return files_of(f"file:{tmp_path}", ""), f"file:{tmp_path}"
    suite = request.getfixturevalue("running")("hdfs")
    return files_of(suite.lake_root, str(suite.webhdfs_url)), f"{suite.lake_root}-files/{tmp_path.name}"


@pytest.fixture
def hdfs(running: Callable[..., Settings], tmp_path: Path) -> tuple[WebHdfs, str]:
    suite = running("hdfs")
    files = files_of(suite.lake_root, str(suite.webhdfs_url))
    assert isinstance(files, WebHdfs)
    return files, f"{suite.lake_root}-files/{tmp_path.name}"


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that retries of this thread would have waited; other threads sleep as ever."""
    seconds: list[float] = []
    this_thread, sleep = threading.get_ident(), time.sleep
    monkeypatch.setattr(
        "tenacity.nap.time.sleep",
        lambda each: seconds.append(each) if threading.get_ident() == this_thread else sleep(each),
    )
    return seconds


def names(files: Files, url: str, after: str = "") -> list[str]:
    return [status.name for status in files.list(url, after)]


def test_what_is_written_is_read_in_whole_and_in_part(place: Place) -> None:
    files, root = place
    content = random.Random(1).randbytes(3_000_000)
    url = f"{root}/database/table/day=2024-08-09/part.parquet"
    assert not files.exists(url)
    files.write(url, b"half of it")
    files.write(url, content)
    assert files.exists(url)
    assert files.read(url) == content
    assert files.read(url, 2_999_990, 100) == content[-10:]
    assert files.read(url, 3_000_000) == b""
    with files.open(url, len(content)) as file:
        for offset, length in ((2_999_992, 8), (0, 5), (1_500_000, 1_200_000), (3_000_000, 1)):
            file.seek(offset)
            assert file.read(length) == content[offset : offset + length]
        assert file.seek(-4, io.SEEK_END) == 2_999_996
        assert file.read() == content[-4:]
    files.write(f"{root}/empty", b"")
    assert files.read(f"{root}/empty") == b""
    files.delete(url)
    files.delete(url)
    assert not files.exists(url)
    with pytest.raises(FileNotFoundError, match=r"part\.parquet"):
        files.read(url)


def test_a_folder_is_listed_from_a_name_on(place: Place) -> None:
    files, root = place
    assert files.list(f"{root}/log") == []
    for number in range(12):
        files.write(f"{root}/log/{number:03d}.json", b"x" * number)
    files.write(f"{root}/log/folder/file", b"")
    assert names(files, f"{root}/log") == [*(f"{number:03d}.json" for number in range(12)), "folder"]
    assert names(files, f"{root}/log", "009.json") == ["010.json", "011.json", "folder"]
    assert names(files, f"{root}/log", "zzz") == []
    assert [status.name for status in files.list(f"{root}/log", "002.json", 3)] == ["003.json", "004.json", "005.json"]
    assert [status.name for status in files.list(f"{root}/log", "010.json", 3)] == ["011.json", "folder"]
    first, second, *_, folder = files.list(f"{root}/log")
    assert [(status.size, status.is_folder) for status in (first, second, folder)] == [
        (0, False),
        (1, False),
        (0, True),
    ]
    assert 1_700_000_000_000 < first.modified <= second.modified
    with pytest.raises(OSError, match="log"):
        files.delete(f"{root}/log")
    files.delete(f"{root}/log", recursive=True)
    assert not files.exists(f"{root}/log")


def test_names_may_have_any_characters(place: Place) -> None:
    files, root = place
    url = f"{root}/a b/x=1%3A2?c&d#e+f/é"
    assert files.create(url, b"content")
    assert files.read(url) == b"content"
    assert names(files, url.rpartition("/")[0]) == ["é"]
    assert files.rename(url, f"{url} new")
    assert files.read(f"{url} new") == b"content"


def test_a_rename_replaces_nothing(place: Place) -> None:
    files, root = place
    for name in ("one", "two", "folder/file", "other/file"):
        files.write(f"{root}/{name}", name.encode())
    assert not files.rename(f"{root}/one", f"{root}/two")
    assert not files.rename(f"{root}/folder", f"{root}/other")
    assert not files.rename(f"{root}/none", f"{root}/three")
    assert not files.rename(f"{root}/one", f"{root}/none/three")
    assert (files.read(f"{root}/one"), files.read(f"{root}/two")) == (b"one", b"two")
    assert files.rename(f"{root}/folder", f"{root}/folder.before")
    assert names(files, f"{root}/folder.before") == ["file"]
    assert names(files, root) == ["folder.before", "one", "other", "two"]


def test_of_creators_of_one_name_one_wins_and_its_file_is_whole(place: Place) -> None:
    """Two drivers that commit one version: exactly one of them has committed it."""
    files, root = place
    contents = [bytes([letter]) * 300_000 for letter in b"abcd"]
    with ThreadPoolExecutor(8) as threads:
        for number in range(10):
            url = f"{root}/log/{number}.json"
            gate = threading.Barrier(5)

            def create(content: bytes, url: str = url, gate: threading.Barrier = gate) -> bool:
                gate.wait(60)
                return files.create(url, content)

            def watch(url: str = url, gate: threading.Barrier = gate) -> bytes:
                gate.wait(60)
                while True:
                    try:
                        return files.read(url)
                    except FileNotFoundError:
                        continue

            first_seen = threads.submit(watch)
            won = list(threads.map(create, contents))
            assert sorted(won) == [False, False, False, True]
            assert first_seen.result() == files.read(url) == contents[won.index(True)]
    # No drafts are left.
    assert names(files, f"{root}/log") == [f"{number}.json" for number in range(10)]


def test_a_replaced_file_is_read_whole(place: Place) -> None:
    files, root = place
    url, done = f"{root}/file", threading.Event()
    files.replace(url, b"a" * 200_000)

    def watch() -> set[bytes]:
        seen = set()
        while not done.is_set():
            seen.add(files.read(url))
        return seen

    with ThreadPoolExecutor(1) as threads:
        seen = threads.submit(watch)
        try:
            for number in range(20):
                files.replace(url, b"ab"[number % 2 : number % 2 + 1] * 200_000)
        finally:
            done.set()
    assert seen.result() <= {b"a" * 200_000, b"b" * 200_000}
    assert names(files, root) == ["file"]


@pytest.mark.services
@pytest.mark.parametrize("operation", ["CREATE", "RENAME"])
def test_a_lost_answer_is_not_a_lost_race(
    hdfs: tuple[WebHdfs, str], waits: list[float], monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    """The retry finds that the name is taken: by ourselves."""
    files, root = hdfs
    send = module._NameNodes.send
    lost: list[str] = []

    def lose(self: Any, method: str, url: str, body: bytes | None = None) -> bytes:
        answer = send(self, method, url, body)
        if f"op={operation}" in url and (body is not None) == (operation == "CREATE") and not lost:
            lost.append(url)
            raise StoreUnavailable("the answer is lost")
        return answer

    monkeypatch.setattr(module._NameNodes, "send", lose)
    assert files.create(f"{root}/ours", b"ours")
    assert files.read(f"{root}/ours") == b"ours"
    files.write(f"{root}/theirs", b"theirs")
    lost.clear()
    assert not files.create(f"{root}/theirs", b"ours")
    assert files.read(f"{root}/theirs") == b"theirs"
    lost.clear()
    files.replace(f"{root}/theirs", b"ours now")
    assert files.read(f"{root}/theirs") == b"ours now"
    assert names(files, root) == ["ours", "theirs"]
    assert waits


@pytest.mark.services
def test_what_hdfs_forbids_is_not_tried_again(
    hdfs: tuple[WebHdfs, str], waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be forbidden for a minute, and then be an error all the same."""
    files, root = hdfs
    monkeypatch.setenv("HADOOP_USER_NAME", "nobody-in-particular")
    stranger = files_of(root, files.webhdfs_url)
    with pytest.raises(StoreError, match=r"CREATE hdfs://.*/not-yours: .*Permission denied: user=nobody-in-particular"):
        stranger.write(f"{root.rpartition('/')[0].rpartition('/')[0]}/not-yours", b"")
    with pytest.raises(FileNotFoundError, match=r"OPEN hdfs://.*/none"):
        stranger.read(f"{root}/none")
    assert waits == []


@pytest.mark.services
@pytest.mark.parametrize("quota", ["namespacequota=1", "storagespacequota=1000"])
def test_a_quota_that_is_used_up_is_said_at_once(hdfs: tuple[WebHdfs, str], waits: list[float], quota: str) -> None:
    files, root = hdfs
    files.write(f"{root}/{quota}/file", b"")
    files.delete(f"{root}/{quota}/file")
    path = f"/{root.partition('//')[2].partition('/')[2]}/{quota}"
    url = f"{files.webhdfs_url.rstrip('/')}/webhdfs/v1{path}?op=SETQUOTA&{quota}&user.name={files.user}"
    with urlopen(Request(url, method="PUT")) as answer:
        assert answer.status == 200
    with pytest.raises(QuotaExceeded, match=r"the quota is used up; .*hdfs dfsadmin -setQuota"):
        files.create(f"{root}/{quota}/file", b"content")
    assert waits == []
    assert names(files, f"{root}/{quota}") == []


@pytest.mark.services
def test_another_name_node_takes_over(hdfs: tuple[WebHdfs, str], waits: list[float]) -> None:
    files, root = hdfs
    both = WebHdfs(f"http://127.0.0.1:1;{files.webhdfs_url}", files.user)
    both.write(f"{root}/file", b"content")
    assert both.read(f"{root}/file") == b"content"
    assert waits == []


@pytest.fixture
def standby() -> Iterator[tuple[str, list[str]]]:
    """The URL of a NameNode that answers as one on standby does, and what it was asked."""
    asked: list[str] = []

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            error = {"exception": "StandbyException", "message": "READ is not supported in state standby"}
            content = json.dumps({"RemoteException": error}).encode()
            self.send_response(403)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
        server.shutdown()


def test_name_nodes_that_all_stand_by_are_asked_in_turn_for_a_minute(
    standby: tuple[str, list[str]], waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, asked = standby
    ticks = itertools.count(0, 2)
    monkeypatch.setattr("tenacity.time.monotonic", lambda: next(ticks))
    with pytest.raises(StoreUnavailable, match=r"state standby; .*refused"):
        WebHdfs(f"{url};http://127.0.0.1:1", "somebody").exists("hdfs://tick/lake/file")
    assert len(waits) > 2
    assert len(asked) == len(waits) + 1
    assert asked[0] == "/webhdfs/v1/lake/file?op=GETFILESTATUS&user.name=somebody"


@pytest.mark.parametrize(
    "ask",
    [
        lambda files, url: files.write(url, b""),
        lambda files, url: files.create(url, b""),
        lambda files, url: files.replace(url, b""),
        lambda files, url: files.rename(url, f"{url}.new"),
        WebHdfs.read,
        WebHdfs.delete,
        WebHdfs.exists,
        WebHdfs.list,
    ],
)
def test_what_does_not_answer_is_tried_again_for_a_minute(
    ask: Callable[[WebHdfs, str], Any], waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = iter(range(0, 1_000, 7))
    monkeypatch.setattr("tenacity.time.monotonic", lambda: next(ticks))
    with pytest.raises(StoreUnavailable, match=r"hdfs://127.0.0.1:1/lake/.*refused"):
        ask(WebHdfs("http://127.0.0.1:1", "somebody"), "hdfs://127.0.0.1:1/lake/file")
    assert len(waits) > 2


def test_files_are_sent_to_executors() -> None:
    for files in (LocalDisk(), WebHdfs("http://127.0.0.1:1", "somebody")):
        assert pickle.loads(pickle.dumps(files)) == files


def test_other_stores_are_refused_by_name() -> None:
    with pytest.raises(UnknownStore, match="s3a://bucket/lake"):
        files_of("s3a://bucket/lake", "")
