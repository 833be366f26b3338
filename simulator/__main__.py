"""A venue on this machine that speaks Binance's, Coinbase's, Kraken's or CoinCap's language, with made-up or recorded
trades: their WebSocket, and on the same port their REST.

The first line on standard output is JSON with the addresses: {"url": "ws://127.0.0.1:PORT/stream", "rest_url":
"http://127.0.0.1:PORT"}. The market opens when the first client has subscribed. At the end, or at SIGINT or SIGTERM,
clients are told goodbye, and the last line is JSON with the number of frames sent by stream and, if any client broke a
rule of the venue, how often.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from simulator.dialects import MADE_UP_NAME, Dialect, Listing
from simulator.dialects.binance import Binance
from simulator.dialects.coinbase import Coinbase
from simulator.dialects.coincap import CoinCap
from simulator.dialects.kraken import Kraken
from simulator.faults import FAULTS, FRAME_FAULTS, RESTARTED_IDS, restarted_ids
from simulator.frames import Frame, recorded, unsent
from simulator.market import ASSETS, trades
from simulator.venue import Venue

DEFAULT_ASSETS = "bitcoin,ethereum,cardano,solana,dogecoin"
DIALECTS: dict[str, type[Binance] | type[Coinbase] | type[Kraken] | type[CoinCap]] = {
    "binance": Binance,
    "coinbase": Coinbase,
    "kraken": Kraken,
    "coincap": CoinCap,
}


def market(
    dialect: Dialect,
    assets: Sequence[str],
    rate: float,
    seed: int,
    limit: int | None,
    faults: Sequence[str],
    opened_ms: int,
) -> Iterator[Frame]:
    generated = itertools.islice(trades(assets, rate, seed), limit)
    return dialect.frames(restarted_ids(generated) if RESTARTED_IDS in faults else generated, opened_ms)


def recording(files: Sequence[Path], opened_ms: int) -> Iterator[Frame]:
    """The recording keeps its own times, whenever it is played."""
    return recorded(files)


def with_holes(
    source: Callable[[int], Iterator[Frame]],
    skips: Sequence[tuple[int, int]],
    forgets: Sequence[tuple[int, int]],
    opened_ms: int,
) -> Iterator[Frame]:
    """The source without some trades: those that were made and not sent, and those that history has not either."""
    return unsent(source(opened_ms), skips, forgets)


def with_faults(source: Callable[[int], Iterator[Frame]], faults: Sequence[str], opened_ms: int) -> Iterator[Frame]:
    frames = source(opened_ms)
    for fault in faults:
        if fault in FRAME_FAULTS:
            frames = FRAME_FAULTS[fault](frames)
    return frames


async def simulate(venue: Venue, path: str, port: int) -> None:
    """Serve until the source ends or a signal comes."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with await venue.listen(port) as server:
        address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        print(json.dumps({"url": f"ws://{address}{path}", "rest_url": f"http://{address}"}), flush=True)
        playing = asyncio.create_task(venue.play())
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait((playing, stopping), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if playing.done():
            playing.result()
        playing.cancel()
    broken_rules = {"violations": venue.violations} if venue.violations else {}
    print(json.dumps({"sent": venue.sent} | broken_rules), flush=True)


def _assets(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in ASSETS]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"no asset {', '.join(unknown)}; there are {', '.join(ASSETS)}")
    return list(dict.fromkeys(names))


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError("a port is 0 (any that is free) to 65535")
    return int(text)


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError("must be above 0")
    return number


def _speed(text: str) -> float:
    return 0.0 if float(text) == 0 else _positive(text)


def _hole(text: str) -> tuple[int, int]:
    after, _, count = text.partition(":")
    if not (after.isdecimal() and count.isdecimal()):
        raise argparse.ArgumentTypeError("write it as AFTER:COUNT")
    return int(after), int(count)


def _file(text: str) -> Path:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text} is no file")
    return Path(text)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m simulator", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--venue", choices=DIALECTS, default="binance", help="whose language (default: binance)")
    parser.add_argument("--port", type=_port, default=0, help="port on loopback (default: 0, any that is free)")
    parser.add_argument("--assets", type=_assets, default=DEFAULT_ASSETS, help=f"default: {DEFAULT_ASSETS}")
    parser.add_argument("--rate", type=_positive, default=50.0, help="trades a second in all (default: 50)")
    parser.add_argument("--seed", type=int, default=1, help="the same seed makes the same trades (default: 1)")
    parser.add_argument("--trades", type=int, metavar="N", help="end after N trades (default: never)")
    parser.add_argument("--replay", type=_file, nargs="+", metavar="FILE", help="recordings instead of a market")
    parser.add_argument(
        "--speed", type=_speed, default=1.0, help="times the original pace; 0: as fast as the client reads (default: 1)"
    )
    parser.add_argument(
        "--skip", type=_hole, action="append", default=[], metavar="AFTER:COUNT",
        help="do not send COUNT trades after the first AFTER; REST has them; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--forget", type=_hole, action="append", default=[], metavar="AFTER:COUNT",
        help="likewise, and REST has them neither",
    )  # fmt: skip
    parser.add_argument(
        "--made-up", type=int, default=0, metavar="N", help="N further assets, coin1 and so on, that no list names"
    )
    parser.add_argument(
        "--cut-seconds", type=_positive, metavar="N", help="every connection is cut without a word after so long"
    )
    parser.add_argument(
        "--delist", type=_assets, default=[], metavar="ASSETS", help="subscriptions to these assets are refused"
    )
    parser.add_argument("--fault", choices=FAULTS, action="append", default=[], help="what goes wrong; may be repeated")
    options = parser.parse_args(argv)
    options.assets += [f"{MADE_UP_NAME}{number}" for number in range(1, options.made_up + 1)]
    listing = Listing(options.venue, options.assets, delisted=options.delist)
    missing = [asset for asset in options.assets if asset not in listing.symbols]
    if missing:
        parser.error(f"argument --assets: {options.venue} has no {', '.join(missing)}")
    dialect = DIALECTS[options.venue](listing)
    if options.replay:
        source = partial(recording, options.replay)
    else:
        source = partial(market, dialect, options.assets, options.rate, options.seed, options.trades, options.fault)
    holes = partial(with_holes, source, options.skip, options.forget)
    faulty = partial(with_faults, holes, options.fault)

    async def run() -> None:
        venue = Venue(faulty, options.speed, dialect, listing.history, options.fault, options.cut_seconds)
        await simulate(venue, dialect.path, options.port)

    try:
        asyncio.run(run())
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
