"""From Kafka records to ticks: parse and judge. Spark expressions only, no Python UDF.

records            RECORD: key, value, topic, partition, offset, kafka_timestamp
-> judged          the record, the tick's fields, rule and reason; rule null: a valid tick
-> sorted_out      kind (tick, bad, report), silver.ticks without is_late
-> valid_ticks     silver.ticks without is_late
-> first_deliveries  without those that lake.seen has seen
quarantined        silver.quarantine

This is the general way, which takes any record. Of the stream's records nearly all go the short one (lake.canonical);
what is left comes here. The two give the same ticks; the proof knows this way only.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from lake.gaps import is_report, report
from lake.tables import PRICE, SILVER_QUARANTINE, SILVER_TICKS

RECORD = ("key", "value", "topic", "partition", "offset", "kafka_timestamp")
REQUIRED = ("timestamp", "asset", "price_usd")
STRINGS = ("timestamp", "asset", "quote", "source", "symbol", "event_time", "quantity", "producer")
INTEGERS = ("trade_id", "trade_epoch", "sequence")
NAMES = ("asset", "quote", "source", "symbol", "producer")
FIELDS = (
    *("timestamp", "asset", "price_usd", "quote", "source", "symbol", "event_time", "quantity"),
    *("trade_id", "trade_epoch", "producer", "sequence"),
)

NAME = r"[A-Za-z0-9/._-]{1,64}"
TIME = r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?(Z|[+-][0-9]{2}:[0-9]{2})"
NUMBER = r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?"

_BEYOND_12_DECIMALS = r"[^eE]*\.[0-9]{12}[0-9]*[1-9][0-9]*"
_WIDE = "DECIMAL(38,19)"
_NOTIONAL = "DECIMAL(38,18)"
_INTEGER_DIGITS = 16


def _is(text: Column, pattern: str) -> Column:
    """Whether the whole text fits the pattern; Java's $ would overlook a line break at the end."""
    return text.rlike(rf"^(?:{pattern})\z")


def _fields(records: DataFrame) -> DataFrame:
    """The record, the message's fields (strings and bigints), and what is wrong with the JSON.

    is_object: false where the value is not a JSON object. wrong_type: the first field of another type than the
    contract's, or null.
    """
    # In brackets, since the parser would overlook what follows a first object.
    text = F.concat(F.lit("["), F.col("value").cast("string"), F.lit("]"))
    parsed = records.select(*RECORD, F.try_parse_json(text).alias("array")).select(
        *RECORD,
        F.when(
            F.try_variant_get("array", "$[1]", "variant").isNull(), F.try_variant_get("array", "$[0]", "variant")
        ).alias("variant"),
    )
    parts = {name: F.try_variant_get("variant", f"$.{name}", "variant") for name in FIELDS}
    parsed = parsed.select(
        *(*RECORD, "variant"),
        *(F.schema_of_variant(part).alias(f"{name}_type") for name, part in parts.items()),
        F.coalesce(F.schema_of_variant("variant").startswith("OBJECT<"), F.lit(False)).alias("is_object"),
    )
    values = {
        name: F.try_variant_get("variant", f"$.{name}", "bigint" if name in INTEGERS else "string") for name in FIELDS
    }
    allowed = {name: "^(VOID|BIGINT)$" if name in INTEGERS else "^(VOID|STRING)$" for name in FIELDS}
    allowed["price_usd"] = r"^(VOID|STRING|BIGINT|DOUBLE|DECIMAL\(.*)$"
    wrong = [F.when(~F.col(f"{name}_type").rlike(pattern), F.lit(name)) for name, pattern in allowed.items()]
    return parsed.select(
        *(*RECORD, "is_object"),
        *(value.alias(name) for name, value in values.items()),
        F.when(F.col("variant").isNotNull(), F.coalesce(*wrong)).alias("wrong_type"),
    )


def _exact(text: Column) -> tuple[Column, Column]:
    """(number as DECIMAL(38,19) or null, whether it has more than 12 decimals)."""
    number = F.when(_is(text, NUMBER), text.try_cast(_WIDE))
    too_precise = _is(text, _BEYOND_12_DECIMALS) | (number != F.round(number, 12))
    return number, F.coalesce(too_precise, F.lit(False))


