"""A coded model in vLLM on a GPU beside bf16 and INT4: time to start, memory, first token, tokens a second.

    python benchmarks/vllm_gpu.py FOLDER --json benchmarks/results/DATE-vllm-gpu.json
    python benchmarks/vllm_gpu.py FOLDER --shape qwen3-30b-a3b --layers 12 --ways "bf16;fast" --sequences 1,8

The model has the shape of Llama-3.1-8B, or the one of ``--shape``, and random weights, of which speed is known but no
quality: it is made in FOLDER, and compressed there, unless both are there already. Embedding and head stay in bf16.
``int4`` are GPTQ's groups of 128, with whatever numbers, for the kernel that vLLM takes on this GPU (the row has its
name). Each way is an engine in a process of its own with nothing in vLLM's cache, with torch.compile and CUDA graphs
as vLLM has them unless it says *eager*. Of tokens a second the prompts (64 tokens each) are no part: they are those of
a longer answer less those of a shorter one. The first token is that of a prompt of 2,048 tokens; each
is the best of three.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_common import device_record, print_table, provenance, write_result
from generation_models import SHAPES

RATES_BITS = 4.25
# Name → (the model's folder, what of kvpack.compress made it, arguments of vLLM's LLM).
WAYS: dict[str, tuple[str, dict[str, Any] | None, dict[str, Any]]] = {
    "bf16": ("bf16", None, {}),
    "int4": ("int4", None, {"load_format": "dummy"}),
    "fast": ("fast", {"bits": RATES_BITS, "layout": "fast", "stack": True}, {}),
    "balanced": ("balanced", {"bits": RATES_BITS, "layout": "balanced", "stack": True}, {}),
    "bf16, eager": ("bf16", None, {"enforce_eager": True}),
    "fast, eager": ("fast", {"bits": RATES_BITS, "layout": "fast", "stack": True}, {"enforce_eager": True}),
}
SHORT, LONG, PROMPT, FIRST = 8, 136, 64, 2048
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}
INT4 = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True, "lm_head": False}


def layer_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """The matrices of one layer, by the names of checkpoints."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    wide, narrow = heads * head_dim, config.num_key_value_heads * head_dim
    shapes = {"q": (wide, hidden), "k": (narrow, hidden), "v": (narrow, hidden), "o": (hidden, wide)}
    found = {f"self_attn.{name}_proj": shape for name, shape in shapes.items()}
    experts = getattr(config, "num_experts", 0)
    inner = config.moe_intermediate_size if experts else config.intermediate_size
    if experts:
        found["mlp.gate"] = (experts, hidden)
    for prefix in [f"mlp.experts.{expert}." for expert in range(experts)] or ["mlp."]:
        found |= {f"{prefix}gate_proj": (inner, hidden), f"{prefix}up_proj": (inner, hidden)}
        found[f"{prefix}down_proj"] = (hidden, inner)
    return found


