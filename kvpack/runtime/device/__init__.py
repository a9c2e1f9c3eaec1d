"""Devices, kernel sources, compiling and launching, uploads, semaphores; what weights and KV pages both stand on."""