def notional(price: Column, quantity: Column) -> Column:
    """price * quantity as DECIMAL(38,18), half up; null if it is 10^20 or more.

    Spark's own product of two DECIMAL(28,12) has 24 decimals and room for 10^14 only. Above that the four products of
    whole and fractional parts are each exact, and only the smallest has decimals to round.
    """
    whole_price, whole_quantity = F.floor(price), F.floor(quantity)
    parts = [
        whole_price * whole_quantity,
        whole_price * (quantity - whole_quantity).cast("DECIMAL(12,12)"),
        (price - whole_price).cast("DECIMAL(12,12)") * whole_quantity,
        (price - whole_price).cast("DECIMAL(12,12)") * (quantity - whole_quantity).cast("DECIMAL(12,12)"),
    ]
    total = parts[0].try_cast(_NOTIONAL)
    for part in parts[1:]:
        total = F.try_add(total, part.try_cast(_NOTIONAL))
    return F.coalesce(F.try_multiply(price, quantity).try_cast(_NOTIONAL), total)


def judged(records: DataFrame, rejects_topic: str, gaps_topic: str) -> DataFrame:
    """Each record with its tick's fields as far as they can be read, and the first rule that it breaks.

    Out: the record; received_at, event_time TIMESTAMP; price_usd, quantity DECIMAL(28,12); the
    other fields of the message; rule and reason STRING, both null for a valid tick.
    """
    texts = _fields(records)
    price, price_too_precise = _exact(F.col("price_usd"))
    quantity, quantity_too_precise = _exact(F.col("quantity"))
    fields = texts.select(
        "*",
        F.when(_is(F.col("timestamp"), TIME), F.col("timestamp").try_cast("timestamp")).alias("received_at"),
        F.when(_is(F.col("event_time"), TIME), F.col("event_time").try_cast("timestamp")).alias("event_at"),
        price.alias("price"),
        price_too_precise.alias("price_too_precise"),
        quantity.alias("size"),
        quantity_too_precise.alias("size_too_precise"),
    ).select("*", notional(F.col("price").try_cast(PRICE), F.col("size").try_cast(PRICE)).alias("notional"))

    def not_a_number(name: str, number: str) -> Column:
        return ~_is(F.col(name), NUMBER) | F.col(name).startswith("-") | (F.col(number) < 0)

    missing = F.coalesce(*(F.when(F.col(name).isNull(), F.lit(name)) for name in REQUIRED))
    misnamed = F.coalesce(*(F.when(~_is(F.col(name), NAME), F.lit(name)) for name in NAMES))
    limit = F.lit(10**_INTEGER_DIGITS).cast(_WIDE)
    not_a_time = "is not an ISO-8601 time with a zone"
    feeds_reason = F.get_json_object(F.col("value").cast("string"), "$.reason")
    rules: list[tuple[str, Column, Column]] = [
        ("reject", F.col("topic") == rejects_topic, F.coalesce(feeds_reason, F.lit("rejected by its feed"))),
        ("json", ~F.col("is_object"), F.lit("the value is not a JSON object")),
        ("type", F.col("wrong_type").isNotNull(), F.concat("wrong_type", F.lit(" has the wrong type"))),
        ("missing", missing.isNotNull(), F.concat(missing, F.lit(" is missing"))),
        ("name", misnamed.isNotNull(), F.concat(misnamed, F.lit(" is not a name of 1 to 64 of A-Z a-z 0-9 / . _ -"))),
        ("timestamp", F.col("received_at").isNull(), _quoted("timestamp", not_a_time)),
        (
            "event_time",
            F.col("event_time").isNotNull() & F.col("event_at").isNull(),
            _quoted("event_time", not_a_time),
        ),
        (
            "price",
            not_a_number("price_usd", "price") | ((F.col("price") == 0) & ~F.col("price_too_precise")),
            _quoted("price_usd", "is not a number above 0"),
        ),
        ("quantity", not_a_number("quantity", "size"), _quoted("quantity", "is not a number of at least 0")),
        ("precision", F.col("price_too_precise"), _quoted("price_usd", "has more than 12 decimals")),
        ("precision", F.col("size_too_precise"), _quoted("quantity", "has more than 12 decimals")),
        (
            "range",
            F.col("price").isNull() | (F.col("price") >= limit),
            _quoted("price_usd", "has more than 16 digits before the point"),
        ),
        (
            "range",
            F.col("quantity").isNotNull() & (F.col("size").isNull() | (F.col("size") >= limit)),
            _quoted("quantity", "has more than 16 digits before the point"),
        ),
        (
            "range",
            F.col("quantity").isNotNull() & F.col("notional").isNull(),
            F.lit("price_usd * quantity has more than 20 digits before the point"),
        ),
    ]
    is_gap = F.col("topic") == gaps_topic
    not_a_gap = F.struct(F.lit("gap").alias("rule"), F.lit("the value is not a row of silver.gaps").alias("reason"))
    broken = F.when(is_gap, F.when(~is_report(F.col("value")), not_a_gap)).otherwise(
        F.coalesce(
            *(
                F.when(applies, F.struct(F.lit(rule).alias("rule"), reason.alias("reason")))
                for rule, applies, reason in rules
            )
        )
    )
    return (
        fields.select(
            *(*RECORD, "received_at", "asset"),
            F.col("price").try_cast(PRICE).alias("price_usd"),
            *("quote", "source", "symbol"),
            F.col("event_at").alias("event_time"),
            F.col("size").try_cast(PRICE).alias("quantity"),
            *("trade_id", "trade_epoch", "producer", "sequence"),
            broken.alias("broken"),
        )
        .select("*", "broken.rule", "broken.reason")
        .drop("broken")
    )


