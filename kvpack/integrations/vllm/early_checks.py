"""What vLLM's configuration says to kvpack, checked when that is made.

That is before a process starts or a file of weights is opened. vLLM itself asks a quantization and a connector when a
model is being loaded, in workers that others wait for.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

_CONNECTOR = "kvpack.integrations.vllm.kv_connector"


def check_config(vllm_config: Any) -> None:
    """
    Raises:
        InputError: something that kvpack does not know, or cannot do.
    """
    from kvpack.integrations.vllm.quantization import asked_weights

    asked_weights(vllm_config.additional_config)
    transfer = vllm_config.kv_transfer_config
    is_asked = transfer is not None and transfer.kv_connector_module_path == _CONNECTOR
    if is_asked and vllm_config.model_config is not None:
        from kvpack.integrations.vllm.kv_connector import checked_options

        checked_options(vllm_config)


def check_early() -> None:
    """Have each configuration checked that vLLM makes; a second call does nothing."""
    from vllm.config import VllmConfig

    usual = VllmConfig.__post_init__
    if getattr(usual, "is_kvpack", False):
        return

    @wraps(usual)
    def post_init(self: Any) -> None:
        check_config(self)
        usual(self)

    post_init.is_kvpack = True  # type: ignore[attr-defined]
    VllmConfig.__post_init__ = post_init
