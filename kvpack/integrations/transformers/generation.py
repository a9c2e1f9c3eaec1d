"""The short form of a cache in ``generate``: ``cache_implementation="kvpack-int4"``.

transformers knows a closed list of such names and makes the caches itself, so both are extended: the list that a
``GenerationConfig`` is checked against, and the method of models that makes the cache.
"""

from __future__ import annotations

import functools
import inspect
import sys
from typing import TYPE_CHECKING, Any

from transformers.cache_utils import Cache

from kvpack.errors import CacheInputError
from kvpack.format.pages import PageFormat

if TYPE_CHECKING:
    from kvpack.integrations.transformers.cache import KVPackCache

# Options of KVPackCache beside those of `cache_config`.
_NAMED: dict[str, dict[str, Any]] = {
    "kvpack": {},
    **{f"kvpack-{known.name.lower()}": {"formats": known.name} for known in PageFormat if known.is_quantized},
}


def register() -> None:
    """Have ``generate`` know ``cache_implementation="kvpack"``, "kvpack-int8", … "kvpack-int2"."""
    from transformers.generation import configuration_utils
    from transformers.generation.utils import GenerationMixin

    known = configuration_utils.ALL_CACHE_IMPLEMENTATIONS
    if "kvpack" in known:
        return
    configuration_utils.ALL_CACHE_IMPLEMENTATIONS = (*known, *_NAMED)  # type: ignore[assignment]
    prepare = GenerationMixin._prepare_cache_for_generation

    @functools.wraps(prepare)
    def with_kvpack(model: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        options = _NAMED.get(generation_config.cache_implementation)
        given = [value for value in model_kwargs.values() if isinstance(value, Cache)]
        if generation_config.use_cache is False and any(map(_is_kvpack, given)):
            raise CacheInputError(
                "a KVPackCache is given, and use_cache is False: the whole text would be appended at each step. Give "
                "use_cache=True"
            )
        if options is None or given or generation_config.use_cache is False:
            return prepare(model, generation_config, model_kwargs, *args, **kwargs)
        cache = _made(model.config, options | (generation_config.cache_config or {}))
        # By what name a model takes its cache differs between versions: it is where the default cache goes.
        name, generation_config.cache_implementation = generation_config.cache_implementation, None
        try:
            result = prepare(model, generation_config, model_kwargs, *args, **kwargs)
        finally:
            generation_config.cache_implementation = name
        for argument, value in model_kwargs.items():
            if isinstance(value, Cache):
                model_kwargs[argument] = cache
        return result

    GenerationMixin._prepare_cache_for_generation = with_kvpack  # type: ignore[method-assign, assignment]


def _is_kvpack(cache: Cache) -> bool:
    """Without importing the cache, of which there is none before."""
    module = sys.modules.get("kvpack.integrations.transformers.cache")
    return module is not None and isinstance(cache, module.KVPackCache)


def _made(config: Any, options: dict[str, Any]) -> KVPackCache:
    from kvpack.integrations.transformers.cache import KVPackCache

    known = inspect.signature(KVPackCache).parameters.keys() - {"config"}
    if others := sorted(options.keys() - known):
        raise CacheInputError(f"cache_config has {', '.join(others)}; there are {', '.join(sorted(known))}")
    return KVPackCache(config, **options)
