"""KV pages on a device: pools, page kernels, allocation of bits, the cache, attention."""
