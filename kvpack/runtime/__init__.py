"""Coded weights on a device: loading, decoding, multiplying, streaming, and coding them there (docs/RUNTIME.md).

=================================================  ==========================================================
``load``, ``upload``                               ``kvpack.load``: file → pinned memory → device
``device_blob``, ``group_table``                   a coded tensor on a device, and the index that kernels use
``linear``, ``replace``, ``warmup``                ``kvpack.RansLinear``, ``replace_linears``, ``warmup``
``ops``                                            ``torch.ops.kvpack``, for CUDA and the CPU
``weight_kernels``, ``fit``, ``expansion``         products and decoding: fused, or in slabs beside cuBLAS
``kernels``, ``sources``                           compile and launch what lies in ``cuda/``
``streaming``                                      models larger than the device; layers side by side
``gpu_encoder``                                    the encoder on a GPU, the same bytes as the CPU's
``bench_*``, ``int8_gemv_triton``                  ``kvpack bench linear``
``errors``                                         what can go wrong, besides a damaged file
=================================================  ==========================================================

May import torch and CuPy; never transformers.
"""
