"""kvpack inside vLLM (docs/VLLM.md)."""
