"""What the bytes of a kvpack file mean: constants, blobs, the container, and the errors of bad ones.

Imports NumPy only. The authority is docs/FORMAT.md.
"""
