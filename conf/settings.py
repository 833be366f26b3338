"""Every setting of the suite: its name, type, default and meaning, and how it is read.

A setting is written `lake_root` in TOML, `TICKHOUSE_LAKE_ROOT` in the environment and `--lake-root` as a flag.
A flag wins over the environment, which wins over the TOML file, which wins over the default here. The file is the
one that `--conf` or `TICKHOUSE_CONF` names, else conf/local.toml.

A wrong setting ends a program with exit code 2 and one line that says which one, where it came from and why.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from conf.text import has_user_info, redacted, shown

logger = logging.getLogger("conf")

PROJECT = Path(__file__).resolve().parent.parent
ENVIRONMENT_PREFIX = "TICKHOUSE_"
# Read from the environment by tests and set-up; not settings of the suite.
NOT_SETTINGS = {"conf", "recordings", "cache", "faults"}
USAGE_ERROR = 2


class SettingsError(ValueError):
    """A setting that cannot be used. The message is one line: which one, where it came from, and why."""


def _listed(value: object) -> object:
    """A comma-separated string as the list it means."""
    return [item.strip() for item in value.split(",") if item.strip()] if isinstance(value, str) else value


def _mapped(value: object) -> object:
    """`a=b,c=d` as the mapping it means."""
    if not isinstance(value, str):
        return value
    pairs = [item.partition("=") for item in value.split(",") if item.strip()]
    if not all(separator for _, separator, _ in pairs):
        raise ValueError("write it as key=value,key=value")
    return {key.strip(): text.strip() for key, _, text in pairs}


def _port_in_range(text: str) -> str:
    """An address or URL whose ports exist. The message has no part of the text: a URL may hold a password."""
    hosts = text.partition("://")[2].partition("/")[0].rpartition("@")[2] if "://" in text else text
    for host in hosts.split(","):
        port = re.search(r":([0-9]+)$", host)
        if port and not (len(port[1]) <= 5 and 1 <= int(port[1]) <= 65535):
            raise ValueError("its port is not between 1 and 65535")
    return text


def _no_password(url: str) -> str:
    """The address of a store, none of which takes a password from there."""
    if re.search(r"://[^/\s]*:[^/\s]*@", url):
        raise ValueError("there is a password in it, which no store takes from there")
    return url


def _http_url(secret: SecretStr) -> SecretStr:
    """An HTTP address that may hold a key, so that no message may hold it."""
    if not re.fullmatch(r"https?://[^/\s]+(/\S*)?", _port_in_range(secret.get_secret_value())):
        raise ValueError("not an address like https://HOST/PATH")
    return secret


Names = Annotated[list[Annotated[str, Field(pattern=r"^[A-Za-z0-9/._-]{1,64}$")]], BeforeValidator(_listed)]
Mapped = Annotated[dict[str, str], BeforeValidator(_mapped)]
Days = Annotated[dict[str, Annotated[float, Field(gt=0)]], BeforeValidator(_mapped)]
Port = Annotated[int, Field(ge=1, le=65535)]
Topic = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,249}$")]
InRange = AfterValidator(_port_in_range)
Address = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+:[0-9]{1,5}(,[A-Za-z0-9._-]+:[0-9]{1,5})*$"), InRange]
WebSocketUrl = Annotated[str, Field(pattern=r"^wss?://[^/\s]+(/\S*)?$"), InRange]
HttpUrl = Annotated[str, Field(pattern=r"^https?://[^/\s]+(/\S*)?$"), InRange, AfterValidator(_no_password)]
SecretUrl = Annotated[SecretStr, AfterValidator(_http_url)]
MailAddress = Annotated[str, Field(pattern=r"^[!-;=?A-~]+@[A-Za-z0-9.-]+$")]
MailAddresses = Annotated[list[MailAddress], BeforeValidator(_listed)]
# Hadoop's own way of writing a local path has one slash, and Delta takes two ways of writing for two places.
StorageUrl = Annotated[
    str,
    Field(pattern=r"^[a-z][a-z0-9+.-]*:/\S*[^/\s]$"),
    AfterValidator(lambda url: url.replace("file:///", "file:/")),
    AfterValidator(_no_password),
]
Count = Annotated[int, Field(ge=1)]


class Settings(BaseModel):
    """All settings. `Settings()` is a suite on this machine's loopback."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # Kafka
    kafka_bootstrap_servers: Address = Field("127.0.0.1:29092", description="HOST:PORT of Kafka brokers")
    ticks_topic: Topic = Field("ticks", description="topic of the ticks")
    rejects_topic: Topic = Field("rejects", description="topic of the frames that no feed could turn into ticks")
    kafka_client: Literal["kafka-python", "confluent-kafka"] = Field(
        "kafka-python", description="library that sends to Kafka: kafka-python, or confluent-kafka, which is faster"
    )
    gaps_topic: Topic = Field("gaps", description="topic of the ticks that are known to be missing")
    kafka_partitions: Count = Field(4, description="partitions of a topic, fixed when it is created")
    kafka_retention_hours: Count = Field(168, description="hours that Kafka keeps a record")
    kafka_retention_bytes: Count = Field(8 << 30, description="bytes that Kafka keeps of a partition")

    # Ingestion
    feed: str = Field("binance", description="venue: binance, coinbase, kraken or coincap")
    url: WebSocketUrl | None = Field(None, description="WebSocket address of the venue; default: the feed's own")
    assets: Names = Field(
        ["bitcoin", "ethereum", "cardano", "solana", "dogecoin"],
        min_length=1,
        description="canonical names, comma-separated",
    )
    discover: Literal["named", "top", "all"] = Field(
        "named", description="follow the named assets, the top ones by market capitalisation, or all USD and USDT pairs"
    )
    top_assets: int = Field(50, ge=1, le=2_000, description="how many assets discover = top follows")
    discovery_seconds: float = Field(
        3_600.0, gt=0, le=86_400, description="the assets to follow are looked up again every so often"
    )
    rest_urls: Mapped = Field(
        {}, description="REST addresses, as FEED=URL; default: the venues' own, for feeds at the venues' own addresses"
    )
    backfill_max_trades: int = Field(
        100_000, ge=0, description="a gap of more trades is not filled from the venue's history; 0: none is"
    )
    fallback_feeds: Names = Field(
        [], description="venues that take over, in this order, while those before deliver no ticks"
    )
    fallback_urls: Mapped = Field({}, description="their WebSocket addresses where not the feeds' own, as FEED=URL")
    all_feeds_at_once: bool = Field(False, description="listen to the fallback feeds all the time")
    failover_seconds: float = Field(
        3.0,
        gt=0,
        le=600,
        description="a feed that is silent for so long, or brings no tick for stale_seconds, is replaced by the next",
    )
    healthy_seconds: float = Field(
        30.0, ge=0, le=86_400, description="a feed that has delivered again for so long has the others closed"
    )
    coincap_api_key: SecretStr | None = Field(
        None, description="CoinCap's key; in the environment, TICKHOUSE_COINCAP_API_KEY, and never a flag"
    )
    record: Path | None = Field(
        None, description="keep every frame as it came in FILE-FEED-TIME.gz, which the simulator replays"
    )
    record_bytes: Count = Field(256 << 20, description="begin a new recording after so many bytes of frames")
    metrics_port: int = Field(
        29108, ge=0, le=65_535, description="port on loopback of /metrics, /healthz and /status; 0: any that is free"
    )
    stale_seconds: float = Field(
        30.0,
        gt=0,
        description="/healthz fails when no tick has come for so long; what usually trades more rarely has longer",
    )
    log_format: Literal["text", "json"] = Field("text", description="text for people, or json: one object a line")
    max_frame_bytes: Count = Field(1 << 20, description="a larger frame is rejected and its connection closed")
    max_in_flight: Count = Field(20_000, description="records on their way to Kafka; the others stay in the spool")
    stop_seconds: float = Field(
        30.0, ge=0, le=3_600, description="a stopping ingester waits so long for Kafka to take what is in the spool"
    )
    spool_dir: Path | None = Field(
        None, description="folder of what was received and is not yet in Kafka; default STATE_DIR/spool"
    )
    spool_fsync_ms: float = Field(
        10.0, ge=0, le=1_000, description="what is received is written to disk, durably, at most every so often"
    )
    spool_max_bytes: int = Field(
        8 << 30, ge=1 << 20, description="size of the spool from which on nothing more is read from the venue"
    )
    sockets: int = Field(
        1, ge=1, le=8, description="connections to a venue that bring the same: a cut of one of two loses nothing"
    )
    clock_step_seconds: float = Field(
        60.0, ge=0, le=86_400, description="a step of the machine's clock that lasts so long moves receipt times too"
    )
    market_data_urls: Mapped = Field(
        {},
        description="REST addresses asked where a venue's is closed (HTTP 451), as FEED=URL; default: the venues' own",
    )
    venue_proxy: SecretUrl | None = Field(
        None,
        description="HTTP proxy to venues on other machines; in the environment, TICKHOUSE_VENUE_PROXY, never a flag",
    )

    # Alerts and their notifier
    alerts_topic: Topic = Field("alerts", description="topic of the alerts")
    webhook_url: SecretUrl | None = Field(
        None, description="alerts are POSTed here; in the environment, TICKHOUSE_WEBHOOK_URL, and never a flag"
    )
    smtp_host: str | None = Field(None, description="mail server that alerts are sent through")
    smtp_port: Port = Field(25, description="port of the mail server")
    smtp_tls: Literal["none", "starttls", "tls"] = Field(
        "none", description="none, starttls (usually port 587), or tls from the first byte (usually port 465)"
    )
    smtp_from: MailAddress | None = Field(None, description="sender of the mails")
    smtp_to: MailAddresses = Field([], description="recipients of the mails, comma-separated")
    smtp_user: str | None = Field(None, description="name at the mail server, if it wants one")
    smtp_password: SecretStr | None = Field(
        None, description="password of smtp_user; in the environment, TICKHOUSE_SMTP_PASSWORD, and never a flag"
    )
    alert_stale_seconds: float = Field(
        300.0, gt=0, le=86_400, description="nobody is told of an alert that opened longer ago"
    )
    alerting_metrics_port: int = Field(
        29110, ge=0, le=65_535, description="as metrics_port, of alerting; another one if it is taken"
    )
    notifier_metrics_port: int = Field(
        29111, ge=0, le=65_535, description="as metrics_port, of the notifier; another one if it is taken"
    )

    # Lake
    lake_root: StorageUrl = Field(
        "hdfs://127.0.0.1:28020/tickhouse", description="where the tables are: ROOT/DATABASE/NAME"
    )
    checkpoint: StorageUrl | None = Field(
        None, description="checkpoint of the streaming job; default ROOT/_checkpoints/ticks"
    )
    webhdfs_url: HttpUrl = Field("http://127.0.0.1:29870", description="WebHDFS address of lake_root's NameNode")
    future_tolerance_seconds: float = Field(
        5.0, ge=0, le=86_400, description="a venue's time further ahead of its receipt than this is not believed"
    )
    receipt_tolerance_seconds: float = Field(
        86_400.0, gt=0, description="a receipt further ahead of the time at which bronze took it is not believed"
    )
    gold_symbols: Mapped = Field(
        {},
        description="the one symbol that feeds gold for SOURCE:ASSET, as SOURCE:ASSET=SYMBOL; else see gold_quotes",
    )
    # Binance has no USD pairs, and producers that do not name a quote mean USD: there both feed gold.
    gold_quotes: Mapped = Field(
        {"coinbase": "USD", "kraken": "USD", "coincap": "USD"},
        description="the one quote that feeds gold for a venue, as SOURCE=QUOTE; of other venues every quote does",
    )

    volatility_seconds: int = Field(
        60, ge=5, le=3_600, multiple_of=5, description="gold.rolling_price's volatility is over so many seconds"
    )
    alert_threshold_pct: Decimal = Field(
        Decimal(2), gt=0, le=1_000, description="a change above so many percent is an alert"
    )
    alert_window_seconds: int = Field(10, ge=1, le=3_600, description="a change within so many seconds is an alert")
    alert_cooldown_seconds: int = Field(
        60, ge=0, le=86_400, description="no alert opens within so many seconds after one was closed"
    )

    history_minutes: float = Field(
        120.0,
        ge=1,
        le=525_600,
        description="old versions of the tables stay readable so long: for time travel, running queries, the proof",
    )
    keep_days: Days = Field(
        {}, description="rows older than so many days are dropped, as TABLE=DAYS,TABLE=DAYS; others stay for ever"
    )
    upkeep: bool = Field(True, description="the streaming job joins small files, and deletes what it has replaced")
    upkeep_seconds: float = Field(30.0, gt=0, le=86_400, description="least time between two rounds of upkeep")
    debt_files: Count = Field(
        20_000, description="with more small or expired files than this, micro-batches become larger and rarer"
    )

    # Streaming
    trigger_seconds: float = Field(0.0, ge=0, le=3_600, description="least time between micro-batches; 0: at once")
    max_offsets_per_trigger: Count = Field(1_000_000, description="records in a micro-batch at most")
    rebuild: bool = Field(
        False,
        description="make silver and gold anew from bronze first, with a new checkpoint after bronze's last record",
    )
    once: bool = Field(False, description="process what Kafka holds now, then end")
    stream_metrics_port: int = Field(
        29109, ge=0, le=65_535, description="as metrics_port, of the streaming job; another one if it is taken"
    )
    stream_stale_seconds: float = Field(
        60.0,
        gt=0,
        le=86_400,
        description="/healthz of the streaming job, alerting and the notifier fails when a record waits for so long",
    )

    # SQL (Spark Thrift Server)
    sql_host: str = Field("127.0.0.1", description="host of the Spark Thrift Server")
    sql_port: Port = Field(20000, description="port of the Spark Thrift Server")

    # Services on this machine
    state_dir: Path = Field(Path(".tickhouse"), description="folder of the services' state, relative to the project")
    kafka_port: Port = Field(29092, description="Kafka broker")
    kafka_controller_port: Port = Field(29093, description="Kafka controller")
    namenode_port: Port = Field(28020, description="NameNode RPC")
    namenode_http_port: Port = Field(29870, description="NameNode web page and WebHDFS")
    secondarynamenode_http_port: Port = Field(29868, description="SecondaryNameNode web page")
    datanode_port: Port = Field(29866, description="DataNode data transfer")
    datanode_http_port: Port = Field(29864, description="DataNode web page")
    datanode_ipc_port: Port = Field(29867, description="DataNode RPC")
    resourcemanager_port: Port = Field(28032, description="ResourceManager client RPC; the next three ports too")
    resourcemanager_http_port: Port = Field(28088, description="ResourceManager web page")
    nodemanager_port: Port = Field(28041, description="NodeManager RPC; the next port too")
    nodemanager_http_port: Port = Field(28043, description="NodeManager web page")

    @model_validator(mode="after")
    def _state_dir_in_project(self) -> Settings:
        object.__setattr__(self, "state_dir", PROJECT / self.state_dir)
        return self

    @property
    def spool_location(self) -> Path:
        return PROJECT / self.spool_dir if self.spool_dir else self.state_dir / "spool"

    @property
    def checkpoint_location(self) -> str:
        return self.checkpoint or f"{self.lake_root}/_checkpoints/ticks"


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def settings_file(environment: Mapping[str, str], file: Path | None = None) -> Path:
    """The TOML file in force: the one given, else the environment's, else conf/local.toml."""
    return file or Path(environment.get(ENVIRONMENT_PREFIX + "CONF") or PROJECT / "conf" / "local.toml")


