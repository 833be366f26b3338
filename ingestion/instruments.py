"""Assets by their canonical names, and what a venue calls them.

A canonical name is also the same asset's slug at CoinCap where CoinCap has it.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

NAME = re.compile(r"[A-Za-z0-9/._-]{1,64}")

# What a pair's price may be in. USDT is taken for USD, and the tick says so in its field `quote`.
QUOTES = ("USD", "USDT")

# The one table of names: canonical asset -> ticker.
TICKERS = {
    "bitcoin": "BTC",
    "ethereum": "ETH",
    "cardano": "ADA",
    "solana": "SOL",
    "dogecoin": "DOGE",
    "xrp": "XRP",
    "binance-coin": "BNB",
    "tron": "TRX",
    "polkadot": "DOT",
    "litecoin": "LTC",
    "chainlink": "LINK",
    "avalanche": "AVAX",
    "stellar": "XLM",
    "bitcoin-cash": "BCH",
    "ethereum-classic": "ETC",
    "uniswap": "UNI",
    "near-protocol": "NEAR",
    "cosmos": "ATOM",
    "filecoin": "FIL",
    "internet-computer": "ICP",
    "aave": "AAVE",
    "algorand": "ALGO",
    "tezos": "XTZ",
    "shiba-inu": "SHIB",
}


@dataclass(frozen=True, slots=True)
class Instrument:
    """What a venue trades: the canonical asset, the venue's own symbol, and the currency of its price."""

    asset: str
    symbol: str
    quote: str


def of_table(symbol: str, quote: str, *, without: Collection[str] = ()) -> dict[str, Instrument]:
    """The table's assets at a venue, by canonical name. `symbol` is a format of {asset} and {ticker}.

    `without`: the venue does not trade these, or not under a name that is certain.
    """
    return {
        asset: Instrument(asset, symbol.format(asset=asset, ticker=ticker), quote)
        for asset, ticker in TICKERS.items()
        if asset not in without
    }
