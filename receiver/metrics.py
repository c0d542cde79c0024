"""Prometheus metrics: callbacks, deliveries, polls, and the ledger's counts; shared by the processes of `--workers`."""

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, multiprocess, values
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector


class PrometheusMetrics:
    """All metrics of one receiver, in a separate registry.

    With `number` it is one of several processes, which share files in PROMETHEUS_MULTIPROC_DIR: each renders the
    totals of all. A process that gets the number of one that ended continues its counts.
    """

    def __init__(self, number: int | None = None) -> None:
        self._registry = shown = CollectorRegistry()
        self._counts = _LedgerCounts()
        if number is not None:
            values.ValueClass = values.MultiProcessValue(lambda: number)  # type: ignore[no-untyped-call]
            shown = CollectorRegistry()
            multiprocess.MultiProcessCollector(shown)  # type: ignore[no-untyped-call]
        self._shown = shown
        shown.register(self._counts)
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
        self._by_hook: dict[tuple[str, str], Histogram] = {}
        self._paused = Gauge(
            "kling_relay_hook_paused",
            "1 while a hook's circuit breaker is open",
            ["hook"],
            registry=self._registry,
            multiprocess_mode="livemax",
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

    def callback(self, vendor: str, result: str) -> None:
        counter = self._by_result.get((vendor, result))
        if counter is None:  # `labels` costs more than the rest of counting
            counter = self._by_result[vendor, result] = self._callbacks.labels(vendor, result)
        counter.inc()

    def delivery(self, hook: str, result: str, seconds: float) -> None:
        histogram = self._by_hook.get((hook, result))
        if histogram is None:
            histogram = self._by_hook[hook, result] = self._deliveries.labels(hook, result)
        histogram.observe(seconds)

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
        self._counts.counts = counts
        return generate_latest(self._shown)


class _LedgerCounts(Collector):
    """The ledger's counts of one scrape: they are of no process, so no process keeps them."""

    counts: Mapping[str, int] = {}

    def collect(self) -> Iterator[GaugeMetricFamily]:
        open_tasks = GaugeMetricFamily("kling_relay_open_tasks", "Open tasks", labels=["status"])
        pending = GaugeMetricFamily("kling_relay_deliveries", "Deliveries, due or dead", labels=["state"])
        quarantine = GaugeMetricFamily("kling_relay_quarantine", "Quarantined bodies")
        for name, count in self.counts.items():
            kind, _, rest = name.partition(".")
            if kind == "task":
                open_tasks.add_metric([rest], count)
            elif kind == "delivery":
                pending.add_metric([rest], count)
            elif kind == "quarantine":
                quarantine.add_metric([], count)
        yield from (open_tasks, pending, quarantine)
