"""Runs models in vLLM, in a process of its own: ``python engine.py REQUEST.json RESULT.json``.

A request is a list of ``{"model": directory, "prompts": [[token, …], …], "tokens": count, "engine": {…}}``; the result
has for each the greedy tokens and the log-probabilities of the whole vocabulary at each step (with ``"logprobs": 0`` of
the chosen tokens alone), how many tokens of each prompt were found in a cache, or the error.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["VLLM_NO_USAGE_STATS"] = "1"


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """What one model says."""
    import torch
    from vllm import LLM, SamplingParams

    engine = {"dtype": "float32", "enforce_eager": True, "max_model_len": 128, "skip_tokenizer_init": True}
    if torch.cuda.is_available():  # several engines in one process, and other processes beside it
        engine |= {"kv_cache_memory_bytes": 1 << 28, "gpu_memory_utilization": 0.05, "disable_custom_all_reduce": True}
    engine |= {"max_logprobs": -1, "enable_prefix_caching": False} | request.get("engine", {})
    llm = LLM(model=request["model"], **engine)
    sampling = SamplingParams(
        temperature=0,
        max_tokens=request["tokens"],
        ignore_eos=True,
        detokenize=False,
        logprobs=request.get("logprobs", -1),
    )
    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    found = llm.generate(prompts, sampling, use_tqdm=False)
    outputs = [output.outputs[0] for output in found]
    result: dict[str, Any] = {"tokens": [list(output.token_ids) for output in outputs]}
    result["cached_tokens"] = [output.num_cached_tokens for output in found]
    result["logprobs"] = [
        [[step[token].logprob for token in sorted(step)] for step in output.logprobs] for output in outputs
    ]
    if request.get("ask"):
        result["ranks"] = llm.collective_rpc(_rank_memory)
    if "kv_transfer_config" in engine:  # what waits is written
        llm.llm_engine.engine_core.shutdown()
    return result


def _rank_memory(worker: Any) -> dict[str, int]:
    """Of a rank: bytes of its coded weights, and of its parameters that are not."""
    model = worker.model_runner.model
    coded = [module for module in model.modules() if type(module).__name__ == "CodedLayer"]
    stacks = [module for module in model.modules() if type(module).__name__ == "StackedExperts"]
    blobs = {id(blob): blob for layer in coded for blob in layer.blobs()}
    blobs |= {id(blob): blob for stack in stacks for blob in stack.blobs}
    return {
        "coded_bytes": sum(blob.blob_bytes for blob in blobs.values()),
        "plain_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "layers": len(coded),
        "stacks": len(stacks),
    }


def main() -> None:
    results = []
    for request in json.loads(Path(sys.argv[1]).read_text()):
        try:
            results.append(answer(request))
        except Exception as error:
            results.append({"error": f"{type(error).__name__}: {error}"})
        Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
