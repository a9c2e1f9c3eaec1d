"""All that pools know, for comparing before and after what must change nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvpack.runtime.kv.cache import KVCache
    from kvpack.runtime.kv.page_pools import PagePools


def dump(pools: PagePools) -> dict[str, Any]:
    return {
        "bytes": (pools.bytes_allocated, pools.bytes_in_use, pools._arena_end),
        "bases": list(pools._bases),
        "pools": {
            kind: (list(pool.free), pool.in_use, [slab.base for slab in pool.slabs])
            for kind, pool in pools._pools.items()
        },
        "pages": [
            (slab.layers.tolist(), slab.pages.tolist(), slab.references.tolist()) for slab in pools._slab_at.values()
        ],
    }


def cache_state(cache: KVCache) -> dict[str, Any]:
    """Everything that callers can notice of a cache, however many pages its tables have room for."""
    pages = int(-(-cache.table.lengths.max() // 64))
    assert (cache.entries[..., pages:] == -1).all()
    assert (cache.page_table[..., pages:] == -1).all()
    return {
        "entries": cache.entries[..., :pages].tolist(),
        "page_table": cache.page_table[..., :pages].tolist(),
        "lengths": (cache.table.lengths.tolist(), cache.lengths.tolist()),
        "mass": (cache.mass.nonzero().tolist(), cache.mass[cache.mass != 0].tolist(), cache.observed_steps.tolist()),
        "shares": cache.shares.tolist(),
        "used_bytes": list(cache._used_bytes),
        "errors": cache.errors.tobytes(),
        "queries": [None if one is None else (one.squares.tolist(), one.count) for one in cache._queries],
        "pools": dump(cache.pools),
        "pages": [cache.pools.blocks(entry).cpu().numpy().tobytes() for entry in cache.entries[cache.entries >= 0]],
    }
