"""kvpack: LLM weights and KV caches, entropy-coded and computed on in place.

>>> import kvpack
>>> for name in sorted(kvpack.__all__):
...     if not name.endswith("Error"):  # kvpack.errors draws their hierarchy
...         print(name)
KVCache
KVPackCache
KVPackConfig
PageFormat
QuantConfig
RansEmbedding
RansLinear
Reader
__version__
attention_with_kv_cache
compress
decompress
load
open
replace_linears
run_concurrently
stream_modules
verify
warmup

Names are loaded when first used, so that ``import kvpack`` costs nothing. After it, transformers' ``from_pretrained``
loads compressed models, whichever of the two is imported first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvpack._version import __version__
from kvpack.integrations.transformers.registration import register_when_imported

if TYPE_CHECKING:
    from kvpack.compression import compress
    from kvpack.encode.decompress import decompress
    from kvpack.encode.quant_config import QuantConfig
    from kvpack.encode.reader import Reader
    from kvpack.encode.reader import Reader as open  # noqa: N813
    from kvpack.encode.verify import verify
    from kvpack.errors import (
        AllocationError,
        BlobError,
        CacheFullError,
        CacheInputError,
        ContainerError,
        ContainerMetadataError,
        DamagedRunError,
        DeviceError,
        DirectoryIndexError,
        FileChangedError,
        FingerprintMismatchError,
        FormatError,
        GeometryError,
        HeaderCrcError,
        InputError,
        KvpackError,
        LaneError,
        LaneStateError,
        LayoutError,
        LimitError,
        MagicError,
        ModelMismatchError,
        MomentsError,
        NotAContainerError,
        NotASnapshotError,
        NotInstalledError,
        NotSupportedError,
        OtherFilesError,
        OutlierError,
        PaddingError,
        PageEntryError,
        PageError,
        PayloadCrcError,
        ReservedError,
        ScaleError,
        SnapshotError,
        SnapshotHeaderError,
        StreamingError,
        TableError,
        TensorCrcError,
        TensorTableError,
        TierMissError,
        TileBoundsError,
        TileModeError,
        TruncatedError,
        VersionError,
    )
    from kvpack.format.pages import PageFormat
    from kvpack.integrations.transformers.cache import KVPackCache
    from kvpack.integrations.transformers.config import KVPackConfig
    from kvpack.integrations.transformers_names import replace_linears
    from kvpack.runtime.kv.attention import attention_with_kv_cache
    from kvpack.runtime.kv.cache import KVCache
    from kvpack.runtime.weights.embedding import RansEmbedding
    from kvpack.runtime.weights.linear import RansLinear
    from kvpack.runtime.weights.load import load
    from kvpack.runtime.weights.offload import run_concurrently, stream_modules
    from kvpack.runtime.weights.warmup import warmup

__all__ = [
    "AllocationError",
    "BlobError",
    "CacheFullError",
    "CacheInputError",
    "ContainerError",
    "ContainerMetadataError",
    "DamagedRunError",
    "DeviceError",
    "DirectoryIndexError",
    "FileChangedError",
    "FingerprintMismatchError",
    "FormatError",
    "GeometryError",
    "HeaderCrcError",
    "InputError",
    "KVCache",
    "KVPackCache",
    "KVPackConfig",
    "KvpackError",
    "LaneError",
    "LaneStateError",
    "LayoutError",
    "LimitError",
    "MagicError",
    "ModelMismatchError",
    "MomentsError",
    "NotAContainerError",
    "NotASnapshotError",
    "NotInstalledError",
    "NotSupportedError",
    "OtherFilesError",
    "OutlierError",
    "PaddingError",
    "PageEntryError",
    "PageError",
    "PageFormat",
    "PayloadCrcError",
    "QuantConfig",
    "RansEmbedding",
    "RansLinear",
    "Reader",
    "ReservedError",
    "ScaleError",
    "SnapshotError",
    "SnapshotHeaderError",
    "StreamingError",
    "TableError",
    "TensorCrcError",
    "TensorTableError",
    "TierMissError",
    "TileBoundsError",
    "TileModeError",
    "TruncatedError",
    "VersionError",
    "__version__",
    "attention_with_kv_cache",
    "compress",
    "decompress",
    "load",
    "open",
    "replace_linears",
    "run_concurrently",
    "stream_modules",
    "verify",
    "warmup",
]

_HOMES = {
    "attention_with_kv_cache": ("kvpack.runtime.kv.attention", "attention_with_kv_cache"),
    "compress": ("kvpack.compression", "compress"),
    "decompress": ("kvpack.encode.decompress", "decompress"),
    "load": ("kvpack.runtime.weights.load", "load"),
    "open": ("kvpack.encode.reader", "Reader"),
    "KVPackCache": ("kvpack.integrations.transformers.cache", "KVPackCache"),
    "KVCache": ("kvpack.runtime.kv.cache", "KVCache"),
    "KVPackConfig": ("kvpack.integrations.transformers.config", "KVPackConfig"),
    "PageFormat": ("kvpack.format.pages", "PageFormat"),
    "QuantConfig": ("kvpack.encode.quant_config", "QuantConfig"),
    "RansEmbedding": ("kvpack.runtime.weights.embedding", "RansEmbedding"),
    "RansLinear": ("kvpack.runtime.weights.linear", "RansLinear"),
    "Reader": ("kvpack.encode.reader", "Reader"),
    "replace_linears": ("kvpack.integrations.transformers_names", "replace_linears"),
    "run_concurrently": ("kvpack.runtime.weights.offload", "run_concurrently"),
    "stream_modules": ("kvpack.runtime.weights.offload", "stream_modules"),
    "verify": ("kvpack.encode.verify", "verify"),
    "warmup": ("kvpack.runtime.weights.warmup", "warmup"),
}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'kvpack' has no attribute {name!r}")
    import importlib

    module, attribute = _HOMES.get(name, ("kvpack.errors", name))
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "cupy", "transformers"):
            raise
        extras = "'kvpack[cuda13]' (or [cuda12]), or 'kvpack[torch]' without a GPU"
        if error.name == "transformers":
            extras = "'kvpack[transformers]'"
        message = f"kvpack.{name} needs {error.name}, which is not installed: pip install {extras}"
        raise ModuleNotFoundError(message, name=error.name) from None


register_when_imported()