def _quoted(name: str, complaint: str) -> Column:
    return F.concat(F.lit(f"{name} "), F.substring(F.col(name), 1, 64), F.lit(f" {complaint}"))


def quarantined(judged_records: DataFrame, at: datetime) -> DataFrame:
    """silver.quarantine: the records that break a rule."""
    return (
        judged_records.where(F.col("rule").isNotNull())
        .withColumn("quarantined_at", F.lit(at))
        .select(*SILVER_QUARANTINE.column_names)
    )


def _silver(future_tolerance_seconds: float) -> dict[str, Column]:
    """silver.ticks without is_late, of a record and the fields of its message."""
    source = F.coalesce("source", F.lit("unknown"))
    symbol = F.coalesce("symbol", "asset")
    epoch = F.coalesce("trade_epoch", F.lit(0).cast("bigint"))
    event_time = F.coalesce("event_time", "received_at")
    tolerance = F.make_dt_interval(secs=F.lit(future_tolerance_seconds).cast("DECIMAL(18,6)"))
    return {
        "event_id": F.coalesce(
            F.when(F.col("trade_id").isNotNull(), F.concat_ws(":", source, symbol, epoch, "trade_id")),
            F.concat(F.col("producer"), F.lit(":"), F.col("sequence")),
            F.concat_ws(":", "topic", "partition", "offset"),
        ),
        "source": source,
        "symbol": symbol,
        "asset": F.col("asset"),
        "quote": F.coalesce("quote", F.lit("USD")),
        "price_usd": F.col("price_usd"),
        "quantity": F.col("quantity"),
        "trade_id": F.col("trade_id"),
        "trade_epoch": epoch,
        "event_time": event_time,
        "received_at": F.col("received_at"),
        "producer": F.col("producer"),
        "sequence": F.col("sequence"),
        "kafka_partition": F.col("partition"),
        "kafka_offset": F.col("offset"),
        "is_future": event_time > F.col("received_at") + tolerance,
        "event_date": F.to_date(event_time),
    }


def sorted_out(judged_records: DataFrame, gaps_topic: str, future_tolerance_seconds: float) -> DataFrame:
    """kind (tick, bad, report), and silver.ticks without is_late, repeats included; null but for ticks."""
    kind = F.when(F.col("rule").isNotNull(), "bad").when(F.col("topic") == gaps_topic, "report").otherwise("tick")
    silver = _silver(future_tolerance_seconds)
    ticks = (F.when(F.col("kind") == "tick", column).alias(name) for name, column in silver.items())
    return judged_records.withColumn("kind", kind).select("kind", *ticks)


def valid_ticks(judged_records: DataFrame, gaps_topic: str, future_tolerance_seconds: float) -> DataFrame:
    """silver.ticks without is_late, repeats included."""
    kinds = sorted_out(judged_records, gaps_topic, future_tolerance_seconds)
    return kinds.where(F.col("kind") == "tick").select(*(n for n in SILVER_TICKS.column_names if n != "is_late"))


def gap_reports(judged_records: DataFrame, gaps_topic: str) -> DataFrame:
    """partition, offset, and report: the row of silver.gaps that a record of topic `gaps` holds."""
    return judged_records.where(F.col("rule").isNull() & (F.col("topic") == gaps_topic)).select(
        "partition", "offset", report(F.col("value")).alias("report")
    )


def gold_time() -> Column:
    """The time that windows go by: the venue's, or the receipt where the venue's clock runs ahead."""
    return F.when(F.col("is_future"), F.col("received_at")).otherwise(F.col("event_time"))


def feeds(gold_symbols: Mapping[str, str], pair: tuple[str, str], symbol: str) -> bool:
    """`feeds_gold`, of one tick: pair is its source and asset."""
    return gold_symbols.get(":".join(pair), symbol) == symbol


def feeds_gold(gold_symbols: Mapping[str, str]) -> Column:
    """Whether a tick's symbol feeds gold: for a source and asset that `gold_symbols` names, only that symbol does."""
    feeds = F.lit(True)
    for pair, symbol in gold_symbols.items():
        source, _, asset = pair.partition(":")
        feeds = feeds & ~((F.col("source") == source) & (F.col("asset") == asset) & (F.col("symbol") != symbol))
    return feeds
