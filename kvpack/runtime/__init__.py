"""The device side. So far it finds the CUDA sources; their launch is not written yet.

May import torch and CuPy; never transformers.
"""
