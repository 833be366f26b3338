"""How much heap the NameNode and the DataNode need for a file.

    python -m benchmarks.heap [--files 300000] [--folder DIR] [--conf FILE]

Starts an HDFS of its own, on the ports of the settings, without files and then with so many files of one block each.
Prints for each daemon the bytes that are left after a full garbage collection. The files come from an image of the
NameNode and from blocks on the DataNode's disk, 8 KB a file: their creation one by one would take an hour. Needs a JDK
(jcmd) and 2 GB of memory. The SecondaryNameNode is not shown: it has the same files in memory, after its first merge.
Exit codes: those of scripts/services.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from conf.settings import Settings, arguments, from_command_line
from services import ServiceError, down, up
from services.control import daemons
from services.java import jars, java_home

ROOT = 16385
FIRST_BLOCK = 1073741825
FIRST_STAMP = 1001
BLOCK_BYTES = 512
# A block's checksum file: version, CRC32C, bytes a checksum, and one checksum. Nobody reads these blocks.
CHECKSUMS = bytes.fromhex("0001020000020000000000")
VIEWER = "org.apache.hadoop.hdfs.tools.offlineImageViewer.OfflineImageViewerPB"


def live_bytes(settings: Settings) -> dict[str, int]:
    """Daemon -> bytes of its heap in use after a full garbage collection."""
    result = {}
    for daemon in (daemon for daemon in daemons(settings, ["hdfs"]) if daemon.name in ("namenode", "datanode")):
        process = daemon.process()
        assert process is not None, f"{daemon.name} does not run"
        jcmd = [f"{java_home()}/bin/jcmd", str(process.pid)]
        subprocess.run([*jcmd, "GC.run"], check=True, stdout=subprocess.DEVNULL)
        info = subprocess.run([*jcmd, "GC.heap_info"], check=True, stdout=subprocess.PIPE, text=True).stdout
        result[daemon.name] = sum(int(used) for used in re.findall(r"generation.*used (\d+)K", info)) << 10
    return result


def add_files(settings: Settings, number: int) -> None:
    """Put so many files into an HDFS that is down and has none: half with names as data files, half as log files."""
    folder = settings.state_dir / "services" / "hdfs"
    names = folder / "data" / "name" / "current"
    xml = folder / "image.xml"
    _viewer(folder, "XML", names / f"fsimage_{0:019}", xml)
    xml.write_text("".join(_with_files(xml.read_text(), number)))
    for old in [*names.glob("edits_*"), *names.glob("fsimage_*")]:
        old.unlink()
    _viewer(folder, "ReverseXML", xml, names / f"fsimage_{0:019}")
    (names / "seen_txid").write_text("0\n")
    (pool,) = (folder / "data" / "blocks" / "current").glob("BP-*")
    for block in range(FIRST_BLOCK, FIRST_BLOCK + number):
        place = pool / "current" / "finalized" / f"subdir{block >> 16 & 31}" / f"subdir{block >> 8 & 31}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"blk_{block}").write_bytes(b"x" * BLOCK_BYTES)
        (place / f"blk_{block}_{block - FIRST_BLOCK + FIRST_STAMP}.meta").write_bytes(CHECKSUMS)


def _with_files(image: str, number: int) -> Iterator[str]:
    """An empty image's XML with the files, which lie in one folder."""
    before, root, rest = re.split(r"(?<=<INodeSection>).*?(<inode>.*?</inode>)", image, maxsplit=1, flags=re.DOTALL)
    middle, after = rest.split("<INodeDirectorySection>")
    stamps = f"<genstampV2>{FIRST_STAMP - 1}<", f"<genstampV2>{FIRST_STAMP + number}<"
    blocks = f"<lastAllocatedBlockId>{FIRST_BLOCK - 1}<", f"<lastAllocatedBlockId>{FIRST_BLOCK + number}<"
    yield before.replace(*stamps).replace(*blocks)
    yield f"<lastInodeId>{ROOT + number}</lastInodeId><numInodes>{number + 1}</numInodes>{root}"
    for file in range(number):
        # In the order of their names, as the NameNode keeps them.
        data = f"part-{file:06}-{uuid.uuid4()}-c000.snappy.parquet"
        name = data if file >= number // 2 else f"{file:020}.json"
        yield (
            f"<inode><id>{ROOT + 1 + file}</id><type>FILE</type><name>{name}</name><replication>1</replication>"
            "<mtime>1</mtime><atime>1</atime><preferredBlockSize>134217728</preferredBlockSize>"
            "<permission>root:supergroup:0644</permission><blocks><block>"
            f"<id>{FIRST_BLOCK + file}</id><genstamp>{FIRST_STAMP + file}</genstamp><numBytes>{BLOCK_BYTES}</numBytes>"
            "</block></blocks><storagePolicyId>0</storagePolicyId></inode>\n"
        )
    children = "".join(f"<child>{ROOT + 1 + file}</child>" for file in range(number))
    yield f"{middle}<INodeDirectorySection><directory><parent>{ROOT}</parent>{children}</directory>{after}"


def _viewer(folder: Path, processor: str, source: Path, target: Path) -> None:
    classes = f"{folder}/conf:{jars('hadoop')}"
    subprocess.run(
        [
            *(f"{java_home()}/bin/java", "-Xmx2g", "-Dtickhouse.log=/dev/null", "-cp", classes),
            *(VIEWER, "-p", processor, "-i", str(source), "-o", str(target)),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--files", type=int, default=300_000, metavar="N", help="default: 300000")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where HDFS's files go for the time (default: /tmp)")
    given, options = from_command_line(parser)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        settings = given.model_copy(update={"state_dir": Path(folder).resolve()})
        try:
            up(settings, ["hdfs"])
            empty = live_bytes(settings)
            down(settings, ["hdfs"])
            add_files(settings, options.files)
            up(settings, ["hdfs"])
            full = live_bytes(settings)
        except ServiceError as error:
            print(f"benchmarks.heap: {error}", file=sys.stderr)
            return error.exit_code
        finally:
            down(settings, ["hdfs"])
    for name, size in full.items():
        each = (size - empty[name]) / options.files
        before, after = empty[name] / 1e6, size / 1e6
        print(f"{name:18} {before:5.1f} MB without files, {after:6.1f} MB with {options.files:,}: {each:.0f} B a file")
    return 0


if __name__ == "__main__":
    sys.exit(main())
