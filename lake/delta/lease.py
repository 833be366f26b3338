"""The lease of a lake: a file at its root that the writer renews, so that a second job notices it and ends.

Correctness does not depend on it: at each commit the newer writer fences the older one, even if both hold a lease.
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
"""A lease not renewed for so long belongs to a dead writer."""
_RELEASE_SECONDS = 5.0
"""A job ends without giving its lease back if the store does not answer; the next writer then waits."""


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
        # When it was last renewed; None: it is not ours.
        self._renewed_at: float | None = None
        self._released = threading.Event()
        self._renewer = threading.Thread(target=self._renew, name="lease", daemon=True)

    @property
    def is_held(self) -> bool:
        """Whether it is ours, and renewed often enough that no other job takes this one for dead."""
        renewed_at = self._renewed_at
        return renewed_at is not None and time.monotonic() - renewed_at < PATIENCE_SECONDS

    def acquire(self) -> None:
        """Take the lease if it is free or its holder is dead. Raises LakeInUse if the holder is alive, and OSError."""
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
        """Stop renewing, and delete the lease if it is still ours. Takes some seconds if the store does not answer."""
        self._released.set()
        self._renewed_at = None
        if self._renewer.is_alive():
            self._renewer.join(_RELEASE_SECONDS)
        try:
            answered(self._give_back, patience=[_RELEASE_SECONDS], who="the lake's store")
        except OSError as error:  # TimeoutError is one.
            logger.warning("the lease of %s is not given back: %s", self._root, error)

    def _give_back(self) -> None:
        # We no longer write the file: if it is not valid JSON, it is another writer's.
        holder = self._read(tries=1)
        if holder is not None and holder["id"] == self._holder["id"]:
            self._files.delete(self.url)

    def _renew(self) -> None:
        while not self._released.wait(RENEWAL_SECONDS):
            try:
                holder = self._read()
                if holder is not None and holder["id"] != self._holder["id"]:
                    self._renewed_at = None
                    return
                if not self._released.is_set():
                    self._write()
            except OSError as error:
                # A store's outage is the job's concern, if it needs the store meanwhile.
                logger.warning("the lease of %s cannot be renewed: %s", self._root, error)

    def _write(self) -> None:
        self._renewals += 1
        content = json.dumps({**self._holder, "renewals": self._renewals}).encode()
        self._files.replace(self.url, content)
        self._renewed_at = time.monotonic()

    def _read(self, tries: int = 50) -> dict[str, Any] | None:
        """The lease's holder; None if there is none, or if the file is not valid JSON after so many tries.

        A writer of an earlier version overwrites the file in place: we may read half of it, and so read it again.
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
