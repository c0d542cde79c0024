"""Prometheus metrics: callbacks, deliveries, polls, and the ledger's counts."""

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest


class PrometheusMetrics:
    """All metrics of one receiver, in a separate registry."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._callbacks = Counter(
            "kling_relay_callbacks", "Callbacks, by vendor and result", ["vendor", "result"], registry=self._registry
        )
        self._by_result: dict[tuple[str, str], Counter] = {}
        self._deliveries = Histogram(
            "kling_relay_delivery_seconds",
            "Delivery attempts, by hook and result (done, due, dead)",
            ["hook", "result"],
            registry=self._registry,
        )
        self._paused = Gauge(
            "kling_relay_hook_paused",
            "1 while a hook's circuit breaker is open",
            ["hook"],
            registry=self._registry,
        )
        self._polls = Counter(
            "kling_relay_polls",
            "Queries to vendors, by vendor and result",
            ["vendor", "result"],
            registry=self._registry,
        )
        self._polled = Counter("kling_relay_polled_tasks", "Tasks polled", ["vendor"], registry=self._registry)
        self._refused = Counter(
            "kling_relay_refused",
            "Task requests of this process (POST /events) that no vendor took; retryable: may succeed later",
            ["vendor", "retryable"],
            registry=self._registry,
        )
        self._closed = Counter(
            "kling_relay_connections_closed",
            "Client connections closed by a bound: headers, slow, pipelined, connections",
            ["reason"],
            registry=self._registry,
        )
        self._open = Gauge("kling_relay_open_tasks", "Open tasks", ["status"], registry=self._registry)
        self._pending = Gauge("kling_relay_deliveries", "Deliveries, due or dead", ["state"], registry=self._registry)
        self._quarantine = Gauge("kling_relay_quarantine", "Quarantined bodies", registry=self._registry)

    def callback(self, vendor: str, result: str) -> None:
        counter = self._by_result.get((vendor, result))
        if counter is None:  # `labels` costs more than the rest of counting
            counter = self._by_result[vendor, result] = self._callbacks.labels(vendor, result)
        counter.inc()

    def delivery(self, hook: str, result: str, seconds: float) -> None:
        self._deliveries.labels(hook, result).observe(seconds)

    def breaker(self, hook: str, *, is_open: bool) -> None:
        self._paused.labels(hook).set(int(is_open))

    def poll(self, vendor: str, result: str, tasks: int) -> None:
        self._polls.labels(vendor, result).inc()
        self._polled.labels(vendor).inc(tasks)

    def connection_closed(self, reason: str) -> None:
        self._closed.labels(reason).inc()

    def refused(self, vendor: str, *, retryable: bool) -> None:
        self._refused.labels(vendor, str(retryable).lower()).inc()

    def render(self, counts: Mapping[str, int]) -> bytes:
        self._open.clear()
        for name, count in counts.items():
            kind, _, rest = name.partition(".")
            if kind == "task":
                self._open.labels(rest).set(count)
            elif kind == "delivery":
                self._pending.labels(rest).set(count)
            elif kind == "quarantine":
                self._quarantine.set(count)
        return generate_latest(self._registry)
