"""What a run has of its own: topics, a lake and a folder."""

from __future__ import annotations

import uuid
from pathlib import Path

from kafka.errors import KafkaError

from benchmarks.backlog import remove, say
from conf.settings import Settings


def own_places(settings: Settings) -> tuple[Settings, Path]:
    """The settings with a run's own topics and lake, and its folder, which this makes."""
    name = uuid.uuid4().hex[:8]
    topics = {f"{kind}_topic": f"benchmark-{kind}-{name}" for kind in ("ticks", "rejects", "gaps")}
    root = f"{settings.lake_root}-benchmark-{name}"
    folder = settings.state_dir / "benchmark" / name
    folder.mkdir(parents=True)
    return settings.model_copy(update={**topics, "lake_root": root, "checkpoint": f"{root}/_checkpoints/ticks"}), folder


def remove_traces(settings: Settings, folder: Path) -> None:
    topics = [settings.ticks_topic, settings.rejects_topic, settings.gaps_topic]
    try:
        remove(settings, topics, folder)
    except KafkaError as error:
        say(f"not removed, since Kafka does not answer ({error!r}): {', '.join(topics)}, {settings.lake_root}")
