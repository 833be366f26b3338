"""What a page of metrics says, and where its names break Prometheus's conventions."""

from __future__ import annotations

import re

from prometheus_client.parser import text_string_to_metric_families

UNITS = ("seconds", "bytes", "ratio")
# Of other units and scales, which belong converted to the base unit.
NO_UNITS = re.compile(r"_(ms|millis|milliseconds|micros|us|minutes|hours|days|kb|mb|kilobytes|percent|pct)(_|$)")
ESCAPED = re.compile(r"[a-z][a-z0-9_]*")


def exposed(page: str) -> dict[str, float]:
    """The samples of a page by name; labels stand in braces, by name."""
    samples = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
            samples[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
    return samples


def problems_of(page: str) -> list[str]:
    """What promtool's linter would complain about, and names without our prefix."""
    problems = []
    names: set[str] = set()
    for family in text_string_to_metric_families(page):
        # The parser cuts _total off a counter's name, as OpenMetrics does.
        name = family.name
        if name in names:
            problems.append(f"{name} is there twice")
        names.add(name)
        if not family.documentation:
            problems.append(f"{name} has no help")
        if not name.startswith(("tickhouse_", "process_")) or not ESCAPED.fullmatch(name):
            problems.append(f"{name} is not our name")
        if NO_UNITS.search(name):
            problems.append(f"{name} is not in a base unit")
        if any(unit in name.split("_") and not name.endswith(f"_{unit}") for unit in UNITS):
            problems.append(f"{name} has its unit before its end")
        if family.type == "counter" and any(not sample.name.endswith("_total") for sample in family.samples):
            problems.append(f"{name} counts without _total")
        if family.type != "counter" and name.endswith("_total"):
            problems.append(f"{name} is no counter")
        if family.type not in ("histogram", "summary") and name.endswith(("_count", "_sum", "_bucket")):
            problems.append(f"{name} looks like a histogram's")
        if family.type == "unknown":
            problems.append(f"{name} has no type")
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        problems += [f"{name}: label {label}" for label in labels if not ESCAPED.fullmatch(label)]
    return problems
