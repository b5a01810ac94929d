"""The metrics of a sample run, and what a reader makes of them, for the tests of metrics."""

from dialogue_samples import INFO
from prometheus_client.parser import text_string_to_metric_families

from stream_hbaf.events import Health, Info, Privacy, Status, Switch
from stream_hbaf.publish.metrics import Metrics

HEALTH = Health(
    uptime_s=1,
    memory_mb=1,
    utterances=1,
    queues={"chunks": 2, "finished": 1, "outbox": 40},
    dropped={"partials": 3, "utterances": 0},
    latency_ms={},
    hints=["ann: nothing but silence"],
)
Sample = tuple[str, tuple[tuple[str, str], ...]]  # a name with its labels, by their names


def sample_metrics(
    *, privacy: Privacy = "full", has_broker: bool = True, info: Info = INFO
) -> Metrics:
    """The metrics of a run that has just begun."""
    described = info.model_copy(update={"privacy": privacy})
    return Metrics(described, health=lambda: HEALTH, has_broker=has_broker)


def all_metrics() -> Metrics:
    """Metrics in which every series is there, as soon as a source runs."""
    counted = sample_metrics()
    counted.count(Status(source="ann", stage="capture", state="online"))
    counted.count(Switch(source="ann", switch="listening", on=True))
    return counted


def parsed(text: str) -> dict[Sample, float]:
    """The samples in Prometheus' text format, each there once."""
    found: dict[Sample, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = sample.name, tuple(sorted(sample.labels.items()))
            assert key not in found, key
            found[key] = sample.value
    return found


def values(counted: Metrics) -> dict[Sample, float]:
    """As a reader without preferences gets them."""
    return parsed(counted.exposition("")[0].decode())
