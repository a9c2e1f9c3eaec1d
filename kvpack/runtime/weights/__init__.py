"""Coded weights on a device: products, layers, loading, replacing, offloading, encoding."""
