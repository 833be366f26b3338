"""The Python packages that jobs import, as an archive for machines that have a Python and nothing of ours installed.

    python -m submit.packages streaming|batch [--name-only]

Prints the archive's path; makes it where it is not there yet. pyspark is never in it: Spark ships its own.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import tarfile
from importlib.metadata import PackageNotFoundError, PackagePath, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from conf.settings import PROJECT

SHIPPED = PROJECT / ".tickhouse" / "ship"
# What the jobs of a folder import; what those need in turn is found out. Spark wants pandas for Arrow.
IMPORTED = {
    "streaming": (
        *("pydantic", "urllib3", "tenacity", "kafka-python", "pyarrow", "pandas", "polars"),
        *("prometheus-client", "psutil"),
    ),
    "batch": ("pydantic", "urllib3", "tenacity", "pyarrow", "pandas", "polars", "great-expectations", "hdfs"),
}
SHIPPED_BY_SPARK = {"pyspark", "py4j"}


def needed(names: tuple[str, ...]) -> list[str]:
    """The packages with all that they require here, in alphabetical order."""
    required: set[str] = set()
    waiting = list(names)
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in required or name in SHIPPED_BY_SPARK:
            continue
        required.add(name)
        for line in distribution(name).requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return sorted(required)


def archive(folder: str) -> Path:
    """The path of the archive for jobs of a folder: another one for other versions, Python or packages."""
    contents = (PROJECT / "requirements.txt").read_bytes() + repr((sys.version_info[:2], IMPORTED[folder])).encode()
    return SHIPPED / f"packages-{folder}-{hashlib.sha256(contents).hexdigest()[:12]}.tar.gz"


def make(folder: str) -> None:
    """Make the archive under another name and rename it, so that a half of one is never shipped."""
    path = archive(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    # Level 1: it is unpacked on the same network that it travels through, and made while somebody waits.
    with tarfile.open(draft, "w:gz", compresslevel=1) as tar:
        for name in needed(IMPORTED[folder]):
            package = distribution(name)
            for file in package.files or ():
                if _is_wanted(file):
                    tar.add(str(package.locate_file(file)), str(file), recursive=False)
    draft.replace(path)


def _is_wanted(file: PackagePath) -> bool:
    """Not scripts in bin, not byte code, and not the packages' own tests, which are the greater half of some."""
    return ".." not in file.parts and "__pycache__" not in file.parts and "tests" not in file.parts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", choices=IMPORTED, help="folder of the job")
    parser.add_argument("--name-only", action="store_true", help="make nothing")
    options = parser.parse_args()
    path = archive(options.folder)
    if not options.name_only and not path.exists():
        print(f"spark-submit.sh: packing Python packages for {options.folder}/ into {path}", file=sys.stderr)
        try:
            make(options.folder)
        except PackageNotFoundError as error:
            print(f"spark-submit.sh: {error}: run scripts/setup", file=sys.stderr)
            return 1
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
