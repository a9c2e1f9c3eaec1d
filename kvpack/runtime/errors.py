"""What can go wrong on the device side, besides a file that breaks the format (``kvpack.format.errors``).

::

    RuntimeError
    ├── DeviceError         the device that was asked for is not there, or lacks what kvpack needs
    ├── StreamingError      streamed weights are used outside the time in which they are on the device
    └── CacheFullError      a KV cache would exceed its bytes, tokens or sequences
    ValueError
    ├── ModelMismatchError  the tensors of a file are not those of the model
    ├── AllocationError     widths of pages cannot be chosen from what was given
    ├── PageEntryError      an entry is none of a page that is in use
    └── CacheInputError     tensors, layers or sequences do not fit a KV cache
"""

from __future__ import annotations


class DeviceError(RuntimeError):
    """No such device, or no driver, no CUDA in torch, no CuPy. The message says what to install or to pass instead."""


class StreamingError(RuntimeError):
    """A streamed layer is used outside its turn or its stream, or in a way that streaming cannot serve."""


class ModelMismatchError(ValueError):
    """Names or shapes of a file's tensors are not those of the model. The model has not been changed."""


class CacheFullError(RuntimeError):
    """A KV cache would exceed its limit of bytes, tokens or sequences. The cache has not been changed."""


class AllocationError(ValueError):
    """Columns of pages, a ladder of widths or a policy contradict each other. Nothing has been changed."""


class PageEntryError(ValueError):
    """An entry is not of a page that these pools have given out and that is still in use. Nothing has been changed."""


class CacheInputError(ValueError):
    """Tensors, layers or sequences do not fit the KV cache they were given to. The cache has not been changed."""
