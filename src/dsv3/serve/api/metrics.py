"""What Prometheus may know: times as requests see them, and the engine's own counts, read when asked."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from dsv3.serve.engine import Engine

SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Metrics:
    """A server's metrics, in a registry of their own."""

    def __init__(self, engine: Engine):
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(engine))

        def histogram(name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"dsv3_{name}_seconds", what, buckets=buckets, registry=self.registry)

        self.first_token = histogram("time_to_first_token", "From a request to its first token.", LONG)
        self.between_tokens = histogram("time_between_tokens", "From one token to the next.", SHORT)
        self.request = histogram("request", "From a request to the end of its last answer.", LONG)
        self.requests = Counter(
            "dsv3_requests", "Requests that reached the engine, by how they ended.", ["outcome"],
            registry=self.registry,
        )  # fmt: skip
        self.http = Counter("dsv3_http_responses", "HTTP answers.", ["status"], registry=self.registry)

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    """Reads the engine's counts from another thread: single numbers, each right at its moment."""

    def __init__(self, engine: Engine):
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        engine = self._engine
        stats, blocks, scheduler = engine.stats, engine.blocks, engine.scheduler
        total = len(blocks.blocks)
        for name, what, value in (
            ("requests_running", "Answers being made.", len(scheduler.running)),
            ("requests_waiting", "Answers that wait for room.", len(scheduler.waiting)),
            ("cache_blocks", "Blocks of the latent cache.", total),
            ("cache_blocks_used", "Blocks that open requests hold.", blocks.used),
            ("cache_use_ratio", "Share of the cache that open requests hold.", blocks.used / total),
        ):
            yield GaugeMetricFamily(f"dsv3_{name}", what, value)
        for name, what, value in (
            ("engine_steps", "Batches computed.", stats.steps),
            ("prompt_tokens", "Tokens of prompts.", stats.prompt_tokens),
            ("generated_tokens", "Tokens of answers.", stats.completion_tokens),
            ("prefix_cache_hit_tokens", "Tokens of prompts found in the cache.", stats.cached_tokens),
            ("draft_tokens", "Tokens the MTP module proposed.", sum(stats.drafted_at)),
            ("accepted_draft_tokens", "Proposed tokens that stood.", sum(stats.accepted_at)),
            ("preemptions", "Answers put back for want of room.", scheduler.preemptions),
        ):
            yield CounterMetricFamily(f"dsv3_{name}", what, value)
