"""The device side (docs/RUNTIME.md): weights loaded, decoded, multiplied, streamed and coded there; KV caches.

=================================================  ==========================================================
``load``, ``upload``                               ``kvpack.load``: file → pinned memory → device
``device_blob``, ``group_table``                   a coded tensor on a device, and the index that kernels use
``linear``, ``replace``, ``warmup``                ``kvpack.RansLinear``, ``replace_linears``, ``warmup``
``ops``                                            ``torch.ops.kvpack``, for CUDA and the CPU
``weight_kernels``, ``fit``, ``expansion``         products and decoding: fused, or in slabs beside cuBLAS
``kernels``, ``sources``                           compile and launch what lies in ``cuda/``
``streaming``                                      models larger than the device; layers side by side
``page_kernels``, ``page_pools``                   KV pages: filled and read; where they lie (docs/KV.md)
``kv_cache``, ``page_allocator``                   a paged cache of mixed precision; which pages get how many bits
``attention``                                      ``kvpack.attention_with_kv_cache``
``attention_kernels``, ``tickets``                 attention to pages in place; counters of blocks that add up
``matrix_quantizer``                               whole matrices quantized, the classic way
``gpu_encoder``                                    the encoder on a GPU, the same bytes as the CPU's
``errors``                                         what can go wrong, besides a damaged file
=================================================  ==========================================================

May import torch and CuPy; never transformers.
"""
