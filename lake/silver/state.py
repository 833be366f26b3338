"""The stored state of deduplication: a snapshot every fifty commits, and the deltas of the commits since.

A commit of silver.ticks carries only what its micro-batch adds to the state (its `delta`): the whole state grows with
the number of instruments. Snapshots lie in a folder of the table that Delta's readers and VACUUM ignore. A snapshot's
name is the table version that it describes.
"""

from __future__ import annotations

import gzip
import json
import logging
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from lake.delta.files import Files
from lake.delta.writer import LakeWriter
from lake.silver.deduplicate import Delta, Seen
from lake.silver.gaps import EarlyReports
from lake.tables import SILVER_TICKS
from lake.times import EPOCH

logger = logging.getLogger(__name__)

# A start reads at most so many commits, some 3 ms each.
SNAPSHOT_EVERY = 50
KEPT_SNAPSHOTS = 2
_SUFFIX = ".json.gz"


class StateLost(RuntimeError):
    """The log no longer has the commits that describe the state of deduplication."""


@dataclass
class State:
    """As of the newest commit of silver.ticks: the ids seen, the waiting reports, and the micro-batch's begin."""

    seen: Seen = field(default_factory=Seen)
    early: EarlyReports = field(default_factory=EarlyReports)
    began: datetime = EPOCH
    last: Delta = field(default_factory=Delta)

    def to_json(self) -> dict[str, Any]:
        return {
            "seen": self.seen.to_json(),
            "early": self.early.to_json(),
            "at": self.began.isoformat(),
            "last": self.last.to_json(),
        }

    def after(self, metadata: Mapping[str, Any]) -> State:
        """The state after a commit with this metadata."""
        if metadata.get("emptied"):
            return State()
        if "seen" in metadata:
            seen, last = Seen.from_json(metadata["seen"]), Delta()
        elif "delta" in metadata:
            last = Delta.from_json(metadata["delta"])
            seen = self.seen.after(last)
        else:
            return self
        early = EarlyReports.from_json(metadata["early"]) if "early" in metadata else self.early
        return State(seen, early, datetime.fromisoformat(metadata["at"]), last)


def _folder(root: str) -> str:
    return f"{SILVER_TICKS.path(root)}/_seen"


def restore(lake: LakeWriter) -> State:
    """Read the state as of the newest commit, and write a snapshot of it. Raises StateLost."""
    newest = lake.version(SILVER_TICKS)
    snapshots = [version for version in _snapshots(lake.files, lake.root) if version <= newest]
    if not snapshots and "seen" in lake.metadata(SILVER_TICKS):
        # Commits of a version 1 lake have the whole state.
        state = State().after(lake.metadata(SILVER_TICKS))
        keep(lake, state, newest)
        return state
    version, state = _newest_snapshot(lake, snapshots)
    try:
        for metadata in lake.metadata_since(SILVER_TICKS, version):
            state = state.after(metadata)
    except FileNotFoundError as error:
        raise StateLost(
            f"{SILVER_TICKS.path(lake.root)}: what was seen is not known, since its log lacks a commit ({error}): "
            "let --rebuild make silver and gold anew from bronze."
        ) from error
    keep(lake, state, newest)
    return state


def _newest_snapshot(lake: LakeWriter, versions: Iterable[int]) -> tuple[int, State]:
    """The version and content of the newest snapshot that is whole; (-1, the empty state) if there is none."""
    for version in sorted(versions, reverse=True):
        try:
            return version, _snapshot(lake, version)
        except (gzip.BadGzipFile, FileNotFoundError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
            logger.warning("%s/%020d%s is damaged: %s", _folder(lake.root), version, _SUFFIX, error)
    return -1, State()


def _snapshot(lake: LakeWriter, version: int) -> State:
    content = json.loads(gzip.decompress(lake.files.read(f"{_folder(lake.root)}/{version:020d}{_SUFFIX}")))
    seen, early = Seen.from_json(content["seen"]), EarlyReports.from_json(content["early"])
    return State(seen, early, datetime.fromisoformat(content["at"]), Delta.from_json(content["last"]))


def keep(lake: LakeWriter, state: State, version: int) -> None:
    """Write a snapshot of the state as of a version of silver.ticks, and delete old ones."""
    content = gzip.compress(json.dumps(state.to_json(), separators=(",", ":")).encode(), compresslevel=1)
    lake.files.replace(f"{_folder(lake.root)}/{version:020d}{_SUFFIX}", content)
    # A start reads the commits that follow.
    lake.keep_log(SILVER_TICKS, version + 1)
    for old in sorted(_snapshots(lake.files, lake.root))[:-KEPT_SNAPSHOTS]:
        lake.files.delete(f"{_folder(lake.root)}/{old:020d}{_SUFFIX}")


def needed_since(files: Files, root: str) -> int:
    """The first version of silver.ticks whose commit a start may read: the log must not be cleaned further."""
    return max(_snapshots(files, root), default=-1) + 1


def _snapshots(files: Files, root: str) -> list[int]:
    names = (status.name for status in files.list(_folder(root)))
    return [int(name.removesuffix(_SUFFIX)) for name in names if name.endswith(_SUFFIX)]
