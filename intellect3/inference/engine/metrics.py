"""`/metrics` for Prometheus: the engine's counters, and latencies of finished requests.

Names are SGLang's where it has such a metric. Nothing is counted per token: counters are read from
the engine when somebody asks, and a request enters the histograms once, when it has finished.
"""

import bisect
import itertools
from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import (
  CounterMetricFamily,
  GaugeMetricFamily,
  HistogramMetricFamily,
  Metric,
)
from prometheus_client.registry import Collector

from intellect3.inference.engine.sequence import Sequence as Generation

Stats = Mapping[str, int | float]

GAUGES = (
  ("sglang:num_running_reqs", "running_requests", "Requests that run."),
  ("sglang:num_queue_reqs", "waiting_requests", "Requests that wait."),
  ("sglang:num_used_tokens", "used_tokens", "Tokens of the cache in use."),
  ("sglang:kv_evictable_tokens", "prefix_tokens", "Tokens that the prefix cache holds."),
  ("sglang:max_total_num_tokens", "max_total_tokens", "Tokens that the cache takes."),
  ("intellect3:paused", "paused", "1 while generation is paused."),
  ("intellect3:updating", "updating", "1 while a weight update waits for running requests."),
)
"""Name, key of the engine's statistics, what it says."""

COUNTERS = (
  ("sglang:prompt_tokens", "prompt_tokens", "Prompt tokens of the requests that were started."),
  ("sglang:generation_tokens", "generated_tokens", "Tokens sampled."),
  ("sglang:cached_tokens", "cached_tokens", "Prompt tokens found in the prefix cache."),
  ("sglang:num_retracted_requests", "retractions", "Times a request lost its cache."),
  ("intellect3:prefilled_tokens", "prefilled_tokens", "Tokens computed in prefill calls."),
  ("intellect3:reprefilled_tokens", "reprefilled_tokens", "Of those, computed once before."),
  ("intellect3:prefill_calls", "prefill_calls", "Calls of the device that prefilled."),
  ("intellect3:decode_calls", "decode_calls", "Calls of the device that decoded."),
)

SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
"""Upper bounds of every histogram's buckets."""


class Histogram:
  """Counts of durations, in seconds, in the buckets of `SECONDS`."""

  def __init__(self) -> None:
    self._counts = [0] * (len(SECONDS) + 1)
    self._sum = 0.0

  def add(self, seconds: float, times: int = 1) -> None:
    self._counts[bisect.bisect_left(SECONDS, seconds)] += times
    self._sum += seconds * times

  def cumulative(self) -> tuple[list[tuple[str, float]], float]:
    """Prometheus' form: (upper bound, how many lie below it), and the sum of all."""
    bounds = [*map(str, SECONDS), "+Inf"]
    return list(zip(bounds, itertools.accumulate(self._counts), strict=True)), self._sum


class Metrics(Collector):
  """What one server has done. `count` and `render` belong to the event loop."""

  def __init__(self, stats: Callable[[], Stats], *, model_name: str):
    """Makes a registry of its own.

    Args:
      stats: the engine's counters, by the names of `GAUGES` and `COUNTERS`.
      model_name: label of every metric, as SGLang's.
    """
    self._stats, self._model_name = stats, model_name
    self._finished = self._aborted = 0
    self._first_token, self._between, self._whole, self._queued = (Histogram() for _ in range(4))
    self._registry = CollectorRegistry()
    self._registry.register(self)

  def count(self, generations: Iterable[Generation]) -> None:
    """Takes finished generations in."""
    for generation in generations:
      self._finished += 1
      finish, finished = generation.finish, generation.finished
      assert finish is not None and finished is not None
      if finish["type"] == "abort":
        self._aborted += 1
      self._whole.add(finished - generation.received)
      if generation.started is not None:
        self._queued.add(generation.started - generation.received)
      if generation.first_token is not None:
        self._first_token.add(generation.first_token - generation.received)
        later = len(generation.output_ids) - 1
        if later > 0:
          self._between.add((finished - generation.first_token) / later, later)

  def render(self) -> bytes:
    """The text that Prometheus reads."""
    return generate_latest(self._registry)

  def describe(self) -> Iterable[Metric]:
    """See Collector; nothing has to be known before the first `collect`."""
    return ()

  def collect(self) -> Iterable[Metric]:
    """See Collector."""
    stats, labels = self._stats(), [self._model_name]
    for name, key, says in GAUGES:
      gauge = GaugeMetricFamily(name, says, labels=["model_name"])
      gauge.add_metric(labels, float(stats[key]))
      yield gauge
    used = GaugeMetricFamily("sglang:token_usage", "Share of the cache in use.", labels=_LABEL)
    used.add_metric(labels, stats["used_tokens"] / max(stats["max_total_tokens"], 1))
    yield used
    hits = GaugeMetricFamily("sglang:cache_hit_rate", "Share of prompts found.", labels=_LABEL)
    hits.add_metric(labels, stats["cached_tokens"] / max(stats["prompt_tokens"], 1))
    yield hits
    for name, key, says in COUNTERS:
      yield self._counter(name, says, float(stats[key]))
    yield self._counter("sglang:num_requests", "Requests that have finished.", self._finished)
    yield self._counter("sglang:num_aborted_requests", "Of those, aborted.", self._aborted)
    for name, says, histogram in (
      ("sglang:time_to_first_token_seconds", "From arrival to first token.", self._first_token),
      ("sglang:inter_token_latency_seconds", "Mean of a request, once a token.", self._between),
      ("sglang:e2e_request_latency_seconds", "From arrival to the end.", self._whole),
      ("sglang:queue_time_seconds", "From arrival to the first computation.", self._queued),
    ):
      family = HistogramMetricFamily(name, says, labels=_LABEL)
      buckets, total = histogram.cumulative()
      family.add_metric(labels, buckets=buckets, sum_value=total)
      yield family

  def _counter(self, name: str, says: str, value: float) -> Metric:
    counter = CounterMetricFamily(name, says, labels=_LABEL)
    counter.add_metric([self._model_name], value)
    return counter


_LABEL = ["model_name"]
