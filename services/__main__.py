"""Kafka, HDFS, YARN and SQL (the Spark Thrift Server) as single real nodes on this machine's loopback.

up      start what does not run, and wait until it answers; data is kept from the last time
down    stop everything, and leave no process and no port
status  one line a daemon; exit code 1 unless all of them answer
logs    the last lines of every daemon's log

Exit codes: 2 wrong usage or setting, 3 a port is taken, 4 a daemon died, 5 no answer in time, 6 not set up.
"""

from __future__ import annotations

import sys

from conf.settings import arguments, from_command_line
from services.control import NAMES, daemons, down, states, up
from services.errors import ServiceError


def main() -> int:
    parser = arguments(__doc__, "state_dir")
    parser.prog = "scripts/services"
    parser.add_argument("command", choices=["up", "down", "status", "logs"])
    parser.add_argument("names", nargs="*", metavar="SERVICE", help=f"of {', '.join(NAMES)} (default: all)")
    parser.add_argument("--lines", type=int, default=20, metavar="N", help="lines of each log (default: 20)")
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
            all_states = states(settings, names)
            for state in all_states:
                running = f"pid {state.pid}" if state.pid else "not running"
                answers = "answers" if state.waits_for is None else f"waits for {state.waits_for}"
                print(f"{state.service:6} {state.daemon:16} {running:12} {state.address:32} {answers}")
            return 0 if all(state.pid and state.waits_for is None for state in all_states) else 1
        else:
            for daemon in daemons(settings, names):
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
