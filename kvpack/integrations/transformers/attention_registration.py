"""Makes transformers know "kvpack" as an attention and a mask function, without loading them.

Whoever imports transformers with kvpack beside it runs this, for whatever model: what the functions need (torch's
operators, numba) is imported when they are first called.
"""

from __future__ import annotations

import warnings
from typing import Any

ATTENTION_NAME = "kvpack"


def attention_for_kvpack(*args: Any, **kwargs: Any) -> Any:
    """:func:`kvpack.integrations.transformers.attention.attention_for_kvpack`."""
    from kvpack.integrations.transformers import attention

    return attention.attention_for_kvpack(*args, **kwargs)


def mask_for_kvpack(*args: Any, **kwargs: Any) -> Any:
    """:func:`kvpack.integrations.transformers.attention.mask_for_kvpack`."""
    from kvpack.integrations.transformers import attention

    return attention.mask_for_kvpack(*args, **kwargs)


def register() -> None:
    """The two functions above are "kvpack" to transformers, for good.

    Scripts that were written for earlier versions register functions of their own by this name, which know nothing of
    masks, windows and soft caps.
    """
    # Both are loaded when this is called.
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    own = ((AttentionInterface, attention_for_kvpack), (AttentionMaskInterface, mask_for_kvpack))
    for interface, function in own:
        known = interface._global_mapping
        if isinstance(known, _Registered):
            continue
        if ATTENTION_NAME in known:
            _warn_of(known[ATTENTION_NAME])
        interface._global_mapping = _Registered({**known, ATTENTION_NAME: function})


def _warn_of(function: Any) -> None:
    warnings.warn(
        f"{ATTENTION_NAME!r} is kvpack's own attention in transformers, with masks, windows and soft caps: "
        f"{getattr(function, '__qualname__', function)} is not registered. Choose another name for it",
        stacklevel=4,
    )


class _Registered(dict[str, Any]):
    """A mapping in which one name stays what it is."""

    def __setitem__(self, name: str, function: Any) -> None:
        if name == ATTENTION_NAME and function is not self[name]:
            _warn_of(function)
        else:
            super().__setitem__(name, function)

    def update(self, *args: Any, **kwargs: Any) -> None:
        for name, function in dict(*args, **kwargs).items():
            self[name] = function
