"""kvpack inside vLLM: compressed models are served as they are (docs/VLLM.md).

vLLM calls :func:`register` in each of its processes, for every model, since kvpack names it as an entry point of
``vllm.general_plugins``. Nothing heavy is imported for a model that is not kvpack's.
"""

from __future__ import annotations


def register() -> None:
    """Make vLLM know ``"quant_method": "kvpack"``, and check options of kvpack's; a second call does nothing."""
    from vllm.model_executor.layers import quantization

    from kvpack.encode.model_config import METHOD

    if METHOD in quantization.QUANTIZATION_METHODS:
        return
    from kvpack.integrations.vllm.early_checks import check_early
    from kvpack.integrations.vllm.quantization import KVPackQuantization

    quantization.register_quantization_config(METHOD)(KVPackQuantization)
    check_early()
