"""Prompts' KV in kvpack's pages, in host memory and in files, behind vLLM's own cache (docs/VLLM.md).

vLLM makes one of these for its scheduler and one for each worker. The scheduler's says what can be loaded and what has
to be saved (:mod:`~kvpack.integrations.vllm.kv_scheduler`), the workers' do it
(:mod:`~kvpack.integrations.vllm.kv_page_store`) and tell the scheduler's which pages they have.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
)
from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from kvpack.errors import InputError
from kvpack.format.pages import PageFormat
from kvpack.format.snapshot import Fingerprint
from kvpack.integrations.vllm.cpu_block_order import block_places, vllm_write
from kvpack.integrations.vllm.kv_identity import rank_fingerprint, text_digest, weights_digest
from kvpack.integrations.vllm.kv_metrics import KVPackPromMetrics, KVPackStats
from kvpack.integrations.vllm.kv_options import ConnectorOptions
from kvpack.integrations.vllm.kv_page_codec import PagedLayers
from kvpack.integrations.vllm.kv_page_store import PageStore
from kvpack.integrations.vllm.kv_plan import Changes, StepPlan
from kvpack.integrations.vllm.kv_scheduler import PageScheduler
from kvpack.integrations.vllm.llvmlite_vars import give_vars
from kvpack.runtime.device.devices import free_bytes
from kvpack.runtime.kv.page_kernels import PAGE_FORMATS

# Below vLLM's own name, so that its handler and its level are taken.
logger = init_logger("vllm.kvpack")

# How long an engine that has nothing to compute waits for a load before it looks for new requests.
_IDLE_WAIT_S = 0.05

give_vars()


@dataclass
class StepMetadata(KVConnectorMetadata):  # type: ignore[misc]
    """Scheduler → workers, of a step."""

    plan: StepPlan


@dataclass
class RankPages(KVConnectorHandshakeMetadata):  # type: ignore[misc]
    """Worker → scheduler, once: which pages a rank has when it starts."""

    rank: int
    hashes: set[bytes]


@dataclass
class RankChanges(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """Workers → scheduler, of a step: pages that have come and gone, by rank."""

    changes: dict[int, Changes] = field(default_factory=dict)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> RankChanges:
        """With those of other ranks, or of a later step."""
        assert isinstance(other, RankChanges)
        both = dict(self.changes)
        for rank, changes in other.changes.items():
            both[rank] = both[rank].then(changes) if rank in both else changes
        return RankChanges(both)


class KVPackConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """vLLM's connector to kvpack's pages.

    Raises:
        InputError: an option that is not known or cannot be used; a model whose keys and values it cannot keep; a
            failure policy by which a damaged file would end a request.
    """

    _cache_hit_source = CacheHitSource.HOST

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        self._options = checked_options(vllm_config)
        self._block_tokens = _block_tokens(kv_cache_config)
        self._loads, self._saves = transfer.is_kv_consumer, transfer.is_kv_producer
        self._store: PageStore | None = None
        self._failed_blocks: set[int] = set()
        weights = _weights(vllm_config, self._options)
        if role == KVConnectorRole.SCHEDULER:
            parallel = vllm_config.parallel_config
            self._scheduler = PageScheduler(
                {
                    "fingerprint": _fingerprint(vllm_config, weights, rank=0).model,
                    "pages": list(self._options.pages),
                },
                ranks=parallel.world_size,
                block_tokens=self._block_tokens,
                loads=self._loads,
                saves=self._saves,
                min_load_tokens=self._options.min_load_tokens,
            )
        else:
            self._rank = vllm_config.parallel_config.rank
            self._fingerprint = _fingerprint(vllm_config, weights, rank=self._rank)

    @property
    def requires_kv_delivery(self) -> bool:
        """A save that is dropped is a miss later, no more."""
        return False

    # Worker ----------------------------------------------------------------------------------------------------------

    @property
    def _pages(self) -> PageStore:
        assert self._store is not None
        return self._store

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """As of vLLM."""
        layers = [kv_caches[name] for name in sorted(kv_caches, key=_by_numbers)]
        full_format = _full_format(layers[0].dtype)
        spec = self._kv_cache_config.kv_cache_groups[0].kv_cache_spec
        shape = layers[0].shape
        if len(shape) != 4 or (shape[1], shape[3]) != (spec.num_kv_heads, 2 * spec.head_size):
            raise InputError(
                f"a layer's cache is {list(shape)}; [blocks, {spec.num_kv_heads} heads, tokens, "
                f"K and V of {spec.head_size}] is wanted"
            )
        ranks, options, device = self._vllm_config.parallel_config.world_size, self._options, layers[0].device
        free, outside, places = free_bytes(device), None, None
        if device.type == "cpu":
            free = None if free is None else free // ranks  # which may all be of this machine
            write = vllm_write(layers[0].dtype, shape[2], spec.head_size)
            places = block_places(write, layers[0].dtype, shape[2], spec.head_size)
        elif device.type == "cuda":
            outside = _outside_bytes(device, self._vllm_config.cache_config.gpu_memory_utilization)
        directory = options.directory
        self._store = PageStore(
            PagedLayers(layers, self._block_tokens, places),
            options.formats(full_format),
            host_bytes=max(1, options.host_bytes // ranks),
            step_tokens=self._vllm_config.scheduler_config.max_num_batched_tokens,
            queue_bytes=options.queue_bytes,
            free_bytes=free,
            outside_bytes=outside,
            fingerprint=self._fingerprint,
            directory=None if directory is None else directory / f"rank-{self._rank}-of-{ranks}",
            disk_bytes=None if options.disk_bytes is None else options.disk_bytes // ranks,
            report=_report,
            report_foreign=_report_foreign,
            on_failure=_failed,
        )
        logger.info(
            "keys and values of up to %.0f MiB wait for being kept (queue_bytes); a step brings up to %.0f MiB",
            self._store.queue_bytes / 2**20,
            self._store.step_bytes / 2**20,
        )

    def get_handshake_metadata(self) -> RankPages | None:
        """As of vLLM."""
        return RankPages(self._rank, self._pages.hashes())

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """As of vLLM: loads begin, in a thread."""
        for load in self._plan().loads:
            self._pages.load(load)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: vLLM schedules a request when all of it is loaded."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing: all layers are copied behind the last one."""

    def wait_for_save(self) -> None:
        """As of vLLM: full pages are copied out."""
        for pages in self._plan().saves:
            self._pages.save(pages)

    def _plan(self) -> StepPlan:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, StepMetadata)
        return metadata.plan

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """As of vLLM: which requests have been loaded."""
        self._pages.look_around()
        if not self._plan().computes:
            # The engine asks again and again, and would keep Python from the thread that loads.
            self._pages.wait_for_load(_IDLE_WAIT_S)
        loaded = self._pages.take_loaded()
        for _, failed in loaded:
            self._failed_blocks.update(failed)
        return None, {request_id for request_id, _ in loaded} or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """As of vLLM."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def build_connector_worker_meta(self) -> RankChanges | None:
        """As of vLLM."""
        changes = self._pages.take_changes()
        return RankChanges({self._rank: changes}) if changes else None

    def shutdown(self) -> None:
        """Save what waits, and end the threads."""
        if self._store is not None:
            self._store.close()
            self._store = None

    # Scheduler -------------------------------------------------------------------------------------------------------

    def set_xfer_handshake_metadata_pp_aware(self, metadata: dict[tuple[int, int], Any]) -> None:
        """As of vLLM."""
        for one in metadata.values():
            self._scheduler.update(one.rank, Changes(come=set(one.hashes)))

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """As of vLLM."""
        found = self._scheduler.lookup(request, num_computed_tokens)
        return found, found > 0

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """As of vLLM."""
        self._scheduler.allocated(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> StepMetadata:
        """As of vLLM."""
        state = scheduler_output.kv_connector_block_state

        def block_ids_of(request_id: str) -> list[int]:
            return list(state.get_block_ids(request_id)[0])

        return StepMetadata(self._scheduler.plan_step(scheduler_output.num_scheduled_tokens, block_ids_of))

    def update_connector_output(self, connector_output: Any) -> None:
        """As of vLLM."""
        if (found := connector_output.kv_connector_worker_meta) is not None:
            for rank, changes in found.changes.items():
                self._scheduler.update(rank, changes)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """As of vLLM. All full pages have been copied out already."""
        self._scheduler.finished(request.request_id)
        return False, None

    def reset_cache(self) -> bool:
        """As of vLLM: for weights that have been changed in place."""
        self._scheduler.reset()
        return True

    # Counts ----------------------------------------------------------------------------------------------------------

    def get_kv_connector_stats(self) -> KVPackStats | None:
        """As of vLLM."""
        counts = self._scheduler.take_counts() if self.role == KVConnectorRole.SCHEDULER else self._pages.take_counts()
        return KVPackStats(data=counts) if counts else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVPackStats:
        """As of vLLM."""
        return KVPackStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any
    ) -> KVPackPromMetrics:
        """As of vLLM."""
        return KVPackPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)


def _by_numbers(name: str) -> list[tuple[int, str]]:
    """Orders names as their numbers are: layers.2 before layers.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _outside_bytes(device: torch.device, utilization: float) -> int:
    """Of a GPU's memory, what vLLM leaves to others; within its share activations have what its cache does not."""
    return int((1 - utilization) * torch.cuda.mem_get_info(device)[1])