def read_settings(
    flags: Mapping[str, Any] | None = None, environment: Mapping[str, str] | None = None, file: Path | None = None
) -> Settings:
    """The settings from flags, environment and TOML file, in that order of precedence.

    Raises SettingsError for an unknown key or a value that does not fit.
    """
    environment = os.environ if environment is None else environment
    flags = {name: value for name, value in (flags or {}).items() if value is not None}
    path = settings_file(environment, file)
    try:
        from_file = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError(f"settings file {path}: {error}") from error
    _warn_of_readers(path, from_file)
    exported = {
        name[len(ENVIRONMENT_PREFIX) :].lower(): value
        for name, value in environment.items()
        if name.startswith(ENVIRONMENT_PREFIX)
    }
    exported = {name: value for name, value in exported.items() if name not in NOT_SETTINGS}
    for name, value in flags.items():
        if has_user_info(value):
            raise SettingsError(
                f"{flag(name)}: everybody on this machine sees a flag; write a URL with a user or password "
                f"into {ENVIRONMENT_PREFIX}{name.upper()} or the settings file"
            )
    try:
        return Settings.model_validate({**from_file, **exported, **flags})
    except ValidationError as error:
        raise SettingsError(_one_line(error.errors()[0], flags, exported, path)) from None


def _one_line(problem: ErrorDetails, flags: Mapping[str, Any], exported: Mapping[str, str], path: Path) -> str:
    name = str(problem["loc"][0]) if problem["loc"] else "settings"
    if name in flags:
        where = flag(name)
    elif name in exported:
        where = ENVIRONMENT_PREFIX + name.upper()
    else:
        where = f"{name} in {path}"
    if problem["type"] == "extra_forbidden":
        return f"{where}: there is no such setting"
    value = repr(problem["input"])
    # A wrong URL may have its password anywhere.
    if _is_secret_setting(name) or re.search("://.*@", value):
        return f"{where}: {problem['msg']}"
    return f"{where} = {shown(value)}: {problem['msg']}"


