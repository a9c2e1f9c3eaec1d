"""All that pools know, for comparing before and after what must change nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvpack.runtime.page_pools import PagePools


def dump(pools: PagePools) -> dict[str, Any]:
    return {
        "bytes": (pools.bytes_allocated, pools.bytes_in_use, pools._arena_end),
        "bases": list(pools._bases),
        "pools": {
            kind: (list(pool.free), pool.in_use, [slab.base for slab in pool.slabs])
            for kind, pool in pools._pools.items()
        },
        "pages": [(slab.owners.tolist(), slab.references.tolist()) for slab in pools._slab_at.values()],
    }
