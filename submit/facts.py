"""Print what spark-submit.sh must know of the settings of the job that it is about to run, one fact a line.

They are: the folder of the services' state; the lake's file system; its WebHDFS address; the
variables of the environment that the job must not have; and `loopback` where that file system is on this machine's
loopback, else `network`.
"""

from __future__ import annotations

import ipaddress
import sys
from collections.abc import Sequence
from urllib.parse import urlsplit

from conf.settings import USAGE_ERROR, Settings, SettingsError, arguments, read_settings
from submit.settings import withheld


def is_loopback(host: str | None) -> bool:
    """Whether a host, as it is written, is this machine's loopback. A path without a host is on this machine too."""
    if host is None or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__, "lake_root", "webhdfs_url", "state_dir")
    # The job's other arguments are the job's business, as is its own --help.
    parser.allow_abbrev = False
    words = sys.argv[1:] if argv is None else argv
    options, _ = parser.parse_known_args([word for word in words if word not in ("-h", "--help")])
    flags = {name: value for name, value in vars(options).items() if name in Settings.model_fields}
    try:
        settings = read_settings(flags, file=options.conf)
    except SettingsError as error:
        print(f"spark-submit.sh: {error}", file=sys.stderr)
        return USAGE_ERROR
    lake = urlsplit(settings.lake_root)
    print(settings.state_dir)
    print(f"{lake.scheme}://{lake.netloc}")
    print(settings.webhdfs_url)
    print(*withheld())
    print("loopback" if is_loopback(lake.hostname) else "network")
    return 0


if __name__ == "__main__":
    sys.exit(main())
