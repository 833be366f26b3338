"""The lake that a job's settings name."""

from __future__ import annotations

import argparse

from conf.settings import Settings
from lake.delta.files import Files, UnknownStore, files_of
from lake.delta.version import OtherVersion, check_version
from lake.tables import SILVER_TICKS

OVERTAKEN = 5
"""Exit code of a job whose files were deleted while it read them: start it again."""


def files_of_lake(parser: argparse.ArgumentParser, settings: Settings) -> Files:
    """The store of the lake's files.

    Ends the program with exit code 2 where lake_root is in no store that we know, or the lake is of another version.
    Raises StoreError.
    """
    try:
        files = files_of(settings.lake_root, str(settings.webhdfs_url))
        check_version(files, settings.lake_root, SILVER_TICKS)
    except (UnknownStore, OtherVersion) as error:
        parser.error(str(error))
    return files
