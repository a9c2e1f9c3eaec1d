"""Blobs on a device: the GPU encoder and decoder of coded elements, whatever they stand for."""
