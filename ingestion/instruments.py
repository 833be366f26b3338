"""The one table of what each venue calls an asset.

`asset` is the canonical name, which is also the same asset's slug at CoinCap where CoinCap has it. A dash: the venue
does not trade it, or not under a name that is certain.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

NAME = re.compile(r"[A-Za-z0-9/._-]{1,64}")

# What a venue's price is in. USDT is taken for USD, and the tick says so in its field `quote`.
QUOTES = {"binance": "USDT", "coinbase": "USD", "kraken": "USD", "coincap": "USD"}

_TABLE = """
asset              binance    coinbase   kraken     coincap
bitcoin            BTCUSDT    BTC-USD    BTC/USD    bitcoin
ethereum           ETHUSDT    ETH-USD    ETH/USD    ethereum
cardano            ADAUSDT    ADA-USD    ADA/USD    cardano
solana             SOLUSDT    SOL-USD    SOL/USD    solana
dogecoin           DOGEUSDT   DOGE-USD   DOGE/USD   dogecoin
xrp                XRPUSDT    XRP-USD    XRP/USD    xrp
binance-coin       BNBUSDT    -          -          binance-coin
tron               TRXUSDT    -          TRX/USD    tron
polkadot           DOTUSDT    DOT-USD    DOT/USD    polkadot
litecoin           LTCUSDT    LTC-USD    LTC/USD    litecoin
chainlink          LINKUSDT   LINK-USD   LINK/USD   chainlink
avalanche          AVAXUSDT   AVAX-USD   AVAX/USD   avalanche
stellar            XLMUSDT    XLM-USD    XLM/USD    stellar
bitcoin-cash       BCHUSDT    BCH-USD    BCH/USD    bitcoin-cash
ethereum-classic   ETCUSDT    ETC-USD    ETC/USD    ethereum-classic
uniswap            UNIUSDT    UNI-USD    UNI/USD    uniswap
near-protocol      NEARUSDT   NEAR-USD   NEAR/USD   near-protocol
cosmos             ATOMUSDT   ATOM-USD   ATOM/USD   cosmos
filecoin           FILUSDT    FIL-USD    FIL/USD    filecoin
internet-computer  ICPUSDT    ICP-USD    ICP/USD    internet-computer
aave               AAVEUSDT   AAVE-USD   AAVE/USD   aave
algorand           ALGOUSDT   ALGO-USD   ALGO/USD   algorand
tezos              XTZUSDT    XTZ-USD    XTZ/USD    tezos
shiba-inu          SHIBUSDT   SHIB-USD   SHIB/USD   shiba-inu
"""


@dataclass(frozen=True, slots=True)
class Instrument:
    """What a venue trades: the canonical asset, the venue's own symbol, and the currency of its price."""

    asset: str
    symbol: str
    quote: str


def _read(table: str) -> dict[str, dict[str, Instrument]]:
    header, *rows = (line.split() for line in table.strip().splitlines())
    instruments: dict[str, dict[str, Instrument]] = {venue: {} for venue in header[1:]}
    for asset, *symbols in rows:
        for venue, symbol in zip(header[1:], symbols, strict=True):
            if symbol != "-":
                instruments[venue][asset] = Instrument(asset, symbol, QUOTES[venue])
    return instruments


# venue -> canonical asset -> Instrument
INSTRUMENTS = _read(_TABLE)
