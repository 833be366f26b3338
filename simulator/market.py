"""A made-up market: the same seed makes the same trades.

Orders arrive in calm and in bursts. An order is filled by one or more trades in the same millisecond, at prices a tick
or so apart. Prices walk at random, and now and then one jumps by 2.5 to 5 % within a few seconds.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# asset: price at the start in USD; decimals of the tick size; decimals of the smallest quantity; share of all trades.
ASSETS: dict[str, tuple[float, int, int, float]] = {
    "bitcoin": (61_700.0, 2, 5, 10.0),
    "ethereum": (2_680.0, 2, 4, 8.0),
    "cardano": (0.3457, 4, 1, 2.0),
    "solana": (155.20, 2, 3, 6.0),
    "dogecoin": (0.10532, 5, 0, 3.0),
    "xrp": (0.6112, 4, 0, 3.0),
    "binance-coin": (513.4, 1, 3, 2.0),
    "tron": (0.1288, 4, 1, 1.0),
    "polkadot": (4.681, 3, 2, 1.0),
    "litecoin": (60.41, 2, 3, 1.0),
    "chainlink": (10.53, 2, 2, 1.0),
    "avalanche": (21.94, 2, 2, 1.0),
    "stellar": (0.1014, 4, 0, 0.5),
    "bitcoin-cash": (346.2, 1, 3, 0.5),
    "ethereum-classic": (19.03, 2, 2, 0.5),
    "uniswap": (6.021, 3, 2, 0.5),
    "near-protocol": (4.137, 3, 1, 1.0),
    "cosmos": (4.683, 3, 2, 0.5),
    "filecoin": (3.671, 3, 2, 0.5),
    "internet-computer": (7.82, 2, 2, 0.5),
    "aave": (103.6, 1, 3, 0.5),
    "algorand": (0.1247, 4, 0, 0.5),
    "tezos": (0.662, 3, 1, 0.5),
    "shiba-inu": (0.00001392, 8, 0, 1.0),
}

# Standard deviation of the logarithm of a price after one second: about 3 % a day.
VOLATILITY = 1e-4
# A ninth of the time is bursts, in which half of all trades happen.
CALM_SECONDS, BURST_SECONDS = 8.0, 1.0
CALM_PACE, BURST_PACE = 0.5625, 4.5
FIRST_JUMP_SECONDS, JUMP_SECONDS = (8.0, 15.0), 60.0
JUMP_SIZE, JUMP_LASTS = (0.025, 0.05), (0.5, 4.0)
# Of 1,000 orders 700 make one trade, 298 a few (4.5 on average), 2 sweep the book (60 on average).
FEW, SWEEP = 0.298, 0.002
TRADES_PER_ORDER = 0.7 + FEW * (2 + 1 / math.expm1(1 / 3)) + SWEEP * 60
USUAL_USD = 300.0


# The same of an asset that is only made up.
MADE_UP = (12.50, 3, 2, 1.0)


@dataclass(frozen=True, slots=True)
class Trade:
    """A trade, `at_ms` milliseconds after the market opened. Ids of an asset have no holes."""

    at_ms: int
    asset: str
    trade_id: int
    price: str
    quantity: str
    buyer_is_maker: bool


class _Book:
    """One asset: where its price is, and its next trade id."""

    def __init__(self, asset: str, chance: random.Random) -> None:
        price, self._price_decimals, self._quantity_decimals, self.share = ASSETS.get(asset, MADE_UP)
        self.asset = asset
        self._start = self._log_price = math.log(price)
        self._seen = 0.0
        self._next_id = chance.randrange(10**8, 4 * 10**9)
        self._jump = (0.0, 0.0, 0.0)

    def jump(self, now: float, chance: random.Random) -> None:
        """Begin a jump, more often than not back towards the price at the start."""
        self._walk(now, chance)
        back = -1 if self._log_price > self._start else 1
        direction = back if chance.random() < 0.8 else -back
        self._jump = (now, now + chance.uniform(*JUMP_LASTS), direction * chance.uniform(*JUMP_SIZE))

    def order(self, now: float, chance: random.Random) -> Iterator[Trade]:
        self._walk(now, chance)
        buys = chance.random() < 0.5
        ticks = round(math.exp(self._log_price) * 10**self._price_decimals) + (1 if buys else 0)
        for _ in range(_trades_of_an_order(chance)):
            ticks = max(1, ticks)
            usd = USUAL_USD * math.exp(chance.gauss(0.0, 1.5))
            lots = max(1, int(usd / ticks * 10 ** (self._price_decimals + self._quantity_decimals)))
            price, quantity = _text(ticks, self._price_decimals), _text(lots, self._quantity_decimals)
            yield Trade(int(now * 1000), self.asset, self._next_id, price, quantity, buyer_is_maker=not buys)
            self._next_id += 1
            if chance.random() < 0.3:
                ticks += 1 if buys else -1

    def _walk(self, now: float, chance: random.Random) -> None:
        self._log_price += VOLATILITY * math.sqrt(now - self._seen) * chance.gauss(0.0, 1.0)
        begins, ends, size = self._jump
        if self._seen < ends:
            self._log_price += size * (min(now, ends) - max(self._seen, begins)) / (ends - begins)
        self._seen = now


def _trades_of_an_order(chance: random.Random) -> int:
    kind = chance.random()
    if kind < SWEEP:
        return chance.randint(20, 100)
    if kind < SWEEP + FEW:
        return 2 + int(chance.expovariate(1 / 3))
    return 1


def _text(units: int, decimals: int) -> str:
    """As Binance writes numbers: always eight decimals."""
    whole, rest = divmod(units, 10**decimals)
    return f"{whole}.{rest:0{decimals}d}".ljust(len(str(whole)) + 9, "0") if decimals else f"{whole}.00000000"


def trades(assets: Sequence[str], rate: float, seed: int) -> Iterator[Trade]:
    """Trades without end, in the order of time; `rate` is how many a second on average, of all assets together."""
    chance = random.Random(seed)
    books = [_Book(asset, chance) for asset in assets]
    shares = list(itertools.accumulate(book.share for book in books))
    orders = rate / TRADES_PER_ORDER
    now = 0.0
    bursting, changes_at = False, chance.expovariate(1 / CALM_SECONDS)
    jumps_at = chance.uniform(*FIRST_JUMP_SECONDS)
    while True:
        arrives = now + chance.expovariate(orders * (BURST_PACE if bursting else CALM_PACE))
        if min(arrives, changes_at, jumps_at) == arrives:
            now = arrives
            yield from chance.choices(books, cum_weights=shares)[0].order(now, chance)
        elif changes_at < jumps_at:
            now, bursting = changes_at, not bursting
            changes_at += chance.expovariate(1 / (BURST_SECONDS if bursting else CALM_SECONDS))
        else:
            now = jumps_at
            chance.choice(books).jump(now, chance)
            jumps_at += chance.expovariate(1 / JUMP_SECONDS)
