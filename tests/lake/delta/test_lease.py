"""The lease: promise 7, a lake has one writer, and a second one is told so at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lake.delta import lease
from lake.delta.files import Files, LocalDisk, StoreUnavailable
from lake.delta.lease import LakeInUse, Lease


@pytest.fixture
def root(tmp_path: Path) -> str:
    return f"file:{tmp_path}"


def test_a_lease_is_refused_while_its_holder_renews_it(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEWAL_SECONDS", 0.01)
    first, second = Lease(LocalDisk(), root), Lease(LocalDisk(), root)
    first.acquire()
    with pytest.raises(LakeInUse, match="is writing the lake"):
        second.acquire()
    first.release()
    second.acquire()
    second.release()
    assert LocalDisk().list(root) == []


def test_a_holder_that_replaces_its_lease_in_place_is_noticed(root: str, tmp_path: Path) -> None:
    """As earlier versions do, whose file is half-written much of the time."""
    path, done = tmp_path / "_writer", threading.Event()

    def renew() -> None:
        number = 0
        while not done.is_set():
            number += 1
            text = json.dumps({"id": "earlier", "host": "elsewhere", "pid": 1, "renewals": number})
            path.write_text(text[:20])
            time.sleep(0.01)
            path.write_text(text)
            time.sleep(0.01)

    path.write_text("{")
    renewer = threading.Thread(target=renew)
    renewer.start()
    try:
        with pytest.raises(LakeInUse, match="process 1 on elsewhere is writing the lake"):
            Lease(LocalDisk(), root).acquire()
    finally:
        done.set()
        renewer.join()


def test_the_lease_of_a_writer_that_is_silent_is_taken(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that is paused lives, but does not renew; once it wakes it leaves the new holder's lease alone."""
    monkeypatch.setattr(lease, "RENEWAL_SECONDS", 0.2)
    paused = Lease(LocalDisk(), root)
    paused._write()
    ticks = iter(range(0, 1000, 5))
    taker = Lease(LocalDisk(), root, clock=lambda: float(next(ticks)))
    taker.acquire()
    woken = threading.Thread(target=paused._renew)
    woken.start()
    woken.join(60)
    assert not woken.is_alive()
    paused.release()
    with pytest.raises(LakeInUse):
        Lease(LocalDisk(), root).acquire()
    taker.release()


def test_the_lease_of_a_process_that_has_ended_is_taken_at_once(root: str) -> None:
    """A job that was killed is started again: it must not wait for itself."""
    dead = Lease(LocalDisk(), root)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    dead._holder["pid"] = ended.pid
    dead._write()

    def no_clock() -> float:
        raise AssertionError("it waits")

    taker = Lease(LocalDisk(), root, clock=no_clock)
    taker.acquire()
    assert json.loads(LocalDisk().read(taker.url))["pid"] == os.getpid()
    taker.release()


def test_a_store_that_is_away_does_not_keep_a_job_from_ending(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Away(LocalDisk):
        is_away = False

        def read(self, url: str, offset: int = 0, length: int | None = None) -> bytes:
            if Away.is_away:
                never.wait()
                raise StoreUnavailable("away")
            return super().read(url, offset, length)

    never = threading.Event()
    monkeypatch.setattr(lease, "_RELEASE_SECONDS", 0.1)
    monkeypatch.setattr(lease, "RENEWAL_SECONDS", 0.01)
    files: Files = Away()
    held = Lease(files, root)
    held.acquire()
    Away.is_away = True
    held.release()
    never.set()
    assert LocalDisk().exists(held.url)