def _block_tokens(kv_cache_config: Any) -> int:
    """Tokens of a block of vLLM's cache.

    Raises:
        InputError: a model whose keys and values are not those of plain attention in every layer.
    """
    specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
    if len(specs) != 1 or not _is_plain(specs[0]):
        shown = ", ".join(f"{type(spec).__name__}{' (not causal)' * _is_not_causal(spec)}" for spec in specs)
        raise InputError(
            "KVPackConnector keeps keys and values of full, causal attention in all layers; this model's cache has "
            f"{shown}"
        )
    return int(specs[0].block_size)


def _is_plain(spec: Any) -> bool:
    """Whether blocks have each token's own keys and values, which later tokens do not change, as long as a request is.

    Kinds of FullAttentionSpec are not: latent vectors, or blocks that vLLM gives to others meanwhile.
    """
    return type(spec) is FullAttentionSpec and spec.tokens_per_state == 1 and not _is_not_causal(spec)


def _is_not_causal(spec: Any) -> bool:
    return bool(getattr(spec, "non_causal", False))


def checked_options(vllm_config: Any) -> ConnectorOptions:
    """What vLLM's configuration says to the connector, as far as it can be checked before there is a cache.

    Raises:
        InputError: an option that is not known or cannot be used, alone or with others of vLLM's.
    """
    transfer, parallel = vllm_config.kv_transfer_config, vllm_config.parallel_config
    options = ConnectorOptions.parse(transfer.kv_connector_extra_config)
    if transfer.kv_load_failure_policy != "recompute":
        raise InputError(
            "kv_load_failure_policy='fail' would end requests whose pages are damaged or have gone; pass "
            "KVTransferConfig(kv_load_failure_policy='recompute', …), so that vLLM computes them"
        )
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        raise InputError("KVPackConnector does not work with context parallelism: ranks have other tokens, not heads")
    if vllm_config.cache_config.cache_dtype == "auto":
        options.formats(_full_format(vllm_config.model_config.dtype))
    _weights_directory(vllm_config, options)
    return options


