"""Who writes a lake: a file at its root that the writer renews, so that a second one finds out and leaves it alone.

This is politeness, not safety: two writers that both believe in their lease cannot both write, since `lake.writer`
fences the older one at each commit.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any
from uuid import uuid4

from py4j.protocol import Py4JJavaError
from pyspark.sql import SparkSession

from lake.files import content

logger = logging.getLogger(__name__)

RENEWAL_SECONDS = 3.0
# A writer that has not renewed its lease for so long is taken to be gone.
PATIENCE_SECONDS = 15.0


class LakeInUse(RuntimeError):
    """Another writer renews its lease of the lake."""


class Lease:
    """The lease of the lake at root, renewed in the background from `acquire` to `release`."""

    def __init__(self, spark: SparkSession, root: str, clock: Callable[[], float] = time.monotonic) -> None:
        jvm = spark._jvm
        assert jvm is not None
        self._spark = spark
        self.url = f"{root}/_writer"
        self._path = jvm.org.apache.hadoop.fs.Path(self.url)
        self._files = self._path.getFileSystem(spark._jsc.hadoopConfiguration())
        self._clock = clock
        self._root = root
        self._holder: dict[str, Any] = {"id": uuid4().hex, "host": socket.gethostname(), "pid": os.getpid()}
        self._renewals = 0
        self._released = threading.Event()
        self._renewer = threading.Thread(target=self._renew, name="lease", daemon=True)

    def acquire(self) -> None:
        """Take the lease, from nobody or from a writer that is gone. Raises LakeInUse if it is alive."""
        holder = self._read()
        if holder is not None and not _is_gone(holder):
            logger.info("%s has the lease of %s: waiting whether it is alive", _named(holder), self._root)
            deadline = self._clock() + PATIENCE_SECONDS
            while self._clock() < deadline:
                time.sleep(0.5)
                now = self._read()
                if now is None:
                    break
                if now != holder:
                    raise LakeInUse(
                        f"{_named(now)} is writing the lake {self._root}: a lake has one writer. "
                        "End that one first, or use another lake_root."
                    )
        self._write()
        self._renewer.start()

    def release(self) -> None:
        """Stop renewing; give the lease back if it is still this writer's."""
        self._released.set()
        if self._renewer.is_alive():
            self._renewer.join()
        # Nobody writes it now, and a store that is away is not waited for.
        holder = self._read(tries=1)
        if holder is not None and holder["id"] == self._holder["id"]:
            self._files.delete(self._path, False)

    def _renew(self) -> None:
        while not self._released.wait(RENEWAL_SECONDS):
            try:
                holder = self._read()
                if holder is not None and holder["id"] != self._holder["id"]:
                    return
                self._write()
            except Py4JJavaError as error:
                # The store is away for a while: the job finds out by itself, or does not need it meanwhile.
                logger.warning("the lease of %s cannot be renewed: %s", self._root, error.java_exception.getMessage())

    def _write(self) -> None:
        self._renewals += 1
        stream = self._files.create(self._path, True)
        try:
            stream.write(bytearray(json.dumps({**self._holder, "renewals": self._renewals}), "utf-8"))
        finally:
            stream.close()

    def _read(self, tries: int = 50) -> dict[str, Any] | None:
        """Who has the lease; None if nobody has. One that is just being written is waited for."""
        for _ in range(tries):
            text = self._text()
            if text is None:
                return None
            try:
                return dict(json.loads(text))
            except ValueError:
                time.sleep(0.05)
        return None

    def _text(self) -> str | None:
        """The file as it is at this moment, which may be half-written; None if there is none."""
        try:
            told = content(self._spark, str(self._path))
            return None if told is None else told.decode("utf-8", errors="replace")
        except Py4JJavaError:
            # It was replaced meanwhile. What cannot be read at all cannot be written either, which raises then.
            return ""


def _is_gone(holder: dict[str, Any]) -> bool:
    """Whether the process has ended, as far as this machine can tell."""
    if holder["host"] != socket.gethostname():
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _named(holder: dict[str, Any]) -> str:
    return f"process {holder['pid']} on {holder['host']}"
