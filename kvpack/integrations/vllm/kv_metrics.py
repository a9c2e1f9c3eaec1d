"""What the connector counts, as vLLM logs it and as Prometheus reads it (``/metrics``)."""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

# Names of counters as Prometheus has them, without "vllm:kvpack_" and "_total", and what they count.
COUNTERS = {
    "queried_tokens": "Tokens of prompts that vLLM's own prefix cache did not have, and that were looked up.",
    "hit_tokens": "Tokens of these that were to be loaded.",
    "loaded_tokens": "Tokens that were loaded, of each rank.",
    "failed_tokens": "Tokens that were to be loaded, and were computed instead, of each rank.",
    "loaded_bytes": "Bytes of pages that were loaded.",
    "saved_pages": "Pages of 64 tokens that were saved, of each rank.",
    "saved_bytes": "Bytes of pages that were saved, as they are in memory.",
    "dropped_pages": "Pages that were not saved, since too much waited to be.",
    "written_files": "Files that were written.",
    "failed_writes": "Files that could not be written.",
    "damaged_files": "Files that could not be read.",
    "foreign_files": "Files of other models, or of something else.",
    "failed_saves": "Saves that ended with an error.",
    "failed_loads": "Loads that ended with an error.",
    "failed_reads": "Looks at the directory that ended with an error.",
    "passed_over_requests": "Requests whose keys and values are not kept: those with images or embeddings.",
}


class KVPackStats(KVConnectorStats):  # type: ignore[misc]
    """Counts by name; ``data`` of an interval."""

    def reset(self) -> None:
        """Count from zero."""
        self.data: dict[str, int] = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Add what another rank, or a later interval, has counted."""
        for name, count in other.data.items():
            self.data[name] = self.data.get(name, 0) + count
        return self

    def reduce(self) -> dict[str, int | float]:
        """For the log."""
        return dict(self.data)

    def is_empty(self) -> bool:
        return not self.data


class KVPackPromMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """A Prometheus counter for each of :data:`COUNTERS`, by engine."""

    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: Any, per_engine_labelvalues: Any) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        made = {
            name: self._counter_cls(name=f"vllm:kvpack_{name}", documentation=said, labelnames=labelnames)
            for name, said in COUNTERS.items()
        }
        self._counters = {
            (engine, name): counter.labels(*values)
            for engine, values in per_engine_labelvalues.items()
            for name, counter in made.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add the counts of an interval."""
        for name, count in transfer_stats_data.items():
            self._counters[engine_idx, name].inc(count)
