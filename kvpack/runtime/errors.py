"""What can go wrong on the device side, besides a file that breaks the format (``kvpack.format.errors``).

::

    RuntimeError
    ├── DeviceError         the device that was asked for is not there, or lacks what kvpack needs
    └── StreamingError      streamed weights are used outside the time in which they are on the device
    ValueError
    └── ModelMismatchError  the tensors of a file are not those of the model
"""

from __future__ import annotations


class DeviceError(RuntimeError):
    """No such device, or no driver, no CUDA in torch, no CuPy. The message says what to install or to pass instead."""


class StreamingError(RuntimeError):
    """A streamed layer is used outside its turn or its stream, or in a way that streaming cannot serve."""


class ModelMismatchError(ValueError):
    """Names or shapes of a file's tensors are not those of the model. The model has not been changed."""
