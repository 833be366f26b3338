"""Who writes a lake: a file at its root that the writer renews, so that a second one notices and leaves it alone.

This is politeness, not safety: two writers that both believe in their lease cannot both write, since the writer of the
tables fences the older one at each commit.
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

from lake.delta.files import Files
from lake.delta.timeouts import answered

logger = logging.getLogger(__name__)

RENEWAL_SECONDS = 3.0
PATIENCE_SECONDS = 15.0
"""A writer that has not renewed its lease for so long is taken to be gone."""
_RELEASE_SECONDS = 5.0
"""A store that is away does not keep a job from ending: the next writer waits for PATIENCE_SECONDS instead."""


class LakeInUse(RuntimeError):
    """Another writer renews its lease of the lake."""


class Lease:
    """The lease of the lake at root, renewed in the background from `acquire` to `release`. clock: in seconds."""

    def __init__(self, files: Files, root: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.url = f"{root}/_writer"
        self._files = files
        self._clock = clock
        self._root = root
        self._holder: dict[str, Any] = {"id": uuid4().hex, "host": socket.gethostname(), "pid": os.getpid()}
        self._renewals = 0
        self._released = threading.Event()
        self._renewer = threading.Thread(target=self._renew, name="lease", daemon=True)

    def acquire(self) -> None:
        """Take the lease, from nobody or from a writer that is gone. Raises LakeInUse if it is alive, and OSError."""
        holder = self._read()
        if holder is not None and not _is_gone(holder):
            logger.info("%s has the lease of %s: waiting whether it is alive", _name(holder), self._root)
            deadline = self._clock() + PATIENCE_SECONDS
            while self._clock() < deadline:
                time.sleep(0.5)
                now = self._read()
                if now is None:
                    break
                if now != holder:
                    raise LakeInUse(
                        f"{_name(now)} is writing the lake {self._root}: a lake has one writer. "
                        "End that one first, or use another lake_root."
                    )
        self._write()
        self._renewer.start()

    def release(self) -> None:
        """Stop to renew; give the lease back if it is still this writer's. Takes some seconds if the store is away."""
        self._released.set()
        if self._renewer.is_alive():
            self._renewer.join(_RELEASE_SECONDS)
        try:
            answered(self._give_back, patience=[_RELEASE_SECONDS], who="the lake's store")
        except OSError as error:  # TimeoutError is one.
            logger.warning("the lease of %s is not given back: %s", self._root, error)

    def _give_back(self) -> None:
        # Nobody writes it now: a file that cannot be read is not ours.
        holder = self._read(tries=1)
        if holder is not None and holder["id"] == self._holder["id"]:
            self._files.delete(self.url)

    def _renew(self) -> None:
        while not self._released.wait(RENEWAL_SECONDS):
            try:
                holder = self._read()
                if holder is not None and holder["id"] != self._holder["id"]:
                    return
                if not self._released.is_set():
                    self._write()
            except OSError as error:
                # The store is away for a while: the job notices by itself, or does not need it meanwhile.
                logger.warning("the lease of %s cannot be renewed: %s", self._root, error)

    def _write(self) -> None:
        self._renewals += 1
        content = json.dumps({**self._holder, "renewals": self._renewals}).encode()
        self._files.replace(self.url, content)

    def _read(self, tries: int = 50) -> dict[str, Any] | None:
        """Who has the lease; None if nobody has, or if the file cannot be understood after so many tries.

        A writer of an earlier version replaces the file in place: then we may read a half of it, and read again.
        """
        for _ in range(tries):
            try:
                return dict(json.loads(self._files.read(self.url)))
            except FileNotFoundError:
                return None
            except ValueError:
                time.sleep(0.05)
        return None


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


def _name(holder: dict[str, Any]) -> str:
    return f"process {holder['pid']} on {holder['host']}"
