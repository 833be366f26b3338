"""Kafka, HDFS, YARN and SQL (the Spark Thrift Server) as single real nodes on this machine's loopback.

up      start what does not run, and wait until it answers; data is kept from the last time
down    stop everything, and leave no process and no port
status  what is wrong and what to do, then memory, disk and contents; exit code 1 unless all daemons run and answer
logs    the last lines of every daemon's log

Exit codes: 2 wrong usage or setting, 3 a port is taken, 4 a daemon died, 5 no answer in time, 6 not set up.
"""

from __future__ import annotations

import json
import sys

from conf.settings import arguments, from_command_line
from services.control import NAMES, all_services, down, up
from services.errors import ServiceError
from services.status import as_json, as_table, look_at


def main() -> int:
    parser = arguments(__doc__, "state_dir")
    parser.prog = "scripts/services"
    parser.add_argument("command", choices=["up", "down", "status", "logs"])
    parser.add_argument("names", nargs="*", metavar="SERVICE", help=f"of {', '.join(NAMES)} (default: all)")
    parser.add_argument("--lines", type=int, default=20, metavar="N", help="lines of each log (default: 20)")
    parser.add_argument("--json", action="store_true", help="status for machines: one object, a member a service")
    settings, options = from_command_line(parser)
    if unknown := [name for name in options.names if name not in NAMES]:
        parser.error(f"there is no service {', '.join(unknown)}; there are {', '.join(NAMES)}")
    names = [name for name in NAMES if name in options.names] or list(NAMES)
    try:
        if options.command == "up":
            up(settings, names)
        elif options.command == "down":
            down(settings, names)
        elif options.command == "status":
            all_figures = look_at(all_services(settings, names))
            print(json.dumps(as_json(all_figures), indent=2) if options.json else as_table(all_figures))
            return 0 if all(figures.answers for figures in all_figures) else 1
        else:
            for service in all_services(settings, names):
                for daemon in service.daemons:
                    print(f"==> {daemon.log} <==", *daemon.last_lines(options.lines), sep="\n", end="\n\n")
    except ServiceError as error:
        print(f"scripts/services: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("scripts/services: interrupted; what has started goes on until scripts/services down", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