def make_plain(folder: Path, shape: str, layers: int) -> None:
    """Random weights of a model's shape; a layer is a file."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig

    kind, sizes = SHAPES[shape]
    config = AutoConfig.for_model(
        kind,
        **sizes
        | {
            "num_hidden_layers": layers,
            "max_position_embeddings": 16384,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "architectures": [ARCHITECTURES[kind]],
            "dtype": "bfloat16",
        },
    )
    folder.mkdir(parents=True)
    generator = torch.Generator("cuda").manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        values = torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)
        return (values * 0.02).cpu()

    def ones(count: int) -> torch.Tensor:
        return torch.ones(count, dtype=torch.bfloat16)

    hidden = config.hidden_size
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if kind == "qwen3_moe":
        norms |= {"self_attn.q_norm": config.head_dim, "self_attn.k_norm": config.head_dim}
    ends = {name: random(config.vocab_size, hidden) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    files = [ends | {"model.norm.weight": ones(hidden)}]
    index: dict[str, str] = {}
    for layer in range(-1, layers):
        tensors = files[0]
        if layer >= 0:
            prefix = f"model.layers.{layer}."
            tensors = {f"{prefix}{name}.weight": random(*shape) for name, shape in layer_shapes(config).items()}
            tensors |= {f"{prefix}{name}.weight": ones(count) for name, count in norms.items()}
        name = f"model-{layer + 2:05}-of-{layers + 1:05}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config.save_pretrained(folder)
    torch.cuda.empty_cache()  # the engines, in processes of their own, take what is free


def make(folder: Path, name: str, options: dict[str, Any] | None, shape: str, layers: int) -> float:
    """The model of a way, if it is not there; how many seconds compressing it took."""
    import kvpack

    plain = folder / "bf16"
    if not plain.exists():
        make_plain(plain, shape, layers)
    found = json.loads((plain / "config.json").read_text())
    kind, sizes = SHAPES[shape]
    wanted = {"model_type": kind, "hidden_size": sizes["hidden_size"], "num_hidden_layers": layers}
    if other := {key: found.get(key) for key in wanted if found.get(key) != wanted[key]}:
        raise SystemExit(f"{plain} has {other}, not {wanted}: take another folder, or its --shape and --layers")
    if (folder / name).exists():
        return 0.0
    if options is None:
        (folder / name).mkdir()
        config = json.loads((plain / "config.json").read_text())
        (folder / name / "config.json").write_text(json.dumps(config | {"quantization_config": INT4}))
        return 0.0
    begin = time.perf_counter()
    kvpack.compress(plain, folder / name, kvpack.QuantConfig(**options))
    return time.perf_counter() - begin


def run(model: str, engine: dict[str, Any], sequences: list[int]) -> dict[str, Any]:
    """One engine in this process."""
    from vllm import LLM, SamplingParams

    begin = time.perf_counter()
    usual = {"max_model_len": 4096, "skip_tokenizer_init": True, "max_num_seqs": max(sequences)}
    llm = LLM(model=model, dtype="bfloat16", enable_prefix_caching=False, **usual, **engine)
    result: dict[str, Any] = {"start_s": time.perf_counter() - begin}
    result["weights_bytes"] = llm.collective_rpc(lambda worker: int(worker.model_runner.model_memory_usage))[0]

    def seconds(count: int, prompt: int, tokens: int) -> float:
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        asked = [{"prompt_token_ids": [(5 + 7 * i + j * j) % 1000 for j in range(prompt)]} for i in range(count)]
        begin = time.perf_counter()
        llm.generate(asked, sampling, use_tqdm=False)
        return time.perf_counter() - begin

    rates = {}
    for count in sequences:
        seconds(count, PROMPT, SHORT)
        short, long = (min(seconds(count, PROMPT, tokens) for _ in range(3)) for tokens in (SHORT, LONG))
        rates[str(count)] = count * (LONG - SHORT) / (long - short)
    seconds(1, FIRST, 1)
    result["first_token_s"] = min(seconds(1, FIRST, 1) for _ in range(3))
    return result | {"tokens_a_second": rates}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--shape", choices=[name for name, (kind, _) in SHAPES.items() if kind in ARCHITECTURES], default="llama-3.1-8b"
    )
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--ways", default=";".join(WAYS), help="names, between semicolons")
    parser.add_argument("--sequences", default="1,8,32,128")
    parser.add_argument("--engine", type=json.loads, default={}, help="more arguments of vLLM's LLM, as JSON")
    parser.add_argument("--logs", type=Path, help="a folder for what the engines say")
    parser.add_argument("--json", type=Path, dest="result")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sequences = [int(one) for one in options.sequences.split(",")]
    if options.one is not None:
        name, _, engine = WAYS[options.one]
        found = run(str(options.folder / name), engine | options.engine, sequences)
        options.result.write_text(json.dumps(found))
        return
    import torch

    rows: list[dict[str, Any]] = []
    record = {"shape": options.shape, "layers": options.layers, "rates_bits": RATES_BITS, "rows": rows}
    for name in options.ways.split(";"):
        directory, settings, _ = WAYS[name]
        made = make(options.folder, directory, settings, options.shape, options.layers)
        row: dict[str, Any] = {"name": name, "compress_s": made}
        rows.append(row)
        with tempfile.TemporaryDirectory() as scratch:
            answer = Path(scratch) / "answer.json"
            command = [sys.executable, __file__, str(options.folder), "--one", name, "--json", str(answer)]
            command += ["--sequences", options.sequences, "--engine", json.dumps(options.engine)]
            environment = os.environ | {
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
                "VLLM_CACHE_ROOT": scratch,
                "TORCHINDUCTOR_CACHE_DIR": scratch,
                "TRITON_CACHE_DIR": scratch,
                "HF_HUB_OFFLINE": "1",
                "VLLM_NO_USAGE_STATS": "1",
            }
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            log = done.stdout + done.stderr
            if options.logs is not None:
                (options.logs / f"{name.replace(', ', '-')}.log").write_text(log)
            if answer.exists():
                row |= json.loads(answer.read_text())
            else:
                row["error"] = next((line for line in reversed(log.splitlines()) if "Error" in line), log[-200:])[-300:]
            kernels = re.findall(r"Using (\w+Kernel) for|Using '(\w+)' WNA16 MoE", log)
            row["kernel"] = ", ".join(dict.fromkeys(one or other for one, other in kernels)) or None
        print(row, flush=True)
        if options.result is not None:  # after each way
            packages = ("torch", "vllm", "triton", "cupy-cuda13x")
            device = {"device": device_record(torch.device("cuda"))}
            write_result(options.result, provenance({}, packages) | device | record, quiet=True)
    shown = [
        [
            row["name"],
            f"{row['start_s']:.1f}",
            f"{row['weights_bytes'] / 1e9:.2f}",
            f"{row['first_token_s'] * 1e3:.1f}",
            *(f"{rate:.0f}" for rate in row["tokens_a_second"].values()),
        ]
        for row in rows
        if "error" not in row
    ]
    headings = ["", "start, s", "weights, GB", f"first of {FIRST} tokens, ms"]
    print_table([*headings, *(f"tokens/s, {count} at once" for count in sequences)], shown)


if __name__ == "__main__":
    main()
