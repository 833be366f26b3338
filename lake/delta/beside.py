"""Commit beside the stream: change a table while the stream, and perhaps other programs, write it too.

The work is based on a version of the table. Others may commit later versions before it is done. Its commit then becomes
the version after theirs, unless one of their commits conflicts with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple
from uuid import uuid4

from lake.delta.drop import dropped
from lake.delta.log import MAINTENANCE, Action, DataFile, TableLog, metadata_of, redefines, removed_by


class Conflict(NamedTuple):
    """Why nothing was committed, and the paths of files to remove that others have removed."""

    reason: str
    lost: set[str]


class Beside:
    """Commits to a table after `version`, on which the work is based. what: the kind of work, for the metadata."""

    def __init__(self, log: TableLog, version: int, what: str) -> None:
        """Raises StoreError, as all methods do."""
        self._log, self._version, self._what, self._run = log, version, what, uuid4().hex
        # Each commit repeats the last micro-batch's metadata: cleaning the log must not delete those.
        self._batch = _of_batch(log.last_batch(version))
        # What others have removed since.
        self._lost: set[str] = set()

    def commit(
        self,
        added: Sequence[DataFile] = (),
        removed: Sequence[DataFile] = (),
        *,
        data_change: bool = True,
        definition: Mapping[str, Any] | None = None,
        conflicts: Callable[[Sequence[Action]], bool] = lambda actions: False,
    ) -> Conflict | None:
        """Commit; None when it is done.

        A conflict is a commit of others that removed one of `removed`, or that changes schema, properties or features,
        or of whose actions `conflicts` is true.
        """
        paths, number = {file.add["path"] for file in removed}, uuid4().hex
        while True:
            if lost := self._lost & paths:
                return Conflict(f"others have replaced {len(lost)} of {len(paths)} files", lost)
            metadata = {**self._batch, MAINTENANCE: self._what, "run": number}
            options: dict[str, Any] = {"data_change": data_change, "definition": definition}
            if self._log.put(self._version + 1, metadata, added, removed, **options):
                self._version += 1
                return None
            actions = self._log.actions(self._version + 1)
            self._version += 1
            theirs = metadata_of(actions)
            if theirs.get("run") == number:
                # It is our own commit: only the store's answer was lost.
                return None
            self._lost |= removed_by(actions)
            if "batch" in theirs:
                self._batch = _of_batch(theirs)
            if redefines(actions):
                return Conflict(f"version {self._version} has changed the schema, properties or features", set())
            if conflicts(actions):
                return Conflict(f"version {self._version} has written rows of the same times", set())

    def drop(self, removed: Sequence[DataFile], before: datetime) -> Conflict | None:
        """Remove files, whose rows are all from before a time, and record that in the table's properties."""
        definition = self._log.definition(self._version)
        configuration = definition.get("configuration") or {}
        if configuration.get("delta.appendOnly") == "true":
            # In a commit of its own: other writers of Delta want to see it before the rows go.
            configuration = {**configuration, "delta.appendOnly": "false"}
            definition = {**definition, "configuration": configuration}
            if conflict := self.commit(definition=definition):
                return conflict
        definition = {**definition, "configuration": {**configuration, **dropped(configuration, before)}}
        return self.commit(removed=removed, definition=definition)


def _of_batch(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metadata.items() if name not in (MAINTENANCE, "run")}
