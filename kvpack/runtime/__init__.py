"""The device side (docs/RUNTIME.md, docs/KV.md): weights loaded, decoded, multiplied and coded there; KV caches.

=============================================  ================================================================
``device.kernels``, ``device.sources``         compile and launch what lies in ``cuda/``
``device.devices``                             which device is meant, and what it gives
``device.upload``, ``device.semaphores``       file → pinned memory → device; counters of blocks that add up
``weights.load``                               ``kvpack.load``
``weights.device_blob``, ``.group_table``      a coded tensor on a device, and the index that kernels use
``weights.linear``, ``.replace``, ``.warmup``  ``kvpack.RansLinear``, ``replace_linears``, ``warmup``
``weights.ops``                                ``torch.ops.kvpack``, for CUDA and the CPU
``weights.products``, ``.launch_model``        fused products and decoding; how they are launched
``weights.launch_costs``                       what the parts of a launch cost on a device: shipped, or measured
``weights.expansion``                          products of many vectors: slabs decoded beside cuBLAS
``weights.offload``                            models larger than the device; layers side by side
``codec.encoder``                            the encoder on a GPU, the same bytes as the CPU's
``kv.page_kernels``, ``kv.page_pools``         KV pages: filled and read; where they lie
``kv.cache``, ``kv.allocator``                 a paged cache of mixed precision; which pages get how many bits
``kv.attention``, ``kv.attention_kernels``     ``kvpack.attention_with_kv_cache``; attention to pages in place
=============================================  ================================================================

May import torch and CuPy; never transformers. ``weights`` and ``kv`` do not know each other.
"""
