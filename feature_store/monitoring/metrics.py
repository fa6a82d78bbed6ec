"""What a serving process measures: every Prometheus metric's name once, its meaning beside it."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

#: Seconds. A decision takes a few milliseconds; what takes longer than a second has long been given up.
_DECISION_BUCKETS = (0.001, 0.002, 0.003, 0.004, 0.006, 0.01, 0.02, 0.05, 0.1, 0.25, 1.0)

#: Seconds. A read of one row takes a fraction of a millisecond, one of thousands of rows some hundred.
_REQUEST_BUCKETS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 1.0)


class ServerMetrics:
    """The metrics that every app has, in the registry that it is given: two apps in one process never add up."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.refused_requests = Counter(
            "isochron_refused_requests_total",
            "Requests answered with an error, by route and by the error's type.",
            ["route", "reason"],
            registry=registry,
        )
        self.events_applied = Counter(
            "isochron_events_applied_total",
            "Pushed events that a view took in; an event counts once for each view on its source.",
            ["view"],
            registry=registry,
        )
        self.events_repeated = Counter(
            "isochron_events_repeated_total",
            "Pushed events that changed nothing, their log position having been applied before, by view.",
            ["view"],
            registry=registry,
        )
        self.rows_written = Counter(
            "isochron_rows_written_total",
            "Rows that were pushed or written to a plain view, whether or not they were newer than what it held.",
            ["view"],
            registry=registry,
        )


class ServingMetrics(ServerMetrics):
    """What the scoring app measures."""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__(registry)
        self.decision_seconds = Histogram(
            "isochron_decision_seconds",
            "Time from the start of a scoring request to its logged and encoded answer; refused requests excluded.",
            buckets=_DECISION_BUCKETS,
            registry=registry,
        )
        self.decisions = Counter(
            "isochron_decisions_total",
            "Decisions by outcome: 'scored', or 'scored_with_warnings' where the answer carries a warning.",
            ["outcome"],
            registry=registry,
        )
        self.unknown_entities = Counter(
            "isochron_unknown_entities_total",
            "Keys of scored requests that no view keyed by them has ever seen, by key column.",
            ["key"],
            registry=registry,
        )
        self.model = Gauge(
            "isochron_model_info",
            "1 for the model that is served and the definitions its features are computed by.",
            ["version", "fingerprint"],
            registry=registry,
        )


class FeatureServerMetrics(ServerMetrics):
    """What the feature server measures."""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__(registry)
        self.requests = Counter(
            "isochron_http_requests_total",
            "Answered requests by route and HTTP status.",
            ["route", "status"],
            registry=registry,
        )
        self.read_seconds = Histogram(
            "isochron_read_seconds",
            "Time from a read request's start to its encoded answer; refused requests excluded.",
            buckets=_REQUEST_BUCKETS,
            registry=registry,
        )
        self.rows_read = Counter("isochron_rows_read_total", "Entity rows in answered reads.", registry=registry)
        self.rows_unknown = Counter(
            "isochron_rows_unknown_total",
            "Entity rows in answered reads of which the store holds nothing, by view.",
            ["view"],
            registry=registry,
        )
        self.definitions = Gauge(
            "isochron_definitions_info",
            "1 for the state of the registry (its SHA-256) that answers are made by.",
            ["project", "stamp"],
            registry=registry,
        )
        self.reloads = Counter(
            "isochron_definitions_reloads_total",
            "Changes of the registry by outcome: 'taken' into service, or 'failed' to be compiled.",
            ["outcome"],
            registry=registry,
        )
        self.views_waiting = Gauge(
            "isochron_views_waiting",
            "Views that are served by their former definition until the store is filled for the new one.",
            registry=registry,
        )