def _full_format(dtype: torch.dtype) -> PageFormat:
    """Raises InputError: keys and values of a type that is not kept."""
    if dtype not in PAGE_FORMATS:
        raise InputError(f"keys and values are {dtype}; KVPackConnector keeps float16 and bfloat16")
    return PAGE_FORMATS[dtype]


def _weights(vllm_config: Any, options: ConnectorOptions) -> str:
    """Hex SHA-256 that tells the model's weights. Raises InputError: as :func:`_weights_directory`."""
    directory = _weights_directory(vllm_config, options)
    return text_digest(str(options.weights_id)) if directory is None else weights_digest(directory)


def _weights_directory(vllm_config: Any, options: ConnectorOptions) -> Path | None:
    """Where the model's files are; None where its weights have a name.

    Raises:
        InputError: they are in no directory here, and have no name.
    """
    if options.weights_id is not None:
        return None
    model = vllm_config.model_config
    directory = Path(model.model)
    if not directory.is_dir():
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(model.model, "config.json", revision=model.revision)
        if not isinstance(found, str):
            raise InputError(
                f"{model.model} is in no directory here, so that pages of other weights could not be told from its "
                'own; name its weights: kv_connector_extra_config={"weights_id": …}'
            )
        directory = Path(found).parent
    return directory


def _fingerprint(vllm_config: Any, weights: str, *, rank: int) -> Fingerprint:
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    return rank_fingerprint(
        model.hf_config.to_dict() | _made_of_files(vllm_config),
        weights,
        dtype=f"{model.dtype}, {vllm_config.cache_config.cache_dtype}",
        world={"tensor": parallel.tensor_parallel_size, "pipeline": parallel.pipeline_parallel_size},
        rank=rank,
    )


def _made_of_files(vllm_config: Any) -> dict[str, Any]:
    """What vLLM's options make of the model's files, and whose layers it adds to the model's."""
    model = vllm_config.model_config
    told: dict[str, Any] = {}
    if model.quantization is not None:  # as they are loaded, maybe
        told["vllm_quantization"] = str(model.quantization)
    if "longrope" in str(getattr(model.hf_text_config, "rope_parameters", None)):
        told["vllm_max_model_len"] = model.max_model_len  # decides which of two sets of frequencies turns keys
    if (load_format := vllm_config.load_config.load_format) == "dummy":
        told["vllm_load_format"] = load_format
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.uses_draft_kv_cache():
        told["vllm_draft"] = [speculative.method, speculative.draft_model_config.model]
    return told


def _report(path: Path, error: Exception) -> None:
    logger.warning("%s is damaged, and taken for a miss: %s", path, error)


def _report_foreign(files: list[tuple[Path, Exception]]) -> None:
    path, error = files[0]
    logger.warning(
        "%s: %d files of something else are left alone, as %s: %s", path.parent, len(files), path.name, error
    )


def _failed(what: str, error: Exception) -> None:
    logger.warning("keys and values could not be kept (%s): %r", what, error)
