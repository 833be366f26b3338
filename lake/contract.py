"""The contract of a tick: which records are ticks, what their fields mean, how ticks are identified and ordered.

Pure data and small pure functions. Two readers follow it: lake/silver/judge.py (one record, plain Python) and
lake/silver/read.py (many records, Arrow). A pattern must match a whole text, and uses only
syntax that RE2 and Python share.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from lake.times import to_micros

RECORD = ("key", "value", "topic", "partition", "offset", "kafka_timestamp")
"""A Kafka record's columns. Readers also need `ingested_at`: when bronze took the record."""

# The message's fields, in the order in which the suite's own ingester writes them.
FIELDS = (
    *("timestamp", "asset", "price_usd", "quote", "source", "symbol", "event_time", "quantity"),
    *("trade_id", "trade_epoch", "producer", "sequence"),
)
# Without these three a record says nothing about a price.
REQUIRED = ("timestamp", "asset", "price_usd")
# Text or null. price_usd is in neither list: it may also be a JSON number, whose digits we keep.
STRINGS = ("timestamp", "asset", "quote", "source", "symbol", "event_time", "quantity", "producer")
# A JSON integer or null. 1.0 and "1" have the wrong type: a venue that writes them means something else.
INTEGERS = ("trade_id", "trade_epoch", "sequence")
# They become parts of keys, paths and SQL literals, so each must match NAME.
NAMES = ("asset", "quote", "source", "symbol", "producer")

# The values of absent or null fields. An absent symbol is the asset's name.
DEFAULT_SOURCE = "unknown"
DEFAULT_QUOTE = "USD"
DEFAULT_TRADE_EPOCH = 0

# Length limits are checked before patterns, so that refusing a text takes at most linear time.
VALUE_BYTES = 1 << 20
"""A longer value is no JSON object (rule json). A tick takes 300 bytes, and Kafka itself refuses more than 1 MB."""
NESTING = 64
"""A JSON value nested deeper is refused (rule json): the depth that Python's parser allows depends on its caller."""
NAME_LENGTH = 64
NUMBER_LENGTH = 128
"""Characters of a price or quantity. DECIMAL(28,12) needs 29; the rest allows for redundant zeros."""
TIME_LENGTH = 40
QUOTED_LENGTH = 64
"""Characters of a field that a reason quotes."""
REASON_LENGTH = 1_024
"""Characters kept of a reason from outside: a feed's for a reject, a report's for a gap."""

# No colon, quote, space or backslash: a name can stand in a key, a path and a literal as it is.
NAME = rf"[A-Za-z0-9/._-]{{1,{NAME_LENGTH}}}"
# ISO-8601 with a zone, to the microsecond that the tables keep. Hours, minutes and offsets are bounded here, since
# parsers disagree about 24:00, second 60 or an offset beyond 18 hours. The parser checks whether the day exists.
TIME = (
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}T(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?"
    r"(?:Z|[+-](?:(?:0[0-9]|1[0-7]):[0-5][0-9]|18:00))"
)
# A number of at least 0. A minus is refused even before a zero. An exponent has at most three digits, so that the
# number can be written out. No two parts can match the same digit, so the match never backtracks.
NUMBER = r"\+?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?"
# Both forms of the ingester: source:symbol:trade_epoch:first_missing, and source:symbol:time.
GAP_ID = r"[A-Za-z0-9/._:-]{1,256}"
GAP_STATUSES = ("open", "filled", "unfillable")

DECIMALS = 12
"""Significant decimals of a price or quantity (rule precision): a cast to DECIMAL(28,12) would round more."""
INTEGER_DIGITS = 16
"""Digits before the point of a price or quantity (rule range), as in DECIMAL(28,12)."""
NOTIONAL_DIGITS = 20
"""Digits before the point of price * quantity, rounded half up to NOTIONAL_DECIMALS (rule range)."""
NOTIONAL_DECIMALS = 18
"""Together DECIMAL(38,18). The limit holds after rounding: 10^20 - 10^-24 becomes 10^20, which does not fit."""
ID_LIMIT = 10**18
"""trade_id, trade_epoch and sequence are from 0 to below it (rule range), so ids and their differences fit BIGINT."""

UNREADABLE = "unreadable"
"""The rule of a record whose reading fails for a reason that we do not foresee: as a last resort it stops nothing.

The proof leaves these records out, since it may not be able to read them either.
"""

EARLIEST = 0
TIME_LIMIT = to_micros(datetime(3000, 1, 1, tzinfo=UTC))
"""Times are from EARLIEST to before TIME_LIMIT, in microseconds since 1970 in UTC (rules timestamp, event_time).

No venue sends other times, Parquet readers disagree about times before 1900, and a far future breaks windows.
"""

TICK_ORDER = ("gold_time", "trade_epoch", "trade_id", "producer", "sequence", "event_id")
"""The order of one instrument's ticks, nulls first: open is the first, close the last. Many share a millisecond."""
CURRENT_ORDER = ("known_at", "event_time", "source", "trade_id", "producer", "sequence", "event_id")
"""The order of an asset's ticks over all venues, nulls first; known_at is the earlier of event_time and received_at."""

Pair = tuple[str, str]
"""source, asset"""


@dataclass(frozen=True)
class TickRules:
    """The settings that decide how a record is classified."""

    rejects_topic: str
    gaps_topic: str
    future_tolerance_seconds: float
    """A tick whose event_time is further ahead of its receipt is_future: gold uses the receipt instead."""
    receipt_tolerance_seconds: float = 86_400.0
    """A timestamp further ahead of bronze's own time for the record is wrong (rule timestamp).

    It may lie any time behind: a spool may wait for days.
    """

    @property
    def future_tolerance(self) -> int:
        """In microseconds."""
        return round(self.future_tolerance_seconds * 1_000_000)

    @property
    def receipt_tolerance(self) -> int:
        """In microseconds."""
        return round(self.receipt_tolerance_seconds * 1_000_000)


def event_id(
    *,
    source: str,
    symbol: str,
    trade_epoch: int,
    trade_id: int | None,
    producer: str | None,
    sequence: int | None,
    place: tuple[str, int, int],
) -> str:
    """A tick's id, the same for each delivery: by the venue's number, else the ingester's, else its place in Kafka.

    place is topic, partition and offset. Names contain no colon, so ids of one kind are equal only if all parts are.
    """
    if trade_id is not None:
        return f"{source}:{symbol}:{trade_epoch}:{trade_id}"
    if producer is not None and sequence is not None:
        return f"{producer}:{sequence}"
    topic, partition, offset = place
    return f"{topic}:{partition}:{offset}"


def gold_time(event_time: int, received_at: int, is_future: bool) -> int:
    """The time that places a tick in gold's windows: the venue's, or the receipt where the venue's clock runs ahead."""
    return received_at if is_future else event_time


def feeds(gold_symbols: Mapping[str, str], gold_quotes: Mapping[str, str], pair: Pair, symbol: str, quote: str) -> bool:
    """Whether a tick feeds gold, so that prices in different currencies never meet in one candle.

    For a source:asset in `gold_symbols` only the symbol named there does; else for a source in `gold_quotes` only
    symbols of that quote do; of other venues every symbol does.
    """
    chosen = gold_symbols.get(":".join(pair))
    return symbol == chosen if chosen is not None else quote == gold_quotes.get(pair[0], quote)
