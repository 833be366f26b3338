"""Our code as a zip file, for machines that have nothing of ours.

    python -m submit.code [--name-only]

Prints the file's path. It is made anew each time, which takes less time than finding out whether it has to be.
"""

from __future__ import annotations

import argparse
import os
import sys
import zipfile

from conf.settings import PROJECT

SHIPPED = PROJECT / ".tickhouse" / "ship" / "code.zip"
# What jobs import.
FOLDERS = ("conf", "lake", "operation", "streaming", "batch")


def make() -> None:
    """Make the file under another name and rename it: a job that is just being submitted reads the old one whole."""
    SHIPPED.parent.mkdir(parents=True, exist_ok=True)
    draft = SHIPPED.with_name(f"{SHIPPED.name}.{os.getpid()}")
    with zipfile.ZipFile(draft, "w", zipfile.ZIP_DEFLATED) as archive:
        for folder in FOLDERS:
            for file in sorted((PROJECT / folder).rglob("*.py")):
                archive.write(file, file.relative_to(PROJECT))
    draft.replace(SHIPPED)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name-only", action="store_true", help="make nothing")
    if not parser.parse_args().name_only:
        make()
    print(SHIPPED)
    return 0


if __name__ == "__main__":
    sys.exit(main())
