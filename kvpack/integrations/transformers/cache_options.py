"""Which pages a command's cache has. Neither torch nor transformers is loaded to say that options contradict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvpack.errors import InputError

if TYPE_CHECKING:
    import torch

    from kvpack.integrations.transformers.cache import KVPackCache

CACHE_BITS = (16, 8, 4, 3, 2)


@dataclass(frozen=True)
class CacheOptions:
    """Which pages a :class:`~kvpack.KVPackCache` has.

    Attributes:
        bits: of elements in pages that leave the recent window: one of ``CACHE_BITS``.
        budget: instead of bits, the bytes of pages as a fraction of those in 16 bits.

    Raises:
        InputError: both or neither are given, or bits that no page has.
    """

    bits: int | None = None
    budget: float | None = None

    def __post_init__(self) -> None:
        if (self.bits is None) == (self.budget is None):
            raise InputError("either --kv-bits or --kv-budget is given, not both")
        if self.bits is not None and self.bits not in CACHE_BITS:
            raise InputError(f"--kv-bits is {self.bits}; there are {', '.join(map(str, CACHE_BITS))}")
        if self.budget is not None and not 0 < self.budget <= 1:
            raise InputError(f"--kv-budget is {self.budget}; it is a fraction, more than 0 and at most 1")

    def new(self, model: Any, rows: int | None = None) -> KVPackCache:
        """An empty cache for that model, with room for so many rows (None: as come first); pages of 16 bits are fp16
        where the model is in fp32.

        Raises:
            CacheInputError: pages cannot hold what the model's layers keep.
        """
        import torch

        return self._of(model.config, torch.float16 if model.dtype == torch.float32 else None, rows)

    def check(self, config: Any) -> None:
        """Whether there can be such a cache for models of a configuration, before one is loaded.

        Raises:
            CacheInputError: a budget that no pages meet; layers that pages cannot hold.
        """
        self._of(config, None, None)

    def _of(self, config: Any, dtype: torch.dtype | None, rows: int | None) -> KVPackCache:
        from kvpack.integrations.transformers.cache import KVPackCache

        formats = None if self.bits in (None, 16) else f"INT{self.bits}"
        return KVPackCache(config, formats=formats, budget=self.budget, dtype=dtype, max_sequences=rows)