def is_secret(annotation: Any) -> bool:
    """Whether a setting of this type may not be shown, and is no flag."""
    return annotation is SecretStr or any(map(is_secret, typing.get_args(annotation)))


def _is_secret_setting(name: str) -> bool:
    return name in Settings.model_fields and is_secret(Settings.model_fields[name].annotation)


def _warn_of_readers(path: Path, values: Mapping[str, Any]) -> None:
    """Warn where others may read a settings file with secrets."""
    secrets = [name for name, value in values.items() if has_user_info(value) or _is_secret_setting(name)]
    if secrets and path.stat().st_mode & 0o077:
        names = ", ".join(map(shown, secrets))
        logger.warning("settings file %s holds secrets (%s), and others may read it: chmod 600 %s", path, names, path)


def arguments(description: str | None, *names: str) -> argparse.ArgumentParser:
    """A parser with `--conf` and the flags of the named settings; parse with `from_command_line`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conf", type=Path, metavar="FILE", help="TOML file of settings (default: conf/local.toml)")
    for name in names:
        field = Settings.model_fields[name]
        if is_secret(field.annotation):
            raise ValueError(f"{name} is a secret, and so no flag")
        default = field.get_default(call_default_factory=True)
        default_text = ",".join(default) if isinstance(default, list) else default
        help_text = (
            f"{field.description} (default: {default_text})"
            if default_text not in (None, {}, False)
            else str(field.description)
        )
        if field.annotation is bool:
            # A flag that is on by default needs its opposite.
            action = argparse.BooleanOptionalAction if default else "store_true"
            parser.add_argument(flag(name), action=action, default=None, help=help_text)
        else:
            parser.add_argument(flag(name), metavar=_metavar(field.annotation), help=help_text.replace("%", "%%"))
    return parser


def _metavar(annotation: Any) -> str:
    if isinstance(annotation, types.UnionType):
        annotation = typing.get_args(annotation)[0]
    return {int: "N", float: "N", Path: "DIR"}.get(annotation, "VALUE")


def from_command_line(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None = None
) -> tuple[Settings, argparse.Namespace]:
    """Parse argv; return the settings and the program's own arguments. Exits with code 2 on a wrong setting."""
    parsed = parser.parse_args(argv)
    values = vars(parsed)
    flags = {name: values[name] for name in values if name in Settings.model_fields}
    try:
        return read_settings(flags, file=values.get("conf")), parsed
    except SettingsError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        raise SystemExit(USAGE_ERROR) from None


def main() -> None:
    """Print the settings in force as JSON: `python -m conf.settings`."""
    names = [name for name, field in Settings.model_fields.items() if not is_secret(field.annotation)]
    settings, _ = from_command_line(arguments(main.__doc__, *names))
    print(redacted(json.dumps(settings.model_dump(mode="json"), indent=2)))


if __name__ == "__main__":
    main()
